"""Bodies to arrays: every accepted form, and every way to be wrong with its status."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.serving import payload
from lib.serving.payload import PayloadError, decode_picture, parse_predict
from tests.unit.serving_parts import card, picture

PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (PIXELS.tobytes(), "application/octet-stream"),
        (picture(PIXELS), "image/png"),
        (picture(PIXELS), "application/x-www-form-urlencoded"),
        (picture(PIXELS), ""),
        (json.dumps({"image": PIXELS.tolist()}).encode(), "application/json; charset=utf-8"),
        (json.dumps({"image": PIXELS.ravel().tolist()}).encode(), "application/json"),
        (json.dumps({"image": PIXELS[..., None].tolist()}).encode(), "application/json"),
    ],
)
def test_every_form_of_one_image_gives_the_same_pixels(body: bytes, content_type: str) -> None:
    images = parse_predict(body, content_type, card())
    assert images.shape == (1, 4, 6, 1)
    np.testing.assert_array_equal(images[0, :, :, 0], PIXELS)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"x", "text/csv", 415, "send image/png"),
        (b"x", "", 415, "content type 'missing'"),
        (b"x" * 23, "application/octet-stream", 422, "one image is 24 bytes"),
        (b"", "application/octet-stream", 422, "0 raw bytes"),
        (b"{", "application/json", 400, "malformed JSON"),
        (b'{"image": [NaN]}', "application/json", 400, "malformed JSON"),
        (b"[1]", "application/json", 422, "send"),
        (b'{"image": [1], "other": 2}', "application/json", 422, "send"),
        (b'{"image": [[1, 2], [3]]}', "application/json", 422, "differ in length"),
        (b'{"image": [[1, 2], [3, 4]]}', "application/json", 422, r"shape \[2, 2\]"),
        (b'{"image": "abc"}', "application/json", 422, "integers 0–255"),
        (json.dumps({"image": [0.5] * 24}).encode(), "application/json", 422, "integers"),
        (json.dumps({"image": [256] * 24}).encode(), "application/json", 422, "0–255"),
        (json.dumps({"image": [-1] * 24}).encode(), "application/json", 422, "0–255"),
        (json.dumps({"image": [True] * 24}).encode(), "application/json", 422, "integers"),
        (json.dumps({"image": [2**70] * 24}).encode(), "application/json", 422, "integers"),
        (picture(PIXELS)[:-20], "image/png", 400, "is it whole"),
        (picture(PIXELS)[:30], "image/png", 400, "is it whole"),
        (b"GIF89a", "image/png", 400, "neither a PNG nor a JPEG"),
        (b"", "image/jpeg", 400, "neither"),
    ],
)
def test_every_bad_body_gets_its_status_and_says_what_to_do(
    body: bytes, content_type: str, status: int, message: str
) -> None:
    with pytest.raises(PayloadError, match=message) as caught:
        parse_predict(body, content_type, card())
    assert caught.value.status == status


def test_a_picture_of_another_size_is_scaled_centred_and_filled() -> None:
    image = decode_picture(picture(np.full((40, 40), 200, np.uint8)), card())
    assert image.shape == (4, 6, 1)
    np.testing.assert_array_equal(image[:, 0, 0], 7)
    np.testing.assert_array_equal(image[:, 5, 0], 7)
    np.testing.assert_array_equal(image[:, 1:5, 0], 200)


def test_colour_becomes_grey_and_grey_becomes_colour_as_the_data_set_has_it() -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    assert decode_picture(picture(red), card())[0, 0, 0] == 76
    grey = decode_picture(picture(PIXELS), card(channels=3))
    assert grey.shape == (4, 6, 3)
    np.testing.assert_array_equal(grey[..., 2], PIXELS)


def test_transparent_parts_show_white_and_16_bits_are_scaled() -> None:
    clear = np.zeros((4, 6, 4), np.uint8)
    assert decode_picture(picture(clear), card())[0, 0, 0] == 255
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 65535, np.uint16)).save(buffer, "PNG")
    assert decode_picture(buffer.getvalue(), card())[0, 0, 0] == 255


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MAX_PIXELS", 100)
    with pytest.raises(PayloadError, match="scale the picture down") as caught:
        decode_picture(picture(np.zeros((20, 20), np.uint8)), card())
    assert caught.value.status == 413


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_damaged_picture_raises_anything_but_a_payload_error(kind: str) -> None:
    whole = bytearray(picture(np.random.default_rng(0).integers(0, 255, (9, 9), np.uint8), kind))
    random = np.random.default_rng(1)
    statuses = []
    for _ in range(400):
        damaged: Any = bytearray(whole)
        for place in random.integers(4, len(whole), 3):
            damaged[place] = random.integers(256)
        try:
            decode_picture(bytes(damaged), card())
        except PayloadError as error:
            statuses.append(error.status)
    assert statuses
    assert set(statuses) <= {400, 413}
