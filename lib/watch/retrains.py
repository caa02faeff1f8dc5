"""Retrains as the monitor sees them: started as jobs, known by their records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.config import Settings
from lib.errors import TooFewError
from lib.storage import Storage
from lib.watch import predictions, retrain, retrain_record
from lib.watch.retrain_asked import Options

MIN_LABELS = 200
"""Without which none is started: it would be refused, or learn from the first requests of what has
changed alone, and the next one would have to wait for the cool-down."""
_SHOWN = ("id", "reason", "who", "started", "ended", "state", "why")


@dataclass(frozen=True, slots=True)
class RetrainJobs:
    """The retrains of the model that the settings name."""

    settings: Settings
    storage: Storage
    options: Options = field(default_factory=Options)
    """Of those that are started."""

    def start(self, reason: str) -> str:
        """Start one as a Ray job, or let one that was killed go on; return its id.

        Raises TooFewError while there are too few labels, before anything is on record.
        """
        now_us, days = time.time_ns() // 1000, self.options.days
        labels = predictions.read_labels(
            self.storage,
            self.settings.model,
            start_us=now_us - int(days * 86400e6),
            end_us=now_us,
        ).num_rows
        if labels < MIN_LABELS:
            raise TooFewError(
                f"{labels} labels came in the last {days:g} days, {MIN_LABELS} are needed; send "
                "them to POST /feedback"
            )
        return retrain.start(
            self.settings, self.storage, reason, who="monitor", options=self.options
        )

    def history(self) -> Sequence[dict[str, Any]]:
        """Return those that there were, oldest first; persons' too."""
        records = retrain_record.history(self.storage, self.settings.model)
        return [{name: getattr(record, name) for name in _SHOWN} for record in records]
