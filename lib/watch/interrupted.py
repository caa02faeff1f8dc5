"""Retrains and rollouts whose process was killed, and how they go on: as Ray jobs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lib.config import Settings
from lib.storage import Storage
from lib.watch import live, retrain, retrain_record
from lib.watch.retrain_record import RUNNING, STARTING_S
from lib.watch.rollout_state import State


@dataclass(kw_only=True, slots=True)
class Interrupted:
    """Those of the model that the settings name."""

    settings: Settings
    storage: Storage
    submit: Callable[[Settings, Sequence[str]], None] = retrain.submit_for
    clock: Callable[[], float] = time.monotonic
    _asked_s: float = field(default=-math.inf, init=False)

    def go_on(self) -> str | None:
        """Let what was interrupted go on; return what that is, None if there is nothing."""
        return self._retrain() or self._rollout()

    def _retrain(self) -> str | None:
        found = retrain.go_on(
            self.settings,
            self.storage,
            submit=lambda settings, name: self.submit(
                settings, ["-m", "jobs.retrain", "--resume", name]
            ),
        )
        return f"retrain {found}" if found else None

    def _rollout(self) -> str | None:
        state = live.interrupted(self.storage, self.settings.model)
        if state is None or self._is_of_a_retrain(state):
            return None
        # A job that was asked for takes its time to begin. A second one would find the lock taken,
        # so nothing is lost if this is forgotten.
        if self.clock() - self._asked_s < STARTING_S:
            return None
        self._asked_s = self.clock()
        self.submit(self.settings, ["-m", "jobs.rollout", "--resume"])
        return f"rollout of version {state.candidate}"

    def _is_of_a_retrain(self, state: State) -> bool:
        """Whether a retrain that has not ended will go on with it by itself."""
        for record in retrain_record.history(self.storage, self.settings.model):
            made = record.step("register")
            if record.state == RUNNING and made and made.result.get("version") == state.candidate:
                return True
        return False
