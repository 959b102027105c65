"""The rivals against direct rewrites of their formulas, in float64: values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelnorm.norms import (
    BatchChannelNorm2d,
    BatchRenorm2d,
    EvoNorm2dS0,
    FilterResponseNorm2d,
    ScaledReLU,
    ScaledWSConv2d,
    SlidingLocalContextNorm2d,
    WSConv2d,
    make_norm,
    weight_norm_conv,
)

SHAPES = st.tuples(
    st.integers(1, 3), st.sampled_from([2, 4, 6]), st.integers(1, 5), st.integers(1, 5)
)
QUICK = settings(max_examples=25, deadline=None)


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64 with other parameters and running statistics than the first ones."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if "mean" in name:
            buffer.normal_()
        elif buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return module


def images(shape: tuple[int, ...]) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()


def c(x: Tensor) -> Tensor:
    """One number a channel, beside feature maps."""
    return x[None, :, None, None]


def assert_same(module: nn.Module, rewrite: Callable[..., Tensor], x: Tensor) -> None:
    """Values, and gradients of the input and all parameters."""
    other = copy.deepcopy(module)
    expected, actual = rewrite(other, x), module(x)
    torch.testing.assert_close(actual, expected)
    toward = torch.randn_like(expected)
    inputs = [(x, x), *zip(module.parameters(), other.parameters(), strict=True)]
    ours = torch.autograd.grad((actual * toward).sum(), [a for a, _ in inputs])
    theirs = torch.autograd.grad((expected * toward).sum(), [b for _, b in inputs])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def group_variance(x: Tensor, group_size: int) -> Tensor:
    """The biased variance of each group, at each of its channels."""
    groups = [
        g.var(dim=(1, 2, 3), correction=0)[:, None].expand(-1, group_size)
        for g in x.split(group_size, dim=1)
    ]
    return torch.cat(groups, dim=1)[..., None, None]


@QUICK
@given(SHAPES, st.sampled_from([1, 2]))
def test_evonorm_s0(shape: tuple[int, int, int, int], group_size: int) -> None:
    def rewrite(norm: EvoNorm2dS0, x: Tensor) -> Tensor:
        y = x / (1 + torch.exp(-c(norm.v) * x)) / (group_variance(x, group_size) + 1e-5).sqrt()
        return y * c(norm.weight) + c(norm.bias)

    assert_same(drawn(EvoNorm2dS0(shape[1], group_size)), rewrite, images(shape))


@QUICK
@given(SHAPES)
def test_filter_response_norm(shape: tuple[int, int, int, int]) -> None:
    def rewrite(norm: FilterResponseNorm2d, x: Tensor) -> Tensor:
        nu2 = (x**2).sum((2, 3), keepdim=True) / (shape[2] * shape[3])
        y = x / (nu2 + 1e-6).sqrt() * c(norm.weight) + c(norm.bias)
        return torch.relu(y - c(norm.tau)) + c(norm.tau)

    assert_same(drawn(FilterResponseNorm2d(shape[1])), rewrite, images(shape))


@pytest.mark.parametrize("norm", [EvoNorm2dS0(4, 2, False), FilterResponseNorm2d(4, False)])
def test_without_the_activation(norm: nn.Module) -> None:
    norm, x = drawn(norm), images((2, 4, 3, 5))
    rms = (x**2).mean((2, 3), keepdim=True).add(1e-6).sqrt()
    fraction = x / rms if isinstance(norm, FilterResponseNorm2d) else x
    torch.testing.assert_close(norm(x), fraction * c(norm.weight) + c(norm.bias))
    assert len(list(norm.parameters())) == 2


@QUICK
@given(SHAPES, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2]))
def test_sliding_local_context_norm(
    shape: tuple[int, int, int, int], rows: int, columns: int, group_size: int
) -> None:
    def rewrite(norm: SlidingLocalContextNorm2d, x: Tensor) -> Tensor:
        _, channels, height, width = shape
        r, s = min(rows, height), min(columns, width)
        y = torch.zeros_like(x)
        for k in range(channels):
            group = k // group_size * group_size
            for i in range(height):
                for j in range(width):
                    top = min(max(i - (r - 1) // 2, 0), height - r)
                    left = min(max(j - (s - 1) // 2, 0), width - s)
                    unit = x[:, group : group + group_size, top : top + r, left : left + s]
                    variance = unit.var(dim=(1, 2, 3), correction=0)
                    value = (x[:, k, i, j] - unit.mean((1, 2, 3))) / (variance + 1e-5).sqrt()
                    at = torch.zeros_like(x)
                    at[:, k, i, j] = 1
                    y = y + at * value[:, None, None, None]
        return y * c(norm.weight) + c(norm.bias)

    norm = drawn(SlidingLocalContextNorm2d(shape[1], group_size, (rows, columns)))
    assert_same(norm, rewrite, images(shape))


def test_sliding_local_context_norm_with_a_large_window_is_group_norm() -> None:
    norm, x = SlidingLocalContextNorm2d(6, 3, window=100), torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(norm(x), nn.GroupNorm(2, 6)(x), rtol=1e-4, atol=1e-5)


def test_sliding_local_context_norm_far_from_zero_keeps_its_digits() -> None:
    norm, x = SlidingLocalContextNorm2d(4, 2, window=3), torch.randn(2, 4, 9, 9)
    expected = copy.deepcopy(norm).double()((x + 1000).double())
    torch.testing.assert_close(norm(x + 1000).double(), expected, rtol=1e-3, atol=1e-3)


def test_sliding_local_context_norm_beside_an_edge_keeps_its_digits() -> None:
    norm, x = SlidingLocalContextNorm2d(2, 2, window=5), 0.3 * torch.randn(1, 2, 32, 32)
    x[..., 16:] += 1000
    expected = copy.deepcopy(norm).double()(x.double())
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-3, atol=2e-3)


LIMITS = [(0, 1, 0), (5000, 1, 0), (15000, 1 + 2 * 10 / 35, 2.5), (25000, 1 + 40 / 35, 5)]


@pytest.mark.parametrize(("step", "r_max", "d_max"), [*LIMITS, (40000, 3, 5), (10**6, 3, 5)])
def test_batch_renorm_in_training(step: int, r_max: float, d_max: float) -> None:
    def rewrite(norm: BatchRenorm2d, x: Tensor) -> Tensor:
        mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
        sigma = norm.running_std
        r = (std.detach() / sigma).clamp(r_min, r_max)
        d = ((mean.detach() - norm.running_mean) / sigma).clamp(-d_max, d_max)
        y = (x - c(mean)) / c(std) * c(r) + c(d)
        return y * c(norm.weight) + c(norm.bias)

    norm = drawn(BatchRenorm2d(24))
    norm.running_std.mul_(torch.logspace(-2, 2, 24))  # r is below, in and above its limits
    norm.num_batches_tracked.fill_(step)
    assert [round(float(limit), 5) for limit in norm.limits()] == [round(r_max, 5), d_max]
    most, d_most = norm.limits()  # their float32 is not the subject
    r_min, r_max, d_max = (1 / most).item(), most.item(), d_most.item()
    assert_same(norm, rewrite, images((2, 24, 3, 4)))


def test_batch_renorm_moves_its_running_statistics_by_a_hundredth() -> None:
    norm, x = BatchRenorm2d(4).double(), images((3, 4, 5, 6)).detach() * 3
    norm.num_batches_tracked.fill_(200)
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.01 * x.mean((0, 2, 3)))
    std = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm.running_std, 1 + 0.01 * (std - 1))
    assert norm.num_batches_tracked == 201


def test_batch_renorm_first_takes_the_mean_of_all_batches() -> None:
    norm = BatchRenorm2d(4).double()
    batches = [images((3, 4, 5, 6)).detach() * 3 for _ in range(5)]
    for x in batches:
        norm(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    stds = torch.stack([(x.var((0, 2, 3), correction=0) + 1e-5).sqrt() for x in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_std, stds.mean(0))


def test_batch_renorm_starts_as_batch_norm() -> None:
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(BatchRenorm2d(4)(x), nn.BatchNorm2d(4)(x))


def test_training_between_evaluation_and_its_backward_pass() -> None:
    norm, x = BatchRenorm2d(4), torch.randn(2, 4, 5, 5, requires_grad=True)
    y = norm.eval()(x)
    norm.train()(x.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_batch_renorm_without_limits_uses_the_running_statistics() -> None:
    norm, x = drawn(BatchRenorm2d(4)), images((3, 4, 5, 6))
    norm.num_batches_tracked.fill_(40000)
    norm.running_std.copy_(x.std((0, 2, 3)).detach())
    norm.running_mean.copy_(x.mean((0, 2, 3)).detach())
    in_evaluation = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(norm(x), in_evaluation)
    expected = (x - c(x.mean((0, 2, 3)))) / c(x.std((0, 2, 3)))
    torch.testing.assert_close(in_evaluation, expected * c(norm.weight) + c(norm.bias))


def test_batch_renorm_refuses_one_value_a_channel_as_batch_norm_does() -> None:
    with pytest.raises(ValueError, match=r"more than 1 value per channel in training, got \(1, 4"):
        BatchRenorm2d(4)(torch.randn(1, 4, 1, 1))


@QUICK
@given(SHAPES, st.sampled_from([1, 2]), st.booleans())
def test_batch_channel_norm(
    shape: tuple[int, int, int, int], group_size: int, training: bool
) -> None:
    def rewrite(norm: BatchChannelNorm2d, x: Tensor) -> Tensor:
        mean, variance = norm.batch.running_mean, norm.batch.running_var
        if training:
            new = ((x.detach() - c(mean)) ** 2).mean((0, 2, 3))
            variance = 0.7 * variance + 0.3 * new
            mean = 0.7 * mean + 0.3 * x.detach().mean((0, 2, 3))
        first = (x - c(mean)) / c(variance + 1e-5).sqrt()
        first = first * c(norm.batch.weight) + c(norm.batch.bias)
        means = [
            g.mean((1, 2, 3))[:, None].expand(-1, group_size) for g in first.split(group_size, 1)
        ]
        centred = first - torch.cat(means, dim=1)[..., None, None]
        y = centred / (group_variance(first, group_size) + 1e-5).sqrt()
        return y * c(norm.channel.weight) + c(norm.channel.bias)

    assume(shape[0] * group_size * shape[2] * shape[3] > 1)  # GroupNorm refuses single elements
    norm = drawn(BatchChannelNorm2d(shape[1], group_size, momentum=0.3)).train(training)
    assert_same(norm, rewrite, images(shape))


def test_running_statistics_are_as_they_were_in_evaluation_and_for_empty_batches() -> None:
    for norm in (drawn(BatchRenorm2d(4)), drawn(BatchChannelNorm2d(4, 2))):
        before = copy.deepcopy(dict(norm.named_buffers()))
        assert norm(torch.empty(0, 4, 5, 5).double()).shape == (0, 4, 5, 5)
        norm.eval()(torch.randn(2, 4, 5, 5).double())
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, before[name]), name


def test_local_response_norm_is_pytorchs() -> None:
    x = images((2, 8, 3, 4))
    expected = x.clone()
    for k in range(8):
        squares = (x[:, max(0, k - 2) : k + 3] ** 2).sum(1)
        expected[:, k] = x[:, k] / (1 + 1e-4 / 5 * squares) ** 0.75
    torch.testing.assert_close(make_norm("lrn", 8)(x), expected)


CONVS = [
    ((4, 6, 3), {"padding": 1}),
    ((4, 6, (1, 3)), {"stride": 2, "bias": False}),
    ((4, 8, 3), {"groups": 4, "dilation": 2, "padding": "same"}),
]


def conv(x: Tensor, module: nn.Conv2d, weight: Tensor) -> Tensor:
    return F.conv2d(
        x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups
    )


@pytest.mark.parametrize(("arguments", "options"), CONVS)
def test_weight_standardization(arguments: tuple[int, ...], options: dict[str, object]) -> None:
    def rewrite(module: WSConv2d, x: Tensor) -> Tensor:
        rows = [w - w.mean() for w in module.weight]
        rows = [w / ((w**2).mean() + 1e-5).sqrt() for w in rows]
        return conv(x, module, torch.stack(rows))

    assert_same(drawn(WSConv2d(*arguments, **options)), rewrite, images((2, 4, 7, 8)))


@pytest.mark.parametrize(("arguments", "options"), CONVS)
def test_scaled_weight_standardization(
    arguments: tuple[int, ...], options: dict[str, object]
) -> None:
    def rewrite(module: ScaledWSConv2d, x: Tensor) -> Tensor:
        rows = [w - w.mean() for w in module.weight]
        rows = [g * w / (w**2).sum().sqrt() for w, g in zip(rows, module.gain, strict=True)]
        return conv(x, module, torch.stack(rows))

    assert_same(drawn(ScaledWSConv2d(*arguments, **options)), rewrite, images((2, 4, 7, 8)))


def test_scaled_weight_standardization_of_equal_weights_is_finite() -> None:
    module = ScaledWSConv2d(4, 6, 3)
    nn.init.ones_(module.weight)
    module(torch.randn(1, 4, 5, 5)).sum().backward()
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize(("arguments", "options"), CONVS)
def test_weight_normalization(arguments: tuple[int, ...], options: dict[str, object]) -> None:
    module = weight_norm_conv(*arguments, **options).double()
    length, direction = (p for name, p in module.named_parameters() if "original" in name)
    nn.init.normal_(length)
    x = images((2, 4, 7, 8))
    rows = [g * w / (w**2).sum().sqrt() for g, w in zip(length, direction, strict=True)]
    torch.testing.assert_close(module(x), conv(x, module, torch.stack(rows)))


def test_the_scaled_relu_keeps_the_variance_of_normal_numbers() -> None:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    y = ScaledReLU()(x)
    mean = (density * y).sum()
    variance = (density * (y - mean) ** 2).sum()
    assert variance.item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(y == 0, x <= 0)
