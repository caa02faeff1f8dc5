"""What Tune asks for trials: first those that an earlier driver left, then the sampler's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher

from lib.train.progress import ASKED, STARTED, Progress, TrialState
from lib.train.samplers import Study
from lib.train.trainable import RESUME


class StudySearcher(Searcher):
    """Gives every trial of a sweep to Tune exactly once. Results come to the study elsewhere.

    Args:
        study: The sampler, which knows of all trials asked for before.
        progress: The sweep.
        limit: Trials that run or wait to, at most.
    """

    def __init__(self, study: Study, progress: Progress, limit: int) -> None:
        super().__init__(metric=None, mode=None)
        self._study = study
        self._progress = progress
        self._limit = limit
        self._left: list[TrialState] = progress.interrupted()
        self.running: Sequence[TuneTrial] = ()
        """Tune's trials that run or wait to."""

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial, None for not now, or that there is none."""
        if len(self.running) >= self._limit:
            return None
        if self._left:
            trial = self._left.pop(0)
        elif self._study.num_asked >= self._study.num_trials:
            return Searcher.FINISHED
        else:
            number, params, sampled = self._study.ask()
            self._progress.add(ASKED, trial=number, params=params, sampled=sampled, durable=True)
            trial = self._progress.trials[number]
        before = trial.attempts[-1:]
        self._progress.add(STARTED, trial=trial.number, attempt=trial_id)
        return {**trial.params, **({RESUME: before[0]} if before else {})}

    @property
    def num_left(self) -> int:
        """How many trials are still to be started."""
        return len(self._left) + max(0, self._study.num_trials - self._study.num_asked)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the study is told once the end is in the journal."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep is resumed from its journal, not from Tune's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out, as `save` does."""
        return {}
