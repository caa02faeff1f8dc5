"""PNG and JPEG files to pixels, the same way for training data and for uploads."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 16 * 2**20
PICTURE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""First bytes of a PNG and of a JPEG."""
_GREY_MODES = ("1", "L", "LA", "La", "F")
SIXTEEN_BIT = "I;16"
"""Mode of a set of 16-bit grey pictures: scaled by its range of values, it becomes 8-bit grey."""
MODE_CHANNELS = {"L": 1, SIXTEEN_BIT: 1, "RGB": 3}
MODE_NAMES = {"L": "grey", SIXTEEN_BIT: "16-bit grey", "RGB": "colour"}
ALL_SIXTEEN_BITS = (0, 65535)
_LOWEST_MAXIMUM = 32
"""Of 255: a 16-bit colour picture that is darker everywhere does not use the full range."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what a viewer does about it."""
_OTHER_FORMATS = {
    b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
}  # fmt: skip

DECODE_ERRORS = (
    OSError,  # Includes Pillow's UnidentifiedImageError and its "image file is truncated".
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for a file that is damaged, cut off, or no picture."""


def pixel_mode(picture: Image.Image) -> str:
    """Return the mode of a data set of such pictures, a key of `MODE_CHANNELS`."""
    if _is_sixteen_bit(picture):
        return SIXTEEN_BIT
    return "L" if picture.mode in _GREY_MODES else "RGB"


def to_mode(
    picture: Image.Image, mode: str, grey_range: tuple[int, int] | None = None
) -> Image.Image:
    """Turn upright and convert to 8-bit grey or colour, the same way everywhere.

    Transparent parts are shown on white, as viewers do. Of 16-bit pictures the values of
    `grey_range`, all by default, become 0 and 255; what lies beyond them is cut off.
    """
    picture = _upright(picture)
    if _is_sixteen_bit(picture):
        low, high = grey_range or ALL_SIXTEEN_BITS
        scaled = (np.asarray(picture).astype(np.float32) - low) / ((high - low) / 255)
        picture = Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
    elif picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = Image.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
    return picture.convert("L" if mode == SIXTEEN_BIT else mode)


def decode(
    body: bytes, grey_range: tuple[int, int] | None = None
) -> tuple[npt.NDArray[np.uint8], str]:
    """Decode a PNG or JPEG at its own size to (H, W, C) pixels and the mode of such a set.

    Raises one of DECODE_ERRORS if it can't be decoded.
    """
    with _opened(body) as picture:
        mode = pixel_mode(picture)
        if mode == "RGB" and picture.format == "PNG" and body[24] == 16:
            _check_sixteen_bit_colour(picture)
        converted = to_mode(picture, mode, grey_range)
    shape = (converted.height, converted.width, MODE_CHANNELS[mode])
    return np.asarray(converted, dtype=np.uint8).reshape(shape), mode


def value_range(body: bytes) -> tuple[int, int]:
    """Return the least and greatest value of a 16-bit picture, of others (65535, 0).

    Raises one of DECODE_ERRORS if it can't be decoded.
    """
    with _opened(body) as picture:
        if not _is_sixteen_bit(picture):
            return ALL_SIXTEEN_BITS[::-1]
        values = np.asarray(picture)
    return int(values.min()), int(values.max())


@contextlib.contextmanager
def _opened(body: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(body), formats=("PNG", "JPEG"))
        except UnidentifiedImageError as error:
            kinds = [kind for start, kind in _OTHER_FORMATS.items() if body.startswith(start)]
            raise ValueError(f"not PNG or JPEG{f' but {kinds[0]}' if kinds else ''}") from error
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}×{picture.height} pixels, over {MAX_PIXELS}")
            yield picture


def _check_sixteen_bit_colour(picture: Image.Image) -> None:
    """Raise ValueError for 12-bit data and the like: Pillow keeps the upper 8 bits of 16 only."""
    highest = max(int(extremes[1]) for extremes in picture.getextrema()[:3])  # type: ignore[index]
    if highest < _LOWEST_MAXIMUM:
        raise ValueError(
            f"16 bits a channel, of which the values up to {highest * 257} alone are used, would "
            f"leave {highest + 1} of 256 steps; scale it to 8 bits a channel"
        )


def _is_sixteen_bit(picture: Image.Image) -> bool:
    return picture.mode == "I" or picture.mode.startswith("I;16")


def _upright(picture: Image.Image) -> Image.Image:
    """Return the picture as viewers show it, by its EXIF orientation."""
    try:
        orientation: Any = picture.getexif().get(ExifTags.Base.Orientation)
    except SyntaxError:  # Metadata that isn't EXIF says nothing, to viewers too.
        return picture
    # Not ImageOps.exif_transpose: it writes the metadata anew and fails on what it can't write.
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)
