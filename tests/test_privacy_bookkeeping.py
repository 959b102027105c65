"""Bookkeeping: the sum of the clipped gradients of whole networks, its memory, its engine."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("opacus")

from opacus import PrivacyEngine as OpacusEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.models import create_model, vgg8
from kernelnorm.models.densenet import DenseNet
from kernelnorm.norms import WSConv2d
from kernelnorm.ops.windows import Geometry
from kernelnorm.privacy import PrivacyEngine, gradients
from kernelnorm.privacy.book import Vectors, Weight, weight_entry
from kernelnorm.privacy.product import Product, unnormalised
from tests.bookkeeping import classification, images, private, small, step
from tests.per_sample import (
    SEED,
    assert_close,
    clipped_sums,
    loader,
    norms,
    projection,
    sample_gradients,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def normalised(groups: int, bias: bool = True) -> nn.Module:
    """A network of which only GroupNorm is trained."""
    norm = nn.GroupNorm(groups, 8)
    if not bias:
        norm.register_parameter("bias", None)
    first, last = nn.Conv2d(3, 8, 3).requires_grad_(False), nn.Conv2d(8, 4, 7).requires_grad_(False)
    return nn.Sequential(first, norm, nn.ReLU(), last, nn.Flatten())


def tokens() -> nn.Module:
    """Linear layers on sequences, with positions between the batch and the features."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(81, 7),
        nn.Tanh(),
        nn.Linear(7, 5, bias=False),
        nn.Flatten(1),
        nn.Linear(15, 4),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "vgg8": lambda: vgg8(width=0.125),
    "vgg8 with GroupNorm": lambda: vgg8("group", width=0.125),
    "vgg8 with WS + GroupNorm": lambda: vgg8("ws_group", width=0.125),
    "resnet18": lambda: create_model("resnet18", num_classes=4),
    "knresnet13": lambda: create_model("knresnet13", num_classes=4),
    "densenet": lambda: DenseNet(4, (2, 1, 1, 2), 8, "kernel", 4, 3, True, None),
    "sequences": tokens,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "resnet18" else n for n in NETWORKS]
)
def test_sum_is_clip_then_add(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    x = images(3, size=9 if name in ("small", "sequences") else 16)
    gradients = sample_gradients(network, x, classification)
    for max_norm in (0.5, 1e4):
        wrapped, optimizer, _ = private(copy.deepcopy(network), x, max_grad_norm=max_norm)
        step(wrapped, optimizer, x)
        expected = clipped_sums(gradients, max_norm)
        for parameter, total in zip(trained(wrapped), expected, strict=True):
            assert_close(parameter.summed_grad, total)
            assert_close(parameter.grad, total / 3)
            assert not parameter.grad.requires_grad


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "name", ["small", "vgg8 with GroupNorm", "vgg8 with WS + GroupNorm", "sequences"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_none_and_one(n: int, name: str, reduction: str) -> None:
    network, x = NETWORKS[name]().double(), images(2, size=9)[:n]
    expected = clipped_sums(sample_gradients(network, x, classification), 0.5)
    network, optimizer, _ = private(network, images(2), loss_reduction=reduction)
    step(network, optimizer, x, reduction)
    for parameter, total in zip(trained(network), expected, strict=True):
        assert_close(parameter.summed_grad, total)
        assert not parameter.grad.isnan().any()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_concatenations_with_opacus_own_modes(mode: str) -> None:
    """KNConvs keep the parts of a concatenation, which the samplers put together."""
    torch.manual_seed(0)
    network, x = NETWORKS["densenet"]().double(), images(3, size=16)
    expected = clipped_sums(sample_gradients(network, x, classification), 0.5)
    wrapped, optimizer, *others = private(network, x, grad_sample_mode=mode)
    criterion = others[0] if mode == "ghost" else nn.CrossEntropyLoss()
    torch.manual_seed(SEED)
    criterion(wrapped(x), torch.arange(3)).backward()
    optimizer.step()
    for parameter, total in zip(trained(network), expected, strict=True):
        assert_close(parameter.summed_grad, total)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 2, 3, 2), (0, 6, 3)])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_group_norm_of_any_shape(shape: tuple[int, ...], frozen: str | None) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.GroupNorm(3, 6)).double(), torch.randn(shape).double() + 1
    nn.init.normal_(network[0].weight)
    if frozen is not None:
        getattr(network[0], frozen).requires_grad_(False)
    expected = clipped_sums(sample_gradients(network, x, projection), 0.5)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    network, optimizer, _ = private(network, images(2))
    projection(network(x)).mean().backward()
    optimizer.step()
    for parameter, total in zip(trained(network), expected, strict=True):
        assert_close(parameter.summed_grad, total)


