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

    See :class:`KernelNorm2d`, of which this is the form for one spatial dimension.

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

    A window :math:`u` has all channels and slides like a pooling window; the normalised windows are
    laid side by side. There are no parameters and no running statistics, and samples do not see
    each other. With :math:`m` a dropout mask of the window's own (0 with probability :math:`p`,
    else :math:`1/(1-p)`):

    .. math::
        u' = m u \qquad
        \hat u = \frac{u - \text{mean}(u')}{\sqrt{\text{var}(u') + \epsilon}}

    Mean and (biased) variance are those of the dropped-out window :math:`u'`, the elements that
    they normalise are the original ones: a regularising effect. Padded zeros are elements of their
    windows. Where windows overlap, elements appear in the output more than once; where the stride
    is larger than the window, some do not appear.

    Args:
        kernel_size: the window's height and width, in pixels
        stride: of the window, in pixels. Default: ``kernel_size``
        padding: zeros added on each side of the input, in pixels
        dropout_p: :math:`p`, in steps of 1/65536. Default: 0.1. The paper has 0.2 before the
            last pooling of a network
        eps: :math:`\epsilon`, added to the variance. Default: 1e-5
        evaluation: the variance in evaluation, see :class:`KNConv2d`

    Shape:
        - Input: :math:`(N, C, H, W)` or :math:`(C, H, W)`
        - Output: :math:`(N, C, H_{out}, W_{out})` or :math:`(C, H_{out}, W_{out})`,
          :math:`H_{out} = k_h \lfloor (H + 2 p_h - k_h) / s_h + 1 \rfloor`, and likewise the width

    Raises:
        TypeError: the input is not a floating-point tensor
        ValueError: an argument is out of its range, the input has another number of dimensions, or
            no window fits into the padded input

    Source: Section 3, Equations 1 to 3. That eps is inside the root is Equation 3's.

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

    See :class:`KernelNorm2d`, of which this is the form for three spatial dimensions.

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
    r"""A convolution of windows that are normalised by their own statistics, for :math:`(N, C, L)`.

    See :class:`KNConv2d`, of which this is the form for one spatial dimension.

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
    convolution, so its weights load. There are no running statistics, and samples do not see each
    other: a network trains with two images a batch as with 256. With :math:`u` a window of the
    input (all channels), :math:`m` the dropout mask (0 with probability :math:`p`, else
    :math:`1/(1-p)`), and :math:`\star` the product with a filter:

    .. math::
        u' = m u \qquad
        \hat u = \frac{u - \text{mean}(u')}{\sqrt{\text{var}(u') + \epsilon}} \qquad
        y = \text{act}(\hat u \star W + b)

    Nothing is unfolded: this is computed as
    :math:`(u \star W - \text{mean}(u') \sum W) / \sqrt{\text{var}(u') + \epsilon} + b`, with the
    statistics as sliding sums. For those, overlapping windows share one mask over the input;
    :class:`KernelNorm2d`, which has each window on its own, has a mask for each. Padded zeros are
    elements of their windows. With ``groups``, the statistics still run over all channels.

    In evaluation there is no dropout, but the variance that training saw had some in it:
    :math:`\mathbb{E}[\text{var}(u')] = \text{var}(u) + \frac{p}{1-p}(1 - \frac1n) \text{mean}(u^2)`
    for the :math:`n` elements of a window. ``evaluation`` says what is used:

    - ``"expected"``, that expectation: deterministic, and the match of training
    - ``"plain"``, :math:`\text{var}(u)`: the paper as read; trained networks lose accuracy by it
    - ``"monte_carlo"``: dropout stays on, as in the authors' code; two evaluations differ

    Args:
        in_channels, out_channels, kernel_size, stride, padding: those of :class:`torch.nn.Conv2d`
        dilation, groups, bias, padding_mode, device, dtype: those of :class:`torch.nn.Conv2d`
        dropout_p: :math:`p` of the dropout on the statistics, in steps of 1/65536. Default: 0.1
        eps: :math:`\epsilon`, added to the variance. Default: 1e-5
        activation: ``"relu"``, ``"leaky_relu"`` or a module. A ReLU or LeakyReLU costs no pass over
            the output and keeps nothing for the backward; its output must not be changed in place
            before the backward, as that of :class:`torch.nn.ReLU`. Another module is applied to
            the output as it is. Default: ``None``
        evaluation: ``"expected"`` (the default), ``"plain"`` or ``"monte_carlo"``;
            :func:`set_evaluation` changes it in a whole network

    Shape:
        - Input: :math:`(N, C_{in}, H, W)` or :math:`(C_{in}, H, W)`
        - Output: that of :class:`torch.nn.Conv2d`

    Raises:
        TypeError: the input is not a floating-point tensor, or has another dtype than the weight
            outside of autocast
        ValueError: an argument is out of its range, the input has other dimensions or channels than
            expected, or the window is larger than the padded input

    Low-rank adapters that add the output of convolutions of their own, as LoRA in peft does, are
    wrong here: these would be kernel normalised, too, and merging them into the weight gives
    another output. Register the adapter as a parametrization of ``weight`` instead
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

    See :class:`KNConv2d`, of which this is the form for three spatial dimensions.

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
    """Sets what every KernelNorm and KNConv in a network does in evaluation.

    Args:
        module: a layer or a network; it is changed in place
        evaluation: ``"expected"``, ``"plain"`` or ``"monte_carlo"``, see :class:`KNConv2d`

    Returns:
        The module.

    Example::

        >>> layer = set_evaluation(KNConv2d(3, 8, 3), "plain").eval()
        >>> layer.evaluation
        'plain'
    """
    arguments.check_normalization(dropout_p=0, eps=1, evaluation=evaluation)
    for layer in module.modules():
        if isinstance(layer, (KernelNormNd, KNConvNd)):
            layer.evaluation = evaluation
    return module
