"""Wrong arguments: one line that says what is wrong and what is allowed, and exit code 2."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kernelnorm import cli
from kernelnorm.cli import main, predict, sweep, train

NETWORKS = "vgg8, resnet18, resnet34, resnet50, resnet101, densenet121, densenet161, densenet169"


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The first of the two lines; the second names the help of the command."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    known = arguments[0] in cli.COMMANDS
    assert second == f"See: kernelnorm {f'{arguments[0]} ' * known}--help"
    assert captured.out == ""
    return first.removeprefix("kernelnorm: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'? Choose from train, compare, "),
        ("xyz", "unknown command 'xyz': choose from train, compare, "),
        ("--lr 0.1", "unknown option '--lr'"),
        ("train --bach-size=2", "unknown option '--bach-size': did you mean '--batch-size'?"),
        ("train --bach-size 2", "unknown option '--bach-size': did you mean '--batch-size'?"),
        ("train --batch=2", "unknown option '--batch'"),
        ("train --batch-size", "--batch-size needs a value"),
        ("train --compile=2", "--compile takes no value, got '2'"),
        ("train digits-vgg8 more", "unexpected argument 'more'"),
        ("evaluate", "missing argument: run"),
        ("predict run", "missing argument: images"),
        ("train digits", "unknown case 'digits': did you mean 'digits-vgg8'? Choose from digits-"),
        ("train --norm=kernal", "unknown norm 'kernal': did you mean 'kernel'? Choose from batch,"),
        ("compare --norms=batch,x", "unknown norm 'x': choose from batch, group, "),
        ("compare --norms=", "--norms must be norms separated by commas, got ''"),
        (
            "train --model=vgg9",
            f"unknown model 'vgg9': did you mean 'vgg8'? Choose from {NETWORKS}",
        ),
        ("bench --networks=vgg8,a", f"unknown model 'a': choose from {NETWORKS}"),
        ("train --precision=half", "unknown precision 'half': choose from 32-true, bf16-mixed, "),
        ("train --accelerator=tpu", "unknown accelerator 'tpu': did you mean 'gpu'? Choose from "),
        ("train --lr=abc", "--lr must be \"auto\" or a positive number, got 'abc'"),
        ("train --lr=nan", "--lr must be \"auto\" or a positive number, got 'nan'"),
        ("train --lr=0", "--lr must be \"auto\" or a positive number, got '0'"),
        ("sweep --lrs=0.1,x", '--lrs must be "auto" or positive numbers separated by commas, got '),
        ("train --batch-size=0", "--batch-size must be a positive integer, got '0'"),
        ("train --batch-size=1.5", "--batch-size must be a positive integer, got '1.5'"),
        ("train --epochs=99999999999", "--epochs must be at most 2147483647, got '99999999999'"),
        ("train --image-size=0", "--image-size must be a positive integer, got '0'"),
        ("train --subset=0", "--subset must be a positive integer, got '0'"),
        ("train --devices=0", "--devices must be a positive integer, got '0'"),
        ("train --max-steps=0", "--max-steps must be a positive integer, got '0'"),
        ("train --seed=-1", "--seed must be an integer from 0 to 2**32 - 1, got '-1'"),
        ("train --seed=4294967296", "--seed must be at most 4294967295, got "),
        ("train --weight-decay=-1", "--weight-decay must be a number of at least 0, got '-1'"),
        ("train --checkpoint-minutes=inf", "--checkpoint-minutes must be a number of at least 0"),
        ("train --augment=perhaps", "--augment must be true or false, got 'perhaps'"),
        ("train --model-options=[", "--model-options must be a JSON object such as {"),
        ("train --out=", "--out must be a path, got ''"),
        ("compare --batch-sizes=2,x", "--batch-sizes must be positive integers separated by comm"),
        ("compare --batch-sizes=,", "--batch-sizes must be positive integers separated by commas"),
        ("sweep --seeds=one", "--seeds must be integers from 0 to 2**32 - 1, separated by commas"),
        ("sweep --rules={}", "--rules must be a JSON list of objects such as [{"),
        ("sweep --jobs=0", "--jobs must be a positive integer, got '0'"),
        ("sweep --cpus-per-run=0", "--cpus-per-run must be a positive integer, got '0'"),
        ("sweep --gpus-per-run=-1", "--gpus-per-run must be a number of at least 0, got '-1'"),
        ("reproduce --scale=huge", "unknown scale 'huge': choose from small, paper"),
        (
            "bench --modes=eager,compiled",
            "unknown mode 'compiled': did you mean 'compile'? Choose from eager, compile, reduce-",
        ),
        ("bench --dtypes=float23", "unknown dtype 'float23': did you mean 'float32'? Choose from "),
        ("bench --dtypes=", "--dtypes must be dtypes separated by commas, got ''"),
        ("bench --passes=test", "unknown pass 'test': choose from train, inference"),
        (
            "bench --memory-formats=channel_last",
            "unknown memory format 'channel_last': did you mean 'channels_last'? Choose from ",
        ),
        ("--print-completion=fish", "unknown shell 'fish': choose from bash, zsh, tcsh"),
        ("info --json", "unknown option '--json'"),
        ("info more", "unexpected argument 'more'"),
        ("bench --threads=0", "--threads must be a positive integer, got '0'"),
        ("bench --rounds=x", "--rounds must be a positive integer, got 'x'"),
        ("bench --seconds=-1", "--seconds must be a number of at least 0, got '-1'"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message_of(arguments.split(), capsys).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: abc", "--lr must be \"auto\" or a positive number, got 'abc'"),
        ("batch_size: true", "--batch-size must be a positive integer, got True"),
        ("batch_size: 32.0", "--batch-size must be a positive integer, got 32.0"),
        ("seed: -1", "--seed must be an integer from 0 to 2**32 - 1, got -1"),
        ("lr_milestones: [1, x]", "--lr-milestones must be positive integers separated by commas"),
        ("norm: [kernel]", "unknown norm ['kernel']: did you mean 'kernel'? Choose from "),
        (
            "model_options: 3",
            '--model-options must be a JSON object such as {"small_images": true}',
        ),
        ("compile: perhaps", "--compile must be true or false, got 'perhaps'"),
        ("case: mnist", "unknown case 'mnist': choose from digits-vgg8, "),
        ("bach_size: 3", "unknown option 'bach_size': did you mean 'batch_size'?"),
        ("config: a.yaml", "unknown option 'config'"),
        ("batch_size: [3", "not valid YAML, line 1: expected ',' or ']', "),
        ("- batch_size", "must have lines such as batch_size: 32"),
        ("", "must have lines such as batch_size: 32"),
    ],
)
def test_wrong_config_files(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    expected = f"--config {file}: {message}"
    assert message_of(["train", f"--config={file}"], capsys).startswith(expected)


def test_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(["train", "--config=nowhere.yaml"], capsys)
    assert message == "--config nowhere.yaml: No such file or directory"


def test_values_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "lr: 1e-3\nlr_milestones: [2, 3]\nsubset:\ncompile: true\nimage-size: 8\n"
        "model_options: {rules: {dropout_p: 1e-2}}\ndata_dir: ~/data\nbatch_size: 4\n"
    )
    arguments = [f"--config={tmp_path / 'run.yaml'}", "--batch-size=8"]
    given = train.make_parser().parse_args(arguments)
    assert (given.lr, given.lr_milestones, given.subset) == (1e-3, [2, 3], None)
    assert (given.compile, given.image_size, given.batch_size) == (True, 8, 8)
    assert given.model_options == {"rules": {"dropout_p": 1e-2}}
    assert given.data_dir == Path.home() / "data"


def test_options_on_the_command_line_win_over_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("case: imagewoof-resnet18\nbatch_size: 64\nseed: 3\n")
    parse = train.make_parser().parse_args
    for arguments in (["digits-vgg8", "--batch-size", "8"], ["--batch-size=8", "digits-vgg8"]):
        for place in (0, 3):
            order = [*arguments]
            order[place:place] = [f"--config={file}"]
            given = parse(order)
            assert (given.case, given.batch_size, given.seed) == ("digits-vgg8", 8, 3)
    assert parse([f"--config={file}"]).case == "imagewoof-resnet18"


def test_json_values() -> None:
    arguments = ['--rules=[{"dropout_p": 1e-3}, {}]', "--model-options={width: 0.5}"]
    given = sweep.make_parser().parse_args(arguments)
    assert given.rules == [{"dropout_p": 1e-3}, {}]
    assert given.model_options == {"width": 0.5}


def test_home_is_expanded_in_every_path() -> None:
    home = Path.home()
    arguments = ["--data-dir=~/data", "--out=~/run", "--dataset=~/photos"]
    given = train.make_parser().parse_args(arguments)
    assert (given.data_dir, given.out) == (home / "data", home / "run")
    assert given.dataset == str(home / "photos")
    given = predict.make_parser().parse_args(["~/run", "~/a.png", "~/b.png"])
    assert (given.run, given.images) == (home / "run", [home / "a.png", home / "b.png"])


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert message_of(["train", f"--out={file}"], capsys).startswith("--out must be a folder, got")
    message = message_of(["train", f"--out={file / 'run'}"], capsys)
    assert message.startswith(f"--out cannot be in the file {file}, got")


def test_file_that_looks_like_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["predict", "run", "-x.png"]
    assert message_of(command, capsys) == "unknown option '-x.png'"
    Path("-x.png").touch()
    expected = "unknown option '-x.png'. For the file of this name, write: -- -x.png"
    assert message_of(command, capsys) == expected
    given = predict.make_parser().parse_args(["run", "--", "-x.png"])
    assert given.images == [Path("-x.png")]


def test_names_are_printed_on_any_console(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("kernelnorm.cli.report.run", lambda _: print("Käse"))
    main(["report", "runs"])
    stream.flush()
    assert stream.buffer.getvalue() == b"K\\xe4se\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["train --norm", "compare --norms", "sweep --norms"])
def test_clipping_for_a_norm_that_does_not_need_it(command: str) -> None:
    with pytest.raises(SystemExit, match="--agc is for the norm nf, got batch: leave it out"):
        main([*command.split(), "batch", "--agc=0.1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--schedule=cosine --lr-milestones=5", "--lr-milestones needs --schedule steps, got cos"),
        ("--warmup-epochs=9", "--warmup-epochs must be less than --epochs, got 9 of 8"),
        ("--weight-decay=1e39", r"--weight-decay must be between 0 and 3e\+38, got 1e\+39"),
    ],
)
def test_messages_have_the_names_of_options(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["train", *arguments.split()])


@pytest.mark.parametrize("output", ["closed", "full"])
def test_an_output_that_cannot_be_written(output: str) -> None:
    place = "&-" if output == "closed" else "/dev/full"
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m kernelnorm info >{place}",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    message = "kernelnorm: No space left on device, so the output cannot be written\n"
    assert (done.returncode, done.stderr) == ((0, "") if output == "closed" else (1, message))
