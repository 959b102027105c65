"""Configuration of the documentation site, which ``make docs`` builds with Sphinx."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import kernelnorm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "kernelnorm"
author = "the kernelnorm contributors"
copyright = author
version = release = kernelnorm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_external_toc",  # so that the pages have no directives, which GitHub would show as text
    "myst_nb",
    "mathml",
]
external_toc_path = "_toc.yml"
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore_regex = [
    ("py:.*", r"(PIL|argparse|collections|nn|numpy|opacus|pathlib|torch|typing)\b.*"),
    # types in signatures that have no page: return types of constructors, records of runs
    ("py:exc", "DataError|RunError"),
    ("py:class", r"kernelnorm\.(conversion\.Network|(experiments|models|norms)\..*)"),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "furo"
pygments_dark_style = "monokai"  # the theme's own underlines modules like links
html_title = f"kernelnorm {release}"
html_math_renderer = "mathml"
html_static_path = ["_static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def link_to_torch(
    app: Sphinx, env: object, node: nodes.Element, text: nodes.TextElement
) -> nodes.reference | None:
    """Links layers and functions of PyTorch, whose inventory would have to be downloaded."""
    target = node.get("reftarget", "")
    parts = target.removeprefix("torch.nn.functional.").removeprefix("torch.nn.")
    if node.get("reftype") not in ("class", "func") or parts == target or "." in parts:
        return None
    address = f"https://docs.pytorch.org/docs/stable/generated/{target}.html"
    return nodes.reference("", "", text, refuri=address, internal=False)


def setup(app: Sphinx) -> None:
    """Registers the links."""
    app.connect("missing-reference", link_to_torch)
