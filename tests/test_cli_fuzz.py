"""Random mistakes on the command line and in files: a short message, no traceback, no file."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import NoReturn

import pytest

from kernelnorm.cli import COMMANDS, main
from tests.run_folders import write_run

TRAINING = ["train", "compare", "sweep", "reproduce"]
WITH_CONFIG = {
    "train": ["norm", "batch_size", "lr", "seed", "epochs", "max_steps", "compile", "devices"],
    "compare": ["norms", "batch_sizes", "lr", "subset", "image_size", "augment", "precision"],
    "sweep": ["norms", "batch_sizes", "lrs", "seeds", "rules", "model_options", "jobs", "dry_run"],
    "reproduce": ["norms", "batch_sizes", "seeds", "scale", "all_rates", "accelerator"],
}
BENCH = ["networks", "sizes", "norms", "passes", "modes", "device", "threads", "rounds", "seconds"]
FLAGS = ["compile", "dry_run", "all_rates"]
WRONG_YAML = ["%", "[", "{a: ", "{? [1]: 2}", "[[[]]]", "0xzz", "!!python/object:os.system 1"]
WRONG_YAML += ["!!binary a", "'\\0'", "2020-01-01", "!!set {a}", "&a [*a]", "*a", "'%\ud83d\ude00'"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what paths may name by mistake; where no command does any work."""

    def accepted(*_: object, **__: object) -> NoReturn:
        raise SystemExit(0)

    for work in ("trainer.train", "compare.compare", "sweep.sweep", "sweep.dry_run", "bench.bench"):
        monkeypatch.setattr(f"kernelnorm.experiments.{work}", accepted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "huge.yaml").write_text("batch_size: 2\n" * 300_000)
    (tmp_path / "secret.yaml").write_text("batch_size: 2\n")
    (tmp_path / "secret.yaml").chmod(0)
    return tmp_path


class Mistakes:
    """Draws wrong command lines, and writes the files that they name."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.files = 0

    def draw(self) -> list[str]:
        kinds = [self.command, self.option, self.value, self.value, self.path, self.config]
        return self.random.choice(kinds)()

    def text(self) -> str:
        """Return a text that is no value of any option."""
        letters = "".join(self.random.choices("aé0-=,.[]{}:'\"\n\t\\ \ud800💥", k=8))
        return self.random.choice(["%", "%" * 500, "%, 2", f"%{letters}", "\udcff"])

    def bytes(self) -> bytes:
        return b"\xff" + self.random.randbytes(self.random.randrange(200))

    def new(self) -> Path:
        self.files += 1
        return self.place / f"new{self.files}"

    def command(self) -> list[str]:
        wrong = self.random.choice(["trian", "Train", "", self.text(), "--trian", "-x"])
        return [wrong, *self.random.choices(["train", "--help=2", "x"], k=self.random.randrange(3))]

    def option(self) -> list[str]:
        option = self.random.choice(["--bach-size", "--x", "-x", "--batch", f"--{self.text()}"])
        value = self.random.choice([["2"], [], [self.text()]])
        return [self.random.choice([*COMMANDS]), option, *value]

    def value(self) -> list[str]:
        command, names = self.random.choice([*WITH_CONFIG.items(), ("bench", BENCH)])
        option = f"--{self.random.choice(names)}".replace("_", "-")
        wrong = self.text()
        given = self.random.choice([[f"{option}={wrong}"], [option, wrong], [option]])
        if option[2:].replace("-", "_") in FLAGS:
            given = [f"{option}={wrong}"]
        return [command, *given]

    def path(self) -> list[str]:
        wrong = self.random.choice(["file", "file/x", "loop", "loop/x", "", " ", "a\0b"])
        return [self.random.choice([*TRAINING, "bench"]), f"--out={wrong}"]

    def config(self) -> list[str]:
        command, names = self.random.choice([*WITH_CONFIG.items()])
        file = self.new()
        kind = self.random.choice(["place", "bytes", "cut", "value", "value", "key"])
        if kind == "place":
            unreadable = ["secret.yaml"] if os.geteuid() else []
            wrong = ["nowhere", "empty", "loop", "huge.yaml", "file", "file/x", "", *unreadable]
            file = self.place / self.random.choice(wrong)
        elif kind == "bytes":
            file.write_bytes(self.random.choice([b"", b"\0", self.bytes(), b"[" * 600]))
        elif kind == "cut":
            whole = "{norms: [kernel, batch], batch_sizes: [2, 32], seeds: [0], subset: 60}"
            file.write_text(whole[: self.random.randrange(len(whole))])
        elif kind == "value":
            wrong = self.random.choice(WRONG_YAML)
            text = f"{self.random.choice(names)}: {wrong}\n"
            file.write_bytes(text.encode(errors="surrogatepass"))
        else:
            file.write_text(f"{self.random.choice(['x', 'bach_size', '3', '[]', 'a.b'])}: 2\n")
        return [command, f"--config={file}"]

    def run(self) -> list[str]:
        """Commands that read a run's folder, which holds anything."""
        root = self.new()
        root.mkdir()
        if self.random.random() < 0.7:
            config = write_run(root, [50.0], epochs=1, found={"classes": ["a"]})
            folder = root / config.name
        else:
            folder = root / "run"
            folder.mkdir()
        damaged = self.random.sample(
            ["config.yaml", "metrics.jsonl", "last.ckpt", "best.ckpt"], k=2
        )
        for name in {*damaged, *(["config.yaml"] * (folder.name == "run"))}:
            self.damage(folder / name)
        if self.random.random() < 0.3:
            folder = self.place / self.random.choice(["nowhere", "empty", "loop", "file", "file/x"])
            if self.random.random() < 0.3:
                return ["report", str(folder)]
        command = self.random.choice(["evaluate", "predict"])
        images = ["file", "nowhere.png"] if command == "predict" else []
        return [command, str(folder), *images, "--accelerator=cpu"]

    def damage(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        contents = [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"run: 3\n",
            b"run: {}\n",
            b'{"epoch": 1',
            b"[" * 600,
        ]
        contents += [self.bytes()] * 3
        kind = self.random.choice(["content"] * 6 + ["folder", "loop"])
        if kind == "folder":
            file.mkdir()
        elif kind == "loop":
            file.symlink_to(file)
        else:
            file.write_bytes(self.random.choice(contents))


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with what changes when it is written."""
    files = {str(path): path.lstat() for path in place.rglob("*")}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in files.items()}


def check(commands: list[list[str]], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command fails with a short message, and no file changes."""
    before = snapshot(place)
    capsys.readouterr()
    for command in commands:
        with pytest.raises(SystemExit) as error:
            main(command)
        code = error.value.code
        message = capsys.readouterr().err + (code if isinstance(code, str) else "")
        assert code not in (None, 0), command
        assert message.startswith("kernelnorm: "), (command, message)
        assert len(message.splitlines()) <= 2, (command, message)
        assert len(message) < 1000, (command, message)
    assert snapshot(place) == before


def test_wrong_arguments_and_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"Mistakes(place, {seed})")
    mistakes = Mistakes(place, seed)
    check([mistakes.draw() for _ in range(100)], place, capsys)


def test_damaged_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"Mistakes(place, {seed})")
    mistakes = Mistakes(place, seed)
    check([mistakes.run() for _ in range(60)], place, capsys)