@given(
    seed=st.integers(0, 2**31),
    max_norm=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
@settings(max_examples=40, deadline=None)
def test_no_sample_moves_the_sum_by_more_than_the_bound(
    seed: int, max_norm: float, scale: float
) -> None:
    """In float32: the norm of the sum for a single sample is at most the bound."""
    torch.manual_seed(seed)
    network, x = small(), torch.randn(1, 3, 9, 9) * scale + scale
    wrapped, optimizer, _ = private(network, x, max_grad_norm=max_norm)
    step(wrapped, optimizer, x)
    total = norms([parameter.summed_grad[None] for parameter in trained(network)])
    assert total.item() <= max_norm * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["kernel", "group"])
def test_float32_agrees_with_float64(norm: str) -> None:
    torch.manual_seed(0)
    network, x = vgg8(norm, width=0.25), images(6, size=32, dtype=torch.float32)
    expected = clipped_sums(sample_gradients(network.double(), x.double(), classification), 0.5)
    network, optimizer, _ = private(network.float(), x)
    step(network, optimizer, x)
    for parameter, total in zip(trained(network), expected, strict=True):
        assert_close(parameter.summed_grad.double(), total, tolerance=1e-4)


def test_autocast_to_bfloat16() -> None:
    network, x = small(), images(4, dtype=torch.float32)
    expected = clipped_sums(sample_gradients(network, x, classification), 0.5)
    network, optimizer, _ = private(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        step(network, optimizer, x)
    for parameter, total in zip(trained(network), expected, strict=True):
        assert parameter.summed_grad.dtype == torch.float32
        assert_close(parameter.summed_grad, total, tolerance=0.05)


def test_autocast_of_ordinary_convolutions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        kn.KNConv2d(3, 8, 3, activation="relu"), nn.Conv2d(8, 8, 3), WSConv2d(8, 4, 3)
    )
    x = images(3, dtype=torch.float32)
    expected = clipped_sums(sample_gradients(network, x, projection), 0.5)
    wrapped, optimizer, _ = private(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(SEED)
        y = wrapped(x)
        assert y.dtype == torch.bfloat16
        projection(y.float()).mean().backward()
    optimizer.step()
    for parameter, total in zip(trained(network), expected, strict=True):
        assert parameter.summed_grad.dtype == torch.float32
        assert (parameter.summed_grad - total).norm() < 0.1 * total.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [small, lambda: normalised(4), lambda: normalised(4, bias=False)])
def test_rounding_does_not_exceed_the_norm(
    dtype: torch.dtype, make: Callable[[], nn.Module]
) -> None:
    network, x = make(), images(1, dtype=torch.float32)
    network, optimizer, _ = private(network, x, max_grad_norm=1e-3)
    for _ in range(20):
        with torch.autocast("cpu", dtype):
            step(network, optimizer, x)
        total = torch.cat([p.summed_grad.flatten() for p in trained(network)])
        assert total.norm() < 1e-3 * (1 + 1e-5)


@pytest.mark.parametrize(("positions", "entry"), [(4, Weight), (1024, Vectors)])
def test_gradients_are_kept_where_positions_are_many(positions: int, entry: type) -> None:
    pointwise = Geometry((1,), (1,), (0,), (1,))
    weight = nn.Parameter(torch.zeros(64, 64, 1))
    x, z = torch.randn(2, 2, 64, positions)
    made = weight_entry(weight, Product(x, z, unnormalised(pointwise, 1)))
    assert isinstance(made, entry)


@pytest.mark.parametrize(("channels", "entry"), [(32, Vectors), (256, Weight)])
def test_large_gradients_are_not_kept(channels: int, entry: type) -> None:
    geometry = Geometry((7, 7), (1, 1), (3, 3), (1, 1))
    weight = nn.Parameter(torch.zeros(channels, channels, 7, 7))
    x, z = torch.randn(2, 1, channels, 26, 26)
    product = Product(x, z, unnormalised(geometry, 1))
    assert not gradients.ghost_is_faster(product, kept=True)
    assert isinstance(weight_entry(weight, product), entry)


