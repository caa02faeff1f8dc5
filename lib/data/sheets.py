"""Pictures of a data set: samples of every class with how many there are."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lib.data.readers import Images

if TYPE_CHECKING:  # Importing it makes folders in the user's home.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_CLASSES = 40
"""More rows than a person looks at."""


def class_sheet(
    title: str,
    class_names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    images: Sequence[Images],
) -> bytes:
    """Return a PNG: a row a class, its samples on the left, its rows per split as bars.

    `images` has (n, H, W, C) for each class. Of more than 40 classes the first 40 are drawn.
    """
    from matplotlib.figure import Figure

    shown = min(len(class_names), _MAX_CLASSES)
    figure = Figure(figsize=(10, 1.2 + 0.42 * shown), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    samples, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_samples(samples, [images[index] for index in range(shown)], class_names[:shown])
    left = np.zeros(shown)
    for split, values in counts.items():
        bars.barh(range(shown), values[:shown], left=left, label=split, height=0.7)
        left += np.asarray(values[:shown])
    bars.set(ylim=(shown - 0.5, -0.5), yticks=[], xlabel="rows")
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    if shown < len(class_names):
        figure.text(0.01, 0.005, f"{len(class_names) - shown} more classes are not shown")
    return _png(figure)


def rows_sheet(sections: Mapping[str, tuple[Images, Sequence[str]]]) -> bytes:
    """Return a PNG: for each section, such as what came and what went, its images and labels."""
    from matplotlib.figure import Figure

    drawn = {name: section for name, section in sections.items() if len(section[0])}
    figure = Figure(figsize=(10, 0.4 + 2.2 * max(1, len(drawn))), layout="constrained")
    if not drawn:
        figure.text(0.5, 0.5, "no rows came or went", ha="center", va="center")
        return _png(figure)
    parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, (name, (images, labels)) in zip(parts, drawn.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=11)
        axes = part.subplots(2, 12, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, image, label in zip(axes, images, labels, strict=False):
            _show(axis, image)
            axis.set_title(label, fontsize=8, pad=2)
    return _png(figure)


def _draw_samples(axis: Axes, images: Sequence[Images], names: Sequence[str]) -> None:
    """Draw all samples as one picture: hundreds of axes would take seconds."""
    height, width, channels = next(of_class.shape[1:] for of_class in images)
    most = max(1, *(len(of_class) for of_class in images))
    sheet = np.full((len(images) * height, most * width, channels), 255, dtype=np.uint8)
    for row, of_class in enumerate(images):
        for column, image in enumerate(of_class):
            top, left = row * height, column * width
            sheet[top : top + height, left : left + width] = image
    _show(axis, sheet)
    axis.set_yticks([(row + 0.5) * height for row in range(len(images))], names)
    axis.set_aspect("auto")
    axis.axis("on")
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _show(axis: Axes, image: npt.NDArray[np.uint8]) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255)
    axis.axis("off")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
