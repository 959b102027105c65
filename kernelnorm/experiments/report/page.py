"""The report as one HTML page and as Markdown, chapter by chapter."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from kernelnorm.experiments.config import AGC, RunConfig
from kernelnorm.experiments.paper import paper
from kernelnorm.experiments.private_options import Privacy, rounded_up
from kernelnorm.experiments.recipes import NAMED_DATASETS
from kernelnorm.experiments.report.blocks import Entry, Picture, Table
from kernelnorm.experiments.report.collect import Collection
from kernelnorm.experiments.report.figures import section_pictures
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.report.tables import section_tables, unreadable_table

__all__ = ["Chapter", "make_chapters", "to_html", "to_markdown"]

# The order of tables and figures in a chapter.
_ORDER = (
    "accuracy",
    "figure-3",
    "leaderboard",
    "comparison",
    "figure-4",
    "time",
    "lr",
    "learning-rates",
    "rates",
    "figure-5",
    "ablations",
    "variants",
    "incomplete",
    "missing",
)


@dataclass(frozen=True)
class Chapter:
    """A section of the page.

    Args:
        title: its heading.
        slug: the chapter's name in file names and links.
        warning: the text of a warning below the heading, or an empty string.
        facts: what was run, and where.
        blocks: tables and pictures by name, in order.
    """

    title: str
    slug: str
    warning: str
    facts: list[str]
    blocks: dict[str, Table | Picture]


def make_chapters(collection: Collection, sections: Sequence[Section]) -> list[Chapter]:
    """Return a chapter for each section, and one for the folders that are left out, if any."""
    chapters: list[Chapter] = []
    slugs = Counter[str]()
    for section in sections:
        case = section.config.case
        slug = re.sub(r"[^\w.-]", "_", case, flags=re.ASCII)
        slugs[slug] += 1
        private = section.config.private
        title = case if private is None else f"{case}, epsilon {private.epsilon:g}"
        if slugs[slug] > 1:
            title, slug = f"{title} ({slugs[slug]})", f"{slug}-{slugs[slug]}"
        found: dict[str, Table | Picture] = {**section_tables(section), **section_pictures(section)}
        blocks = {name: found[name] for name in _ORDER if name in found}
        chapters.append(Chapter(title, slug, _warning(section), _facts(section), blocks))
    if collection.unreadable:
        table = unreadable_table(collection.unreadable)
        chapters.append(Chapter("Not counted", "not-counted", "", [], {"unreadable": table}))
    return chapters


def to_html(title: str, chapters: Sequence[Chapter]) -> str:
    """Return the HTML page, which contains its pictures, style and script."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, chapters=chapters)


def to_markdown(title: str, chapters: Sequence[Chapter]) -> str:
    """Return the report in Markdown; it shows the files ``{slug}-{name}.png`` of its folder."""
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
                lines += [*_table_lines(block), ""]
            lines += [_escape(block.note), ""]
    return "\n".join(lines)


def _table_lines(table: Table) -> list[str]:
    columns = zip(*table.rows, strict=True)
    numeric = [any(entry.number is not None for entry in column) for column in columns]
    rows = [
        table.head,
        ["---:" if right else "---" for right in numeric],
        *([_entry_text(entry) for entry in row] for row in table.rows),
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _entry_text(entry: Entry) -> str:
    note = f"<br>{_escape(entry.note)}" if entry.note else ""
    return f"{_escape(entry.text)}{note}"


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    for special in "\\`*_[]|":
        text = text.replace(special, f"\\{special}")
    return html.escape(" ".join(text.split()), quote=False)


def _warning(section: Section) -> str:
    if not section.deviations:
        return ""
    return (
        f"Not trained as for the paper's tables: {', '.join(section.deviations)}. The paper's "
        "values beside ours are those of its full training: the differences to them do not test "
        "the paper."
    )


def _unlike_the_paper(config: RunConfig) -> str:
    """Return the training options that the paper does not use, as text."""
    return "".join(
        [
            ", AdamW" * (config.optimizer == "adamw"),
            ", cosine schedule" * (config.schedule == "cosine"),
            f", {config.warmup_epochs:g} epochs of warm-up" * (config.warmup_epochs > 0),
            "" if config.agc in (None, AGC) else f", adaptive gradient clipping at {config.agc:g}",
            f", from the weights {config.init_from}" * bool(config.init_from),
        ]
    )


def _privacy(section: Section, private: Privacy) -> str:
    ends = [record.history[-1] for record in section.records if record.history]
    spent = [metrics["epsilon"] for metrics in ends if "epsilon" in metrics]
    most = f"; spent: epsilon {rounded_up(max(spent))}" if spent else ""
    return f"Differentially private: {private}{most}. The search for options is not counted."


def _data(section: Section) -> str:
    """Return the data set's name, or a folder with the fingerprints of its images."""
    dataset = section.config.dataset
    prints = next((record.fingerprints for record in section.records if record.fingerprints), ())
    shown = prints and dataset not in NAMED_DATASETS
    return f"{dataset} (fingerprints {', '.join(prints)})" if shown else dataset


def _facts(section: Section) -> list[str]:
    config = section.config
    counts = [f"{number} {state}" for state, number in section.counts.items() if number]
    missing = len(section.missing)
    if missing:
        counts.append(f"{missing} missing")
    runs = f"Runs: {', '.join(counts)}."
    size = f", {config.image_size} pixels" if config.image_size else ""
    subset = f", {config.subset:,} images" if config.subset else ""
    options = {name: value for name, value in config.model_options.items() if name != "rules"}
    with_options = "".join(f", {name} {value}" for name, value in options.items())
    facts = [
        f"Data {_data(section)}{size}{subset}; network {config.model}{with_options}; at most "
        f"{config.epochs} epochs{_unlike_the_paper(config)}; {config.precision}.",
        *([] if config.private is None else [_privacy(section, config.private)]),
        runs,
        *(f"{number} of them with {where}." for where, number in section.environments.items()),
    ]
    if config.case not in paper():
        facts.append("Not one of the paper's case studies: there are no values to compare with.")
    return facts
