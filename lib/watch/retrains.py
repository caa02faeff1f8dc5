"""Retrains as the monitor sees them: started as jobs, known by their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib.config import Settings
from lib.storage import Storage
from lib.watch import retrain, retrain_record

_SHOWN = ("id", "reason", "who", "started", "ended", "state", "why")


@dataclass(frozen=True, slots=True)
class RetrainJobs:
    """The retrains of the model that the settings name."""

    settings: Settings
    storage: Storage

    def start(self, reason: str) -> str:
        """Start one as a Ray job, or let one that was killed go on; return its id."""
        return retrain.start(self.settings, self.storage, reason, who="monitor")

    def history(self) -> Sequence[dict[str, Any]]:
        """Return those that there were, oldest first; persons' too."""
        records = retrain_record.history(self.storage, self.settings.model)
        return [{name: getattr(record, name) for name in _SHOWN} for record in records]
