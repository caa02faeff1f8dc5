from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

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
        ("I;16", "I;16"),
        ("P", "RGB"),
        ("RGB", "RGB"),
        ("RGBA", "RGB"),
    ],
)
def test_every_png_mode_becomes_grey_or_colour(mode: str, expected: str) -> None:
    pixels, found = pictures.decode(_png(Image.new(mode, (5, 3))))
    assert found == expected
    assert pixels.shape == (3, 5, pictures.MODE_CHANNELS[expected])
    assert pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_cut() -> None:
    picture = Image.fromarray(np.array([[0, 65535, 32896]], np.uint16))
    pixels, _ = pictures.decode(_png(picture))
    assert pixels.ravel().tolist() == [0, 255, 128]


@pytest.mark.parametrize("grey_range", [(0, 4095), (1000, 1255)])
def test_sixteen_bits_are_scaled_by_the_range_of_the_set(grey_range: tuple[int, int]) -> None:
    low, high = grey_range
    values = np.array([[low, high, (low + high) // 2, 0, 65535]], np.uint16)
    body = _png(Image.fromarray(values))
    pixels, _ = pictures.decode(body, grey_range)
    assert pixels.ravel().tolist() == [0, 255, 127, 0, 255]
    assert pictures.value_range(body) == (0, 65535)


def test_eight_bits_are_left_as_they_are_whatever_the_range() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels, _ = pictures.decode(_png(Image.fromarray(values)), (0, 4095))
    np.testing.assert_array_equal(pixels[..., 0], values)


def _png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG that Pillow can't write: colour, or grey with alpha, of 16 bits a channel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colour_of_16_bits_is_read_unless_its_contrast_would_be_lost(
    colour_type: int, channels: int
) -> None:
    values = np.full((2, 2, channels), 65535, np.uint16)
    values[0, 0, : channels - (colour_type != 2)] = 257 * 100
    pixels, mode = pictures.decode(_png_of_16_bits(values, colour_type))
    assert (mode, pixels[0, 0].tolist(), pixels[1, 1, 0]) == ("RGB", [100] * 3, 255)
    values[..., : channels - (colour_type != 2)] = 4095
    with pytest.raises(pictures.DECODE_ERRORS, match="leave 16 of 256 steps"):
        pictures.decode(_png_of_16_bits(values, colour_type))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_turned_as_viewers_turn_it(orientation: int, kind: str) -> None:
    corners = Image.fromarray(np.array([[250, 170], [90, 10]], np.uint8).repeat(8, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    corners.save(stream, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    pixels, _ = pictures.decode(stream.getvalue())
    np.testing.assert_array_equal(pixels[..., 0], expected)
    assert pixels.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))


def test_metadata_that_is_damaged_costs_no_picture() -> None:
    stream = io.BytesIO()
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(values).save(stream, "PNG", exif=b"Exif\0\0nothing of the kind")
    pixels, _ = pictures.decode(stream.getvalue())
    np.testing.assert_array_equal(pixels[..., 0], values)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WebP", "TIFF"])
def test_a_picture_of_another_format_is_named(kind: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, kind)
    with pytest.raises(pictures.DECODE_ERRORS, match=f"not PNG or JPEG but {kind}"):
        pictures.decode(stream.getvalue())


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
