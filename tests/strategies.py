"""Random layers, inputs, masks and memory layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernelnorm.ops.mask import draw_keys, expand_keys, keep, rounded_p
from kernelnorm.ops.windows import Geometry

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

LAYOUTS = [
    "contiguous",
    "channels_last",
    "slice of contiguous",
    "slice of channels_last",
    "strided",
    "transposed",
]
EXPANDED = ["expanded pixel", "expanded scalar"]
"""Layouts of gradients, such as that of a sum. They repeat some values of the tensor."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The tensor with other strides. What lies beside its elements in memory is NaN."""
    if layout == "expanded scalar":
        return x.flatten()[:1].expand(x.shape) if x.numel() else x
    if layout == "expanded pixel":
        first = x
        for axis in range(2, x.dim()):
            first = first.narrow(axis, 0, min(1, x.shape[axis]))
        return first.expand(x.shape)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    base = torch.cat([x, torch.full_like(x, torch.nan)], 1) if "slice" in layout else x
    base = base.contiguous()
    if "channels_last" in layout:
        base = base.movedim(1, -1).contiguous().movedim(-1, 1)
    return base[:, : x.shape[1]]


@dataclass(frozen=True)
class Case:
    """A window over an input of some size, and a seed for the numbers."""

    geometry: Geometry
    sizes: tuple[int, ...]
    batch: int
    groups: int
    in_channels: int
    out_channels: int
    layout: str
    seed: int

    @property
    def d(self) -> int:
        return len(self.sizes)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float64, device="cpu") -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def gradient(self, y: Tensor) -> Tensor:
        """Numbers like the output, and other ones than those of an input of the same shape."""
        other = replace(self, seed=self.seed + 7919)
        return other.randn(*y.shape, dtype=y.dtype, device=y.device)

    def input(self, dtype: torch.dtype = torch.float64, device="cpu") -> Tensor:
        shape = (self.batch, self.in_channels, *self.sizes)
        x = (self.randn(*shape, device=device) + 0.5).to(dtype)
        return laid_out(x, self.layout)

    def filters(self, dtype: torch.dtype = torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
        shape = (self.out_channels, self.in_channels // self.groups, *self.geometry.kernel_size)
        weight = self.randn(*shape, dtype=dtype, device=device)
        return weight, self.randn(self.out_channels, dtype=dtype, device=device)

    def keys(self, device="cpu") -> Tensor:
        generator = torch.random.get_rng_state()
        torch.manual_seed(self.seed)
        keys = draw_keys((self.batch, self.in_channels, *self.sizes), torch.device(device))
        torch.random.set_rng_state(generator)
        return keys


@st.composite
def cases(draw: st.DrawFn, dilated: bool = True, wide: bool = False) -> Case:
    """Windows that fit, over small inputs of one, two or three dimensions.

    Args:
        wide: also large strides and dilations, long lines and many channels
    """
    d = draw(st.sampled_from([1, 2, 2, 3]))
    most = {1: 5, 2: 4, 3: 3}[d]

    def each(low: int, high: int, more: int | None = None) -> tuple[int, ...]:
        values = st.integers(low, high)
        if wide and more is not None:
            values = st.one_of(values, values, values, st.just(more))
        return tuple(draw(values) for _ in range(d))

    kernel_size, stride, padding = each(1, most), each(1, 3, 9), each(0, 2)
    dilation = each(1, 3, 6) if dilated else (1,) * d
    geometry = Geometry(kernel_size, stride, padding, dilation)
    smallest = [max(1, geometry.reach(i) - 2 * padding[i]) for i in range(d)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = [low + draw(st.integers(0, 4)) for low in smallest]
    channels = st.integers(1, 4)
    if wide:
        sizes[-1] += draw(st.sampled_from([0, 0, 64, 129])) if d < 3 else 0
        channels = st.one_of(channels, st.sampled_from([7, 8, 9, 16, 35]))
    return Case(
        geometry=geometry,
        sizes=tuple(sizes),
        batch=draw(st.integers(1, 3)),
        groups=groups,
        in_channels=groups * draw(channels),
        out_channels=groups * draw(channels if wide else st.integers(1, 3)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**31)),
    )


def mask_of(
    seed: int, shape: torch.Size, p: float, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """The mask that the next call draws after ``torch.manual_seed(seed)``; seeds it once more."""
    if rounded_p(p) == 0:
        return None
    torch.manual_seed(seed)
    keys = expand_keys(draw_keys(shape, torch.device(device)), shape, p)
    torch.manual_seed(seed)
    return keep(keys, torch.float64) / (1 - rounded_p(p))
