"""The report as Markdown, for reading where the code lies."""

from __future__ import annotations

import html
from collections.abc import Sequence

from kernelnorm.experiments.report.content import Chapter
from kernelnorm.experiments.report.entries import Entry, Table
from kernelnorm.experiments.report.plotting import Picture

__all__ = ["to_markdown"]


def to_markdown(title: str, chapters: Sequence[Chapter]) -> str:
    """Return the report; its pictures lie beside it, named after chapter and picture."""
    lines = [f"# {_escape(title)}", ""]
    for chapter in chapters:
        lines += [f"## {_escape(chapter.title)}", ""]
        if chapter.warning:
            lines += [f"> **{_escape(chapter.warning)}**", ""]
        lines += [*(f"- {_escape(fact)}" for fact in chapter.facts), ""]
        for name, block in chapter.blocks.items():
            lines += [f"### {_escape(block.title)}", ""]
            if isinstance(block, Picture):
                lines += [f"![{_escape(block.alt)}]({chapter.slug}-{name}.png)", ""]
            else:
                lines += [*_table(block), ""]
            lines += [_escape(block.note), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    columns = zip(*table.rows, strict=True)
    numeric = [any(entry.number is not None for entry in column) for column in columns]
    rows = [
        table.head,
        ["---:" if right else "---" for right in numeric],
        *([_entry(entry) for entry in row] for row in table.rows),
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _entry(entry: Entry) -> str:
    note = f"<br>{_escape(entry.note)}" if entry.note else ""
    return f"{_escape(entry.text)}{note}"


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    for special in "\\`*_[]|":
        text = text.replace(special, f"\\{special}")
    return html.escape(" ".join(text.split()), quote=False)
