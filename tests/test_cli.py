"""The command line: what it prints, what it exits with, and how it explains mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kernelnorm.cli import main
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.norms import NORMS

SMALL = ["--batch-size=16", "--epochs=1", "--subset=50", "--image-size=8", "--accelerator=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    main(["train", *SMALL, f"--out={out}"])
    return out


def one_line_of(error: pytest.ExceptionInfo[SystemExit]) -> str:
    """The message of an exit with code 1: a single line."""
    message = error.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    return message


def folder_of_images(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path / split / name / f"{i}.png")
    return path


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    output = capsys.readouterr().out
    for command in ("train", "compare", "evaluate", "predict"):
        assert command in output


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "predict"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"\nexamples:\n  kernelnorm {command}" in capsys.readouterr().out


def test_python_m_kernelnorm_works() -> None:
    command = [sys.executable, "-m", "kernelnorm", "--version"]
    assert "0.1" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "invalid choice: 'tarin'"),
        (["train", "--modle=vgg8"], "--modle"),
        (["train", "--norm=weight"], "weight"),
        (["train", "--lr=high"], "Given value: high"),
        (["train", "--batch-size=two"], "two"),
        (["evaluate"], "run"),
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mnist"], "unknown case 'mnist'"),
        (["train", "--batch-size=0"], "batch_size must be positive"),
        (["train", "--model=resnet18", "--dataset=nowhere"], "nowhere is not a folder"),
        (["compare", "--norms=batch,weight"], "unknown norm 'weight'"),
        (["evaluate", "nowhere"], "nowhere is not the folder of a run"),
        (["predict", "nowhere", "x.png"], "nowhere is not the folder of a run"),
    ],
)
def test_problems_exit_with_1_and_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in one_line_of(error)


def test_train_tells_the_lr_only_where_it_is_not_quite_the_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *SMALL, "--max-steps=1"]
    main([*arguments, f"--out={tmp_path / 'a'}"])
    assert "--lr auto" not in capsys.readouterr().out
    main([*arguments, "--batch-size=10", f"--out={tmp_path / 'b'}"])
    assert "--lr auto is 0.0025: Table 4(a), KernelNorm, batch size 8" in capsys.readouterr().out


def test_train_reads_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("norm: group\nbatch_size: 10\nlr: 0.125\nmax_steps: 1\n")
    main(["train", f"--config={tmp_path / 'run.yaml'}", *SMALL[1:], f"--out={tmp_path / 'run'}"])
    record = RunFolder(tmp_path / "run").read_config()["run"]
    assert (record["norm"], record["batch_size"], record["lr"]) == ("group", 10, 0.125)


def test_any_model_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = folder_of_images(tmp_path / "pets"), tmp_path / "run"
    options = ["--model=resnet18", "--image-size=32", "--epochs=1", "--batch-size=4"]
    options.append('--model-options={"small_images": true}')
    main(["train", f"--dataset={images}", *options, "--norm=batch", f"--out={out}"])
    content = RunFolder(out).read_config()
    assert content["classes"] == ["cat", "dog"]
    assert len(content["standardise"]["mean"]) == 3
    capsys.readouterr()
    main(["predict", str(out), str(images / "val" / "cat" / "0.png")])
    assert "cat" in capsys.readouterr().out


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for dataset in ("imagenette", "imagewoof"):
        folder_of_images(folder / dataset)
    return folder


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["imagenette-densenet121", "imagewoof-resnet18"])
def test_the_papers_cases_take_some_steps_with_every_norm(
    case: str, norm: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size=64", "--batch-size=4", "--max-steps=2", f"--out={tmp_path}"]
    main(["train", case, f"--data-dir={data_dir}", f"--norm={norm}", *options])
    assert "after 2 steps: train loss" in capsys.readouterr().out
    content = RunFolder(tmp_path).read_config()
    assert content["run"]["augment"]
    assert (content["standardise"] is None) == (norm == "kernel")


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "pets")
    (images / "train" / "dog" / "2.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as error:
        main(["train", f"--dataset={images}", "--image-size=32", f"--out={tmp_path / 'run'}"])
    assert "2.png" in one_line_of(error)


def test_evaluate_shows_the_three_behaviours(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["evaluation", "expected", "plain", "monte_carlo"]
    assert "(5 passes)" in lines[3]
    expected = f"{RunFolder(run).read_metrics()[-1]['test_accuracy']:.2%}"
    assert lines[1].split()[2] == expected


def test_evaluate_one_behaviour(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--evaluation=plain", "--checkpoint=best"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["plain"]


def test_predict_prints_three_classes_an_image(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (20, 20), 128).save(tmp_path / "a.png")
    main(["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "a.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'a.png'}: ")
    assert lines[0].count("%") == 3


def test_predict_names_what_it_cannot_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as error:
        main(["predict", str(run), str(tmp_path / "a.png")])
    assert "a.png" in one_line_of(error)


def test_evaluate_before_the_first_checkpoint(tmp_path: Path) -> None:
    main(["train", *SMALL, "--max-steps=1", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as error:
        main(["predict", str(tmp_path), "x.png"])
    assert "has no best.ckpt yet: train it further" in one_line_of(error)
