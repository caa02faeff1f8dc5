from __future__ import annotations

import numpy as np
import pytest

from lib.watch.features import feature_names, features, grid_means, grid_shape


@pytest.mark.parametrize("shape", [(28, 28, 1), (30, 17, 3), (4, 6, 1), (1, 1, 1), (7, 200, 3)])
def test_every_shape_has_its_features(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    found = features(images)
    rows, columns = grid_shape(shape)
    assert found.shape == (5, len(feature_names(shape)))
    assert len(set(feature_names(shape))) == len(feature_names(shape))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found[:, rows * columns], images.reshape(5, -1).mean(axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        found[:, rows * columns + 1], images.reshape(5, -1).std(axis=1), rtol=1e-3, atol=1e-2
    )


def test_cells_are_the_means_of_their_pixels() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    cells = grid_means(images).reshape(3, 7, 7)
    assert cells[1, 2, 3] == pytest.approx(images[1, 8:12, 12:16].mean(), rel=1e-6)
    assert cells[2, 6, 0] == pytest.approx(images[2, 24:28, 0:4].mean(), rel=1e-6)


def test_edges_are_steps_between_neighbours_however_many_images() -> None:
    images = np.zeros((2500, 4, 4, 1), np.uint8)
    images[2400, :, 2:] = 200
    edges = features(images)[:, feature_names((4, 4, 1)).index("edges")]
    assert edges[2400] == pytest.approx(200 / 3)
    assert np.count_nonzero(edges) == 1


def test_colours_are_told_apart() -> None:
    red, blue = np.zeros((2, 1, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 90, 90
    difference = features(red) - features(blue)
    moved = [
        name
        for name, by in zip(feature_names((8, 8, 3)), difference[0], strict=True)
        if abs(by) > 1
    ]
    assert moved == ["channel 0", "channel 2"]


def test_no_images_have_no_features() -> None:
    assert features(np.empty((0, 28, 28, 1), np.uint8)).shape == (0, 52)
