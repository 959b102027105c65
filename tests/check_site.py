"""The built documentation works without a network, on wide and narrow screens: make docs."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "docs"
PAGES = sorted(
    page for page in SITE.rglob("*.html") if not {"_static", "_downloads"} & {*page.parts}
)
CHROMIUM = shutil.which("chromium")
SCHEMES = {"dark": 0, "light": 1}

# Opens each page in a frame, and writes what it sees into this one.
LOOK = """
<!doctype html>
<iframe style="width: %(width)dpx; height: 900px; border: 0"></iframe>
<pre id="seen"></pre>
<script>
const frame = document.querySelector("iframe");
const seen = {};
const look = async page => {
  await new Promise(loaded => { frame.onload = loaded; frame.src = page; });
  const inside = frame.contentDocument, root = inside.documentElement;
  const colours = getComputedStyle(inside.body);
  seen[page] = {
    overflow: root.scrollWidth - root.clientWidth,
    background: colours.backgroundColor,
    colour: colours.color,
    broken: [...inside.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    formulas: [...inside.querySelectorAll("math")].map(m => m.getBoundingClientRect().height),
  };
};
(async () => {
  for (const page of %(pages)s) await look(page);
  document.getElementById("seen").textContent = JSON.stringify(seen);
})();
</script>
"""


class Links(HTMLParser):
    """Collects the identifiers of a page, its links, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and {"stylesheet", "icon"} & {*values.get("rel", "").split()}:
            self.loads.append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Links]:
    assert len(PAGES) > 30
    return {page.resolve(): Links(page) for page in PAGES}


def test_links_lead_to_pages_and_headings(pages: dict[Path, Links]) -> None:
    for page, content in pages.items():
        for link in content.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", (page, link)
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), (page, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {""}, (page, link)


def test_everything_is_loaded_from_the_site(pages: dict[Path, Links]) -> None:
    for page, content in pages.items():
        for source in content.loads:
            parts = urlsplit(source)
            assert parts.scheme in ("", "data"), (page, source)
            assert parts.scheme or (page.parent / unquote(parts.path)).is_file(), (page, source)
    for sheet in SITE.rglob("*.css"):
        for source in re.findall(r"url\(['\"]?([^)'\"]+)", sheet.read_text()):
            assert source.startswith(("data:", "#")) or (sheet.parent / source).is_file(), source


def test_formulas_are_mathml(pages: dict[Path, Links]) -> None:
    text = (SITE / "api" / "layers.html").read_text()
    assert text.count("<math ") > 20
    assert not [
        page
        for page in pages
        if r"\frac" in re.sub("<pre>.*?</pre>", "", page.read_text(), flags=re.S)
    ]


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [400, 1300])
def test_pages_in_a_browser(width: int, scheme: str, tmp_path: Path) -> None:
    """No page scrolls sideways, pictures and formulas show, text differs from its ground."""
    page = tmp_path / "look.html"
    page.write_text(LOOK % {"width": width, "pages": json.dumps([p.as_uri() for p in PAGES])})
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=600000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    assert len(seen) == len(PAGES)
    for name, page_seen in seen.items():
        assert page_seen["overflow"] == 0, name
        assert page_seen["broken"] == [], name
        assert all(page_seen["formulas"]), name
        ground, text = brightness(page_seen["background"]), brightness(page_seen["colour"])
        assert (ground > 0.9) == (scheme == "light"), name
        assert abs(ground - text) > 0.5, name
