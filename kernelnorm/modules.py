"""Kernel normalisation as layers, for one, two and three spatial dimensions."""

from __future__ import annotations

from torch import nn

from kernelnorm import arguments
from kernelnorm.arguments import Evaluation
from kernelnorm.bases import KernelNormNd, KNConvNd

__all__ = [
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "set_evaluation",
]


class KernelNorm1d(KernelNormNd):
    r"""Normalises each window of :math:`(N, C, L)` inputs by its own mean and variance.

    :class:`KernelNorm2d` for one spatial dimension: see there for the formula and the arguments.

    Shape:
        - Input: :math:`(N, C, L)` or :math:`(C, L)`
        - Output: :math:`(N, C, O)` or :math:`(C, O)`

    Example::

        >>> import torch
        >>> KernelNorm1d(3, stride=1, padding=1)(torch.randn(8, 16, 100)).shape
        torch.Size([8, 16, 300])
    """

    _dims = 1


class KernelNorm2d(KernelNormNd):
    r"""Normalises each window of :math:`(N, C, H, W)` inputs by its own mean and variance.

    A window :math:`u` has all channels and slides like a pooling window; the output has the
    normalised windows side by side. There are no parameters and no running statistics, and samples
    do not influence each other. Each window has its own dropout mask :math:`m` (0 with probability
    :math:`p`, else :math:`1/(1-p)`):

    .. math::
        u' = m u \qquad
        \hat u = \frac{u - \text{mean}(u')}{\sqrt{\text{var}(u') + \epsilon}}

    The mean and the (biased) variance of the dropped-out window :math:`u'` normalise the original
    elements :math:`u`, which has a regularising effect. Padded zeros are elements of their windows.
    Where windows overlap, elements appear in the output more than once; where the stride is larger
    than the window, some elements do not appear.

    Args:
        kernel_size: the window's height and width, in pixels
        stride: of the window, in pixels. Default: ``kernel_size``
        padding: zeros added on each side of the input, in pixels. Default: 0
        dropout_p: :math:`p`, in steps of 1/65536. Default: 0.1. The paper has 0.2 before the
            last pooling of a network
        eps: :math:`\epsilon`, added to the variance. Default: 1e-5
        evaluation: ``"expected"`` (the default), ``"plain"`` or ``"monte_carlo"``: the variance in
            evaluation, see :class:`KNConv2d`

    Shape:
        - Input: :math:`(N, C, H, W)` or :math:`(C, H, W)`
        - Output: :math:`(N, C, H_{out}, W_{out})` or :math:`(C, H_{out}, W_{out})`,
          :math:`H_{out} = k_h \lfloor (H + 2 p_h - k_h) / s_h + 1 \rfloor`, and likewise the width

    Raises:
        TypeError: the input is not a floating-point tensor
        ValueError: an argument is out of its range, the input has another number of dimensions, or
            no window fits into the padded input

    Source: Section 3, Equations 1 to 3. Equation 3 has eps inside the root.

    Example::

        >>> import torch
        >>> x = torch.randn(8, 64, 7, 7)
        >>> KernelNorm2d(kernel_size=1, dropout_p=0.2)(x).shape
        torch.Size([8, 64, 7, 7])
        >>> KernelNorm2d(kernel_size=3, stride=2, padding=1)(x).shape
        torch.Size([8, 64, 12, 12])
    """

    _dims = 2


class KernelNorm3d(KernelNormNd):
    r"""Normalises each window of :math:`(N, C, D, H, W)` inputs by its own mean and variance.

    :class:`KernelNorm2d` for three spatial dimensions: see there for the formula and the arguments.

    Shape:
        - Input: :math:`(N, C, D, H, W)` or :math:`(C, D, H, W)`
        - Output: :math:`(N, C, D_{out}, H_{out}, W_{out})` or without :math:`N`

    Example::

        >>> import torch
        >>> KernelNorm3d(2)(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 4, 8, 8, 8])
    """

    _dims = 3


class KNConv1d(KNConvNd, nn.Conv1d):
    r"""A convolution of windows that are normalised by their own statistics, for sequences.

    :class:`KNConv2d` for one spatial dimension: see there for the formula and the arguments.

    Shape:
        - Input: :math:`(N, C_{in}, L)` or :math:`(C_{in}, L)`
        - Output: that of :class:`torch.nn.Conv1d`

    Example::

        >>> import torch
        >>> KNConv1d(16, 33, 3, stride=2)(torch.randn(20, 16, 50)).shape
        torch.Size([20, 33, 24])
    """

    _dims = 1


