from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lib.train.augment import Augmentation, affine_maps, augment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(**limits: float) -> Augmentation:
    """An augmentation that does one thing alone."""
    names = ("max_rotation_deg", "max_scale", "max_shear", "max_translation")
    return Augmentation(**{name: limits.get(name, 0.0) for name in names})


def test_strength_zero_changes_nothing_and_draws_nothing() -> None:
    images = torch.rand((4, 1, 28, 28))
    generator = seeded()
    before = generator.get_state()
    assert augment(images, Augmentation(strength=0.0), generator) is images
    assert torch.equal(generator.get_state(), before)


def test_the_identity_map_gives_the_same_image() -> None:
    images = torch.rand((4, 3, 12, 20))
    torch.testing.assert_close(augment(images, only(), seeded()), images, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_images_and_another_seed_others() -> None:
    images = torch.rand((8, 1, 28, 28))
    first = augment(images, Augmentation(), seeded(1))
    assert torch.equal(first, augment(images, Augmentation(), seeded(1)))
    assert not torch.equal(first, augment(images, Augmentation(), seeded(2)))


def test_every_image_of_a_batch_is_moved_by_a_draw_of_its_own() -> None:
    images = torch.rand((1, 1, 28, 28)).expand(16, 1, 28, 28).contiguous()
    moved = augment(images, Augmentation(), seeded())
    assert len({image.numpy().tobytes() for image in moved}) == 16


@pytest.mark.parametrize("shape", [(28, 28), (12, 20), (40, 16)])
def test_rotation_keeps_lengths_whatever_the_aspect_ratio(shape: tuple[int, int]) -> None:
    height, width = shape
    rows = torch.arange(height).view(-1, 1) - (height - 1) / 2
    columns = torch.arange(width).view(1, -1) - (width - 1) / 2
    distance = torch.hypot(rows, columns)
    blob = torch.exp(-((distance / (min(shape) / 5)) ** 2)).expand(6, 1, -1, -1).contiguous()
    turned = augment(blob, only(max_rotation_deg=90.0), seeded())
    # A round blob looks the same however it is turned; stretched, it would not.
    assert (turned - blob).abs().max() < 0.06


def test_translation_moves_by_at_most_its_share_of_the_image() -> None:
    images = torch.zeros((64, 1, 20, 20))
    images[:, :, 10, 10] = 1.0
    moved = augment(images, only(max_translation=0.1), seeded())
    peaks = moved.flatten(1).argmax(dim=1)
    distances = [
        max(abs(int(peak) // 20 - 10), abs(int(peak) % 20 - 10)) for peak in peaks.tolist()
    ]
    assert max(distances) == 2
    assert math.isclose(0.1 * 20, max(distances))


def test_what_comes_in_from_outside_repeats_the_edge() -> None:
    images = torch.full((8, 1, 16, 16), 0.75)
    moved = augment(images, Augmentation(strength=2.0), seeded())
    torch.testing.assert_close(moved, images, rtol=0, atol=1e-5)


def test_images_are_never_mirrored() -> None:
    # An L-shape: mirrored, its bar would be on the left.
    images = torch.zeros((256, 1, 28, 28))
    images[:, :, 6:22, 8:10] = 1.0
    images[:, :, 20:22, 8:20] = 1.0
    moved = augment(images, Augmentation(strength=1.0), seeded())
    correct = (moved * images).sum(dim=(1, 2, 3))
    mirrored = (moved * images.flip(3)).sum(dim=(1, 2, 3))
    assert (correct > mirrored).float().mean() > 0.95


def test_a_strength_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="strength=-1"):
        Augmentation(strength=-1)


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (3, 2, 12, 20), (2, 3, 1, 7)])
def test_pixels_come_from_where_torchs_own_affine_grid_says(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    theta = affine_maps(images.shape, Augmentation(strength=2.0), seeded(3))
    grid = functional.affine_grid(theta, list(shape), align_corners=False)
    expected = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    moved = augment(images, Augmentation(strength=2.0), seeded(3))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)
