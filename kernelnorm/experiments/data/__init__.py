"""Images for the experiments: found or downloaded, decoded once, augmented on the device.

:func:`load_images` returns :class:`Images`; :func:`batches` iterates over them in batches.
"""

from kernelnorm.experiments.data.batches import (
    Augment,
    Preprocess,
    batches,
    steps_per_epoch,
)
from kernelnorm.experiments.data.decode import read_image
from kernelnorm.experiments.data.download import DATASETS
from kernelnorm.experiments.data.images import Images
from kernelnorm.experiments.data.load import load_images
from kernelnorm.experiments.errors import DataError

__all__ = [
    "DATASETS",
    "Augment",
    "DataError",
    "Images",
    "Preprocess",
    "batches",
    "load_images",
    "read_image",
    "steps_per_epoch",
]
