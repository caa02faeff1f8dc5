"""What trivial trials run, in a file of its own: their processes import no more than it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from lib.train.trainable import SweepTrial


class NothingTrial(SweepTrial):
    """As the line's trials are: one process takes one configuration after the other."""

    def begin(self, params: Mapping[str, Any]) -> None:
        self._x = params["x"]

    def advance(self) -> Mapping[str, Any]:
        return {"score": self._x, "done": True}


def function_trial(config: dict[str, Any]) -> None:
    """As Ray Tune's documentation starts: a function, a process for each trial."""
    tune.report({"score": config["x"]})
