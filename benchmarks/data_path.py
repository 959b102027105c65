"""Images per second of the data path alone: order, gather, copy to the device, augment, preprocess.

    python benchmarks/data_path.py digits cifar10 imagenette --data-dir data

Compare it with the images per second of a training to see whether the data path limits training.
"""

from __future__ import annotations

import argparse
import time

import torch

from kernelnorm.experiments.data import Augment, Images, batches, load_images


def images_per_second(
    images: Images, batch_size: int, augment: Augment | None, device: str, seconds: float
) -> float:
    """Return the rate over epochs until ``seconds`` have passed, after a batch to warm up."""
    next(batches(images, batch_size, train=True, augment=augment, device=device))
    seen, epoch, start = 0, 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for x, _ in batches(
            images, batch_size, train=True, epoch=epoch, augment=augment, device=device
        ):
            seen += len(x)
            if time.perf_counter() - start > seconds:
                break
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        epoch += 1
    return seen / passed


def main() -> None:
    """Print one line for each data set, with and without augmentation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "datasets", nargs="+", help="digits, cifar10, imagenette, imagewoof, a folder"
    )
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 32, 256])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    args = parser.parse_args()

    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    print("data set      shape          load [s]  batch   plain [images/s]  augmented [images/s]")
    for name in args.datasets:
        start = time.perf_counter()
        images = load_images(name, "train", data_dir=args.data_dir, image_size=args.image_size)
        loading = time.perf_counter() - start
        shape = "x".join(map(str, images.pixels.shape[1:]))
        for batch_size in args.batch_sizes:
            plain, augmented = (
                images_per_second(images, batch_size, augment, args.device, args.seconds)
                for augment in (None, Augment())
            )
            print(
                f"{name:13} {shape:13} {loading:9.1f} {batch_size:6} "
                f"{plain:18,.0f} {augmented:21,.0f}"
            )


if __name__ == "__main__":
    main()
