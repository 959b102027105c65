"""Networks as folders: what is read back is what was written, and nothing else is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from kernelnorm import models, norms, set_evaluation
from kernelnorm.hub import from_pretrained, save_pretrained

OPTIONS: list[dict[str, Any]] = [
    {"name": "resnet18", "norm": norm, "num_classes": 3} for norm in norms.NORMS
]
OPTIONS += [
    {"name": name, "num_classes": 3}
    for name in (
        *("vgg8", "resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3_small"),
        *("knresnet13", "knresnet18"),
    )
]
OPTIONS += [
    {"name": "vgg8", "width": 0.25, "in_channels": 1},
    {"name": "resnet18", "rules": {"dropout_p": 0.3, "evaluation": "plain"}, "small_images": True},
    {"name": "resnet18", "rules": models.Rules(residual_relu="sum")},
]


def small_network(**options: Any) -> nn.Module:
    return models.create_model("vgg8", **{"width": 0.1, "num_classes": 3, **options})


def assert_same(network: nn.Module, expected: nn.Module) -> None:
    assert repr(network) == repr(expected)
    weights = expected.state_dict()
    assert [*network.state_dict()] == [*weights]
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name


def test_a_save_that_fails_leaves_the_old_files(tmp_path: Path) -> None:
    before = small_network()
    save_pretrained(before, tmp_path)
    with pytest.raises(Exception, match="meta"):
        save_pretrained(small_network(rules={"evaluation": "plain"}).to("meta"), tmp_path)
    assert_same(from_pretrained(tmp_path), before)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_network_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    network = models.create_model(**options)
    save_pretrained(network, tmp_path / "new" / "folder")
    loaded = from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    assert_same(loaded, network)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    x = torch.randn(1, network.get_submodule(first_convolution(network)).in_channels, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), network.eval()(x))


def first_convolution(network: nn.Module) -> str:
    return next(name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))


def test_a_network_that_was_read_is_written_again(tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a")
    save_pretrained(loaded, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_network_is_written_to_the_folder_that_it_came_from(tmp_path: Path) -> None:
    """Its weights are its own, not a view of the file that is replaced."""
    network = small_network(width=1)
    save_pretrained(network, tmp_path)
    loaded = from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    save_pretrained(loaded, tmp_path)
    assert_same(from_pretrained(tmp_path), network)


def test_trained_weights_come_back_in_their_dtype_and_layout(tmp_path: Path) -> None:
    network = small_network().to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    save_pretrained(network, tmp_path)
    assert_same(from_pretrained(tmp_path), network)


def test_the_configuration_names_all_options(tmp_path: Path) -> None:
    save_pretrained(models.create_model("resnet18", rules={"dropout_p": 0.3}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "name": "resnet18",
        "norm": "kernel",
        "rules": {"dropout_p": 0.3},
        "options": {"num_classes": 1000, "in_channels": 3, "small_images": False},
    }


def test_a_repository_is_read_from_the_cache(tmp_path: Path) -> None:
    """The layout of huggingface_hub's cache, and no connection."""
    repository = tmp_path / "models--user--digits"
    network = small_network()
    save_pretrained(network, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    loaded = from_pretrained("user/digits", cache_dir=tmp_path, local_files_only=True)
    assert_same(loaded, network)


def test_other_layers_are_refused(tmp_path: Path) -> None:
    network = small_network()
    network.classifier = nn.Linear(51, 8)
    with pytest.raises(ValueError, match=r"got '\(classifier\).*out_features=8.*=3.*num_classes"):
        save_pretrained(network, tmp_path)
    with pytest.raises(ValueError, match="evaluation=plain"):
        save_pretrained(set_evaluation(small_network(), "plain"), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_networks_of_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes a network of .*create_model, got a VGG8"):
        save_pretrained(models.vgg8(), tmp_path)


def test_options_that_are_no_json_are_refused(tmp_path: Path) -> None:
    import numpy as np

    network = small_network(width=np.float32(0.5))
    with pytest.raises(ValueError, match=r"option width=.* cannot be saved"):
        save_pretrained(network, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_file_is_refused(name: str, tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "must have the fields name, norm, rules, options, got"),
        ({"name": 3}, "name must be a str, got 3"),
        ({"rules": []}, r"rules must be a dict, got \[\]"),
        ({"options": None}, "options must be a dict, got None"),
        ({"name": "__import__"}, "unknown model '__import__'"),
        ({"norm": "spectral"}, "unknown norm 'spectral'"),
        ({"rules": {"speed": 1}}, "unknown rule 'speed'"),
        ({"options": {"num_classes": -5}}, "num_classes must be an integer of at least 1"),
        ({"options": {"speed": 1}}, "describes no network: .*'speed'"),
        ({"options": {"norm": "batch"}}, "options must not have the field norm"),
    ],
)
def test_a_wrong_configuration_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pretrained(small_network(), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_a_configuration_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="got list"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path)
    (tmp_path / name).write_bytes(b"\0damaged")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        from_pretrained(tmp_path)


def test_a_configuration_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", Path("no/where")])
def test_a_folder_that_is_not_there_is_named(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no folder {source}, and the name of a reposit"):
        from_pretrained(source)


def test_a_pruned_network_is_refused(tmp_path: Path) -> None:
    network = small_network()
    prune.l1_unstructured(network.classifier, "weight", 0.5)
    with pytest.raises(ValueError, match=r"other tensors than .* such as 'classifier\.weight'"):
        save_pretrained(network, tmp_path)
    assert not [*tmp_path.iterdir()]
    prune.remove(network.classifier, "weight")
    save_pretrained(network, tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_pretrained(small_network(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier.bias"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "safetensors.torch")
    with pytest.raises(ImportError, match=f"pip install {package}"):
        from_pretrained("user/digits")


def test_local_folders_need_no_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    save_pretrained(small_network(), tmp_path)
    from_pretrained(tmp_path)


def test_importing_kernelnorm_imports_none_of_them() -> None:
    names = "{'huggingface_hub', 'safetensors', 'timm', 'torchvision', 'monai'}"
    code = f"import sys, kernelnorm, kernelnorm.hub; print({names} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
