"""KNResNets on the command line: trained, refused with other norms, evaluated with weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kernelnorm import set_evaluation
from kernelnorm.cli import main
from kernelnorm.experiments.published import evaluate_published
from kernelnorm.models import create_model, load_published
from kernelnorm.models.published import published_names

LABELS = [0, 0, 1]


def one_line_of(command: list[str]) -> str:
    """The message of an exit with code 1."""
    with pytest.raises(SystemExit) as error:
        main(command)
    message = error.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    return message.removeprefix("kernelnorm: ")


def save_weights(file: Path, **options: bool | int) -> Path:
    network = create_model("knresnet18", num_classes=2, **options)
    state = network.state_dict()
    model = {theirs: state[ours] for theirs, ours in published_names(network).items()}
    torch.save({"model": model}, file)
    return file


def save_image(file: Path, width: int, height: int, seed: int) -> Tensor:
    """A picture of large random tiles, and its pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(256, (-(-height // 32), -(-width // 32), 3), generator=generator)
    pixels = tiles.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width]
    pixels = pixels.to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)
    return pixels.permute(2, 0, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_weights(tmp_path_factory.mktemp("weights") / "knresnet18.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder of images, and the central pixels of each where its shorter side is 256 long."""
    root = tmp_path_factory.mktemp("val")
    wide = save_image(root / "n01" / "wide.png", 304, 256, seed=0)
    tall = save_image(root / "n01" / "tall.png", 256, 280, seed=1)
    save_image(root / "n02" / "deep" / "large.png", 300, 300, seed=2)
    with Image.open(root / "n02" / "deep" / "large.png") as image:
        large = image.resize((256, 256), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)
    central = [tall[:, 28:252, 16:240], wide[:, 16:240, 40:264], pixels[:, 16:240, 16:240]]
    return root, torch.stack(central)


@pytest.mark.parametrize("standardise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_are_those_of_the_central_pixels(
    weights: Path, folder: tuple[Path, Tensor], standardise: bool
) -> None:
    images, central = folder
    network, labels, x = load_published("knresnet18", weights), torch.tensor(LABELS), central / 255
    if standardise:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
    options = {"standardise": standardise, "batch_size": 2, "accelerator": "cpu"}
    chosen = ("plain", "expected")
    scores = evaluate_published("knresnet18", weights, images, evaluations=chosen, **options)
    assert tuple(score.evaluation for score in scores) == chosen
    for score in scores:
        with torch.no_grad():
            expected = set_evaluation(network, score.evaluation)(x)
        assert score.loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-3)
        right = (expected.argmax(1) == labels).sum().item()
        assert score.accuracy == pytest.approx(right / 3)


def test_the_command_shows_the_three_behaviours(
    weights: Path, folder: tuple[Path, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate-published", "knresnet18", str(weights), str(folder[0])]
    command += ["--accelerator=cpu", "--subset=2"]
    tables = []
    for _ in range(2):  # with the same seeds of dropout
        main(command)
        tables.append(capsys.readouterr().out.splitlines())
    assert tables[0] == tables[1]
    names = [line.split()[0] for line in tables[0]]
    assert names == ["evaluation", "expected", "plain", "monte_carlo"]
    assert "(5 passes)" in tables[0][3]
    assert {line.split()[2] for line in tables[0][1:3]} <= {"0.00%", "50.00%", "100.00%"}
    main([*command, "--evaluation=plain", "--standardise=none"])
    (_, plain) = capsys.readouterr().out.splitlines()
    assert plain.split()[0] == "plain"
    assert plain.split()[1] != tables[0][2].split()[1]


def test_what_cannot_be_evaluated(
    weights: Path, folder: tuple[Path, Tensor], tmp_path: Path
) -> None:
    def message(file: Path, images: Path, network: str = "knresnet18") -> str:
        return one_line_of(["evaluate-published", network, str(file), str(images)])

    images = folder[0]
    nowhere = tmp_path / "nowhere"
    assert message(nowhere, images).startswith(f"there is no file {nowhere}: give a file that")
    assert message(weights, nowhere) == (
        f"{nowhere} is not a folder: expected {nowhere / '<class>' / '*'}"
    )
    flat = images / "n01"
    assert message(weights, flat) == (
        f"{flat} has no folders of classes: expected {flat / '<class>' / '*'}"
    )
    small = save_weights(tmp_path / "small.pt", small_images=True)
    assert message(small, images) == (
        f"{small} is not of a network for ImageNet: its first filters are of shape (3, 3, 3), not "
        "(3, 7, 7)"
    )
    assert message(weights, images, "knresnet34").startswith(f"{weights} does not fit knresnet34: ")
    for label in ("n01", "n02", "n03"):
        save_image(tmp_path / "three" / label / "a.png", 8, 8, seed=0)
    assert message(weights, tmp_path / "three") == (
        f"{tmp_path / 'three'} has 3 folders of classes, but the network of {weights} tells 2 "
        "classes apart: give a folder with all of them"
    )
    for label in ("n01", "n02"):
        (tmp_path / "bad" / label).mkdir(parents=True)
        (tmp_path / "bad" / label / "a.jpg").write_bytes(b"not an image")
    assert "bad/n01/a.jpg" in message(weights, tmp_path / "bad").replace("\\", "/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --norm=batch", "knresnet18 exists with the norm kernel only, got batch: choose "),
        ("compare", "knresnet18 exists with the norm kernel only, got batch: choose kernel, or "),
        ("sweep --norms=kernel,layer", "knresnet18 exists with the norm kernel only, got layer: "),
        ('train --model-options={"width":1}', "cannot build knresnet18: "),
        ('train --model-options={"rules":{"head":false}}', "cannot build knresnet18: rules are f"),
    ],
)
def test_other_norms_and_options_are_refused_in_one_line(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = arguments.split()
    run = ["--model=knresnet18", "--dataset=digits", "--subset=20"]
    assert one_line_of([command, *options, *run]).startswith(message)


def test_bench_compares_norms() -> None:
    message = one_line_of(["bench", "--networks=vgg8,knresnet18", "--norms=batch,kernel"])
    assert message.startswith(
        "--networks: knresnet18 exists with the norm kernel only, and bench compares norms; "
        "choose from: vgg8, resnet18, "
    )
    assert "knresnet34" not in message


@pytest.mark.slow
def test_one_is_trained_and_evaluated_like_other_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset=digits", "--batch-size=8", "--subset=16", "--epochs=1", "--augment=false"]
    out = tmp_path / "run"
    options += ["--accelerator=cpu", f"--out={out}"]
    main(["train", "--model=knresnet13", *options])
    main(["evaluate", str(out), "--evaluation=expected"])
    printed = capsys.readouterr().out
    assert "for imagewoof-resnet18" in printed
    assert printed.splitlines()[-3].startswith("expected")
