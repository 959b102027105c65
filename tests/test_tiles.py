"""KNConv is local: tiles of an image, and images of a batch, give what they give together."""

from __future__ import annotations

import math
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernelnorm import KernelNorm2d, KNConv2d
from kernelnorm.models import create_model
from kernelnorm.models.densenet import DenseNet
from kernelnorm.norms import LocalContextNorm2d, PositionalNorm2d

in_tiles = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "tiles.py"))["in_tiles"]

SIDE, TILE = 96, 32
TOLERANCE = 1e-10
"""Largest difference of what is equal in float64, in standard deviations of the output."""
FAILURE = 1e-3
"""Smallest difference of what is not."""


class SqueezeExcite(nn.Module):
    """Scales each channel by what the mean of the whole map tells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(4, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": nn.InstanceNorm2d,
    "positional": PositionalNorm2d,
    "local_context": lambda channels: LocalContextNorm2d(channels, 4, window=8),
}


def block(norm: str, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
    """A convolution of the same padding, its norm and a ReLU."""
    arguments = (inputs, outputs, 3, stride, dilation, dilation)
    if norm == "kernel":
        return KNConv2d(*arguments, activation="relu")
    if norm == "kernel and squeeze-excite":
        return nn.Sequential(KNConv2d(*arguments, activation="relu"), SqueezeExcite(outputs))
    return nn.Sequential(nn.Conv2d(*arguments), NORMS[norm](outputs), nn.ReLU())


def flat(norm: str) -> nn.Sequential:
    """A segmentation network that keeps the resolution."""
    return nn.Sequential(
        block(norm, 3, 8),
        block(norm, 8, 16, dilation=2),
        block(norm, 16, 16, dilation=3),
        nn.Conv2d(16, 4, 3, padding=1),
    )


def hourglass(norm: str, mode: str = "nearest") -> nn.Sequential:
    """A segmentation network that works at a half and a quarter of the resolution."""
    return nn.Sequential(
        block(norm, 3, 8, stride=2),
        block(norm, 8, 16),
        nn.MaxPool2d(3, 2, padding=1),
        block(norm, 16, 16, dilation=2),
        nn.Upsample(scale_factor=2, mode=mode),
        block(norm, 16, 8),
        nn.Upsample(scale_factor=2, mode=mode),
        nn.Conv2d(8, 4, 3, padding=1),
    )


def bilinear_hourglass(norm: str) -> nn.Sequential:
    return hourglass(norm, mode="bilinear")


NETWORKS = {flat: 1, hourglass: 4, bilinear_hourglass: 4}
"""Networks, and the pixels of the image per pixel of their coarsest map."""


def layers_of(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a sequence that look at more than one pixel, or change the resolution."""
    kinds = (nn.Conv2d, nn.MaxPool2d, KernelNorm2d, nn.Upsample)
    return (layer for layer in network.modules() if isinstance(layer, kinds))


def number(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def overlap_of(network: nn.Module, grid: int) -> int:
    """The overlap that docs/tiles.md tells to take: from the last layer to the first."""
    overlap = 0
    for layer in reversed([*layers_of(network)]):
        if isinstance(layer, nn.Upsample):
            neighbour = 0 if layer.mode == "nearest" else 1 / 2
            overlap = math.ceil(overlap / layer.scale_factor + neighbour)
        else:
            stride, padding = number(layer.stride), number(layer.padding)
            reach = number(getattr(layer, "dilation", 1)) * (number(layer.kernel_size) - 1)
            if isinstance(layer, KernelNorm2d):
                overlap = math.ceil(overlap / number(layer.kernel_size))
            overlap = stride * overlap + max(padding, reach - padding - (stride - 1))
    return math.ceil(overlap / grid) * grid


def image_of(side: int = SIDE) -> Tensor:
    """Noise whose brightness and contrast grow to the right and downwards."""
    ramp = torch.linspace(0.1, 2, side, dtype=torch.float64)
    return torch.rand(1, 3, side, side, dtype=torch.float64) * ramp * ramp[:, None]


def evaluated(network: nn.Module, image: Tensor) -> nn.Module:
    """The network in evaluation; a BatchNorm takes the statistics of the image."""
    network.double().train()
    with torch.no_grad():
        network(image)
    return network.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, in standard deviations of ``b``."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.std()).item()


@torch.no_grad()
def tiled_difference(network: nn.Module, image: Tensor, overlap: int) -> float:
    return difference(in_tiles(network, image, TILE, overlap), network(image))


@pytest.mark.parametrize(
    ("layers", "scale"),
    [
        ([KNConv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2)], 2),
        ([KNConv2d(3, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=4)], 2),
        ([KernelNorm2d(3, 2, 1)], 1.5),
        ([KNConv2d(3, 4, 3, padding=1), KernelNorm2d(3, 1, 1)], 3),
    ],
)
def test_maps_that_are_larger_than_the_image(layers: list[nn.Module], scale: float):
    network, image = nn.Sequential(*layers).double().eval(), image_of()
    assert network(image).shape[-1] == scale * image.shape[-1]
    assert tiled_difference(network, image, 8) < TOLERANCE


