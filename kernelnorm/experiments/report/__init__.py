"""From run folders alone: the paper's tables and figures as one page, as Markdown and as numbers.

``report.json`` has all numbers that the page shows; accuracies are in percent:

``kernelnorm``
    the version that wrote it.
``sections``
    one for each case, or for each way in which a case was trained:

    ``case``, ``setting``, ``deviations``, ``environments``, ``counts``
        what was run, what of it differs from the paper's training, where, how many runs.
    ``cells``
        one for each normalisation and batch size, see :class:`.cells.Cell`, with the values of
        ``paper``, and ``absence``: why there is no accuracy.
    ``leaderboard``
        one for each normalisation and batch size with runs, see :class:`.leaderboard.Standing`.
    ``comparisons``, ``variants``
        see :class:`.sections.Comparison` and :class:`.cells.Variant`.
    ``runs``
        every run, with its metrics epoch by epoch.
``unreadable``
    folders that do not count, and why.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import kernelnorm
from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.report.blocks import Picture
from kernelnorm.experiments.report.collect import collect
from kernelnorm.experiments.report.page import make_chapters, to_html, to_markdown
from kernelnorm.experiments.report.sections import make_sections

__all__ = ["report"]


def report(root: Path, out: Path | None = None) -> Path:
    """Write ``report.html``, ``report.md``, the figures and ``report.json``; nothing is trained.

    Args:
        root: every run folder below it is read.
        out: where to write; without it ``report`` in ``root``.

    Returns:
        The page's path. It needs no other file.

    Raises:
        RunError: there are no runs, or a file cannot be written.
    """
    out = out or root / "report"
    collection = collect(root, out)
    sections = make_sections(collection.records)
    chapters = make_chapters(collection, sections)
    title = "Kernel normalized convolutional networks: results"
    numbers = {
        "kernelnorm": kernelnorm.__version__,
        "sections": [section.as_dict() for section in sections],
        "unreadable": [asdict(item) for item in collection.unreadable],
    }
    for chapter in chapters:
        for name, block in chapter.blocks.items():
            if isinstance(block, Picture):
                write_atomically(out / f"{chapter.slug}-{name}.png", block.png)
    write_atomically(out / "report.json", f"{json.dumps(numbers)}\n".encode())
    write_atomically(out / "report.md", to_markdown(title, chapters).encode())
    page = out / "report.html"
    write_atomically(page, to_html(title, chapters).encode())
    return page
