"""True labels for answered requests, as they come in."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from lib.serving.bundle import Card
from lib.serving.payload import MAX_BATCH, PayloadError

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OWN_ID = re.compile(r"[0-9a-f]{32}")
PROBE_ID = "rayline-probe"
"""Request id of the line's own questions, which are nobody's traffic and not logged."""


def new_request_id() -> str:
    """Return an id for a request that brings none: its second, then 96 random bits, in hex.

    With the time in it, a label that comes days later finds its answer without a search.
    """
    return f"{int(time.time()):08x}{os.urandom(12).hex()}"


def second_of(request_id: str) -> int | None:
    """Return the second that `new_request_id` put into an id, None if it made no such id."""
    return int(request_id[:8], 16) if _OWN_ID.fullmatch(request_id) else None


def parse_feedback(content: Any, card: Card) -> Mapping[str, Any]:
    """Check a feedback body; raise PayloadError 422 saying what is wrong with it.

    Returns:
        request_id, index, label (the number of the class) and class_name.
    """
    if not isinstance(content, dict) or not {"request_id", "label"} <= set(content):
        raise PayloadError(422, 'send {"request_id": "…", "label": "…"}')
    request_id, label = content["request_id"], content["label"]
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise PayloadError(422, "`request_id` must be the one that an answer carried")
    index = content.get("index", 0)
    if type(index) is not int or not 0 <= index < MAX_BATCH:
        raise PayloadError(422, "`index` must be the place of an image in its batch, from 0")
    number = _number(label, card)
    return {
        "request_id": request_id,
        "index": index,
        "label": number,
        "class_name": card.class_names[number],
    }


def _number(label: Any, card: Card) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(card.class_names):
            raise PayloadError(422, f"label {label} is not in 0–{len(card.class_names) - 1}")
        return label
    if label not in card.class_names:
        raise PayloadError(422, f"label {label!r} is none of {', '.join(card.class_names)}")
    return card.class_names.index(label)
