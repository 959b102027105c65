"""The arguments of ``convert``, its messages and its report."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelnorm
from kernelnorm import KNConv2d
from tests.converting import IMAGE, Block, Calling, conv_norm_relu, convert


def test_order_of_registration_decides_without_an_example():
    model = nn.Sequential(conv_norm_relu(3, 8), Block(), conv_norm_relu(8, 4))
    network, report = kernelnorm.convert(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert network[0][0].activation == "relu"
    assert isinstance(network[1].relu, nn.ReLU)  # who calls it cannot be known
    assert all(row.why.endswith("(a guess)") for row in report.rows)
    assert "Pass an example_input" in str(report)
    network(IMAGE).sum().backward()


def test_layers_that_evaluation_does_not_call_are_guessed():
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.features(x)
        return y + self.auxiliary(x) if self.training else y

    model = Calling(forward, features=conv_norm_relu(3, 8), auxiliary=conv_norm_relu(3, 8))
    network, report = convert(model)
    assert isinstance(network.auxiliary[0], KNConv2d)
    assert [row.name for row in report.rows if "guess" in row.why] == [
        f"auxiliary.{i}" for i in range(3)
    ]


def test_examples_with_several_arguments():
    def forward(self: Any, x: Tensor, scale: Tensor) -> Tensor:
        return self.layers(x) * scale

    class Scaled(Calling):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return forward(self, x, scale)

    for example in ((IMAGE, torch.ones(1)), {"x": IMAGE, "scale": torch.ones(1)}):
        network, report = convert(Scaled(forward, layers=conv_norm_relu(3, 8)), example)
        assert network.layers[0].activation == "relu"
        assert "guess" not in str(report)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Conv2d(3, 8, 3), {}, "no norm of the kinds batch, so there is nothing"),
        (lazy, {}, r"its module '0' is lazy.*Call the model once"),
        (
            lambda: conv_norm_relu(4, 8),
            {},
            r"model cannot run on example_input \(RuntimeError: .*channels.*Pass an input",
        ),
        (lambda: conv_norm_relu(3, 8), {"norms": "batch"}, "norms must be names from batch, group"),
        (lambda: conv_norm_relu(3, 8), {"norms": ["layer"]}, "norms must be names from batch"),
        (lambda: conv_norm_relu(3, 8), {"norms": ()}, r"norms must be names .* got \(\)"),
        (lambda: conv_norm_relu(3, 8), {"norms": None}, "norms must be names .* got None"),
        (lambda: conv_norm_relu(3, 8), {"rules": {"dropout": 1}}, "unknown rule 'dropout'"),
    ],
)
def test_messages(model: Callable[[], nn.Module], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kernelnorm.convert(model(), IMAGE, **options)


def test_what_is_no_module_or_scripted_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        kernelnorm.convert("resnet18", IMAGE)  # type: ignore[type-var]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that scripting is deprecated
        scripted = torch.jit.script(conv_norm_relu(3, 8))
    model = nn.Sequential(OrderedDict(part=scripted))
    with pytest.raises(TypeError, match=r"its module 'part' is scripted.*script it then"):
        kernelnorm.convert(model, IMAGE)


def test_model_that_cannot_be_copied_can_be_converted_itself():
    model = conv_norm_relu(3, 8)
    model.generator = (i for i in range(3))
    with pytest.raises(ValueError, match=r"model cannot be copied.*Pass inplace=True"):
        kernelnorm.convert(model, IMAGE)
    network, _ = kernelnorm.convert(model, IMAGE, inplace=True)
    assert isinstance(network[0], KNConv2d)


def test_containers_of_the_example_keep_their_class():
    class Batch(dict):  # type: ignore[type-arg]
        def __getattr__(self, name: str) -> Any:
            return self[name]

    model = Calling(
        lambda self, batch: self.layers(batch.image.add_(1)), layers=conv_norm_relu(3, 8)
    )
    batch = Batch(image=IMAGE.clone(), lock=threading.Lock())
    _, report = kernelnorm.convert(model, (batch,))
    assert not report.unconverted
    assert torch.equal(batch.image, IMAGE)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, y: sum(s.layers(y) for _ in range(2)) + sum(y[:, :1] for _ in range(1500)),
        lambda s, y: s.layers[1:](functools.reduce(_view, range(1500), s.layers[0](y))),
        lambda s, y: s.layers(y) * functools.reduce(_square, range(40), y.sigmoid()),
        lambda s, y: s.layers[1:](functools.reduce(_shuffle, range(40), s.layers[0](y))),
    ],
)
def test_long_chains_of_functions(function: Callable[[Any, Tensor], Tensor]):
    x = torch.randn(1, 8, 2, 2)
    model = Calling(
        lambda s, x: s.last(function(s, x)), layers=conv_norm_relu(8, 8), last=nn.ReLU()
    )
    start = time.perf_counter()
    kernelnorm.convert(model, x)
    assert time.perf_counter() - start < 30


def _view(y: Tensor, _: int) -> Tensor:
    return y.view(y.shape)


def _square(y: Tensor, _: int) -> Tensor:
    return y * y


def _shuffle(y: Tensor, _: int) -> Tensor:
    first, second = y.chunk(2, 1)
    return torch.cat([second, first], 1)


def test_converts_in_inference_mode_and_leaves_the_example():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layers(x.mul_(2))

    x = IMAGE.clone()
    with torch.inference_mode():
        network, _ = kernelnorm.convert(Calling(forward, layers=conv_norm_relu(3, 8)), x)
    assert torch.equal(x, IMAGE)
    network(x).sum().backward()


def test_failed_run_leaves_the_model_as_it_was():
    model = conv_norm_relu(3, 8)
    with pytest.raises(ValueError, match="cannot run"):
        kernelnorm.convert(model, IMAGE[:, :1], inplace=True)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert model.training
    model(IMAGE)


def test_report_is_a_table():
    _, report = convert(nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 2, 1)))
    assert str(report).splitlines() == [
        "module  before       after     why",
        "0.0     Conv2d       KNConv2d  rule I",
        "0.1     BatchNorm2d  removed   rule II: the KNConv normalises its input",
        "0.2     ReLU         removed   rule III: moved into the KNConv before it",
        "1       Conv2d       Conv2d    no norm before or after it",
        "",
        "1 KNConvs, 0 KernelNorms, nothing unconverted",
        "Build the optimizer after converting: new parameters: 1, removed: 2.",
    ]
