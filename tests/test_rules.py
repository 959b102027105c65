"""What ablations vary of the rules, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelnorm.experiments.config import configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.models import Rules, create_model
from kernelnorm.models.resnet import BasicBlock, Bottleneck
from kernelnorm.modules import KernelNorm2d, KNConv2d

RESIDUAL = ["resnet18", "resnet50"]
QUICK = ["vgg8", "resnet18", "resnet50", "densenet121"]  # one of each wiring
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in QUICK[2:]]
VARIANTS: list[dict[str, Any]] = [
    {"dropout_p": 0.0, "head_dropout_p": 0.0},
    {"dropout_p": 0.5},
    {"residual_relu": "sum"},
    {"residual_relu": "both"},
    {"head": False},
    {"head": False, "residual_relu": "sum"},
    {"evaluation": "plain"},
]


def small(name: str, rules: Rules | dict[str, Any] | None = None) -> nn.Module:
    """The network for five classes, its weights always the same."""
    torch.manual_seed(0)
    return create_model(name, num_classes=5, rules=rules)


def on_meta(name: str, **rules: Any) -> nn.Module:
    """The network without memory for its parameters: enough for its layers."""
    with torch.device("meta"):
        return create_model(name, rules=rules)


def layers(network: nn.Module, kind: type) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, kind)]


def without_relu(network: nn.Module) -> list[str]:
    """The names of the KNConvs that have no ReLU."""
    return [
        name
        for name, m in network.named_modules()
        if isinstance(m, KNConv2d) and m.activation is None
    ]


def scores_and_gradients(network: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    scores = network(torch.randn(2, 3, 32, 32))
    scores.logsumexp(1).sum().backward()
    return [scores, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("rules", [{}, Rules(), {"dropout_p": 0.1, "residual_relu": "branch"}])
@pytest.mark.parametrize("name", [*QUICK[:2], *SLOW])
def test_without_rules_they_are_the_papers(name: str, rules: Rules | dict[str, Any]):
    expected, network = small(name), small(name, rules)
    assert str(network) == str(expected)
    for a, b in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    pairs = zip(scores_and_gradients(network), scores_and_gradients(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("rules", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["resnet18", SLOW[0]])
def test_variants_have_the_same_weights_and_each_gets_a_gradient(name: str, rules: dict[str, Any]):
    expected, network = small(name).state_dict(), small(name, rules)
    assert list(network.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    scores_and_gradients(network)
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", QUICK)
def test_rule_1s_dropout_is_that_of_every_knconv(name: str):
    assert {m.dropout_p for m in layers(on_meta(name, dropout_p=0.3), KNConv2d)} == {0.3}


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_rule_4s_dropout_is_that_of_the_head(name: str):
    network = on_meta(name, head_dropout_p=0.4)
    assert [m.dropout_p for m in layers(network, KernelNorm2d)] == [0.4]
    assert {m.dropout_p for m in layers(network, KNConv2d)} == {0.1}


@pytest.mark.parametrize("name", QUICK)
def test_no_dropout_at_all_trains_as_plain_evaluation_does(name: str):
    rules = {"dropout_p": 0.0} if name == "vgg8" else {"dropout_p": 0.0, "head_dropout_p": 0.0}
    network, x = small(name, rules), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), small(name, {"evaluation": "plain"}).eval()(x))


@pytest.mark.parametrize("evaluation", ["expected", "plain", "monte_carlo"])
@pytest.mark.parametrize("name", QUICK)
def test_the_evaluation_is_that_of_every_kernel_layer(name: str, evaluation: str):
    network = on_meta(name, evaluation=evaluation)
    kernel_layers = layers(network, KNConv2d) + layers(network, KernelNorm2d)
    assert {m.evaluation for m in kernel_layers} == {evaluation}


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("residual_relu", ["branch", "sum", "both"])
def test_rule_3s_relu_is_in_the_branches_or_after_the_sum(name: str, residual_relu: str):
    network = small(name, {"residual_relu": residual_relu})
    outputs: dict[str, list[Tensor]] = {"branch": [], "shortcut": [], "sum": [], "block": []}

    def keep(kind: str, output: Tensor) -> None:
        outputs[kind].append(output)

    blocks = layers(network, (BasicBlock, Bottleneck))
    for block in blocks:
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        last.register_forward_hook(lambda *args: keep("branch", args[-1]))
        if isinstance(block.downsample, nn.Sequential):
            block.downsample.register_forward_hook(lambda *args: keep("shortcut", args[-1]))
        block.sum_relu.register_forward_hook(lambda *args: keep("sum", args[1][0]))
        block.register_forward_hook(lambda *args: keep("block", args[-1]))
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    rectified = {kind: [bool((y >= 0).all()) for y in ys] for kind, ys in outputs.items()}

    *others, last_branch = rectified["branch"]
    in_branch, after_sum = residual_relu != "sum", residual_relu != "branch"
    assert set(others) == set(rectified["shortcut"]) == {in_branch}
    assert not last_branch  # before the KernelNorm of rule IV
    assert set(rectified["block"][:-1]) == {True}
    assert rectified["block"][-1] == after_sum
    assert not rectified["sum"][-1]
    assert len(layers(network, nn.ReLU)) == 1 + after_sum * len(blocks)


@pytest.mark.parametrize("name", RESIDUAL)
def test_each_variant_of_rule_3_is_another_network(name: str):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        a, b, c = (
            small(name, {"residual_relu": relu}).eval()(x) for relu in ("branch", "sum", "both")
        )
    assert not torch.allclose(a, b)
    assert not torch.allclose(a, c)
    assert not torch.allclose(b, c)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_without_rule_4_the_last_knconv_has_its_relu(name: str):
    network = on_meta(name, head=False)
    assert not layers(network, KernelNorm2d)
    assert not layers(network, nn.ReLU)
    assert without_relu(network) == []


@pytest.mark.parametrize("name", RESIDUAL)
def test_without_rule_4_a_relu_left_to_the_sum_stays_there(name: str):
    expected = without_relu(on_meta(name, residual_relu="sum"))
    assert without_relu(on_meta(name, residual_relu="sum", head=False)) == expected


CHOICES = "dropout_p, head_dropout_p, residual_relu, head, evaluation"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"dropout": 0.1}, f"unknown rule 'dropout', choose from: {CHOICES}"),
        ([0.1], rf"rules must be a mapping with any of {CHOICES}, got \[0.1\]"),
        ({"dropout_p": 1.0}, "rule dropout_p must be a number from 0 to below 1, got 1.0"),
        ({"dropout_p": "0.1"}, "rule dropout_p must be a number from 0 to below 1, got '0.1'"),
        ({"dropout_p": False}, "rule dropout_p must be a number from 0 to below 1, got False"),
        ({"head_dropout_p": -0.1}, "rule head_dropout_p must be a number .*, got -0.1"),
        ({"residual_relu": "after"}, r"residual_relu must be one of \('branch', .*, got 'after'"),
        ({"head": 0}, "rule head must be True or False, got 0"),
        ({"evaluation": "exact"}, r"rule evaluation must be one of \('expected', .* got 'exact'"),
        (
            {"head": False, "head_dropout_p": 0.1},
            "rule head_dropout_p=0.1 does nothing: head=False leaves the KernelNorm out",
        ),
        (
            {"head": False, "residual_relu": "both"},
            "rule residual_relu='both' needs head=True: else use 'branch'",
        ),
    ],
)
def test_mistaken_rules_are_refused(rules: Any, message: str):
    with pytest.raises(ValueError, match=message):
        create_model("resnet18", rules=rules)


@pytest.mark.parametrize(
    ("name", "rules", "message"),
    [
        ("vgg8", {"residual_relu": "sum"}, "residual_relu='sum' does nothing: VGG8 has no additi"),
        ("vgg8", {"head": False}, "rule head=False does nothing: VGG8 has no KernelNorm before"),
        ("vgg8", {"head_dropout_p": 0.1}, "head_dropout_p=0.1 does nothing: VGG8 has no KernelN"),
        ("densenet121", {"residual_relu": "both"}, "'both' does nothing: DenseNet has no addition"),
    ],
)
def test_rules_that_do_nothing_in_a_network_are_refused(name: str, rules: Any, message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, rules=rules)


@pytest.mark.parametrize("name", QUICK)
def test_rules_are_for_the_kernel_norm(name: str):
    message = "rules are for norm='kernel', got norm='batch'. Leave them out"
    with pytest.raises(ValueError, match=message):
        create_model(name, norm="batch", rules={"dropout_p": 0.2})


def test_a_run_has_its_rules_among_the_models_options():
    recipe = recipe_for("imagewoof-resnet18")
    options = {"rules": {"head": False}}
    config = configure(recipe, norm="kernel", batch_size=2, model_options=options)
    assert config.name != configure(recipe, norm="kernel", batch_size=2).name
    assert not layers(build_network(config, num_classes=5, in_channels=3), KernelNorm2d)


def test_a_run_with_mistaken_rules_says_so():
    options = {"rules": {"heads": False}}
    recipe = recipe_for("imagewoof-resnet18")
    config = configure(recipe, norm="kernel", batch_size=2, model_options=options)
    with pytest.raises(RunError, match="cannot build resnet18: unknown rule 'heads', choose"):
        build_network(config, num_classes=5, in_channels=3)
