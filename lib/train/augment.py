"""Per-sample augmentation of whole batches: one affine map an image, no Python an image.

Images are never flipped: a mirrored digit or letter is another or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """How far an image may be moved at strength 1; a strength of 0 turns augmentation off."""

    strength: float = 1.0
    max_rotation_deg: float = 12.0
    max_scale: float = 0.12
    """Relative change of size."""
    max_shear: float = 0.15
    """Sideways shift of a row as a share of its distance from the centre."""
    max_translation: float = 0.08
    """Share of the image's height and width."""

    def __post_init__(self) -> None:
        """Check the strength."""
        if not 0.0 <= self.strength <= 4.0:
            raise ValueError(f"strength={self.strength} must lie between 0 and 4")


def augment(images_NCHW: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Return the images, each rotated, scaled, sheared and moved by a draw of its own.

    What comes in from outside the image repeats its edge, so any background colour goes on.
    The same generator state gives the same images.
    """
    if how.strength == 0.0:
        return images_NCHW
    theta_N23 = affine_maps(images_NCHW.shape, how, generator).to(images_NCHW.dtype)
    return functional.grid_sample(
        images_NCHW,
        _grid(theta_N23, *images_NCHW.shape[-2:]),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def affine_maps(shape: torch.Size, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw one affine map an image, [N, 2, 3], in the coordinates of `affine_grid`."""
    num_images, _, height, width = shape
    draws_5N = torch.rand((5, num_images), generator=generator, device=generator.device) * 2 - 1
    angle, scale, shear, move_x, move_y = (draws_5N * how.strength).unbind(0)
    angle = angle * math.radians(how.max_rotation_deg)
    scale = torch.exp(scale * how.max_scale)
    shear = shear * how.max_shear
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # Rotation times shear; width and height are 2 long each in these coordinates, so what mixes
    # them is corrected by the aspect ratio.
    aspect = width / height
    return torch.stack(
        (
            torch.stack(
                (cos, (cos * shear - sin) / aspect, move_x * 2 * how.max_translation), dim=1
            ),
            torch.stack((sin * aspect, sin * shear + cos, move_y * 2 * how.max_translation), dim=1),
        ),
        dim=1,
    )


def _grid(theta_N23: Tensor, height: int, width: int) -> Tensor:
    """Return where every pixel comes from, [N, H, W, 2]; what `affine_grid` returns.

    That one multiplies a 3×2 matrix a pixel, which takes three times as long as the sampling. An
    affine map is a term of the column plus a term of the row: one addition a coordinate.
    """
    columns_W = _pixel_centres(width, theta_N23)
    rows_H = _pixel_centres(height, theta_N23)
    grid_NHW2 = theta_N23.new_empty((len(theta_N23), height, width, 2))
    for axis in range(2):
        of_column_N1, of_row_N1, constant_N1 = theta_N23[:, axis].split(1, dim=1)
        torch.add(
            (of_row_N1 * rows_H + constant_N1).unsqueeze(2),
            (of_column_N1 * columns_W).unsqueeze(1),
            out=grid_NHW2[..., axis],
        )
    return grid_NHW2


def _pixel_centres(length: int, like: Tensor) -> Tensor:
    return (torch.arange(length, dtype=like.dtype, device=like.device) * 2 + 1) / length - 1
