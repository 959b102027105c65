"""The commands of the documents that need no download run, one after the other, on few images."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from kernelnorm.cli import main
from tests.test_docs import LINES

LATER = re.compile(
    r"weights\.pt|dropout|cifar|imagen|imagewoof|bench|torchrun|sweep\.yaml|RUN|NORM"
)
"""Commands that need data sets, a cluster or minutes."""

COMMANDS = [
    (document, shlex.split(line, comments=True)[1:])
    for document, line in LINES
    if not LATER.search(line.split("#")[0])
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Opacus, about its generator of random numbers
@pytest.mark.parametrize("document", sorted({document for document, _ in COMMANDS}), ids=str)
def test_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, classes in (("photos", ("cat", "dog")), ("more-photos", ("emu", "fox", "gnu"))):
        for i in range(100):
            file = tmp_path / folder / classes[i % len(classes)] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * (i % 2), i % 3, i % 5)).save(file)
    for _, (command, *arguments) in (entry for entry in COMMANDS if entry[0] == document):
        if command in ("train", "compare", "sweep"):
            few = {"--subset": "60", "--epochs": "2"}
            arguments += [x for pair in few.items() if pair[0] not in arguments for x in pair]
        if "--private" in arguments:
            pytest.importorskip("opacus")
            arguments[arguments.index("--batch-size") + 1] = "20"
        main([command, *arguments])
