"""The latency that a search can be for: of the net as it is exported."""

from __future__ import annotations

import pytest

from lib.train.exported import exported_latency_ms
from lib.train.model import ModelConfig


@pytest.mark.parametrize(
    ("shape", "num_views"), [((28, 28, 1), 1), ((28, 28, 1), 3), ((9, 12, 3), 1)]
)
def test_a_net_of_any_shape_is_exported_and_answers_one_image(
    shape: tuple[int, int, int], num_views: int
) -> None:
    height, width, channels = shape
    config = ModelConfig(
        height=height,
        width=width,
        channels=channels,
        num_classes=3,
        stage_width=4,
        depth=1,
        num_views=num_views,
        pixel_mean=(0.1,) * channels,
        pixel_std=(0.3,) * channels,
    )
    assert 0 < exported_latency_ms(config) < 1000
