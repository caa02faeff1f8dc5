"""What the monitor remembers, as files: the windows that were tested, and the evidence so far.

`watch/<model>/history/<number>.json` is a look that tested windows, with all that the next look
needs: creating it is the commit point. A monitor that is killed leaves the newest of them whole,
and of two monitors only one makes the next. `watch/<model>/state.json` is a view for others;
nothing is read from it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import StorageError
from lib.storage import Storage
from lib.watch.sequence import Evidence

KEPT_LOOKS = 1000
"""Files of the history that are kept; a look makes one if a window was full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What one look leaves to the next."""

    number: int
    """Of the newest history file; 0 before the first."""
    cursor_us: int
    """Requests up to this time have been in a window, or never will be."""
    block_from_us: int
    """Where the block of windows begins that is being filled."""
    reference: str
    """What the evidence is about."""
    evidence: Evidence

    def to_json(self) -> dict[str, Any]:
        """Return the memory as JSON types."""
        return {
            "number": self.number,
            "cursor_us": self.cursor_us,
            "block_from_us": self.block_from_us,
            "reference": self.reference,
            "evidence": self.evidence.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Memory:
        """Rebuild the memory from its JSON."""
        return cls(**{**content, "evidence": Evidence.from_json(content["evidence"])})


Recalled = tuple[Memory, dict[str, Any]]
"""The newest memory and the look that left it."""


def state_path(model: str) -> str:
    """Return where others read the state of a model."""
    return f"watch/{model}/state.json"


def recall(storage: Storage, model: str) -> Recalled | None:
    """Return the newest memory and the look that left it, None before the first."""
    for path in reversed(storage.list(f"watch/{model}/history")):
        try:
            look = storage.read_json(path)
            return Memory.from_json(look["memory"]), look
        except (StorageError, KeyError, TypeError):
            # Files are whole or not there; what a disk did to one must not stop the monitor.
            continue
    return None


def remember(
    storage: Storage, model: str, memory: Memory, look: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Commit a look; return it, or None if another monitor made this number before."""
    content = {**look, "memory": memory.to_json()}
    if not storage.create_json(_history_path(model, memory.number), content):
        return None
    storage.delete(_history_path(model, memory.number - KEPT_LOOKS))
    return content


def _history_path(model: str, number: int) -> str:
    return f"watch/{model}/history/{number:08d}.json"
