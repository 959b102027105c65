"""A dense block: KNConvs that see all that came before them, in one buffer.

Each step appends its output to its input. A concatenation would copy the input for each step and
keep every copy for the backward; here the input of a step is a prefix of one buffer, which holds
all outputs. In the backward, too, there is one buffer, to which each step adds the gradient of its
prefix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops import DIFFERENTIABLE, knconv, pointwise, primitives_for
from kernelnorm.ops.knconv import Settings
from kernelnorm.ops.layouts import in_rows

_PART = 7 << 20
"""The fewest bytes of a buffer that are filled at a time where nothing is kept: what stays in the
cache of a processor with 32 MB, and is enough work for a convolution."""


class Layer(NamedTuple):
    """The arguments of :func:`kernelnorm.ops.knconv.kn_conv` but for the input."""

    weight: Tensor
    bias: Tensor | None
    keys: Tensor | None
    settings: Settings


def dense_block(x: Tensor, steps: Sequence[Sequence[Layer]]) -> Tensor:
    """The input and the outputs of all steps, concatenated.

    Args:
        steps: chains of layers that keep the size of the image

    Shape:
        - x: :math:`(N, C, *)`
        - Output: :math:`(N, C', *)`, with the strides of ``channels_last``
    """
    with knconv.without_autocast(x):
        settings = tuple(tuple(layer.settings for layer in step) for step in steps)
        tensors = [tensor for step in steps for layer in step for tensor in layer[:3]]
        masked = any(layer.keys is not None for layer in chain(*steps))
        in_parts = not (masked or torch.is_grad_enabled()) and x.device.type == "cpu"
        y: Tensor = _DenseBlock.apply(settings, in_parts, x, *tensors)  # type: ignore[no-untyped-call]
        return y


class _DenseBlock(torch.autograd.Function):
    """Keeps the buffer, the outputs within a step, and one-channel maps; in parts, nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[tuple[Settings, ...], ...],
        in_parts: bool,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        steps = _steps(settings, tensors)
        buffer = _begin(x, steps)
        if in_parts:
            _fill_in_parts(buffer, x.shape[1], steps)
            return buffer
        kept = [tensor for state in _fill(buffer, x.shape[1], steps) for tensor in state]
        ctx.settings, ctx.channels = settings, x.shape[1]
        ctx.save_for_backward(buffer, *tensors, *kept)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        buffer, *rest = ctx.saved_tensors
        count = 3 * sum(map(len, ctx.settings))
        steps, kept = _steps(ctx.settings, rest[:count]), rest[count:]
        needs = ctx.needs_input_grad[2:]
        with knconv.without_autocast(grad):
            if torch.is_grad_enabled():
                x = buffer[:, : ctx.channels]
                gradients = _differentiable_backward(grad, x, ctx.settings, rest[:count], needs)
            else:
                gradients = _backward(grad, buffer, ctx.channels, steps, kept, needs)
            return None, None, *gradients


def _begin(x: Tensor, steps: Sequence[Sequence[Layer]]) -> Tensor:
    """The buffer with the input in it."""
    channels = x.shape[1] + sum(len(step[-1].weight) for step in steps)
    buffer = x.new_empty(len(x), *x.shape[2:], channels).movedim(-1, 1)
    buffer[:, : x.shape[1]] = x
    return buffer


def _fill(
    buffer: Tensor, end: int, steps: Sequence[Sequence[Layer]]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Appends the steps' outputs to the channels before ``end``; yields each layer's state.

    That is what is kept in the output's place, its maps and sums, and the next layer's input,
    where they are not in the buffer.
    """
    for step in steps:
        y = buffer[:, :end]
        start, end = end, end + len(step[-1].weight)
        for layer in step:
            within = layer is not step[-1]
            into = None if within else buffer[:, start:end]
            y, numerator, *maps = knconv.forward(primitives_for(y), y, *layer, into)
            kept = numerator if numerator is not None else y if within else None
            yield kept, *maps, y if within else None


def _fill_in_parts(buffer: Tensor, end: int, steps: Sequence[Sequence[Layer]]) -> None:
    """The same where nothing is kept: some samples at a time, which stay in the cache."""
    parts = buffer.numel() * buffer.element_size() // _PART
    for part in buffer.tensor_split(max(1, min(parts, len(buffer)))):
        deque(_fill(part, end, steps), maxlen=0)


def _backward(
    grad: Tensor,
    buffer: Tensor,
    channels: int,
    steps: list[list[Layer]],
    kept: list[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    total = grad.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    gradients: list[Tensor | None] = [None] * len(needs)
    end, index = buffer.shape[1], len(gradients)
    for step in reversed(steps):
        start = end - len(step[-1].weight)
        g = total[:, start:end]
        for i in reversed(range(len(step))):
            *state, _ = kept[-5:]
            del kept[-5:]
            x = kept[-1] if i > 0 else _as_input(buffer[:, :start], step[0])
            if state[0] is None:
                state[0] = buffer[:, start:end]
            index -= 3
            saved = x, *step[i][:3], *state
            wanted = True, *needs[index : index + 2]
            into = None if i > 0 else total[:, :start]
            of_x, *of_parameters = knconv.backward(g, saved, wanted, step[i].settings, into)
            assert of_x is not None  # it was wanted
            g, gradients[index : index + 2] = of_x, of_parameters
        end = start
    gradients[0] = total[:, :channels] if needs[0] else None
    return gradients


def _differentiable_backward(
    grad: Tensor,
    x: Tensor,
    settings: tuple[tuple[Settings, ...], ...],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The same gradients, from operations that can be differentiated once more."""
    wanted = [i for i, need in enumerate(needs) if need]

    def output(*inputs: Tensor) -> Tensor:
        every: list[Tensor | None] = [x, *tensors]
        for i, value in zip(wanted, inputs, strict=True):
            every[i] = value
        y, *others = every
        assert y is not None
        for step in _steps(settings, others):
            new = y
            for layer in step:
                new = knconv.forward(DIFFERENTIABLE, new, *layer)[0]
            y = torch.cat([y, new], 1)
        return y

    found = torch.func.vjp(output, *([x, *tensors][i] for i in wanted))[1](grad)
    gradients: list[Tensor | None] = [None] * len(needs)
    for i, value in zip(wanted, found, strict=True):
        gradients[i] = value
    return gradients


def _as_input(prefix: Tensor, layer: Layer) -> Tensor:
    """In rows, unless its convolution reads it where it lies: copied once, not by each reader."""
    if pointwise.pays(prefix, layer.weight, layer.settings.geometry):
        return prefix
    return in_rows(prefix)


def _steps(
    settings: tuple[tuple[Settings, ...], ...], tensors: Sequence[Tensor | None]
) -> list[list[Layer]]:
    """The reverse of the flattening in :func:`dense_block`."""
    tensor = iter(tensors)
    return [[Layer(next(tensor), next(tensor), next(tensor), s) for s in step] for step in settings]  # type: ignore[arg-type]