class KNConv2d(KNConvNd, nn.Conv2d):
    r"""A convolution of windows that are normalised by their own mean and variance.

    A drop-in replacement for a convolution and its BatchNorm. The state dict is that of the
    convolution, so its weights load. There are no running statistics, and samples do not influence
    each other: a network trains with 2 images per batch as with 256. With :math:`u` a window of the
    input (all channels), :math:`m` the dropout mask (0 with probability :math:`p`, else
    :math:`1/(1-p)`), and :math:`\star` the product with a filter:

    .. math::
        u' = m u \qquad
        \hat u = \frac{u - \text{mean}(u')}{\sqrt{\text{var}(u') + \epsilon}} \qquad
        y = \text{act}(\hat u \star W + b)

    No window is copied: before the activation, :math:`y` is computed as
    :math:`(u \star W - \text{mean}(u') \sum W) / \sqrt{\text{var}(u') + \epsilon} + b`. The
    statistics are sliding sums. These need one mask over the input, which overlapping windows
    share; in :class:`KernelNorm2d` each window has its own mask. Padded zeros are elements of their
    windows. With ``groups``, the statistics still run over all channels.

    Evaluation has no dropout, but in training the dropout raises the variance:
    :math:`\mathbb{E}[\text{var}(u')] = \text{var}(u) + \frac{p}{1-p}(1 - \frac1n) \text{mean}(u^2)`
    for the :math:`n` elements of a window. ``evaluation`` selects the variance:

    - ``"expected"``: this expectation, which is deterministic and fits the variance in training
    - ``"plain"``: :math:`\text{var}(u)`; networks trained with dropout lose accuracy with it
    - ``"monte_carlo"``: dropout stays on, as in the authors' code; two evaluations differ

    Args:
        in_channels, out_channels, kernel_size, stride, padding: those of :class:`torch.nn.Conv2d`
        dilation, groups, bias, padding_mode, device, dtype: those of :class:`torch.nn.Conv2d`
        dropout_p: :math:`p` of the dropout on the statistics, in steps of 1/65536. Default: 0.1
        eps: :math:`\epsilon`, added to the variance. Default: 1e-5
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01) or a module. A ReLU, or a LeakyReLU
            of a slope from 0.001 to 1, is fused: it needs no pass over the output and no memory for
            the backward. As with :class:`torch.nn.ReLU`, its output must not be changed in place
            before the backward. Any other module is called on the output. Default: ``None``
        evaluation: ``"expected"`` (the default), ``"plain"`` or ``"monte_carlo"``;
            :func:`set_evaluation` changes it in a whole network

    Shape:
        - Input: :math:`(N, C_{in}, H, W)` or :math:`(C_{in}, H, W)`
        - Output: that of :class:`torch.nn.Conv2d`

    Raises:
        TypeError: the input is not a floating-point tensor, or has another dtype than the weight
            outside of autocast
        ValueError: an argument is out of its range, the input has other dimensions or channels than
            expected or is on another device than the weight, or the window is larger than the
            padded input

    Do not use low-rank adapters that add the output of further convolutions, as LoRA in peft does:
    those convolutions would be kernel normalised, too, and merging them into the weight would
    change the output. Register the adapter as a parametrization of ``weight`` instead
    (:mod:`torch.nn.utils.parametrize`), which is exact.

    Source: Section 3, Equations 4 and 5, Algorithm 1.

    Example::

        >>> import torch
        >>> layer = KNConv2d(3, 64, kernel_size=3, padding=1, activation="relu")
        >>> layer(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
    """

    _dims = 2


class KNConv3d(KNConvNd, nn.Conv3d):
    r"""A convolution of windows that are normalised by their own statistics, for volumes.

    :class:`KNConv2d` for three spatial dimensions: see there for the formula and the arguments.

    Shape:
        - Input: :math:`(N, C_{in}, D, H, W)` or :math:`(C_{in}, D, H, W)`
        - Output: that of :class:`torch.nn.Conv3d`

    Example::

        >>> import torch
        >>> KNConv3d(4, 8, 3, padding=1)(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 8, 8, 8, 8])
    """

    _dims = 3


def set_evaluation(module: nn.Module, evaluation: Evaluation) -> nn.Module:
    """Set what every KernelNorm and KNConv in a network does in evaluation.

    Args:
        module: a layer or a network; it is changed in place
        evaluation: ``"expected"``, ``"plain"`` or ``"monte_carlo"``, see :class:`KNConv2d`

    Returns:
        The module.

    Raises:
        TypeError: ``module`` is not a module
        ValueError: ``evaluation`` is none of the three

    Example::

        >>> layer = set_evaluation(KNConv2d(3, 8, 3), "plain").eval()
        >>> layer.evaluation
        'plain'
    """
    arguments.check_normalization(dropout_p=0, eps=1, evaluation=evaluation)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for layer in module.modules():
        if isinstance(layer, (KernelNormNd, KNConvNd)):
            layer.evaluation = evaluation
    return module
