"""Run a network on a large image in tiles: the result is exact if all of its layers are local."""

import torch
from torch import Tensor, nn

from kernelnorm import KNConv2d
from kernelnorm.norms import make_norm


def block(norm: str, in_channels: int, out_channels: int) -> nn.Module:
    if norm == "kernel":
        return KNConv2d(in_channels, out_channels, 3, padding=1, activation="relu")
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(conv, make_norm(norm, out_channels), nn.ReLU())


def in_tiles(network: nn.Module, image: Tensor, tile: int, overlap: int) -> Tensor:
    """Run the network on each tile with ``overlap`` pixels around it, and join the outputs."""
    rows: list[list[Tensor]] = []
    for top in range(0, image.shape[-2], tile):
        rows.append([])
        for left in range(0, image.shape[-1], tile):
            y, x = max(top - overlap, 0), max(left - overlap, 0)
            crop = image[..., y : top + tile + overlap, x : left + tile + overlap]
            out = network(crop)
            a, b = out.shape[-1], crop.shape[-1]  # a output pixels for b image pixels
            out = out[..., (top - y) * a // b :, (left - x) * a // b :]  # without the overlap
            rows[-1].append(out[..., : tile * a // b, : tile * a // b])
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)


if __name__ == "__main__":
    image = torch.rand(1, 3, 256, 256) * torch.linspace(0, 1, 256)  # darker on the left
    for norm in ("kernel", "batch", "group", "instance"):
        network = nn.Sequential(block(norm, 3, 64), block(norm, 64, 64), nn.Conv2d(64, 2, 1))
        with torch.no_grad():
            network(image)  # BatchNorm collects its statistics
            whole, tiled = network.eval()(image), in_tiles(network, image, tile=64, overlap=2)
        print(f"{norm}: largest difference {(tiled - whole).abs().max() / whole.std():.0e} std")
