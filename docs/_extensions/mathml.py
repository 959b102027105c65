"""Renders formulas as MathML, which browsers show without scripts and without a network."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator


def to_mathml(latex: str, display: str) -> str:
    """Converts a formula; floors and ceilings become fences, not names."""
    mathml = convert(latex, display=display)
    for fences, form in (("8A", "prefix"), ("9B", "postfix")):
        operator = rf'<mo stretchy="false" form="{form}">\1</mo>'
        mathml = re.sub(rf"<m[io]>(&#x0230[{fences}];)</m[io]>", operator, mathml)
    return mathml


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a sentence."""
    self.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    number = f" ({get_node_equation_number(self, node)})" if node["number"] else ""
    self.body.append(f'<div class="math">{to_mathml(node.astext(), "block")}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
