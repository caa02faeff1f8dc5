"""What the watching jobs last wrote about a model: quality and drift, and its rollout."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from lib.errors import StorageError
from lib.storage import Storage

_log = logging.getLogger(__name__)


def watch_path(model: str) -> str:
    """Return where jobs/monitor writes its newest view of a model."""
    return f"watch/{model}/state.json"


def rollout_path(model: str) -> str:
    """Return where jobs/rollout keeps its state for a model."""
    return f"rollouts/{model}/state.json"


def overview(storage: Storage, models: Iterable[str]) -> dict[str, Any]:
    """Return both documents by model as they are, None for what nobody has written."""
    return {
        model: {
            "watch": _read(storage, watch_path(model)),
            "rollout": _read(storage, rollout_path(model)),
        }
        for model in models
    }


def _read(storage: Storage, path: str) -> Any:
    if not storage.exists(path):
        return None
    try:
        return storage.read_json(path)
    except StorageError as error:
        # Shown as nothing known: the console must not go down with a file that it only shows.
        _log.warning("%s", error)
        return None
