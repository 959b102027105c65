import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernelnorm.norms import (
    NORMS,
    BatchChannelNorm2d,
    BatchRenorm2d,
    LocalContextNorm2d,
    PositionalNorm2d,
    ScaledWSConv2d,
    SlidingLocalContextNorm2d,
    describe,
    make_norm,
)

MORE_THAN_A_LAYER = ["batch_channel", "ws_group", "weight_norm", "nf", "kernel"]
LAYERS = [name for name in NORMS if name not in MORE_THAN_A_LAYER]
WITHOUT_PARAMETERS = ["lrn", "none"]


def randomised(norm: nn.Module) -> nn.Module:
    """The norm in float64, with a scale and a shift that differ from channel to channel."""
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def by_tiles(norm: nn.Module, x: Tensor, group_size: int, rows: int, columns: int) -> Tensor:
    """Normalises one tile after another: what the layers are checked against."""
    y = torch.empty_like(x)
    n, c, h, w = x.shape
    for sample in range(n):
        for k in range(0, c, group_size):
            for i in range(0, h, rows):
                for j in range(0, w, columns):
                    at = (
                        sample,
                        slice(k, k + group_size),
                        slice(i, i + rows),
                        slice(j, j + columns),
                    )
                    unit = x[at]
                    deviation = (unit.var(unbiased=False) + norm.eps).sqrt()
                    y[at] = (unit - unit.mean()) / deviation
    return y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


SHAPES = [(1, 4, 1, 1), (1, 6, 5, 7), (2, 8, 6, 9), (3, 12, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_positional_norm_normalises_each_position(shape):
    norm = randomised(PositionalNorm2d(shape[1]))
    x = torch.randn(shape, dtype=torch.float64) + 3
    torch.testing.assert_close(norm(x), by_tiles(norm, x, shape[1], 1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 3, 4, (2, 5), 100])
@pytest.mark.parametrize("group_size", [1, 2, "all"])
def test_local_context_norm_normalises_each_tile(shape, window, group_size):
    group_size = shape[1] if group_size == "all" else group_size
    norm = randomised(LocalContextNorm2d(shape[1], group_size, window))
    x = torch.randn(shape, dtype=torch.float64) + 3
    torch.testing.assert_close(norm(x), by_tiles(norm, x, group_size, *norm.window))


@pytest.mark.parametrize("norm", [PositionalNorm2d(4), LocalContextNorm2d(4, 2, (2, 3))])
def test_gradients(norm):
    norm = randomised(norm)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize(
    ("channels", "group_size"), [(64, 32), (16, 16), (48, 24), (33, 11), (51, 17), (37, 1)]
)
def test_group_norm_has_groups_of_32_or_the_largest_divisor_below(channels, group_size):
    norm = randomised(make_norm("group", channels))
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(x), by_tiles(norm, x, group_size, 3, 3))


def test_layer_norm_has_one_unit_a_sample():
    norm = randomised(make_norm("layer", 6))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(x), by_tiles(norm, x, 6, 3, 4))


def test_instance_norm_has_one_unit_a_channel_and_no_statistics_of_the_past():
    norm = randomised(make_norm("instance", 6))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(x), by_tiles(norm, x, 1, 3, 4))
    assert not list(norm.buffers())


