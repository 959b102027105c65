"""The base classes of the layers: arguments, ``forward`` and ``repr``, for any dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kernelnorm import arguments, functional
from kernelnorm.arguments import Evaluation
from kernelnorm.ops import observers

__all__ = ["KNConvNd", "KernelNormNd"]


class KernelNormNd(nn.Module):
    """The base of KernelNorm1d, KernelNorm2d and KernelNorm3d."""

    _dims: ClassVar[int]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        *,
        evaluation: Evaluation = "expected",
    ) -> None:
        super().__init__()
        arguments.check_normalization(dropout_p, eps, evaluation)
        stride = kernel_size if stride is None else stride
        padding = arguments.integers("padding", padding, self._dims, at_least=0)
        geometry = arguments.geometry(self._dims, kernel_size, stride, padding, 1)
        self.kernel_size, self.stride, self.padding, _ = geometry
        self.dropout_p = dropout_p
        self.eps = eps
        self.evaluation: Evaluation = evaluation

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each window of the input."""
        recorded: Tensor | None = observers.called_as_leaf(self, input)
        if recorded is not None:
            return recorded
        return functional.kernel_norm(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            dropout_p=self.dropout_p,
            training=self.training,
            eps=self.eps,
            evaluation=self.evaluation,
        )

    def extra_repr(self) -> str:
        """The arguments, as ``print(module)`` shows them."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}{_shown_evaluation(self.evaluation)}"
        )


class KNConvNd(nn.Module):
    """The first base of KNConv1d, KNConv2d and KNConv3d; the second is the convolution."""

    _dims: ClassVar[int]
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        activation: str | nn.Module | None = None,
        evaluation: Evaluation = "expected",
    ) -> None:
        if type(activation) is nn.ReLU:
            activation = "relu"
        arguments.check_normalization(dropout_p, eps, evaluation)
        arguments.check_convolution(*arguments.fused(activation), padding_mode)
        arguments.check_channels(in_channels, out_channels, groups)
        window = arguments.geometry(self._dims, kernel_size, stride, padding, dilation)
        init: Any = super().__init__  # of nn.Conv1d, nn.Conv2d or nn.Conv3d
        init(
            in_channels,
            out_channels,
            window.kernel_size,
            window.stride,
            padding if isinstance(padding, str) else window.padding,
            window.dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.dropout_p = dropout_p
        self.eps = eps
        self.activation = activation
        self.evaluation: Evaluation = evaluation

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the normalised windows of the input."""
        recorded: Tensor | None = observers.called_as_leaf(self, input)
        if recorded is not None:
            return recorded
        fused, negative_slope = arguments.fused(self.activation)
        y = functional.kn_conv(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            dropout_p=self.dropout_p,
            training=self.training,
            eps=self.eps,
            activation=fused,
            negative_slope=negative_slope,
            evaluation=self.evaluation,
        )
        return self.activation(y) if isinstance(self.activation, nn.Module) and not fused else y

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """See :meth:`torch.nn.Module.register_forward_hook`.

        A hook of Opacus also keeps the dropout mask of the call, see :mod:`kernelnorm.privacy`.
        """
        owner = type(getattr(hook, "__self__", None))
        if any(base.__module__.startswith("opacus.") for base in owner.__mro__):
            from kernelnorm.privacy.samplers import with_call  # registers the samplers, too

            hook = with_call(hook)
        return super().register_forward_hook(hook, **options)

    def extra_repr(self) -> str:
        """The arguments, as ``print(module)`` shows them."""
        convolution = super().extra_repr()
        named = isinstance(self.activation, str)  # print shows a module on a line of its own
        activation = f", activation={self.activation}" if named else ""
        return (
            f"{convolution}, dropout_p={self.dropout_p}, eps={self.eps}{activation}"
            f"{_shown_evaluation(self.evaluation)}"
        )


def _shown_evaluation(evaluation: Evaluation) -> str:
    return "" if evaluation == "expected" else f", evaluation={evaluation}"