@pytest.mark.parametrize("kind", [partial(kn.KNConv2d, dropout_p=0), WSConv2d])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_ghost_norms_in_float32_are_exact(mean: float, kind: Callable[..., nn.Module]) -> None:
    """Also with a large mean, and with windows of zeros, whose gradients are large.

    They are larger by the bound on the rounding of the sum, which is relative to the mean.
    """
    torch.manual_seed(0)
    layer = kind(8, 4, 3, padding=1)
    x = torch.randn(3, 8, 8, 8).relu() + mean
    x[:, :, :4] = 0
    results = []
    for dtype in (torch.float32, torch.float64):
        wrapped, *_ = private(layer.to(dtype), x)
        y = wrapped(x.to(dtype))
        with mock.patch.object(gradients, "ghost_is_faster", return_value=dtype == torch.float32):
            (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        results.append(wrapped.book.norms().double())
        layer = wrapped.to_standard_module()
    norms, exact = results
    assert (norms > (1 - 1e-5) * exact).all()
    assert (norms < (1 + (1e-3 if mean else 1e-5)) * exact).all()


def test_batch_memory_manager_splits_batches() -> None:
    x = images(7, dtype=torch.float64)
    results = []
    for size in (7, 3):
        network = small(p=0).double()
        wrapped, optimizer, batches = private(network, x, poisson_sampling=False)
        with BatchMemoryManager(
            data_loader=batches, max_physical_batch_size=size, optimizer=optimizer
        ) as parts:
            for part, _ in parts:
                optimizer.zero_grad()
                wrapped(part).square().sum(1).mean().backward()
                optimizer.step()
        results.append([p.detach() for p in network.parameters()])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_evaluation_is_untouched() -> None:
    network, x = small(), images(2, dtype=torch.float32)
    expected = network.eval()(x)
    wrapped, *_ = private(network.train(), x)
    wrapped.eval()
    with torch.no_grad():
        assert torch.equal(wrapped(x), expected)
        assert torch.equal(wrapped(x), expected)


def test_network_comes_back_as_it_was() -> None:
    network, x = small(), images(2, dtype=torch.float32)
    wrapped, optimizer, _ = private(network, x)
    step(wrapped, optimizer, x)
    assert wrapped.to_standard_module() is network
    network.zero_grad()
    for _ in range(2):  # no book complains
        classification(network(x)).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    again, optimizer, _ = private(network, x)
    step(again, optimizer, x)


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks", "ghost"])
def test_memory_is_released(mode: str) -> None:
    network, x = small(), images(5, dtype=torch.float32)
    made = private(network, x, grad_sample_mode=mode)
    wrapped, optimizer = made[:2]
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    outputs: list[weakref.ref[Tensor]] = []
    network[1].register_forward_hook(lambda *call: outputs.append(weakref.ref(call[2])))
    for _ in range(3):
        optimizer.zero_grad()
        loss = criterion(wrapped(x), torch.arange(5) % 4)
        loss.backward()
        optimizer.step()
        del loss
    gc.collect()
    assert len(outputs) == 3
    assert not [reference for reference in outputs if reference() is not None]
    alive = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape[:1] == (5,)]
    # Opacus keeps the gradients of the samples until the next call of zero_grad().
    of_samples = {(5, *p.shape) for p in network.parameters()} if mode == "hooks" else set()
    assert {tuple(t.shape) for t in alive} <= {tuple(x.shape), (5,), *of_samples}


def test_activations_are_released_by_zero_grad() -> None:
    network, x = small(), images(4, dtype=torch.float32)
    wrapped, optimizer, _ = private(network, x)
    pointers: list[int] = []
    network[0].register_forward_hook(lambda *call: pointers.append(call[2].data_ptr()))

    def is_stored() -> bool:
        gc.collect()
        alive = (t for t in gc.get_objects() if isinstance(t, Tensor) and t.numel() == 4 * 8 * 81)
        return any(tensor.data_ptr() == pointers[0] for tensor in alive)

    with mock.patch.object(gradients, "is_kept", return_value=False):
        classification(wrapped(x)).mean().backward()
    assert is_stored()
    optimizer.zero_grad()
    assert not is_stored()
    step(wrapped, optimizer, x)


@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_make_private_with_epsilon_keeps_books_too() -> None:
    network = small()
    engine = PrivacyEngine(accountant="rdp")
    wrapped, optimizer, batches = engine.make_private_with_epsilon(
        module=network,
        optimizer=SGD(network.parameters(), lr=0.1),
        data_loader=loader(images(8, dtype=torch.float32), 2),
        target_epsilon=4.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
        augmentations=2,
    )
    assert wrapped.book.augmentations == 2
    for x, _ in [*batches, *batches]:
        step(wrapped, optimizer, x.repeat_interleave(2, 0))
    assert 3.9 < engine.get_epsilon(1e-3) <= 4.0


def test_is_an_engine_of_opacus() -> None:
    assert issubclass(PrivacyEngine, OpacusEngine)
