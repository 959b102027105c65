"""``convert`` on the networks of torchvision, timm, segmentation_models_pytorch and MONAI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelnorm import convert
from kernelnorm.conversion import kinds
from kernelnorm.ops.containers import tensors_in
from tests.zoo.networks import EXAMPLES, Example, arguments, training_arguments

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOTHING_TO_CONVERT = ("alexnet", "squeezenet", "convnext")


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output."""
    return (tensor for tensor in tensors_in(output) if tensor.is_floating_point())


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, CONVOLUTIONS) and "weight" in dict(module.named_parameters())
    }


def without_norms(name: str) -> bool:
    return name.startswith(NOTHING_TO_CONVERT) or (name.startswith("vgg") and "bn" not in name)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_converted_network_trains_on_one_image(
    example: Example, record_property: Callable[[str, object], None]
):
    torch.set_num_threads(1)
    model = example.make()
    if without_norms(example.name):
        with pytest.raises(ValueError, match="nothing to convert"):
            convert(model, arguments(example))
        return
    names = [name for name, _ in model.named_modules()]
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    modes = {name: module.training for name, module in model.named_modules()}

    network, report = convert(model, arguments(example), inplace=True)

    modules = dict(network.named_modules())
    assert {*names} <= {*modules}
    assert all(modules[name].training == modes[name] for name in names)
    after = weights(network)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    left = [name for name, module in modules.items() if kinds.name_of_norm(module) == "batch"]
    assert {*left} <= {row.name for row in report.unconverted}
    assert all(row.why for row in report.unconverted)

    network.train()
    for name in left:  # such a norm refuses a single image in training
        modules[name].eval()
    loss = sum(
        output.float().square().mean() for output in tensors(network(*training_arguments(example)))
    )
    assert torch.isfinite(loss)
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) > len(report.rows) / 4
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    record_property("row", table_row(example, network, report))


def table_row(example: Example, network: nn.Module, report: Any) -> str:
    knconvs = sum("KNConv" in row.after for row in report.rows)
    kept = [row for row in report.rows if row.before == row.after and "Conv" in row.before]
    norms = sum("KernelNorm" in row.after for row in report.rows)
    why = {row.why: f"`{row.name}`" for row in reversed(report.unconverted)}
    counts = Counter(row.why for row in report.unconverted)
    left = "; ".join(
        f"{name}{f' and {counts[reason] - 1} more' * (counts[reason] > 1)}: {reason}"
        for reason, name in why.items()
    )
    cells = [example.group, example.name, knconvs, len(kept), norms, left]
    return f"| {' | '.join(map(str, cells))} |"
