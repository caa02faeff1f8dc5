from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lib.data import pictures


def _png(picture: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "L"),
        ("I;16", "L"),
        ("P", "RGB"),
        ("RGB", "RGB"),
        ("RGBA", "RGB"),
    ],
)
def test_every_png_mode_becomes_grey_or_colour(mode: str, expected: str) -> None:
    pixels, found = pictures.decode(_png(Image.new(mode, (5, 3))))
    assert found == expected
    assert pixels.shape == (3, 5, {"L": 1, "RGB": 3}[expected])
    assert pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_cut() -> None:
    picture = Image.fromarray(np.array([[0, 65535, 32896]], np.uint16))
    pixels, _ = pictures.decode(_png(picture))
    assert pixels.ravel().tolist() == [0, 255, 128]


def test_what_is_transparent_is_white() -> None:
    pixels, _ = pictures.decode(_png(Image.new("RGBA", (1, 1), (10, 20, 30, 0))))
    assert pixels.ravel().tolist() == [255, 255, 255]


def test_a_damaged_picture_raises_what_callers_catch() -> None:
    whole = _png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)))
    for body in (b"", b"text", whole[: len(whole) // 2], whole[:40]):
        with pytest.raises(pictures.DECODE_ERRORS):
            pictures.decode(body)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(pictures.DECODE_ERRORS, match="pixels"):
        pictures.decode(_png(Image.new("1", (5000, 5000))))
