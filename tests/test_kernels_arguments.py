"""The checks before a call of a C kernel, which would read any memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelnorm.ops import operators  # noqa: F401 (registers them)
from kernelnorm.ops.backends import Statistics, cpu
from kernelnorm.ops.mask import count_keys, draw_keys
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import EPS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def arguments_of_primitives() -> dict[str, dict[str, Any]]:
    """Arguments that the C kernels take, by the name of the primitive and of the argument."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    shape, one, vector = (2, 4, 6, 5), torch.ones(2, 1, 6, 5), torch.ones(4)
    x, options = torch.randn(shape), Settings(geometry, 1, 0.1, True, EPS, slope=None)
    keys = draw_keys(shape, x.device)
    return {
        "window_statistics": {"x": x, "keys": keys, "settings": options, "with_means": True},
        "epilogue": {
            "z": x.clone(), "terms": [(one, vector)] * 2, "rstd": one, "bias": vector,
            "slope": None,
        },
        "epilogue_backward": {
            "grad": x, "kept": x, "statistics": Statistics(one, one), "filter_sums": vector,
            "bias": vector, "slope": 0.0, "factors": (1.0, 1.0),
        },
        "statistics_backward": {
            "grad": x.clone(), "x": x, "pair": torch.ones(2, 2, 6, 5), "keys": keys,
            "settings": options,
        },
    }  # fmt: skip


def with_another(arguments: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    """The arguments with another tensor at a path such as ``("terms", 0, 1)``."""
    if not path:
        return value
    name, *rest = path
    changed = with_another(arguments[name], tuple(rest), value)
    if isinstance(arguments, dict):
        return {**arguments, name: changed}
    items = [*arguments[:name], changed, *arguments[name + 1 :]]
    return type(arguments)(*items) if isinstance(arguments, Statistics) else type(arguments)(items)


def at(arguments: Any, path: tuple[Any, ...]) -> Tensor:
    for name in path:
        arguments = arguments[name]
    return arguments


CHECKED = [
    ("window_statistics", ("keys",)),
    *[("epilogue", ("terms", i, j)) for i in range(2) for j in range(2)],
    *[("epilogue", (name,)) for name in ("rstd", "bias")],
    *[("epilogue_backward", (name,)) for name in ("grad", "kept", "filter_sums", "bias")],
    *[("epilogue_backward", ("statistics", i)) for i in range(2)],
    *[("statistics_backward", (name,)) for name in ("grad", "x", "pair", "keys")],
]
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda x: x.flatten()[:1],
    "too few": lambda x: x[..., :-1],
    "too many": lambda x: torch.cat([x, x[:1]]),
    "none": lambda x: x[:0],
    "on another device": lambda x: x.to("meta"),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "expanded": lambda x: x.flatten()[:1].expand(x.numel() + 1),
}
REFUSED = r"expected (\d+ contiguous elements of|a CPU tensor of shape|a tensor with storage)"
FLAT = pytest.raises(IndexError, match="tuple index out of range")  # a missing dimension


@pytest.mark.parametrize(("primitive", "path"), CHECKED, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors_are_refused_before_they_are_read(primitive: str, path, fault: str):
    arguments = arguments_of_primitives()[primitive]
    getattr(cpu, primitive)(**arguments)
    wrong = FAULTS[fault](at(arguments, path))
    is_map = path[0] in ("grad", "kept", "x") or (path[0] == "terms" and path[2] == 0)
    with FLAT if is_map and wrong.dim() == 1 else pytest.raises(RuntimeError, match=REFUSED):
        getattr(cpu, primitive)(**with_another(arguments, path, wrong))


@pytest.mark.parametrize(
    ("primitive", "path"),
    [(p, path) for p, path in CHECKED if path[0] in ("keys", "grad", "kept", "x")],
    ids=str,
)
def test_another_dtype_is_refused_before_it_is_read(primitive: str, path):
    arguments = arguments_of_primitives()[primitive]
    x = at(arguments, path)
    wrong = x.to(torch.int64 if x.dtype == torch.int32 else torch.float64)
    dtypes = rf"expected .* {x.dtype}.* {wrong.dtype}|expected .* {wrong.dtype}.* {x.dtype}"
    with pytest.raises(RuntimeError, match=dtypes):
        getattr(cpu, primitive)(**with_another(arguments, path, wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64])
@pytest.mark.parametrize(
    ("primitive", "name"),
    [("window_statistics", "x"), ("epilogue", "z"), ("statistics_backward", "x")],
)
def test_dtypes_that_no_kernel_has_are_refused(primitive: str, name: str, dtype):
    arguments = arguments_of_primitives()[primitive]
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(KeyError, match=f"^{dtype}$"):
        getattr(cpu, primitive)(**arguments)


def test_operators_with_arguments_that_do_not_fit_are_errors():
    """The checks of :mod:`kernelnorm.functional` are not in their way."""
    x, weight, bias = torch.randn(2, 5, 6, 6), torch.randn(6, 5, 3, 3), torch.randn(6)
    keys = draw_keys(x.shape, x.device)
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    rest = 0.1, True, 1e-5, True, 0.0
    forward, backward = torch.ops.kernelnorm.kn_conv, torch.ops.kernelnorm.kn_conv_backward
    y, _, *small = forward(x, weight, bias, keys, *window, 1, *rest)
    for groups in (2, 3, 4, 7, 0, -1):
        for p in (0.1, 0.0):
            with pytest.raises(RuntimeError, match="groups"):
                forward(x, weight, bias, keys, *window, groups, p, *rest[1:])
    for wrong, message in (
        ((x, weight, bias, keys[:-1]), "expected 23 contiguous elements of torch.int32"),
        ((x, weight, bias[:-1], keys), "expected 6 contiguous elements of torch.float32"),
        ((x[0], weight, bias, keys), "expected 36 contiguous elements of torch.int32"),
        ((x[..., 0], weight, bias, keys), "expected 17 contiguous elements of torch.int32"),
        ((x, weight[:, :3], bias, keys), "channels"),
        ((x, weight[:4], bias, keys), "expected 4 contiguous elements of torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong, *window, 1, *rest)
    saved = [y, *small]
    grad = torch.ones_like(y)
    for i in range(4):
        wrong = [t.flatten()[:3] if i == j else t for j, t in enumerate(saved)]
        with pytest.raises(RuntimeError, match=REFUSED) if i else FLAT:
            backward(grad, x, weight, bias, keys, wrong, [True] * 3, *window, 1, *rest)
    for wrong in (grad[:, :1], grad[:1], grad[..., :1]):
        with pytest.raises(RuntimeError, match=r"expected a CPU tensor of shape \(2, 6, 6, 6\)"):
            backward(wrong, x, weight, bias, keys, saved, [True] * 3, *window, 1, *rest)


def test_a_count_of_keys_is_that_of_the_drawn_ones():
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (0, 3, 4)):
        assert count_keys(shape) == draw_keys(shape, torch.device("cpu")).numel()
