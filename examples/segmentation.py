"""Segment street scenes with one image per batch: a U-Net with BatchNorm, converted to KNConvs.

    python examples/segmentation.py camvid.zip

The archive holds camvid/train/images/*.jpg and camvid/train/masks/*.png, and likewise val and test.
A mask has the class of each pixel: 0 to 10, or 11 for void. Without an archive, the images are
generated.
"""

import sys
from io import BytesIO
from itertools import pairwise
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from kernelnorm import convert

CLASSES, VOID, WIDTH, HEIGHT = 11, 11, 128, 96


def layer(in_channels, out_channels, norm, stride=1, size=3):
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, norm(out_channels))


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-18."""

    def __init__(self, in_channels, out_channels, norm, stride):
        super().__init__()
        first = layer(in_channels, out_channels, norm, stride)
        self.body = nn.Sequential(first, nn.ReLU(), layer(out_channels, out_channels, norm))
        same = stride == 1
        self.shortcut = nn.Identity() if same else layer(in_channels, out_channels, norm, stride, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        """Return maps of the same size, or of half the size if the stride is 2."""
        return self.relu(self.body(x) + self.shortcut(x))


class UNet(nn.Module):
    """Two blocks for each scale on the way down, one convolution for each on the way up."""

    def __init__(self, norm=nn.BatchNorm2d, widths=(24, 32, 48, 64, 96)):
        super().__init__()
        self.stem = nn.Sequential(layer(3, widths[0], norm, stride=2), nn.ReLU())
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(widths):
            blocks = Block(fine, coarse, norm, stride=2), Block(coarse, coarse, norm, stride=1)
            self.down.append(nn.Sequential(*blocks))
            self.up.insert(0, nn.Sequential(layer(fine + coarse, fine, norm), nn.ReLU()))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x):
        """Return a score for each class and pixel."""
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        y = maps.pop()
        for up in self.up:
            skip = maps.pop()
            y = up(torch.cat([F.interpolate(y, skip.shape[-2:]), skip], dim=1))
        return F.interpolate(self.head(y), x.shape[-2:], mode="bilinear")


def load(archive, split):
    """Return images (n, 3, height, width) and masks (n, height, width)."""
    if archive is None:
        masks = torch.randint(CLASSES, (4, HEIGHT // 16, WIDTH // 16))
        masks = masks.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
        return torch.linspace(-2, 2, CLASSES)[masks][:, None].repeat(1, 3, 1, 1), masks
    images, masks, folder = [], [], f"camvid/{split}/images/"
    with ZipFile(archive) as files:  # members are read into memory: nothing is unpacked
        for name in sorted(n for n in files.namelist() if n.startswith(folder) and n != folder):
            with Image.open(BytesIO(files.read(name))) as image:
                images.append(np.array(image.convert("RGB").resize((WIDTH, HEIGHT))))
            name = name.replace("/images/", "/masks/").replace(".jpg", ".png")
            with Image.open(BytesIO(files.read(name))) as mask:
                masks.append(np.array(mask.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels / 64 - 2, torch.from_numpy(np.stack(masks)).long()


def train_epoch(network, optimizer, images, masks, batch_size, seed):
    """Train on each image once, in random order; mirror each with probability 0.5."""
    random = torch.Generator().manual_seed(seed)
    network.train()
    for batch in torch.randperm(len(images), generator=random).split(batch_size):
        mirror = torch.rand(len(batch), 1, 1, generator=random) < 0.5
        x, y = images[batch], masks[batch]
        x = torch.where(mirror[..., None], x.flip(-1), x)
        y = torch.where(mirror, y.flip(-1), y)
        loss = F.cross_entropy(network(x), y, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ious(network, images, masks):
    """Return intersection over union for each class, over the pixels of all images."""
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(x).argmax(dim=1) for x in images.split(8)])
    pairs = (masks * CLASSES + predicted)[masks != VOID]
    counts = pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)  # true, predicted
    hits = counts.diagonal()
    return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)


if __name__ == "__main__":
    archive, epochs = (sys.argv[1], 24) if len(sys.argv) > 1 else (None, 2)
    images, masks = load(archive, "train")
    val_images, val_masks = load(archive, "val")
    network, report = convert(UNet(), images[:1])
    print(report)

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        train_epoch(network, optimizer, images, masks, batch_size=1, seed=epoch)
        schedule.step()
        iou = ious(network, val_images, val_masks).nanmean()
        print(f"epoch {epoch + 1}: mean IoU {iou:.1%} on the validation images")
