"""The script that completes the command line in a shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernelnorm.cli import COMMANDS, main, names


def test_without_shtab_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.cli.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as error:
        main(["--print-completion", "bash"])
    assert error.value.code == "kernelnorm: --print-completion needs: pip install shtab"


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    if sys.platform == "win32" or shutil.which("bash") is None:
        pytest.skip("needs bash")
    main(["--print-completion", "bash"])
    file = tmp_path / "completion"
    file.write_text(capsys.readouterr().out)
    return file


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    code = (
        f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        "_shtab_kernelnorm; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_commands_options_and_names_are_completed(script: Path) -> None:
    assert completed(script, "kernelnorm", "''") >= {*COMMANDS}
    assert completed(script, "kernelnorm", "train", "--prec") == {"--precision"}
    assert completed(script, "kernelnorm", "train", "--norm", "k") == {"kernel"}
    assert completed(script, "kernelnorm", "train", "--model", "''") == {*names.MODELS}
    assert completed(script, "kernelnorm", "train", "imagen") == {"imagenette-densenet121"}
