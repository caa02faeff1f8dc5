"""What is kept of an image to see drift by: brightness on a coarse grid, and a few global numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

GRID = 7
"""Cells a side at most: what moves by more than a cell, or darkens a corner, shows in them."""
GLOBALS = ("mean", "contrast", "edges")
"""Mean and standard deviation of the pixels, and the mean step between neighbours (blur lowers it)."""
_CHUNK_ROWS = 1024


def grid_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the grid for images of shape (H, W, C)."""
    return (min(GRID, shape[0]), min(GRID, shape[1]))


def feature_names(shape: Sequence[int]) -> tuple[str, ...]:
    """Return a name per feature of images of shape (H, W, C), in their order."""
    rows, columns = grid_shape(shape)
    cells = [f"cell {row},{column}" for row in range(rows) for column in range(columns)]
    colours = [f"channel {channel}" for channel in range(shape[2])] if shape[2] > 1 else []
    return (*cells, *GLOBALS, *colours)


def features(images_NHWC: Images) -> Features:
    """Return the features (N, F) of uint8 images, scaled to 0–1; any H, W and C."""
    chunks = [
        _features(images_NHWC[start : start + _CHUNK_ROWS])
        for start in range(0, len(images_NHWC), _CHUNK_ROWS)
    ]
    width = len(feature_names(images_NHWC.shape[1:]))
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.float32)


def _features(images_NHWC: Images) -> Features:
    num, height, width, channels = images_NHWC.shape
    grey = (
        images_NHWC[..., 0].astype(np.float32)
        if channels == 1
        else images_NHWC.mean(axis=3, dtype=np.float32)
    )
    grey /= np.float32(255)
    rows, columns = grid_shape(images_NHWC.shape[1:])
    cells = _cell_means(grey, rows, columns)
    flat = grey.reshape(num, -1)
    mean = flat.mean(axis=1)
    # From the squares: `std` would go over the pixels twice more.
    variance = np.einsum("np,np->n", flat, flat) / flat.shape[1] - mean * mean
    found = [
        cells.reshape(num, -1),
        mean[:, None],
        np.sqrt(np.maximum(variance, 0))[:, None],
        _edges(grey)[:, None],
    ]
    if channels > 1:
        found.append(images_NHWC.mean(axis=(1, 2), dtype=np.float32) / np.float32(255))
    return np.concatenate(found, axis=1, dtype=np.float32)


def _cell_means(grey: npt.NDArray[np.float32], rows: int, columns: int) -> Features:
    _, height, width = grey.shape
    top = np.linspace(0, height, rows + 1).astype(np.int64)
    left = np.linspace(0, width, columns + 1).astype(np.int64)
    sums = np.add.reduceat(np.add.reduceat(grey, top[:-1], axis=1), left[:-1], axis=2)
    return np.asarray(sums / np.outer(np.diff(top), np.diff(left)), dtype=np.float32)


def _edges(grey: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    total = np.zeros(len(grey), np.float32)
    for axis in (1, 2):
        if grey.shape[axis] > 1:
            total += np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2), dtype=np.float32)
    return total
