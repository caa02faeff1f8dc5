"""From a retrain to the rollout of its version, and back with how that ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.config import Settings
from lib.errors import RolloutError
from lib.storage import Storage
from lib.watch import live, rollout_state
from lib.watch.retrain_record import is_of_a_retrain
from lib.watch.rollout_state import Options


def hand_over(
    settings: Settings, storage: Storage, version: int, options: Options
) -> Mapping[str, Any]:
    """Roll a version out and return how that ended, whatever it was.

    One that is under way goes on; one that has ended is not begun again. Where the version of an
    earlier retrain is held, because nobody called, it gives way: else no retrain could come through
    until a person came by.
    """
    last = rollout_state.load(storage, settings.model)
    if last and last.candidate == version and last.status in rollout_state.FINAL:
        return {"status": last.status, "stage": last.stage, "reason": last.reason}
    if (
        last
        and last.candidate != version
        and last.status == rollout_state.HELD
        and is_of_a_retrain(last.who)
    ):
        live.abort(settings, storage, who=options.who)
    try:
        return live.roll_out(settings, storage, version, options)
    except RolloutError as error:
        if "status" not in error.details:
            raise
        return error.details
