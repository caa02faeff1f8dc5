"""True labels for answered requests, durable before they are acknowledged."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lib.serving.bundle import Card
from lib.serving.payload import PayloadError
from lib.storage import Storage

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def parse_feedback(content: Any, card: Card) -> Mapping[str, Any]:
    """Check a feedback body; raise PayloadError 422 saying what is wrong with it."""
    if not isinstance(content, dict) or not {"request_id", "label"} <= set(content):
        raise PayloadError(422, 'send {"request_id": "…", "label": "…"}')
    request_id, label = content["request_id"], content["label"]
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise PayloadError(422, "`request_id` must be the one that an answer carried")
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(card.class_names):
            raise PayloadError(422, f"label {label} is not in 0–{len(card.class_names) - 1}")
        label = card.class_names[label]
    if label not in card.class_names:
        raise PayloadError(422, f"label {label!r} is none of {', '.join(card.class_names)}")
    return {"request_id": request_id, "label": label, "model": card.name}


def store_feedback(storage: Storage, entry: Mapping[str, Any]) -> None:
    """Write one label, synced to disk; several for one request are all kept, in their order."""
    now = datetime.now(UTC)
    stamp = now.strftime("%H%M%S%f")
    storage.write_json(
        f"feedback/{now:%Y-%m-%d}/{stamp}-{uuid.uuid4().hex[:8]}.json",
        {**entry, "time": now.isoformat()},
    )
