"""Coarse features of images, which drift is looked for in and which cost little to keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

GRID = 7
"""Cells along each side; images with fewer pixels along one have as many as pixels there."""
GLOBALS = ("mean", "contrast", "edges")
"""Mean and standard deviation of the pixels, and the mean step between neighbours (blur: less)."""
_CHUNK_ROWS = 1024
"""Images that are wider than bytes at the same time."""


def grid_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the grid for images of shape (H, W, C)."""
    return (min(GRID, shape[0]), min(GRID, shape[1]))


def feature_names(shape: Sequence[int]) -> tuple[str, ...]:
    """Return a name for each feature of images of shape (H, W, C), in their order."""
    rows, columns = grid_shape(shape)
    cells = [f"cell {row},{column}" for row in range(rows) for column in range(columns)]
    channels = [f"channel {channel}" for channel in range(shape[2])] if shape[2] > 1 else []
    return (*cells, *GLOBALS, *channels)


def features(images_NHWC: Images) -> Features:
    """Return the features (N, F), 0–255: the grid's cells, then the global ones."""
    width = len(feature_names(images_NHWC.shape[1:]))
    found = np.empty((len(images_NHWC), width), np.float32)
    for start in range(0, len(found), _CHUNK_ROWS):
        _fill(images_NHWC[start : start + _CHUNK_ROWS], found[start : start + _CHUNK_ROWS])
    return found


def grid_means(images_NHWC: Images) -> Features:
    """Return the mean intensity, 0–255, in every cell of a coarse grid, channels joined: (N, F).

    Cells are in the order of reading. Sides that the grid does not divide have cells that differ
    by one pixel.
    """
    count, height, width, channels = images_NHWC.shape
    rows, row_sizes = _cells(height)
    columns, column_sizes = _cells(width)
    # Along the rows first: there the inner loops are long, and little is left for the rest.
    sums_NGW = np.add.reduceat(
        images_NHWC.reshape(count, height, width * channels), rows, axis=1, dtype=np.uint32
    )
    sums_NGG = np.add.reduceat(sums_NGW, columns * channels, axis=2)
    sizes_GG = np.outer(row_sizes, column_sizes * channels)
    return (sums_NGG / sizes_GG).astype(np.float32).reshape(count, -1)


def _fill(images_NHWC: Images, out_NF: Features) -> None:
    count, height, width, channels = images_NHWC.shape
    cells = np.prod(grid_shape((height, width)))
    out_NF[:, :cells] = grid_means(images_NHWC)
    flat = images_NHWC.reshape(count, -1).astype(np.float32)
    mean = flat.mean(axis=1)
    variance = np.einsum("np,np->n", flat, flat) / flat.shape[1] - mean * mean
    out_NF[:, cells] = mean
    out_NF[:, cells + 1] = np.sqrt(np.maximum(variance, 0))
    out_NF[:, cells + 2] = _edges(images_NHWC)
    if channels > 1:
        out_NF[:, cells + 3 :] = images_NHWC.mean(axis=(1, 2), dtype=np.float32)


def _edges(images_NHWC: Images) -> Features:
    pairs = (
        (images_NHWC[:, 1:], images_NHWC[:, :-1]),
        (images_NHWC[:, :, 1:], images_NHWC[:, :, :-1]),
    )
    total = np.zeros(len(images_NHWC), np.float32)
    for one, other in pairs:
        if one.size:
            # In bytes, which a processor takes many of at a time: a difference could be negative.
            steps = np.maximum(one, other) - np.minimum(one, other)
            total += steps.reshape(len(steps), -1).mean(axis=1, dtype=np.float32)
    return total


def _cells(side: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return where the cells along a side start, and how many pixels each has."""
    edges = np.linspace(0, side, min(GRID, side) + 1).astype(np.intp)
    return edges[:-1], np.diff(edges)
