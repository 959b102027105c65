"""Every command that the documents name exists, with its options."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from kernelnorm.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINES = [
    (document, line)
    for document in DOCUMENTS
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if re.search(r"\bkernelnorm [a-z]", line.split("#")[0])
]


@pytest.mark.parametrize(("document", "line"), LINES, ids=lambda value: getattr(value, "name", ""))
def test_commands_exist(
    document: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL):
        (tmp_path / "sweep.yaml").write_text(block)
    line = line[line.index("kernelnorm ") :].replace(" NORM ", " kernel ")
    _, command, *arguments = shlex.split(line, comments=True)
    COMMANDS[command].file.make_parser().parse_args(arguments)


def test_every_command_is_named() -> None:
    named = {line.split("kernelnorm ")[1].split()[0] for _, line in LINES}
    assert named == {*COMMANDS}
