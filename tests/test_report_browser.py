"""The page works in a real browser, without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kernelnorm.experiments.report import report
from tests.run_folders import write_result, write_run

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]

# Looks at the page and writes what it sees into it.
LOOK = """
<pre id="seen"></pre>
<script>
addEventListener("load", () => {
  const tables = [...document.querySelectorAll("table")];
  const accuracy = tables[0];
  const column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].firstChild.data);
  const click = i => {
    const heading = accuracy.tHead.rows[0].cells[i];
    heading.querySelector("button").focus();
    document.activeElement.click();
    const sorts = [...accuracy.tHead.rows[0].cells].map(cell => cell.ariaSort);
    return [column(accuracy, 0), sorts];
  };
  document.getElementById("seen").textContent = JSON.stringify({
    widths: [...document.images].map(image => image.naturalWidth),
    alts: [...document.images].map(image => image.alt),
    resources: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
    headings: document.querySelectorAll("th").length,
    buttons: document.querySelectorAll("th > button").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    before: column(accuracy, 0),
    clicks: [click(2), click(2), click(0), click(1)],
  });
});
</script>
"""


def see(page: Path, width: int = 1200) -> dict[str, Any]:
    """Open a copy of the page that looks at itself, and return what it has seen."""
    copy = page.with_name("looked-at.html")
    copy.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr
    assert seen[1], "the page's script did not come to its end"
    return dict(json.loads(html.unescape(seen[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    accuracies = {"batch": {2: 70.0, 32: 90.0, 256: 80.0}, "kernel": {2: 91.0, 32: 85.0}}
    for norm, by_batch_size in accuracies.items():
        for batch_size, accuracy in by_batch_size.items():
            write_result(root, accuracy, norm=norm, batch_size=batch_size)
    message = "</td><img src=x alt=broken><script>document.body.textContent = ''</script>"
    write_run(root, [], norm="kernel", batch_size=256, failure=("failed", message))
    return report(root)


@pytest.fixture(scope="module")
def seen(page: Path) -> dict[str, Any]:
    return see(page)


def test_all_figures_are_there(seen: dict[str, Any]) -> None:
    assert len(seen["widths"]) == 2
    assert min(seen["widths"]) > 700
    assert all(seen["alts"])


def test_nothing_is_loaded(seen: dict[str, Any]) -> None:
    assert set(seen["resources"]) <= {"data:"}


def test_a_click_on_a_heading_sorts_its_table(seen: dict[str, Any]) -> None:
    assert seen["before"] == ["2", "32", "256"]
    kernel, kernel_down, batch_size, batch = seen["clicks"]
    # Batch size 256 failed with KernelNorm: it has no number, and stays behind the others.
    assert kernel == [["32", "2", "256"], [None, None, "ascending"]]
    assert kernel_down == [["2", "32", "256"], [None, None, "descending"]]
    assert batch_size == [["2", "32", "256"], ["ascending", None, None]]
    assert batch == [["2", "256", "32"], [None, "ascending", None]]


def test_every_heading_can_be_reached_by_keyboard(seen: dict[str, Any]) -> None:
    assert seen["headings"] == seen["buttons"] > 10


def test_a_narrow_page_does_not_scroll_sideways(page: Path) -> None:
    assert see(page, width=500)["overflow"] == 0
