"""Files that other services read: the citation, workflows and forms of issues: make docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kernelnorm

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
FILES = {
    ROOT / "CITATION.cff": "citation-file-format",
    GITHUB / "ISSUE_TEMPLATE" / "config.yml": "github-issue-config",
    GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml": "github-issue-forms",
    GITHUB / "ISSUE_TEMPLATE" / "feature_request.yml": "github-issue-forms",
    GITHUB / "workflows" / "tests.yml": "github-workflows",
    GITHUB / "workflows" / "wheels.yml": "github-workflows",
}
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_has_its_schema(file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--default-filetype", "yaml"]
    command += ["--builtin-schema", f"vendor.{FILES[file]}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_left_out() -> None:
    assert {*GITHUB.rglob("*.yml")} - {GITHUB / "zizmor.yml"} <= {*FILES}


def test_workflows_pass_the_linter() -> None:
    command = [str(Path(sys.executable).parent / "zizmor"), "--offline", "--quiet", str(GITHUB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_citation_names_the_paper_of_the_readme() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert paper["url"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_the_changelog_has_the_version() -> None:
    """The section on top is of the version in development, or of the release."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    section = changelog.split("\n## ")[1]
    release, _, development = kernelnorm.__version__.partition(".dev")
    assert section.startswith("Unreleased" if development else release)
    assert release in section


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(notebook: Path) -> None:
    """The site has the outputs: they are computed when it is built."""
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs"), cell["source"]
        assert cell.get("execution_count") is None
