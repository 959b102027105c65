"""Norms that use statistics of the batch in other ways than BatchNorm."""

import torch
from torch import Tensor, nn

from kernelnorm.norms.affine import AffineNorm2d, check_group_size, per_channel

__all__ = ["BatchChannelNorm2d", "BatchRenorm2d"]

PIXELS = (0, 2, 3)
"""The dimensions of a batch of feature maps that are not channels."""


class BatchRenorm2d(AffineNorm2d):
    r"""Normalises by statistics of the batch, corrected towards the running ones.

    .. math::
        y = \left(\frac{x - \mu_B}{\sigma_B} r + d\right) \gamma + \beta, \qquad
        r = \operatorname{clip}_{[1/r_{max}, r_{max}]} \frac{\sigma_B}{\sigma}, \qquad
        d = \operatorname{clip}_{[-d_{max}, d_{max}]} \frac{\mu_B - \mu}{\sigma}

    for each channel, with the batch's mean :math:`\mu_B` and deviation
    :math:`\sigma_B = \sqrt{\mathrm{var}_B + \epsilon}`; the gradient treats :math:`r` and :math:`d`
    as constants. Afterwards the running statistics move by 1 %,
    :math:`\mu \leftarrow \mu + 0.01 (\mu_B - \mu)`, and likewise :math:`\sigma`. In the first 100
    steps they are the means of all batches so far, independent of their initial values. In
    evaluation :math:`y = \frac{x - \mu}{\sigma} \gamma + \beta`. In bfloat16 a step of 1 % is too
    small to be seen: keep the layer in float32, as autocast does.

    The limits follow the published schedule. In the first 5000 steps :math:`r_{max} = 1` and
    :math:`d_{max} = 0`, which is BatchNorm; then they rise linearly, :math:`r_{max}` to 3 at step
    40000 and :math:`d_{max}` to 5 at step 25000. So a run of fewer than 5000 steps trains as
    BatchNorm does. The output depends on the running statistics, which move in each forward pass:
    activation checkpointing, which repeats the forward pass, changes the gradients.

    Source: S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", NeurIPS 2017.

    Args:
        channels: the channels of the input
        eps: added to the variance
        device, dtype: of the scale :math:`\gamma` (ones), the shift :math:`\beta` (zeros), and the
            buffers ``running_mean`` (zeros) and ``running_std`` (ones). ``num_batches_tracked``
            counts the steps

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``channels`` is not positive, an input has another shape, or in training an
            input has only one value per channel.

    Example::

        >>> norm, x = BatchRenorm2d(64), torch.randn(2, 64, 8, 8)
        >>> norm.limits()  # of r and d
        (tensor(1.), tensor(0.))
        >>> torch.allclose(norm(x), torch.nn.BatchNorm2d(64)(x), atol=1e-5)
        True
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, device, dtype)
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_std", torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device).long())

    def reset_parameters(self) -> None:
        """Reset scale, shift, running statistics and number of steps to those of a new layer."""
        super().reset_parameters()
        self.running_mean.zero_()
        self.running_std.fill_(1)
        self.num_batches_tracked.zero_()

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the limits of ``r`` and of ``d`` for the next step."""
        steps = (self.num_batches_tracked - 5000).clamp(min=0)
        return 1 + 2 * (steps / 35000).clamp(max=1), 5 * (steps / 20000).clamp(max=1)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise by the batch in training, and by the running statistics in evaluation."""
        running_mean, running_std = self.running_mean.to(x.dtype), self.running_std.to(x.dtype)
        if not self.training or x.numel() == 0:
            # Not a division, which would save the buffer for the backward pass.
            return (x - per_channel(running_mean)) * per_channel(running_std.reciprocal())
        if x.numel() == self.channels:
            raise ValueError(
                f"expected more than 1 value per channel in training, got {tuple(x.shape)}"
            )
        variance, mean = torch.var_mean(x, dim=PIXELS, correction=0)
        std = (variance + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = self.limits()
            r = torch.clamp(std / running_std, 1 / r_max, r_max)
            d = torch.clamp((mean - running_mean) / running_std, -d_max, d_max)
            self.num_batches_tracked.add_(1)
            rate = (1 / self.num_batches_tracked).clamp(min=0.01)
            _move(self.running_mean, mean, rate)
            _move(self.running_std, std, rate)
        return (x - per_channel(mean)) * per_channel(r / std) + per_channel(d)


class BatchChannelNorm2d(nn.Module):
    r"""Normalises each channel by running statistics, then each sample by groups of channels.

    .. math::
        \hat x = \frac{x - \hat\mu_c}{\sqrt{\hat\sigma_c^2 + \epsilon}} \gamma_c + \beta_c,
        \qquad y = \operatorname{GroupNorm}(\hat x)

    In training the running statistics move first, and have no gradient:
    :math:`\hat\sigma_c^2 \leftarrow \hat\sigma_c^2 + r (E_B[(x - \hat\mu_c)^2] - \hat\sigma_c^2)`,
    with the mean before its update, and
    :math:`\hat\mu_c \leftarrow \hat\mu_c + r (E_B[x] - \hat\mu_c)`.
    Since they average over steps, the layer trains with one image a batch. Activation
    checkpointing, which repeats the forward pass, moves them twice and changes the gradients.

    Source: S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019: micro-batch BCN, the authors' variant for small batches. In their code
    the second half has a scale and a shift for each group, here for each channel, as in the paper's
    GroupNorm. Their networks standardise the weights, too: :class:`WSConv2d`.

    Args:
        channels: the channels of the input
        group_size: the channels of a group, a divisor of ``channels``
        momentum: the rate :math:`r`, above 0 and at most 1
        eps: added to the variances
        device, dtype: of the parameters and running statistics

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``group_size`` does not divide ``channels``, an argument is out of its range,
            or an input has another shape.

    Example::

        >>> BatchChannelNorm2d(64, group_size=32)(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        group_size: int,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch = _RunningNorm2d(channels, momentum, eps, device, dtype)
        check_group_size(channels, group_size)
        groups = channels // group_size
        self.channel = nn.GroupNorm(groups, channels, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised, in its own dtype."""
        y: Tensor = self.channel(self.batch(x))
        return y.to(x.dtype)


class _RunningNorm2d(AffineNorm2d):
    """Normalises by running statistics, also in training: the first half of BCN."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        momentum: float,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(channels, eps, device, dtype)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Reset scale, shift and running statistics to those of a new layer."""
        super().reset_parameters()
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def normalise(self, x: Tensor) -> Tensor:
        """Move the running statistics in training, and normalise by them."""
        if self.training and x.numel():
            with torch.no_grad():
                deviation = x - per_channel(self.running_mean)
                _move(self.running_var, deviation.square().mean(dim=PIXELS), self.momentum)
                _move(self.running_mean, x.mean(dim=PIXELS), self.momentum)
        mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        return (x - per_channel(mean)) * per_channel(torch.rsqrt(variance + self.eps))

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"{super().extra_repr()}, momentum={self.momentum}"


def _move(running: Tensor, new: Tensor, rate: float | Tensor) -> None:
    running.add_((new.to(running.dtype) - running) * rate)
