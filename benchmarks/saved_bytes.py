"""What a network keeps in memory for its backward, in bytes: a table of ratios to BatchNorm.

It counts each storage that autograd saves once, and leaves the parameters out. The count does not
depend on the machine. Run it with ``python benchmarks/saved_bytes.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelnorm.models import create_model

NETWORKS = {"vgg8": 32, "resnet18": 192, "densenet121": 160}
NORMS = ("none", "batch", "group", "layer", "kernel")


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Return the bytes that a training step keeps between its forward and its backward."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    assert output.requires_grad
    return sum(kept.values())


def main() -> None:
    print(f"{'network':14}{'MB an image, batch':>20}" + "".join(f"{norm:>9}" for norm in NORMS))
    for name, size in NETWORKS.items():
        x = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        kept = {
            norm: saved_bytes(
                create_model(name, norm=norm, num_classes=10).to(memory_format=torch.channels_last),
                x,
            )
            for norm in NORMS
        }
        ratios = "".join(f"{kept[norm] / kept['batch']:9.3f}" for norm in NORMS)
        print(f"{name:14}{kept['batch'] / 2e6:20.1f}{ratios}")


if __name__ == "__main__":
    main()
