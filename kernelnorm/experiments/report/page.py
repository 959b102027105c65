"""The report as one HTML page, which loads nothing."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from kernelnorm.experiments.report.content import Chapter

__all__ = ["to_html"]


def to_html(title: str, chapters: Sequence[Chapter]) -> str:
    """Return the page; its pictures, style and script are in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, chapters=chapters)
