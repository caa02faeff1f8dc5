"""What Tune asks for trials: first those that an earlier driver left, then the sampler's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher, SearchGenerator

from lib.train.progress import ASKED, STARTED, Progress, TrialState
from lib.train.samplers import Study
from lib.train.trainable import RESUME


class Slots(Protocol):
    """How many trials may be under way: `lib.leases.share.Share`."""

    @property
    def limit(self) -> int:
        """Trials that may run or wait for their process now."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether other sweeps want slots too."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether the limit is the answer to what is under way now."""
        ...

    def update(self, *, running: int, pending: int, left: int) -> None:
        """Take note of what is under way and what is still to be."""
        ...

    def pause(self) -> None:
        """Wait a little for a slot."""
        ...


class StudySearcher(Searcher):
    """Gives every trial of a sweep to Tune exactly once. Results come to the study elsewhere.

    Args:
        study: The sampler, which knows of all trials asked for before.
        progress: The sweep.
        slots: Says how many trials may be under way.
    """

    def __init__(self, study: Study, progress: Progress, slots: Slots) -> None:
        super().__init__(metric=None, mode=None)
        self._study = study
        self._progress = progress
        self._slots = slots
        self._left: list[TrialState] = progress.interrupted()
        self._live: Sequence[TuneTrial] = ()
        """Tune's trials that had not ended when this step began."""
        self._num_seen = 0
        self._handed_out = 0
        """Trials that were given to Tune in this step."""
        self._in_step = False

    def begin_step(self, trials: Sequence[TuneTrial]) -> None:
        """Take note of Tune's trials, at the start of a step of its loop."""
        # Those that have ended are looked at once: there may be thousands, at each step.
        known = [*self._live, *trials[self._num_seen :]]
        self._live = [t for t in known if t.status not in (TuneTrial.TERMINATED, TuneTrial.ERROR)]
        self._num_seen = len(trials)
        self._handed_out, self._in_step = 0, True
        running = sum(trial.status == TuneTrial.RUNNING for trial in self._live)
        pending = sum(trial.status == TuneTrial.PENDING for trial in self._live)
        left = self.num_left + len(self._live) - running - pending
        self._slots.update(running=running, pending=pending, left=left)
        if left and not running + pending and not self._slots.limit:
            # Without a trial to wait for, Tune would ask again at once.
            self._slots.pause()

    def end_step(self) -> None:
        """Take note that Tune's step is over."""
        self._in_step = False

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial, None for not now, or that there is none."""
        if self._under_way() >= self._slots.limit:
            return None
        if self._left:
            trial = self._left.pop(0)
        elif self._study.num_asked >= self._study.num_trials:
            return Searcher.FINISHED
        else:
            number, params, sampled = self._study.ask()
            self._progress.add(ASKED, trial=number, params=params, sampled=sampled, durable=True)
            trial = self._progress.trials[number]
        before = trial.attempts[::-1]
        self._progress.add(STARTED, trial=trial.number, attempt=trial_id)
        self._handed_out += 1
        return {**trial.params, **({RESUME: before} if before else {})}

    @property
    def num_left(self) -> int:
        """How many trials are still to be started."""
        return len(self._left) + max(0, self._study.num_trials - self._study.num_asked)

    @property
    def gives_back(self) -> bool:
        """Whether the process of a trial that has just ended is to go, for others to take its part.

        Only within a step of Tune's loop: between two it would mean that the sweep is over.
        """
        slots = self._slots
        given = self._in_step and slots.is_shared and slots.is_settled
        return given and self._under_way() >= slots.limit

    def may_resume(self) -> bool:
        """Whether there is a slot for a trial that was paused."""
        return not self._slots.is_shared or self._under_way() < self._slots.limit

    def _under_way(self) -> int:
        live = (TuneTrial.PENDING, TuneTrial.RUNNING)
        return sum(trial.status in live for trial in self._live) + self._handed_out

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


class TrialSource(SearchGenerator):
    """What Tune wraps around a searcher, made to let go of processes too.

    Tune keeps the process of a trial that has ended for the next one, and with it a part of the
    cluster, until the search is over. Where the slot went to another sweep, that would wait.
    """

    searcher: StudySearcher

    def is_finished(self) -> bool:
        """Whether there are no more trials, or none now and what is idle must go."""
        return super().is_finished() or self.searcher.gives_back

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out, as the searcher does."""
        return {}
