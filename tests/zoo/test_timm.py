"""The networks in timm's registry do what timm's own networks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

import kernelnorm.timm
from kernelnorm import models
from kernelnorm.hub import save_pretrained

NAMES = models.list_models()
FAMILIES = ["vgg8", "resnet18", "resnet50", "densenet121", "knresnet18"]
FAMILIES += [name for name in NAMES if name.startswith(("mobilenet", "efficientnet"))]
SIZE = 96  # the least that a KNResNet takes


def create(name: str, **options: Any) -> Any:
    return timm.create_model(f"kernel_{name}", **options)


def created_with(weights: dict[str, torch.Tensor], name: str, **options: Any) -> nn.Module:
    """The network of kernelnorm.models with given weights."""
    with torch.device("meta"):
        network = models.create_model(name, **options)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def test_every_network_is_registered() -> None:
    assert {*timm.list_models("kernel_*")} == {f"kernel_{name}" for name in NAMES}
    for name in NAMES:
        with torch.device("meta"):
            ours, theirs = models.create_model(name), create(name)
        shapes = [[(key, t.shape) for key, t in n.state_dict().items()] for n in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_the_module_names_what_it_registers() -> None:
    for name in NAMES:
        assert f"kernel_{name}" in kernelnorm.timm.__all__
        assert callable(getattr(kernelnorm.timm, f"kernel_{name}"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_is_that_of_kernelnorm(name: str) -> None:
    """Weights have the same names, and the same weights give the same scores."""
    network = create(name).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = created_with(network.state_dict(), name)(x)
        assert torch.equal(network(x), expected)
        features = network.forward_features(x)
        assert features.shape[1] == network.num_features
        assert torch.equal(network.forward_head(features), expected)
        hidden = network.forward_head(features, pre_logits=True)
    assert hidden.shape == (1, network.head_hidden_size)
    assert torch.equal(network.get_classifier()(hidden), expected)


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_have_the_channels_and_reductions_of_feature_info(name: str) -> None:
    backbone = create(name, features_only=True).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 128, 128))
    info = backbone.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    for m, reduction in zip(maps, info.reduction(), strict=True):
        padded = 2 * ("knresnet" in name)  # between stages
        assert abs(m.shape[-1] - 128 / reduction) <= padded
    first = info.reduction()[0]
    assert info.reduction() == [first * 2**i for i in range(len(maps))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_feature_maps_are_what_the_network_pools(name: str, tmp_path: Path) -> None:
    network = create(name).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    own = {"file": str(tmp_path / "weights.pt")}
    options = {"features_only": True, "pretrained": True, "pretrained_cfg_overlay": own}
    backbone = create(name, out_indices=(1, -1), **options).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        maps = backbone(x)
        assert len(maps) == 2
        assert torch.equal(maps[-1], network.forward_features(x))


def test_out_indices_choose_the_feature_maps() -> None:
    every = create("resnet18", features_only=True)
    some = create("resnet18", features_only=True, out_indices=(1, 3))
    assert every.feature_info.channels() == [64, 64, 128, 256, 512]
    assert some.feature_info.channels() == [64, 256]
    assert some.feature_info.reduction() == [4, 16]
    assert not [name for name, _ in some.named_parameters() if "layer4" in name]


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_and_channels_of_the_images_are_options(name: str) -> None:
    network = create(name, num_classes=7, in_chans=1)
    assert (network.num_classes, network.in_chans) == (7, 1)
    x = torch.randn(1, 1, SIZE, SIZE)
    assert network(x).shape == (1, 7)
    network.reset_classifier(4)
    assert network.num_classes == network.get_classifier().out_features == 4
    assert network(x).shape == (1, 4)
    network.reset_classifier(0)
    assert network(x).shape == (1, network.head_hidden_size)
    assert create(name, num_classes=0, in_chans=1)(x).shape == (1, network.head_hidden_size)
    assert create(name, num_classes=0, in_chans=1, global_pool="")(x).ndim == 4


def test_rules_and_other_options_of_create_model_pass_through() -> None:
    network = create("resnet18", rules={"dropout_p": 0.3}, small_images=True)
    assert network.conv1.dropout_p == 0.3
    backbone = create("resnet18", features_only=True, small_images=True)
    assert backbone.feature_info.reduction() == [1, 2, 4, 8]


def test_a_new_classifier_has_the_dtype_and_device_of_the_network() -> None:
    network = create("vgg8").to(torch.bfloat16)
    network.reset_classifier(3)
    assert network.get_classifier().weight.dtype == torch.bfloat16


def test_pooling_is_an_option() -> None:
    network = create("vgg8", global_pool="max").eval()
    features = network.forward_features(x := torch.randn(1, 3, SIZE, SIZE))
    assert torch.equal(network(x), network.get_classifier()(features.amax((2, 3))))


def test_a_pooling_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="global_pool must be 'avg', 'max', 'avgmax' or ''"):
        create("vgg8", global_pool="catavgmax")


def test_scores_without_pooling_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=10 needs pooled features"):
        create("vgg8", num_classes=10, global_pool="")


def test_dropout_before_the_classifier_is_for_training() -> None:
    network = create("vgg8", drop_rate=0.5)
    x = torch.randn(1, 512, 4, 4)
    assert (network.forward_head(x, pre_logits=True) == 0).any()
    assert torch.equal(network.eval().forward_head(x), network.forward_head(x))


def test_there_are_no_pretrained_weights() -> None:
    assert not timm.list_pretrained("kernel_*")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        create("resnet18", pretrained=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_weights_load_for_other_classes_and_channels(name: str, tmp_path: Path) -> None:
    """timm adapts the first convolution and leaves the classifier out, by their names."""
    original = models.create_model(name, num_classes=5)
    save_pretrained(original, tmp_path)
    own = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    options = {"pretrained": True, "pretrained_cfg_overlay": own}
    same = create(name, num_classes=5, **options)
    for key, value in original.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key
    other = create(name, num_classes=3, in_chans=1, **options)
    assert other(torch.randn(1, 1, SIZE, SIZE)).shape == (1, 3)
    first = next(layer for layer in original.modules() if isinstance(layer, nn.Conv2d))
    adapted = next(layer for layer in other.modules() if isinstance(layer, nn.Conv2d))
    torch.testing.assert_close(adapted.weight, first.weight.sum(1, keepdim=True))


def test_folders_of_timm_load(tmp_path: Path) -> None:
    network = create("resnet18", num_classes=5, rules={"dropout_p": 0.3}).eval()
    timm.models.save_for_hf(network, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    assert loaded.conv1.dropout_p == 0.3
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "knresnet18"])
def test_a_unet_trains_on_a_single_image(name: str) -> None:
    network = smp.Unet(f"tu-kernel_{name}", encoder_weights=None, in_channels=1, classes=2)
    x = torch.randn(1, 1, SIZE, SIZE)
    y = network(x)
    assert y.shape == (1, 2, SIZE, SIZE)
    y.square().mean().backward()
    assert [key for key, value in network.named_parameters() if value.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_a_unet_of_small_images_starts_at_full_resolution() -> None:
    network = smp.Unet(
        "tu-kernel_vgg8", encoder_depth=3, decoder_channels=(64, 32, 16), encoder_weights=None
    )
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 1, 32, 32)
