"""Small sources for tests, made of the bundled MNIST."""

from __future__ import annotations

import functools
import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lib.data.sources import BUNDLED_MNIST

Array = npt.NDArray[np.uint8]
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@functools.cache
def mnist(split: str) -> tuple[Array, Array]:
    """Images (N, 28, 28) and labels of the bundled files, read without the code under test."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = gzip.decompress((BUNDLED_MNIST / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((BUNDLED_MNIST / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def idx_images(images: Array) -> bytes:
    return struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: Array) -> bytes:
    return struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()


def idx_files(num_train: int = 400, num_test: int = 200) -> dict[str, bytes]:
    train_images, train_labels = mnist("train")
    test_images, test_labels = mnist("test")
    contents = (
        idx_images(train_images[:num_train]),
        idx_labels(train_labels[:num_train]),
        idx_images(test_images[:num_test]),
        idx_labels(test_labels[:num_test]),
    )
    return dict(zip(IDX_FILES, contents, strict=True))


def write_files(folder: Path, files: dict[str, bytes], *, gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return folder


def write_pictures(
    folder: Path,
    split: str,
    per_class: int,
    classes: dict[str, int],
    *,
    suffix: str = "png",
    skip: int = 0,
) -> Path:
    """One folder per class name with pictures of its digit, 28×28 grey."""
    images, labels = mnist(split)
    for name, digit in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(np.flatnonzero(labels == digit)[skip : skip + per_class]):
            Image.fromarray(images[row]).save(folder / name / f"{number:04d}.{suffix}")
    return folder
