"""Makes the paper's tables and figures from run folders: as HTML, as Markdown and as JSON.

``report.json`` has all numbers that the page shows; accuracies are in percent:

``kernelnorm``
    the version that wrote the file.
``sections``
    a list with an object for each section; the runs of a section differ only in normalisation,
    batch size, learning rate, seed and rules:

    ``case``, ``setting``, ``deviations``, ``environments``, ``counts``
        the case; the options that all runs share; how they differ from the paper's; the number of
        runs by environment (versions and device); the number of runs by state.
    ``cells``
        one for each normalisation and batch size, see :class:`.cells.Cell`. In addition ``paper``
        has the paper's values, and ``absence`` says why there is no accuracy.
    ``leaderboard``
        one for each normalisation and batch size with runs, see :class:`.leaderboard.Standing`.
    ``comparisons``, ``variants``
        see :class:`.sections.Comparison` and :class:`.cells.Variant`.
    ``runs``
        every run, with its metrics epoch by epoch.
``unreadable``
    folders that the report leaves out, each with the reason.
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
        out: the folder to write to (default: ``report`` in ``root``).

    Returns:
        The path of ``report.html``, which contains its figures.

    Raises:
        RunError: ``root`` is not a folder or has no runs, two runs differ in nothing that the
            tables compare, or a file cannot be written.
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
