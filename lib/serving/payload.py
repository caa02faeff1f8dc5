"""Request bodies to arrays, and every way in which a body can be wrong."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from lib.config import MAX_BODY_BYTES
from lib.data.pictures import DECODE_ERRORS, MAX_PIXELS, PICTURE_STARTS, to_mode
from lib.serving.bundle import Card

Images = npt.NDArray[np.uint8]

MAX_BATCH = 1024


class PayloadError(Exception):
    """A request that can't be served; `status` is the HTTP status it gets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def decoded(body: bytes, encoding: bytes) -> bytes:
    """Undo a request's Content-Encoding; the limit on bodies holds for what comes out.

    Raises PayloadError 415 for an encoding that is not taken, 413 for a body that grows beyond
    MAX_BODY_BYTES, and 400 for one that is damaged.
    """
    names = [name.strip() for name in encoding.decode("latin-1").lower().split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if not codings:
        return body
    if len(codings) > 1 or codings[0] not in ("gzip", "x-gzip", "deflate"):
        raise PayloadError(
            415, f"Content-Encoding {', '.join(codings)!r} is not taken; send gzip, deflate or none"
        )
    # 32 more than the window: gzip or zlib, as the first bytes say. Some clients' deflate has
    # neither header.
    has_header = body.startswith(b"\x1f\x8b") or (
        body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    )
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32 if has_header else -zlib.MAX_WBITS)
    try:
        result = stream.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise PayloadError(400, f"the compressed body is damaged: {error}") from error
    if len(result) > MAX_BODY_BYTES:
        raise PayloadError(413, f"the decoded body is larger than {MAX_BODY_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise PayloadError(400, "the compressed body ends too early, or something follows it")
    return result


def parse_predict(body: bytes, content_type: str, card: Card) -> Images:
    """Turn the body of POST /predict into one image, shape (1, H, W, C).

    Pictures of any size are preprocessed as the data set's manifest records; raw bytes and JSON
    must have the exact shape. Raises PayloadError (400, 415 or 422).
    """
    kind = content_type.partition(";")[0].strip().lower()
    # curl's --data-binary says form data unless told otherwise: look at the bytes instead.
    is_unnamed = kind in ("", "application/x-www-form-urlencoded", "image/*")
    if kind in ("image/png", "image/jpeg", "image/jpg") or (
        is_unnamed and body.startswith(PICTURE_STARTS)
    ):
        return decode_picture(body, card)[np.newaxis]
    if kind == "application/octet-stream":
        return _from_raw(body, card)
    if kind == "application/json":
        return _from_json(body, card)
    raise PayloadError(
        415,
        f"content type {kind or 'missing'!r} is not served; send image/png, image/jpeg, "
        f"application/octet-stream ({card.image_bytes} raw bytes) or application/json",
    )


def decode_picture(body: bytes, card: Card) -> Images:
    """Decode a PNG or JPEG and fit it to the card's shape, (H, W, C).

    A picture of the exact size is left as it is; others are scaled to fit, centred, and filled
    up with the colour that the training images have at their border.
    """
    if not body.startswith(PICTURE_STARTS):
        raise PayloadError(400, "the body is neither a PNG nor a JPEG picture; check the file")
    try:
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PayloadError(
                    413,
                    f"{picture.width}×{picture.height} pixels; at most {MAX_PIXELS} are decoded: "
                    "scale the picture down",
                )
            converted = to_mode(picture, card.preprocess.mode, card.preprocess.grey_range)
    except PayloadError:
        raise
    except DECODE_ERRORS as error:
        raise PayloadError(400, f"the picture can't be decoded: {error}; is it whole?") from error
    fitted = _fit(converted, card)
    return np.asarray(fitted, np.uint8).reshape(card.shape)


def _fit(picture: Image.Image, card: Card) -> Image.Image:
    if picture.size == (card.width, card.height):
        return picture
    scale = min(card.width / picture.width, card.height / picture.height)
    width = max(1, round(picture.width * scale))
    height = max(1, round(picture.height * scale))
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    fill = card.preprocess.fill
    canvas = Image.new(
        picture.mode, (card.width, card.height), fill[0] if len(fill) == 1 else tuple(fill)
    )
    canvas.paste(resized, ((card.width - width) // 2, (card.height - height) // 2))
    return canvas


def _from_raw(body: bytes, card: Card) -> Images:
    if len(body) != card.image_bytes:
        raise PayloadError(
            422,
            f"{len(body)} raw bytes; one image is {card.image_bytes} bytes: "
            f"uint8 of shape {list(card.shape)} (height, width, channels)",
        )
    return np.frombuffer(body, np.uint8).reshape(1, *card.shape)


def load_json(body: bytes) -> Any:
    """Parse JSON; raise PayloadError 400 (NaN and infinities are no JSON)."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise PayloadError(400, f"malformed JSON: {error}") from error


def _from_json(body: bytes, card: Card) -> Images:
    content = load_json(body)
    if not isinstance(content, dict) or set(content) != {"image"}:
        raise PayloadError(422, f'send {{"image": […]}} with integers 0–255, {_wanted(card)}')
    return pixels(content["image"], card)[np.newaxis]


def pixels(values: Any, card: Card) -> Images:
    """Turn nested or flat lists of integers 0–255 into one image (H, W, C)."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise PayloadError(422, f"the image's rows differ in length; {_wanted(card)}") from error
    if array.dtype.kind != "i" or array.dtype == np.bool_:
        raise PayloadError(422, "pixels must be integers 0–255")
    shapes = {card.shape, (card.image_bytes,)}
    if card.channels == 1:
        shapes.add((card.height, card.width))
    if array.shape not in shapes:
        raise PayloadError(422, f"the image has shape {list(array.shape)}; {_wanted(card)}")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise PayloadError(422, "pixels must be integers 0–255")
    return array.astype(np.uint8).reshape(card.shape)


def _wanted(card: Card) -> str:
    return f"one image has shape {list(card.shape)} (height, width, channels)"
