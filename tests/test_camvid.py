"""The study on CamVid: its networks, the order of its runs, and that they resume.

It needs the packages that kernelnorm.experiments needs.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kernelnorm import KNConv2d

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study with few steps: generated images, two norms, two rates, two epochs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("camvid", "camvid_report", "camvid_runs", "camvid_networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import camvid_report
    import camvid_runs

    stages = (("unet", 2, ("kernel", "group"), (0, 1)),)
    for module in (camvid_runs, camvid_report):
        monkeypatch.setattr(module, "RATES", (0.001, 0.01))
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "EPOCHS", 2)
    monkeypatch.setattr(camvid_runs, "STAGES", stages)
    return camvid_runs


def networks(study: ModuleType) -> ModuleType:
    return sys.modules["camvid_networks"]


def report(study: ModuleType) -> ModuleType:
    return sys.modules["camvid_report"]


@pytest.mark.parametrize("network", ["unet", "fcdensenet"])
def test_kernel_networks_have_no_batchnorm_and_the_same_convolutions(
    study: ModuleType, network: str
):
    torch.manual_seed(0)
    batch = networks(study).build(network, "batch")
    torch.manual_seed(0)
    kernel = networks(study).build(network, "kernel")
    convs = {name: m for name, m in batch.named_modules() if isinstance(m, nn.Conv2d)}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in kernel.modules())
    for name, conv in convs.items():
        converted = kernel.get_submodule(name)
        assert isinstance(converted, (nn.Conv2d, KNConv2d))
        assert torch.equal(converted.weight, conv.weight)
    assert sum(isinstance(m, KNConv2d) for m in kernel.modules()) > 20


@pytest.mark.parametrize("network", ["unet", "fcdensenet"])
@pytest.mark.parametrize("norm", ["batch", "group", "ws_group", "kernel", "kernel_p0"])
def test_scores_have_the_size_of_the_image(study: ModuleType, network: str, norm: str):
    x = torch.rand(1, 3, 45, 62)  # odd sizes on the way down
    assert networks(study).build(network, norm)(x).shape == (1, 11, 45, 62)


def test_standardized_weights_have_mean_0_and_norm_1(study: ModuleType):
    network = networks(study).build("unet", "ws_group")
    weight = network.up[0][0][0].weight.flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(len(weight)), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)), atol=1e-3, rtol=0)
    assert network.head.weight.flatten(1).mean(1).abs().max() > 1e-3


def test_groups_have_at_least_8_channels(study: ModuleType):
    groups = {c: networks(study).group_norm(c).num_groups for c in (24, 32, 52, 96, 512)}
    assert groups == {24: 3, 32: 4, 52: 4, 96: 12, 512: 32}


def test_iou_is_that_of_sets_of_pixels_without_void(study: ModuleType):
    masks = torch.tensor([[[0, 0, 1, 1], [2, 2, 11, 11]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [2, 0, 2, 2]]])

    class Predicts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(predicted, 11).permute(0, 3, 1, 2).float()

    iou = networks(study).EXAMPLE["ious"](Predicts(), torch.rand(1, 3, 2, 4), masks)
    torch.testing.assert_close(iou[:3], torch.tensor([1 / 3, 2 / 3, 1 / 2]))
    assert iou[3:].isnan().all()  # classes that are nowhere


def test_images_and_masks_are_paired_by_name(study: ModuleType, tmp_path: Path):
    archive = tmp_path / "camvid.zip"
    with zipfile.ZipFile(archive, "w") as files:
        for i, name in enumerate("ba"):
            for folder, ending in (("images", "jpg"), ("masks", "png")):
                shape = (180, 240, 3) if folder == "images" else (180, 240)
                content = io.BytesIO()
                image = Image.fromarray(np.full(shape, 10 * i, np.uint8))
                image.save(content, "JPEG" if ending == "jpg" else "PNG")
                files.writestr(f"camvid/val/{folder}/{name}.{ending}", content.getvalue())
        files.writestr("../camvid/val/images/c.jpg", b"outside")  # is not looked at
    images, masks = networks(study).EXAMPLE["load"](archive, "val")
    assert images.shape == (2, 3, 96, 128)
    assert masks.shape == (2, 96, 128)
    assert masks[:, 0, 0].tolist() == [10, 0]
    assert (images[:, 0, 0, 0] * 64 + 128).round().tolist() == [10, 0]


def test_other_seeds_take_the_rate_that_is_best_on_validation_images(study: ModuleType):
    Run = study.Run
    results = {}
    order = []
    while (run := study.next_run(results)) is not None:
        order.append(run)
        value = 0.5 + run.rate if run.norm == "kernel" else 0.5 - run.rate
        results[run] = {"val": [value] * 11, "test": [1 - value] * 11}
    assert order == [
        Run("unet", "kernel", 2, 0.01, 0, 2),
        Run("unet", "kernel", 2, 0.001, 0, 2),
        Run("unet", "group", 2, 0.01, 0, 2),
        Run("unet", "group", 2, 0.001, 0, 2),
        Run("unet", "kernel", 2, 0.01, 1, 2),
        Run("unet", "group", 2, 0.001, 1, 2),
    ]


def test_an_interrupted_run_ends_with_the_same_weights(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, data = study.Run("unet", "kernel", 2, 0.001, 0, 2), study.load(None)
    (whole := tmp_path / "whole").mkdir()
    expected = study.train(run, data, whole).state_dict()

    (parts := tmp_path / "parts").mkdir()
    train_epoch = networks(study).EXAMPLE["train_epoch"]

    def stops(network, optimizer, images, masks, batch_size, seed):
        if seed == 1:
            raise KeyboardInterrupt
        train_epoch(network, optimizer, images, masks, batch_size, seed)

    monkeypatch.setitem(networks(study).EXAMPLE, "train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        study.train(run, data, parts)
    monkeypatch.setitem(networks(study).EXAMPLE, "train_epoch", train_epoch)
    resumed = study.train(run, data, parts).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("command", ["run", "picture"])
def test_the_study_needs_the_archive(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    import camvid

    with pytest.raises(SystemExit):
        camvid.main([command, "--out", str(tmp_path / "out"), "--limit", "0"])
    assert f"{command} needs the archive: give camvid.zip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_go_on_from_the_results_and_end_in_tables_and_a_picture(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study.run_missing(None, tmp_path, limit=3)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    study.run_missing(None, tmp_path, limit=100)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["run"]) for line in lines}) == len(lines) == 6
    capsys.readouterr()
    study.run_missing(None, tmp_path, limit=1)
    assert "all runs are done" in capsys.readouterr().out
    report(study).print_tables(tmp_path)
    tables = capsys.readouterr().out
    assert "| unet | GroupNorm | 2 |" in tables
    assert "kernel, converted at 2 - GroupNorm at 2 | test |" in tables
    report(study).draw_picture(None, tmp_path, tmp_path / "picture.png", batch_size=2)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
