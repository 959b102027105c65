"""The networks of others that are converted: how each is made, and its example input.

The images are about the smallest that each network takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import monai.networks.nets
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation, video


@dataclass(frozen=True)
class Example:
    """A network, and the shape of an input."""

    group: str
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 3, 64, 64)

    def __str__(self) -> str:
        return f"{self.group}-{self.name}"


_NO_CONVOLUTIONS = ("vit", "swin")
_LARGE = "regnet_y_128gf"  # 645 million parameters, of the layers of regnet_y_32gf
_SIZES = {"inception_v3": 299, "maxvit_t": 224}
_OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def _torchvision() -> list[Example]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [
        Example(
            "torchvision",
            name,
            partial(torchvision.models.get_model, name, **_OPTIONS.get(name, {})),
            (1, 3, _SIZES.get(name, 64), _SIZES.get(name, 64)),
        )
        for name in names
        if not name.startswith(_NO_CONVOLUTIONS) and name != _LARGE
    ]


_WITHOUT_WEIGHTS = {"weights": None, "weights_backbone": None}


def _of_tasks() -> list[Example]:
    """Segmentation, detection and video."""
    small = {**_WITHOUT_WEIGHTS, "min_size": 64, "max_size": 64}
    return [
        *(
            Example("torchvision", name, partial(getattr(segmentation, name), **_WITHOUT_WEIGHTS))
            for name in (
                *("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"),
                "lraspp_mobilenet_v3_large",
            )
        ),
        *(
            Example("torchvision", name, partial(getattr(detection, name), **small), (3, 64, 64))
            for name in (
                *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn"),
                *("fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn"),
                "keypointrcnn_resnet50_fpn",
            )
        ),
        *(
            Example("torchvision", name, getattr(video, name), (1, 3, 4, 32, 32))
            for name in ("r3d_18", "mc3_18", "r2plus1d_18")
        ),
    ]


_TIMM = {
    64: (
        "resnet18 resnet50 resnet10t resnetblur18 resnetaa50 resnetrs50 resnext26ts "
        "wide_resnet50_2 resnetv2_50 seresnet18 seresnext26d_32x4d ecaresnet26t gcresnet50t "
        "skresnet18 senet154 res2net50_26w_4s resnest14d gernet_s regnetx_002 regnety_002 "
        "repvgg_a0 mobileone_s0 densenet121 dla34 dpn68 vovnet39a ese_vovnet19b_dw selecsls42 "
        "cspresnet50 cspdarknet53 cs3darknet_s darknet17 darknet53 hrnet_w18_small xception41 "
        "xception65p xception71 vgg11_bn tresnet_m lambda_resnet26t "
        "hgnet_tiny hgnetv2_b0 starnet_s1 fasternet_t0 rexnet_100 "
        "efficientnet_b0 tf_efficientnet_b0 tf_efficientnet_cc_b0_4e "
        "tf_efficientnetv2_b0 efficientnet_es mixnet_s tinynet_e lcnet_035 mnasnet_100 "
        "semnasnet_100 spnasnet_100 fbnetc_100 hardcorenas_a mobilenetv1_100 mobilenetv2_100 "
        "mobilenetv3_small_100 mobilenetv4_conv_small mobilenet_edgetpu_100 ghostnet_100 "
        "ghostnetv2_100 repghostnet_050 convmixer_768_32 efficientvit_b0 fastvit_t8 "
        "mobilevit_xxs swiftformer_xs tiny_vit_5m_224 nextvit_small inception_next_atto"
    ),
    96: "inception_v3 inception_v4 inception_resnet_v2 legacy_xception nasnetalarge pnasnet5large",
    224: "repvit_m1 efficientvit_m0 levit_128s coatnet_nano_rw_224 efficientformer_l1 "
    "visformer_tiny",
    256: "botnet26t_256 halonet26t eca_botnext26ts_256",
}


def _timm() -> list[Example]:
    return [
        Example("timm", name, partial(timm.create_model, name), (1, 3, size, size))
        for size, names in _TIMM.items()
        for name in names.split()
    ]


def _smp(kind: str, encoder: str) -> Example:
    make = partial(getattr(smp, kind), encoder, encoder_weights=None)
    return Example("smp", f"{kind}, {encoder}", make)


def _monai(kind: str, **options: Any) -> Example:
    make = partial(getattr(monai.networks.nets, kind), **options)
    return Example("monai", kind, make, (1, 1, 32, 32, 32))


def _others() -> list[Example]:
    dims: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    layers: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
    nnunet: dict[str, Any] = {
        "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
    }  # fmt: skip
    return [
        *(_smp(kind, "resnet18") for kind in ("Unet", "UnetPlusPlus", "Linknet", "PSPNet")),
        _smp("DeepLabV3Plus", "mobilenet_v2"),
        _smp("Unet", "tu-efficientnet_b0"),
        _monai("UNet", **dims, **layers, num_res_units=2, norm="batch"),
        _monai("DynUNet", **dims, **nnunet, norm_name="batch"),
        _monai("SegResNet", **dims, norm="batch"),
        _monai("DenseNet121", **dims),
        _monai("ResNet", block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64],
               n_input_channels=1, num_classes=2),
    ]  # fmt: skip


EXAMPLES = [*_torchvision(), *_of_tasks(), *_timm(), *_others()]


def arguments(example: Example) -> tuple[Any, ...]:
    """The arguments of one call; detectors take lists of images."""
    x = torch.rand(example.shape)
    return ([x],) if len(example.shape) == 3 else (x,)


def training_arguments(example: Example) -> tuple[Any, ...]:
    """The same for training; detectors take boxes, too."""
    if len(example.shape) > 3:
        return arguments(example)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "keypoints": torch.tensor([[[16.0, 16.0, 1.0]] * 17]),
    }
    return *arguments(example), [target]