def test_instance_norm_refuses_maps_of_one_position():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        make_norm("instance", 4)(torch.randn(2, 4, 1, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_shape_is_kept_and_every_parameter_is_one_a_channel(name):
    norm = make_norm(name, 64)
    x = torch.randn(2, 64, 9, 11)
    assert norm(x).shape == x.shape
    shapes = {tuple(p.shape) for p in norm.parameters()}
    assert shapes == (set() if name in WITHOUT_PARAMETERS else {(64,)})


@pytest.mark.parametrize("name", LAYERS)
def test_only_batch_dependent_norms_depend_on_the_batch(name):
    norm = make_norm(name, 8)
    x = torch.randn(3, 8, 5, 5)
    alone, together = norm(x[:1]), norm(x)[:1]
    independent = describe(name).group != "batch-dependent"
    assert torch.allclose(alone, together, atol=1e-6) == independent


def test_a_window_larger_than_the_map_is_the_map():
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(LocalContextNorm2d(4, 2, 512)(x), LocalContextNorm2d(4, 2, (3, 5))(x))


@pytest.mark.parametrize(
    "layer", [BatchRenorm2d(4), BatchChannelNorm2d(4, 2), ScaledWSConv2d(4, 4, 3)], ids=repr
)
def test_reset_parameters_resets_everything(layer):
    torch.manual_seed(0)
    fresh = copy.deepcopy(layer)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer(torch.randn(8, 4, 5, 5))
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
    torch.manual_seed(0)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [PositionalNorm2d(64), LocalContextNorm2d(64, 32, 4)])
def test_half_precision_inputs_have_float32_statistics(norm, dtype):
    x = (100 + torch.randn(2, 64, 9, 9)).to(dtype)
    assert torch.equal(norm(x), norm(x.float()).to(dtype))


@pytest.mark.parametrize(
    "norm", [PositionalNorm2d(4), LocalContextNorm2d(4, 2, 3), SlidingLocalContextNorm2d(4, 2, 3)]
)
def test_constant_units_and_empty_batches(norm):
    x = torch.full((2, 4, 5, 5), 7.0, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.isfinite().all()
    for shape in ((0, 4, 5, 5), (2, 4, 0, 5)):
        assert norm(torch.empty(shape)).shape == shape


def test_repr_shows_the_arguments():
    assert repr(PositionalNorm2d(4)) == "PositionalNorm2d(4, eps=1e-05)"
    assert (
        repr(LocalContextNorm2d(4, 2, 3))
        == "LocalContextNorm2d(4, eps=1e-05, group_size=2, window=(3, 3))"
    )


@pytest.mark.parametrize("norm", [PositionalNorm2d(4), LocalContextNorm2d(4, 2, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (4, 5, 5), (2, 4, 5)])
def test_wrong_inputs_are_refused(norm, shape):
    with pytest.raises(ValueError, match=r"expected an input \(n, 4, h, w\), got"):
        norm(torch.randn(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 2), "channels must be an integer of at least 1 .*, got 0"),
        (("6", 1, 2), "channels must be an integer of at least 1 .*, got '6'"),
        ((6, 4, 2), "group_size must divide channels = 6, got 4"),
        ((6, 2.0, 2), "group_size must be an integer of at least 1 .*, got 2.0"),
        ((6, 2, 0), "window must be an integer of at least 1 .*, got 0"),
        ((6, 2, (2.5, 3)), r"window must be an integer .*, got \(2.5, 3\)"),
        ((6, 2, (1, 2, 3)), r"window must be an integer .*, or 2 of them, got \(1, 2, 3\)"),
        ((6, 2, 3, -1.0), "eps must be at least .* and finite, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalContextNorm2d(*arguments)


def test_more_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="momentum must be above 0 and at most 1, got 5"):
        BatchChannelNorm2d(4, 2, momentum=5)
    with pytest.raises(ValueError, match=r"channels must be an integer of at least 1 .*, got 0"):
        make_norm("layer", 0)
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch\.uint8"):
        PositionalNorm2d(3)(torch.ones(1, 3, 2, 2, dtype=torch.uint8))


def test_unknown_norms_are_refused_with_the_choices():
    for function in (describe, lambda name: make_norm(name, 4)):
        with pytest.raises(
            ValueError, match=f"unknown norm 'bacth', choose one of: {', '.join(NORMS)}$"
        ):
            function("bacth")


@pytest.mark.parametrize("name", MORE_THAN_A_LAYER)
def test_norms_with_a_convolution_of_their_own_are_no_layers(name):
    classes = {"kernel": "KNConv2d", "weight_norm": "weight_norm_conv", "nf": "ScaledWSConv2d"}
    with pytest.raises(ValueError, match=f"by .*{classes.get(name, 'WSConv2d')}. kernelnorm.mod"):
        make_norm(name, 4)


def test_what_is_known_of_the_norms():
    dependent = [name for name in NORMS if describe(name).group == "batch-dependent"]
    assert dependent == ["batch", "batch_renorm", "batch_channel"]
    weights = [name for name in NORMS if describe(name).group == "weight-based"]
    assert weights == ["ws_group", "weight_norm", "nf"]
    assert [n for n in NORMS if not describe(n).batch_one] == ["batch", "batch_renorm"]
    assert {n: describe(n).needs for n in NORMS if describe(n).needs} == {"nf": ("agc",)}
    assert len({describe(name).label for name in NORMS}) == len(NORMS)
    with_activation = [name for name in NORMS if describe(name).has_activation]
    assert with_activation == ["evonorm_s0", "frn", "nf"]


def test_the_page_has_each_norm_with_what_it_needs():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    found = {}
    for row in rows:
        if len(row) == 5 and row[0].startswith("`"):
            known = (row[3] == "yes", ("agc",) if row[4] == "adaptive gradient clipping" else ())
            found.update({name.strip("`"): known for name in row[0].split(", ")})
    assert found == {name: (describe(name).batch_one, describe(name).needs) for name in NORMS}
