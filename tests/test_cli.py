"""The command line: what it prints, what it exits with, and how it explains mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kernelnorm import __version__
from kernelnorm.cli import main, train
from kernelnorm.cli.options import configure_run, explain_lr
from kernelnorm.experiments.evaluation import evaluate
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.norms import NORMS

ALL = ["train", "compare", "sweep", "reproduce", "report", "evaluate", "evaluate-published"]
ALL += ["predict", "bench", "info"]
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


def folder_of_images(path: Path, height: int = 40, width: int = 40) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(
                    256, (height, width, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(path / split / name / f"{i}.png")
    return path


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([])
    output = capsys.readouterr().out
    for command in ALL:
        assert command in output


@pytest.mark.parametrize("command", ALL)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"\nexamples:\n  kernelnorm {command}" in capsys.readouterr().out


def test_python_m_kernelnorm_works() -> None:
    command = [sys.executable, "-m", "kernelnorm", "--version"]
    assert __version__ in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model=resnet18", "--dataset=nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "there is no folder nowhere: give the folder of a run, such"),
        (["predict", "nowhere", "x.png"], "there is no folder nowhere"),
    ],
)
def test_problems_exit_with_1_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in one_line_of(error)


def test_without_the_extra_it_says_what_to_install() -> None:
    code = """
import sys
from kernelnorm.cli import main

for module in "jsonargparse", "lightning_fabric":
    sys.modules[module] = None
    try:
        main(["train"])
    except SystemExit as error:
        print(error)
    del sys.modules[module]
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line, module in zip(
        printed.splitlines(), ["jsonargparse", "lightning_fabric"], strict=True
    ):
        assert line.startswith(f"kernelnorm: {module} is missing. ")
        assert "pip install 'kernelnorm[experiments]'" in line
        assert "pip install '.[experiments]'" in line


def test_train_tells_the_lr_only_where_it_is_not_quite_the_papers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(*arguments: str) -> str:
        parser = train.make_parser()
        parsed = parser.parse_args([*arguments])
        config = configure_run(parsed, "kernel", 8)
        assert config.lr == 0.0025
        explain_lr(parsed, [config])
        return capsys.readouterr().out

    assert told("cifar10-vgg8") == ""
    assert told("cifar10-vgg8", "--lr=0.0025") == ""
    assert told("digits-vgg8").startswith(
        "learning rate 0.0025 (--lr auto: Table 4(a), KernelNorm, "
    )


def test_train_reads_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("norm: group\nbatch_size: 10\nlr: 0.125\nmax_steps: 1\n")
    main(["train", f"--config={tmp_path / 'run.yaml'}", *SMALL[1:], f"--out={tmp_path / 'run'}"])
    record = RunFolder(tmp_path / "run").read_config()["run"]
    assert (record["norm"], record["batch_size"], record["lr"]) == ("group", 10, 0.125)


def predicted(image: Path, line: str) -> set[str]:
    """The classes that ``kernelnorm predict`` prints after the name of an image."""
    begin, _, classes = line.partition(f"{image}: ")
    assert begin == ""
    return {text.split()[0] for text in classes.split(", ")}


def test_any_model_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = folder_of_images(tmp_path / "pets"), tmp_path / "run"
    options = ["--model=resnet18", "--image-size=32", "--epochs=1", "--batch-size=4"]
    options.append('--model-options={"small_images": true}')
    main(["train", f"--dataset={images}", *options, "--norm=batch", f"--out={out}"])
    content = RunFolder(out).read_config()
    assert content["classes"] == ["cat", "dog"]
    assert len(content["standardise"]["mean"]) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"Run:  {out}", f"Next: kernelnorm evaluate {out}"]
    image = images / "val" / "cat" / "0.png"
    main(["predict", str(out), str(image)])
    assert predicted(image, capsys.readouterr().out) == {"cat", "dog"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for dataset in ("imagenette", "imagewoof"):
        folder_of_images(folder / dataset)
    return folder


CASES_AND_NORMS = [
    ("imagenette-densenet121", "kernel"),
    ("imagewoof-resnet18", "batch"),
    *(
        pytest.param("imagewoof-resnet18", norm, marks=pytest.mark.slow)
        for norm in NORMS
        if norm != "batch"
    ),
]


@pytest.mark.parametrize(("case", "norm"), CASES_AND_NORMS)
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
    *lines, _, last = capsys.readouterr().out.splitlines()
    assert last == f"Next: kernelnorm predict {run} IMAGE ..."
    assert [line.split()[0] for line in lines] == ["evaluation", "expected", "plain", "monte_carlo"]
    assert "(5 passes)" in lines[3]
    expected = f"{RunFolder(run).read_metrics()[-1]['test_accuracy']:.2%}"
    assert lines[1].split()[2] == expected


def test_evaluate_one_behaviour(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--evaluation=plain", "--checkpoint=best"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-2]] == ["plain"]


def test_evaluate_has_the_precision_of_training(tmp_path: Path) -> None:
    options = ["--precision=bf16-mixed", "--norm=batch", f"--out={tmp_path}"]
    main(["train", *SMALL, *options])
    (score,) = evaluate(tmp_path, accelerator="cpu")
    metrics = RunFolder(tmp_path).read_metrics()[-1]
    assert (score.loss, score.accuracy) == (metrics["test_loss"], metrics["test_accuracy"])


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images that are not square."""
    folder = tmp_path_factory.mktemp("wide")
    images = folder_of_images(folder / "pets", height=16, width=24)
    options = ["--model=vgg8", "--epochs=1", "--batch-size=4", "--norm=layer", "--accelerator=cpu"]
    options.append('--model-options={"width": 0.25}')
    main(["train", f"--dataset={images}", *options, f"--out={folder / 'run'}"])
    return folder


def test_evaluate_finds_images_that_have_moved(
    wide_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folder_of_images(tmp_path / "moved", height=16, width=24)
    main(["evaluate", str(wide_run / "run"), f"--dataset={images}"])
    expected = f"{RunFolder(wide_run / 'run').read_metrics()[-1]['test_accuracy']:.2%}"
    assert capsys.readouterr().out.splitlines()[-3].split()[-1] == expected
    (images / "val" / "cat" / "0.png").unlink()
    with pytest.raises(SystemExit) as error:
        main(["evaluate", str(wide_run / "run"), f"--dataset={images}"])
    assert "has changed: test_images was 12 and is 11" in one_line_of(error)


def test_predict_takes_images_of_the_size_of_those_that_are_not_square(
    wide_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = wide_run / "pets" / "val" / "cat" / "0.png"
    main(["predict", str(wide_run / "run"), str(image)])
    assert predicted(image, capsys.readouterr().out) == {"cat", "dog"}
    Image.new("RGB", (24, 24)).save(tmp_path / "square.png")
    with pytest.raises(SystemExit) as error:
        main(["predict", str(wide_run / "run"), str(tmp_path / "square.png")])
    assert "square.png" in one_line_of(error)
    assert "24 pixels wide and 16 high" in one_line_of(error)
    assert "bring it to that size" in one_line_of(error)


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
