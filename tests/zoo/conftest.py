"""Tests beside other libraries: make test-zoo installs them and runs these."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("timm") else ["test_*.py"]

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"
HEAD = """
| from | network | KNConvs | kept convolutions | KernelNorms | unconverted |
|---|---|---:|---:|---:|---|
"""
ROWS: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the rows of the table of converted networks, also those of other processes."""
    for name, row in report.user_properties:
        if name == "row" and report.when == "call":
            ROWS[report.nodeid] = row


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Write the table, if this process collected all of it."""
    yield
    if session.testsfailed or hasattr(session.config, "workerinput") or len(ROWS) < 100:
        return
    start, end = "<!-- table -->\n", "<!-- end of table -->\n"
    before, rest = PAGE.read_text().split(start)
    rows = "\n".join(sorted(ROWS.values(), key=str.casefold))
    PAGE.write_text(f"{before}{start}{HEAD}{rows}\n\n{end}{rest.split(end)[1]}")