@pytest.mark.parametrize("norm", ["kernel", "batch", "positional"])
@pytest.mark.parametrize("make", NETWORKS)
def test_local_networks_give_in_tiles_what_they_give_at_once(make, norm: str):
    image = image_of()
    network = evaluated(make(norm), image)
    overlap = overlap_of(network, NETWORKS[make])
    assert tiled_difference(network, image, overlap) < TOLERANCE


@pytest.mark.parametrize(
    ("norm", "least"),
    [("group", 0.1), ("layer", 0.1), ("instance", 0.1), ("kernel and squeeze-excite", FAILURE)],
)
@pytest.mark.parametrize("make", NETWORKS)
def test_networks_that_look_at_the_whole_map_do_not(make, norm: str, least: float):
    """Not even with an overlap of a whole tile."""
    image = image_of()
    network = evaluated(make(norm), image)
    assert tiled_difference(network, image, overlap=TILE) > least


@pytest.mark.parametrize("make", NETWORKS)
def test_less_overlap_is_too_little(make):
    """One pixel less, or with strides the next smaller multiple of the coarsest map's pixel."""
    image = image_of()
    network = evaluated(make("kernel"), image)
    grid = NETWORKS[make]
    assert tiled_difference(network, image, overlap_of(network, grid) - grid) > FAILURE


def test_tiles_have_to_start_on_pixels_of_the_coarsest_map():
    image = image_of()
    network = evaluated(hourglass("kernel"), image)
    overlap = overlap_of(network, grid=4)
    assert tiled_difference(network, image, overlap + 4) < TOLERANCE
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        tiled_difference(network, image, overlap + 2)


def test_the_overlap_is_how_far_an_output_sees():
    """Without strides, exactly: the gradient of a pixel of the output reaches that far."""
    network = flat("kernel").double().eval()
    image = image_of().requires_grad_()
    middle = SIDE // 2
    network(image)[0, :, middle, middle].square().sum().backward()
    _, _, rows, columns = image.grad.nonzero(as_tuple=True)
    overlap = overlap_of(network, grid=1)
    for seen in (rows, columns):
        assert (seen.min(), seen.max()) == (middle - overlap, middle + overlap)


@pytest.mark.parametrize(
    ("layer", "scale"),
    [
        (KernelNorm2d(1), 1),  # that of rule IV
        (KernelNorm2d(4), 1),  # windows side by side: tiles start where a window does
        (KernelNorm2d(3, stride=1, padding=1), 3),  # each window a 3x3 block of its own
        (KernelNorm2d(4, stride=2, padding=1), 2),
        (LocalContextNorm2d(16, 4, window=8).double().requires_grad_(False), 1),
    ],
    ids=str,
)
def test_norms_of_windows_are_local(layer: nn.Module, scale: int):
    """A KernelNorm of windows larger than its stride enlarges the map, and the tiles with it."""
    image = image_of(side=64).repeat(1, 6, 1, 1)[:, :16]
    whole = layer.eval()(image)
    assert whole.shape[-1] == scale * image.shape[-1]
    overlap = 8
    for left in (0, 16, 32, 48):
        start = max(left - overlap, 0)
        tile = layer(image[..., start : left + 16 + overlap])[..., scale * (left - start) :]
        expected = whole[..., scale * left : scale * (left + 16)]
        assert difference(tile[..., : 16 * scale], expected) < TOLERANCE


def test_kernel_norms_between_convolutions_are_local():
    network = nn.Sequential(
        KNConv2d(3, 8, 3, padding=1, activation="relu"),
        KernelNorm2d(3, stride=1, padding=1),
        nn.Conv2d(8, 8, 3, stride=3),
        KernelNorm2d(2),
        nn.Conv2d(8, 4, 3, padding=1),
    )
    image = image_of()
    network = evaluated(network, image)
    overlap = overlap_of(network, grid=2)
    assert tiled_difference(network, image, overlap) < TOLERANCE
    assert tiled_difference(network, image, overlap - 2) > FAILURE


