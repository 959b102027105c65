"""The commands sweep and reproduce: what they read, print and refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kernelnorm.cli import main
from kernelnorm.cli.sweep import make_parser, make_runs
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.style import LABELS
from kernelnorm.experiments.sweep import Status
from kernelnorm.experiments.sweep.execute import execute
from kernelnorm.experiments.sweep.reproduction import _SMALL, Scale
from kernelnorm.experiments.sweep.view import View
from tests.small_sweeps import LAUNCH, SMALL, Here, small


def test_dry_run_lists_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, missing = small()
    assert execute(done, LAUNCH, tmp_path / done.name) == ""
    folder = RunFolder(tmp_path / done.name)
    times = {"seconds": 15.0, "startup_seconds": 0.0}
    folder.write_metrics([{**metrics, **times} for metrics in folder.read_metrics()])
    options = ["--norms=batch,layer", "--batch-sizes=8", "--epochs=2", f"--out={tmp_path}"]
    main(["sweep", *SMALL, *options, "--dry-run", "--jobs=1"])
    output = capsys.readouterr().out
    assert [line.split()[4] for line in output.splitlines()[1:3]] == ["done", "missing"]
    assert f"To be trained in {tmp_path}: 1 of 2 runs, 1 at a time." in output
    assert "Time for them: 30 s, estimated from the epochs trained so far." in output
    assert not (tmp_path / missing.name).exists()


def test_dry_run_of_a_reproduction_tells_how_many_runs_to_expect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reproduce", "digits-vgg8", "--norms=batch", "--dry-run", f"--out={tmp_path / 'none'}"])
    output = capsys.readouterr().out
    assert output.startswith("Scale small (subset 500, epochs 4): not the paper's experiment")
    assert "6 of 6 runs" in output
    assert "there will be 12 to 26 runs in the end" in output
    assert not (tmp_path / "none").exists()


def test_reproduce_tunes_repeats_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, reported = Here(), list[Path]()
    scale = Scale((32,), {"subset": 60, "epochs": 2, "image_size": 8})
    monkeypatch.setitem(_SMALL, "digits-vgg8", scale)
    monkeypatch.setattr("kernelnorm.experiments.sweep.LocalPool", lambda *_: pool)
    monkeypatch.setattr("kernelnorm.cli.reproduce.write_report", reported.append)
    options = ["--norms=batch", "--seeds=1,2", f"--out={tmp_path}"]
    main(["reproduce", "digits-vgg8", *options, "--accelerator=cpu"])
    best = next(config.lr for config in pool.submitted if config.seed == 1)
    assert [config.seed for config in pool.submitted if config.lr == best] == [0, 1, 2]
    assert len(pool.submitted) >= 5
    assert reported == [tmp_path]
    assert "Scale small (subset 60, epochs 2, " in capsys.readouterr().out.split("norm  batch")[0]
    main(["reproduce", "digits-vgg8", *options, "--accelerator=cpu"])
    assert len(reported) == 2


def test_sweep_reads_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "case: imagewoof-resnet18\nnorms: [kernel]\nbatch_sizes: [32]\nlrs: [0.01]\n"
        "seeds: [0, 1]\nrules:\n  - {dropout_p: 0.0}\n  - {}\nsubset: 1000\n"
    )
    main(["sweep", f"--config={tmp_path / 'sweep.yaml'}", "--dry-run", "--seeds=2"])
    output = capsys.readouterr().out
    assert "runs/imagewoof-resnet18: 2 of 2 runs" in output
    assert output.count("dropout_p=0 ") == 1


def test_the_recipe_of_a_case_can_be_changed() -> None:
    changes = ["--augment=false", "--weight-decay=0", "--lr-milestones="]
    for options, expected in (
        ([], (True, 1e-4, (60,))),
        (changes, (False, 0.0, ())),
        (["--lr-milestones=5,8"], (True, 1e-4, (5, 8))),
    ):
        run, *_ = make_runs(make_parser().parse_args(["imagewoof-resnet18", *options]))
        assert (run.augment, run.weight_decay, run.lr_milestones) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("batch_sizes: 8\nseeds: 1\nlrs: 1\n", [(8, 1, 1.0)]),
        ("batch_sizes: [4]\nseeds: [1, 2]\nlrs: [1e-3]\n", [(4, 1, 1e-3), (4, 2, 1e-3)]),
        ("batch_sizes: 4,2\nseeds: 0\nlrs: 0.1,\n", [(4, 0, 0.1), (2, 0, 0.1)]),
    ],
)
def test_numbers_of_a_config_file(
    given: str, expected: list[tuple[int, int, float]], tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(f"norms: batch\n{given}")
    runs = make_runs(make_parser().parse_args([f"--config={tmp_path / 'sweep.yaml'}"]))
    assert [(run.batch_size, run.seed, run.lr) for run in runs] == expected
    assert all(isinstance(run.lr, float) for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "digits-vgg8", "--scale=paper"], "digits-vgg8 is not in the paper"),
        (["reproduce", "--seeds=0"], "seed 0 is the seed of the tuning"),
    ],
)
def test_problems_exit_with_1_and_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: True)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in str(error.value.code)
    assert "\n" not in str(error.value.code)


@pytest.mark.parametrize(
    "option", ["--lrs=high", "--batch-sizes=two", "--seeds=[one]", "--scale=huge"]
)
def test_wrong_arguments_exit_with_2(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce" if "scale" in option else "sweep", option])
    assert option.split("=")[1] in capsys.readouterr().err


def test_failed_runs_exit_with_1_and_say_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.LocalPool", lambda *_: Here())
    options = ["--norms=instance,batch", "--batch-sizes=8", "--epochs=1", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"runs that have failed: 1\. In the folder of each, "):
        main(["sweep", *SMALL, *options])


def test_the_live_table_stays_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    configs = small(norms=["batch", "layer"], batch_sizes=[8, 2])
    view = View("Scale small.", jobs=2)
    view.show([Status(config, "missing") for config in configs], [])
    first = capsys.readouterr().out
    assert first.startswith("Scale small.\n")
    rows = [line.split() for line in first.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in LABELS.values()] == [
        [LABELS[norm], batch_size] for batch_size in ("8", "2") for norm in ("batch", "layer")
    ]
    view.show([Status(config, "running") for config in configs], [])
    assert "\x1b[5F\x1b[J" in capsys.readouterr().out  # back to the heading
    monkeypatch.setenv("LINES", "6")
    view.show([Status(config, "missing") for config in configs], [])
    assert "and 4 more" in capsys.readouterr().out
    view.close()


def test_ray_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"--ray needs: pip install 'kernelnorm\[cluster\]'"):
        main(["sweep", "--ray", f"--out={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus-per-run=2"], "are for a cluster: add --ray"),
        (["--ray=auto", "--jobs=2"], "with --ray give --cpus-per-run"),
        (["--ray=auto", "--dry-run"], "give --jobs instead of --ray"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["sweep", *SMALL, *options, f"--out={tmp_path}"])


def test_a_case_after_ray_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: True)
    with pytest.raises(SystemExit, match="--ray digits-vgg8: an address is auto, local or HOST"):
        main(["sweep", "--ray", "digits-vgg8", f"--out={tmp_path}"])
