"""The data sets that torchvision downloads."""

from __future__ import annotations

import hashlib
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data.checks import (
    Labels,
    check_class_names,
    check_labels,
    check_row_counts,
    check_same_shape,
)
from lib.data.manifest import Ignored
from lib.data.readers import RawReader, Shape
from lib.data.sources import Opened, SplitRows
from lib.data.staging import Staging
from lib.errors import DataError

SETS = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS")
"""Those with a train and a test split, given as arrays."""
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchvisionSource:
    """Arrays as torchvision gives them; these sets are small enough to hold."""

    name: str
    images: Mapping[str, npt.NDArray[np.uint8]]
    """Split → (N, H, W, C)."""
    labels: Mapping[str, Labels]
    class_names: tuple[str, ...]
    digests: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()

    @classmethod
    def load(cls, set_name: str, *, cache_dir: Path) -> TorchvisionSource:
        """Download the set into the cache folder unless it is there, and read it."""
        if set_name not in SETS:
            raise DataError(f"torchvision:{set_name} is not known; choose one of {', '.join(SETS)}")
        # Imported here: torchvision costs a second and 170 MB, which other sources must not pay.
        import torchvision.datasets

        images, labels, digests = {}, {}, {}
        class_names: tuple[str, ...] | None = None
        for split in ("train", "test"):
            try:
                loaded: Any = getattr(torchvision.datasets, set_name)(
                    root=str(cache_dir), train=split == "train", download=True
                )
            except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
                raise _failed(set_name, split, cache_dir, error) from error
            pixels = np.ascontiguousarray(np.asarray(loaded.data), dtype=np.uint8)
            images[split] = pixels[..., np.newaxis] if pixels.ndim == 3 else pixels
            labels[split] = np.asarray(loaded.targets).astype(np.int32)
            digests[f"{split} images"] = hashlib.sha256(pixels.data).hexdigest()
            digests[f"{split} labels"] = hashlib.sha256(labels[split].data).hexdigest()
            class_names = class_names or tuple(getattr(loaded, "classes", ()))
        name = f"torchvision:{set_name}"
        if not class_names:
            class_names = tuple(str(label) for label in range(int(labels["train"].max()) + 1))
        check_class_names(name, class_names)
        return cls(
            name=name, images=images, labels=labels, class_names=class_names, digests=digests
        )

    def open(self, staging: Staging) -> Opened:
        """Check the arrays and stage them, so that tasks read them by range."""
        shapes: dict[str, Shape] = {
            f"{self.name} {split}": (images.shape[1], images.shape[2], images.shape[3])
            for split, images in self.images.items()
        }
        check_same_shape(shapes)
        splits = []
        for split, images in self.images.items():
            name = f"{self.name} {split}"
            check_row_counts(name, len(images), name, len(self.labels[split]))
            check_labels(name, self.labels[split], len(self.class_names), self.name)
            content = images.reshape(-1).data
            pieces = (
                content[start : start + _PIECE_BYTES]
                for start in range(0, images.nbytes, _PIECE_BYTES)
            )
            path = staging.add(f"{split}-images", pieces, images.nbytes)
            reader = RawReader(
                name=name,
                root=staging.storage,
                path=path,
                offset_bytes=0,
                start=0,
                stop=len(images),
            )
            splits.append(
                SplitRows(split=split, labels=self.labels[split], reader=reader, labels_name=name)
            )
        return Opened(
            class_names=self.class_names,
            shape=next(iter(shapes.values())),
            splits=tuple(splits),
        )


def _failed(set_name: str, split: str, cache_dir: Path, error: Exception) -> DataError:
    if isinstance(error, urllib.error.URLError) or "download" in str(error).lower():
        return DataError(
            f"torchvision:{set_name} can't be downloaded: {error}; check the network, or put its "
            f"raw files below {cache_dir / set_name}"
        )
    return DataError(
        f"torchvision:{set_name} {split}: its files below {cache_dir / set_name} are damaged "
        f"({type(error).__name__}: {error}); delete them and run the same command again"
    )
