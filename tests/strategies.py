"""Random layers, inputs and masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernelnorm.ops.mask import draw_keys, keep, rounded_p, spread_keys
from kernelnorm.ops.windows import Geometry

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


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

    def input(self, dtype: torch.dtype = torch.float64, device="cpu") -> Tensor:
        shape = (self.batch, self.in_channels, *self.sizes)
        x = self.randn(*shape, dtype=dtype, device=device) + 0.5
        if self.layout == "channels_last" and self.d in CHANNELS_LAST:
            return x.contiguous(memory_format=CHANNELS_LAST[self.d])
        if self.layout == "strided":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        if self.layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x

    def filters(self, dtype: torch.dtype = torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
        shape = (self.out_channels, self.in_channels // self.groups, *self.geometry.kernel_size)
        weight = self.randn(*shape, dtype=dtype, device=device)
        return weight, self.randn(self.out_channels, dtype=dtype, device=device)


@st.composite
def cases(draw: st.DrawFn, dilated: bool = True) -> Case:
    """Windows that fit, over small inputs of one, two or three dimensions."""
    d = draw(st.sampled_from([1, 2, 2, 3]))
    most = {1: 5, 2: 4, 3: 3}[d]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    kernel_size, stride, padding = each(1, most), each(1, 3), each(0, 2)
    dilation = each(1, 3) if dilated else (1,) * d
    geometry = Geometry(kernel_size, stride, padding, dilation)
    smallest = [max(1, geometry.reach(i) - 2 * padding[i]) for i in range(d)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Case(
        geometry=geometry,
        sizes=tuple(low + draw(st.integers(0, 4)) for low in smallest),
        batch=draw(st.integers(1, 3)),
        groups=groups,
        in_channels=groups * draw(st.integers(1, 4)),
        out_channels=groups * draw(st.integers(1, 3)),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "strided", "transposed"])),
        seed=draw(st.integers(0, 2**31)),
    )


def mask_of(
    seed: int, shape: torch.Size, p: float, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """The mask that the next call draws after ``torch.manual_seed(seed)``; seeds it once more."""
    if rounded_p(p) == 0:
        return None
    torch.manual_seed(seed)
    keys = spread_keys(draw_keys(shape, torch.device(device)), shape, p)
    torch.manual_seed(seed)
    return keep(keys, torch.float64) / (1 - rounded_p(p))
