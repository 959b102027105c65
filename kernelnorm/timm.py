"""The kernel normalised networks in timm's registry: import this module, then use timm.

Each name of :func:`kernelnorm.models.list_models` is registered as ``kernel_<name>``::

    import timm
    import kernelnorm.timm

    network = timm.create_model("kernel_resnet50", num_classes=10)
    backbone = timm.create_model("kernel_resnet50", features_only=True, out_indices=(1, 2, 3, 4))

Libraries that build their encoders with timm can use these networks, too: in
segmentation_models_pytorch the name is ``tu-kernel_resnet50``. There are no pretrained weights.
timm loads your own weights from a file with
``pretrained=True, pretrained_cfg_overlay={"file": path}``; the state dict is that of the network
in :mod:`kernelnorm.models`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import (
    FeatureListNet,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn
from torch.nn import functional as F

from kernelnorm import models

__all__ = ["KernelNetwork"]

_POOL = "avgpool"
"""The child of each network that pools its features; the children after it are the classifier."""
_SIZE = 1024
"""Height and width in pixels of the image from which :attr:`KernelNetwork.feature_info` follows.

Large, so that the padding in some networks hardly changes the ratios.
"""


class KernelNetwork(nn.Module):
    """A network of :mod:`kernelnorm.models` with the attributes and methods that timm calls.

    It takes over the children of the network, so the state dict has the same names.

    Args:
        name: one of :func:`kernelnorm.models.list_models`
        num_classes: the size of the output, 0 for the pooled features. Default: the network's
        in_chans: the channels of the images
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for feature maps without pooling
            and without a classifier
        drop_rate: probability of the dropout before the last linear layer
        options: other options of :func:`kernelnorm.models.create_model`, such as ``rules``
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_classes:
            options["num_classes"] = num_classes
        self._arguments = {"name": name, "in_channels": in_chans, **options}
        for child_name, child in models.create_model(**self._arguments).named_children():
            self.add_module(child_name, child)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self._classifier = _ends_of(name)["classifier"]
        linear = self.get_classifier()
        self.num_classes: int = linear.out_features
        self.head_hidden_size: int = linear.in_features
        first = [layer for layer in self._hidden_layers() if isinstance(layer, nn.Linear)]
        pool: Any = self.get_submodule(_POOL)
        self._pool_size: int = pool.output_size  # 2 in KNResNet-13, else 1
        self.num_features: int = [*first, linear][0].in_features // self._pool_size**2
        self._set_pool(global_pool)
        if num_classes == 0 or not global_pool:
            self.reset_classifier(num_classes or 0)

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", "max", "avgmax", ""):
            raise ValueError(
                f"global_pool must be 'avg', 'max', 'avgmax' or '' for none, got {global_pool!r}"
            )
        self.global_pool = global_pool
        pool = SelectAdaptivePool2d(self._pool_size, global_pool, flatten=bool(global_pool))
        self.add_module(_POOL, pool)

    def _hidden_layers(self) -> Sequence[nn.Module]:
        """The layers between the pooling and the last linear layer."""
        child, _, index = self._classifier.partition(".")
        return list(self.get_submodule(child).children())[:-1] if index else []

    def get_classifier(self) -> Any:
        """Return the last linear layer, or an identity."""
        return self.get_submodule(self._classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer by one of ``num_classes`` outputs, or an identity."""
        if global_pool is not None:
            self._set_pool(global_pool)
        if num_classes and not self.global_pool:
            raise ValueError(
                f"num_classes={num_classes} needs pooled features, got global_pool='': "
                "give num_classes=0, or a global_pool"
            )
        weight = next(self.parameters())
        layer = (
            nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes
            else nn.Identity()
        )
        self.set_submodule(self._classifier, layer)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature maps, the input of the pooling."""
        for name, child in self.named_children():
            if name == _POOL:
                break
            x = child(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the scores of the classes, or with ``pre_logits`` the last layer's input."""
        x = self.get_submodule(_POOL)(x)
        if not self.global_pool:
            return x
        for layer in self._hidden_layers():
            x = layer(x)
        x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits:
            return x
        scores: Tensor = self.get_classifier()(x)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, ``(n, num_classes)``; features if there are none."""
        return self.forward_head(self.forward_features(x))

    @cached_property
    def feature_info(self) -> list[dict[str, Any]]:
        """The feature maps at each resolution: ``num_chs``, ``reduction`` and ``module``.

        Each is the last output of its resolution, before the layer that halves it. The last entry
        therefore comes after the KernelNorm and the activation before the pooling, just as in
        timm's DenseNets it comes after the last BatchNorm. One forward pass on the device ``meta``
        gives the shapes; ``reduction`` is rounded to a power of two.
        """
        with torch.device("meta"):
            network = models.create_model(**self._arguments).eval()
            x = torch.empty(1, self.in_chans, _SIZE, _SIZE)
        levels = {}
        with torch.no_grad():
            for name, layer in _feature_layers(network):
                x = layer(x)
                reduction = 2 ** round(math.log2(_SIZE / x.shape[-1]))
                levels[reduction] = {
                    "num_chs": x.shape[1],
                    "reduction": reduction,
                    "module": name,
                }
        return list(levels.values())


def _feature_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers before the pooling in order, for an ``nn.Sequential`` the layers in it."""
    for name, child in network.named_children():
        if name == _POOL:
            return
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}.{inner}", layer) for inner, layer in child.named_children())
        else:
            yield name, child


@cache
def _ends_of(name: str) -> dict[str, str]:
    """The names of a network's first convolution and last linear layer, by the keys of timm."""
    with torch.device("meta"):
        layers = [*models.create_model(name).named_modules()]
    convolutions = [name for name, layer in layers if isinstance(layer, nn.Conv2d)]
    linear = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    return {"first_conv": convolutions[0], "classifier": linear[-1]}


class _FeatureMaps(FeatureListNet):  # type: ignore[misc]
    """The list of feature maps at ``out_indices``, by default at all resolutions."""

    def __init__(
        self, model: KernelNetwork, out_indices: Sequence[int] | int | None = None, **options: Any
    ) -> None:
        indices = range(len(model.feature_info)) if out_indices is None else out_indices
        super().__init__(model, indices, **options)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build a network."""

    def create(
        pretrained: bool = False,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        network: nn.Module = build_model_with_cfg(
            KernelNetwork,
            create.__name__,
            pretrained,
            pretrained_cfg_overlay={**_ends_of(name), **(pretrained_cfg_overlay or {})},
            feature_cfg={
                "feature_cls": _FeatureMaps,
                "out_indices": None,
                "flatten_sequential": True,
            },
            name=name,
            **options,
        )
        return network

    create.__name__ = create.__qualname__ = f"kernel_{name}"
    create.__doc__ = f"Returns ``kernelnorm.models.create_model({name!r})`` for timm."
    return create


def _classes_of(name: str) -> int:
    default: int = inspect.signature(getattr(models, name)).parameters["num_classes"].default
    return default


default_cfgs = generate_default_cfgs(
    {f"kernel_{name}": {"num_classes": _classes_of(name)} for name in models.list_models()}
)
"""The configurations that timm reads under this name, with the preprocessing of ImageNet."""

for _name in models.list_models():
    _create = _entrypoint(_name)
    globals()[_create.__name__] = _create  # timm also adds the name to __all__
    register_model(_create)
