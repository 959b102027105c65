"""Every command on the page about the app exists, with its options."""

from __future__ import annotations

import re
import shlex

import run as launcher
import study
from conftest import ROOT
from kernelnorm_federated.settings import Settings

PAGE = (ROOT / "docs" / "federated.md").read_text()
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]


def test_the_commands_are_known() -> None:
    """Those of Flower's processes are run by test_federated_flower.py."""
    launched = ("flwr", "flower-superlink", "flower-supernode", "openssl", ".")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in LINES:
        command, *arguments = [word for word in words if not word.startswith("FLWR_")]
        if command == "export":
            assert not arguments  # the variables of Flower
        elif command == "make":
            assert arguments[0] in targets
        elif command == "python":
            assert (ROOT / arguments[0]).is_file()
            if arguments[0].endswith("study.py"):
                study.make_parser().parse_args(arguments[1:])
        else:
            assert command in launched


def test_the_run_configurations_are_accepted() -> None:
    configured = [words for words in LINES if "--run-config" in words]
    assert configured
    for words in configured:
        launcher.check(words)


def test_every_key_of_the_run_configuration_is_explained() -> None:
    for name in Settings.__dataclass_fields__:
        assert f"`{name.replace('_', '-')}`" in PAGE, name
