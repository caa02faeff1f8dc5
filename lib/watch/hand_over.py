"""From a retrain to the rollout of its version, and back with how that ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.config import Settings
from lib.errors import RolloutError
from lib.storage import Storage
from lib.watch import live, rollout_state
from lib.watch.rollout_state import Options


def hand_over(settings: Settings, storage: Storage, version: int, who: str) -> Mapping[str, Any]:
    """Roll a version out and return how that ended, whatever it was.

    One that is under way goes on; one that has ended is not begun again.
    """
    last = rollout_state.load(storage, settings.model)
    if last and last.candidate == version and last.status in rollout_state.FINAL:
        return {"status": last.status, "stage": last.stage, "reason": last.reason}
    try:
        return live.roll_out(settings, storage, version, Options(who=who))
    except RolloutError as error:
        if "status" not in error.details:
            raise
        return error.details
