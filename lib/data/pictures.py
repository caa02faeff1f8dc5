"""PNG and JPEG files to pixels, the same way for training data and for uploads."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX_PIXELS = 16 * 2**20
PICTURE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""First bytes of a PNG and of a JPEG."""
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
MODE_CHANNELS = {"L": 1, "RGB": 3}

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
    """Return the mode a data set made of such pictures has: `L` for grey, else `RGB`."""
    is_grey = picture.mode in _GREY_MODES or picture.mode.startswith("I;16")
    return "L" if is_grey else "RGB"


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Convert to 8-bit grey or colour; transparent parts are shown on white, as viewers do."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        scaled = np.asarray(picture).astype(np.float32) / 257.0
        picture = Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
    elif picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = Image.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
    return picture.convert(mode)


def decode(body: bytes) -> tuple[npt.NDArray[np.uint8], str]:
    """Decode a PNG or JPEG at its own size to (H, W, C) pixels and their mode.

    Raises one of DECODE_ERRORS if it can't be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}×{picture.height} pixels, over {MAX_PIXELS}")
            mode = pixel_mode(picture)
            converted = to_mode(picture, mode)
    shape = (converted.height, converted.width, MODE_CHANNELS[mode])
    return np.asarray(converted, dtype=np.uint8).reshape(shape), mode
