"""The first convolution and pooling of residual and dense networks."""

from collections.abc import Callable

from torch import nn


def stem(
    conv: Callable[..., nn.Conv2d], in_channels: int, channels: int, small_images: bool
) -> tuple[nn.Conv2d, nn.Module]:
    """Return a 7x7 convolution of stride 2, and 3x3 max-pooling of stride 2.

    Args:
        conv: makes the convolution, from the first arguments of :class:`torch.nn.Conv2d`
        in_channels: the channels of the images
        channels: the channels of the convolution
        small_images: return a 3x3 convolution of stride 1 and an identity instead, for images of
            about 32x32
    """
    if small_images:
        return conv(in_channels, channels, 3, 1, 1), nn.Identity()
    return conv(in_channels, channels, 7, 2, 3), nn.MaxPool2d(3, 2, padding=1)