@pytest.mark.parametrize(
    ("name", "options", "overlap"),
    [
        ("vgg8", {"width": 0.25}, 24),
        pytest.param("resnet18", {"small_images": True}, 56, marks=pytest.mark.slow),
    ],
)
def test_the_pooling_is_a_mean_over_tiles_and_all_before_it_is_local(name, options, overlap):
    """Rule IV's head among it; so an image's scores are those of the mean of its tiles' maps."""
    network = create_model(name, num_classes=5, **options).double().eval()
    *features, pooling, linear = network.children()
    assert isinstance(pooling, nn.AdaptiveAvgPool2d)
    features = nn.Sequential(*features)
    image = image_of(side=192)[..., :16, :]
    with torch.no_grad():
        tiled = in_tiles(features, image, 64, overlap)
        assert difference(tiled, features(image)) < TOLERANCE
        assert difference(linear(tiled.mean(dim=(2, 3))), network(image)) < TOLERANCE
        assert difference(in_tiles(features, image, 64, overlap - 8), features(image)) > FAILURE


def gradients(network: nn.Module, losses: Iterator[Tensor]) -> list[Tensor]:
    """The gradients of the parameters, accumulated over losses."""
    network.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in network.parameters()]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two gradients, each parameter's relative to its largest element.

    Parameters whose gradient is zero but for rounding are left out: biases before a BatchNorm.
    """
    largest = max(g.abs().max().item() for g in b)
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if y.abs().max() > 1e-9 * largest]
    assert len(pairs) > 1
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def without_dropout(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, (KNConv2d, KernelNorm2d)):
            layer.dropout_p = 0.0
    return network


def tile_losses(network: nn.Module, image: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """The loss of each tile's pixels, summed, with one tile's activations in memory at a time."""
    overlap = overlap_of(network, grid=1)
    for left in range(0, SIDE, TILE):
        start = max(left - overlap, 0)
        scores = network(image[..., start : left + TILE + overlap])
        own = scores[..., left - start :][..., :TILE]
        yield nn.functional.cross_entropy(own, labels[..., left : left + TILE], reduction="sum")


@pytest.mark.parametrize(("norm", "exact"), [("kernel", True), ("batch", False), ("group", False)])
def test_training_on_tiles_is_training_on_the_image(norm: str, exact: bool):
    image = image_of()
    labels = torch.randint(0, 4, (1, SIDE, SIDE))
    network = without_dropout(flat(norm)).double()
    loss = nn.functional.cross_entropy(network(image), labels, reduction="sum")
    whole = gradients(network, iter([loss]))
    tiled = gradients(network, tile_losses(network, image, labels))
    error = largest_difference(tiled, whole)
    assert error < 1e-9 if exact else error > FAILURE


NO_DROPOUT = {"dropout_p": 0, "head_dropout_p": 0}


def vgg8(norm: str) -> nn.Module:
    rules = {"dropout_p": 0} if norm == "kernel" else None
    return create_model("vgg8", norm=norm, width=0.25, rules=rules)


def resnet18(norm: str) -> nn.Module:
    rules = NO_DROPOUT if norm == "kernel" else None
    return create_model("resnet18", norm=norm, num_classes=10, small_images=True, rules=rules)


def densenet(norm: str) -> nn.Module:
    """A narrow DenseNet of DenseNet-121's layout."""
    rules = NO_DROPOUT if norm == "kernel" else None
    return DenseNet(8, (6, 12, 24, 16), 16, norm, 10, 3, small_images=True, rules=rules)


def in_batches(network: nn.Module, images: Tensor, labels: Tensor, size: int) -> list[Tensor]:
    """The gradients of the mean loss, accumulated over batches of this size."""
    batches = zip(images.split(size), labels.split(size), strict=True)
    return gradients(
        network,
        (
            nn.functional.cross_entropy(network(x), y, reduction="sum") / len(images)
            for x, y in batches
        ),
    )


@pytest.mark.parametrize(
    ("make", "count", "sizes"),
    [
        (vgg8, 64, (1, 2, 16)),
        pytest.param(resnet18, 4, (1,), marks=pytest.mark.slow),
        (densenet, 8, (1,)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize(("norm", "exact"), [("kernel", True), ("batch", False)])
def test_accumulated_gradients_are_those_of_the_large_batch(make, norm, exact, count, sizes):
    """Images one by one train a kernel normalised network as all at once do."""
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,))
    network = make(norm).double()
    at_once = in_batches(network, images, labels, count)
    for size in sizes:
        error = largest_difference(in_batches(network, images, labels, size), at_once)
        assert error < 1e-9 if exact else error > FAILURE


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("make", [vgg8, resnet18, densenet])
def test_an_output_does_not_depend_on_the_other_images_of_the_batch(make, training: bool):
    network = make("kernel").double().train(training)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    others = torch.full_like(images, float("nan"))
    others[1] = images[1]
    with torch.no_grad():
        together, alone = network(images)[1], network(images[1:2])[0]
        assert difference(network(others)[1], together) < 1e-12
        assert difference(alone, together) < 1e-12
