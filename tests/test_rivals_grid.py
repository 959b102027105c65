"""One grid for every norm: a convolution with its norm and activation, as networks have them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from kernelnorm.models.blocks import layers_for
from kernelnorm.norms import NORMS, describe

RIVALS = [name for name in NORMS if name != "kernel"]
WITH_STATISTICS = [name for name in RIVALS if describe(name).group == "batch-dependent"]
every = pytest.mark.parametrize("name", RIVALS)


def block(
    name: str, in_channels: int = 3, out_channels: int = 8, device: str = "cpu"
) -> nn.Sequential:
    layers = layers_for(name, family="vgg")
    with torch.device(device):
        return nn.Sequential(
            layers.conv(in_channels, out_channels, 3, padding=1),
            layers.norm(out_channels),
            layers.relu(),
        )


def randomised(module: nn.Module) -> nn.Module:
    """The module with parameters that differ from channel to channel."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@every
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 3, 8, 8), (3, 3, 2, 9)])
def test_shape_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    module, x = randomised(block(name)), torch.randn(shape, requires_grad=True)
    y = module(x)
    assert y.shape == (shape[0], 8, *shape[2:])
    y.square().sum().backward()
    for key, tensor in [("x", x), *module.named_parameters()]:
        assert tensor.grad.isfinite().all(), key
        assert tensor.grad.any(), key


@every
def test_gradients_are_those_of_differences(name: str) -> None:
    """With fixed statistics: that of the past has no gradient, so training cannot pass this."""
    module = randomised(block(name, 2, 4).double()).train(name not in WITH_STATISTICS)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    parameters = tuple(p.detach().clone().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    if name != "weight_norm":  # PyTorch's second derivative is wrong
        assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@every
def test_double_is_close_to_float(name: str) -> None:
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 6)
    double = copy.deepcopy(module).double()
    y = double(x.double())
    assert y.dtype == torch.float64
    torch.testing.assert_close(module(x).double(), y, rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 6, requires_grad=True)
    expected = copy.deepcopy(module)(x)
    with torch.autocast("cpu", dtype):
        y = module(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@every
def test_bfloat16_parameters(name: str) -> None:
    if name == "lrn":
        pytest.skip("PyTorch's LocalResponseNorm has no bfloat16 on CPUs, but for autocast")
    module, x = block(name).to(torch.bfloat16), torch.randn(2, 3, 6, 6)
    y = module(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every
def test_channels_last(name: str) -> None:
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 5)
    expected = copy.deepcopy(module)(x)
    last = {"memory_format": torch.channels_last}
    y = module.to(**last)(x.to(**last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if name not in ("lrn", "instance"):  # PyTorch's return contiguous tensors
        assert y.is_contiguous(**last)


@every
def test_one_image_is_treated_as_in_a_batch_unless_the_norm_needs_others(name: str) -> None:
    module, x = randomised(block(name)).eval(), torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(module(x)[:1], module(x[:1]), rtol=1e-4, atol=1e-5)
    module.train()
    same = torch.allclose(module(x)[:1], module(x[:1]), rtol=1e-4, atol=1e-4)
    assert same == (name not in WITH_STATISTICS)


@every
def test_state_dict_round_trip(name: str) -> None:
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 6)
    module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = block(name)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(x), module.eval()(x))


@every
def test_copies_are_equal_and_apart(name: str) -> None:
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 6)
    before = tensors(module)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), copy.deepcopy(module)(x))
    randomised(other)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@every
def test_meta_device(name: str) -> None:
    module = block(name, device="meta")
    assert module(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 8, 6, 6)
    assert {t.device.type for t in module.state_dict().values()} <= {"meta"}


@every
def test_empty_batch(name: str) -> None:
    module, x = block(name), torch.empty(0, 3, 6, 6, requires_grad=True)
    if name in ("batch", "instance"):
        pytest.skip("PyTorch's InstanceNorm fails, and its BatchNorm's statistics become NaN")
    before = tensors(module)
    y = module(x)
    assert y.shape == (0, 8, 6, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("nf", "aot_eager"),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in RIVALS),
    ],
)
def test_compiled(name: str, compiler: str) -> None:
    """Inductor traces as aot_eager does, and then generates code."""
    module, x = randomised(block(name)), torch.randn(2, 3, 6, 6)
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for _ in range(2):
        y, expected = compiled(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("frn", 1, "FilterResponseNorm2d(8, eps=1e-06)"),
        ("positional", 1, "PositionalNorm2d(8, eps=1e-05)"),
        ("evonorm_s0", 1, "EvoNorm2dS0(8, eps=1e-05, group_size=8)"),
        (
            *("local_context_sliding", 1),
            "SlidingLocalContextNorm2d(8, eps=1e-05, group_size=8, window=(8, 8))",
        ),
        (
            *("nf", 0),
            "ScaledWSConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
        ),
    ],
)
def test_layers_say_what_they_are(name: str, index: int, expected: str) -> None:
    assert repr(block(name)[index]) == expected


@every
def test_layers_say_the_same_on_every_device(name: str) -> None:
    assert "eps=0.00" not in repr(block(name))
    assert repr(block(name)) == repr(block(name, device="meta"))
