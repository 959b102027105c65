"""Images of 32x32 pixels, once as PNG and once as JPEG: how much accuracy does JPEG cost?

    python benchmarks/jpeg_images.py imagenette2-160 small
    kernelnorm train --model vgg8 --dataset small/png --out runs/png
    kernelnorm train --model vgg8 --dataset small/jpeg --out runs/jpeg

The first argument is a folder ``SPLIT/CLASS/*`` of larger images. Each is cut to a square and made
smaller, which removes the traces of its own compression. ``small/jpeg`` has Pillow's default
quality, 75, and colours at half the resolution.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

SIZE = 32


def shrink(file: Path) -> Image.Image:
    """The central square of an image, at the size of CIFAR-10's images."""
    with Image.open(file) as image:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(source: Path, out: Path) -> None:
    files = sorted(
        file for file in source.glob("*/*/*") if file.suffix.lower() in (".jpeg", ".jpg")
    )
    if not files:
        sys.exit(f"{source} has no images SPLIT/CLASS/*.jpg")
    for file in tqdm(files, unit=" images"):
        image = shrink(file)
        for kind, suffix in (("png", ".png"), ("jpeg", ".jpg")):
            copy = out / kind / file.relative_to(source).with_suffix(suffix)
            copy.parent.mkdir(parents=True, exist_ok=True)
            image.save(copy)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
