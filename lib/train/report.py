"""What happens in Tune, told to the journal, the sampler, MLflow and the person who watches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from lib.cli import progress as say
from lib.errors import DeviceError, RaylineError, StorageError
from lib.train.experiment import Experiment
from lib.train.progress import (
    CHANGED,
    CUT,
    ENDED,
    FAILED,
    FINISHED,
    REPORTED,
    STOPPED,
    Progress,
    TrialState,
    reached,
)
from lib.train.samplers import Study
from lib.train.searcher import StudySearcher
from lib.train.trainable import AT_RUNG, ENDS, NO_DEVICE, NO_PLACE, REPORT, RESUME, RUNG_COUNT
from lib.train.trainable import FAILED as FAILURE

_TUNES_OWN = frozenset(
    {
        "time_this_iter_s",
        "time_total_s",
        "training_iteration",
        "iterations_since_restore",
        "time_since_restore",
        "timestamp",
        "pid",
        "timesteps_total",
        "episodes_total",
        "done",
        "epoch",
        REPORT,
        RUNG_COUNT,
        AT_RUNG,
        ENDS,
    }
)


class SweepReport(tune.Callback):
    """Follows the trials of a sweep. Trials that die before they start are followed too."""

    def __init__(
        self, progress: Progress, study: Study, searcher: StudySearcher, experiment: Experiment
    ) -> None:
        self.error: RaylineError | None = None
        """What must end the sweep: no place to keep its state, or a GPU that can't be used."""
        self.begun_s: float | None = None
        """When the first trial of this driver started, by the monotonic clock."""
        self._progress = progress
        self._study = study
        self._searcher = searcher
        self._experiment = experiment

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Let the searcher know which trials are under way."""
        self._searcher.begin_step(trials)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Let the searcher know that Tune looks whether the sweep is over."""
        self._searcher.end_step()

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Say so."""
        self.begun_s = self.begun_s or time.monotonic()
        state = self._state(trial)
        if not state.num_reports:
            say("tune", f"{self._name(state)} starts: {describe(state.params)}")

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Note a report, unless it is one that was noted before an interruption."""
        for name, kind in ((NO_PLACE, StorageError), (NO_DEVICE, DeviceError)):
            if name in result:
                self.error = kind(result[name])
                raise self.error
        state = self._state(trial)
        if result.get(REPORT, 0) <= state.num_reports:
            return
        params = {name: value for name, value in trial.config.items() if name != RESUME}
        if params != state.params:
            self._add(CHANGED, trial=state.number, epoch=state.epoch, params=params)
        metrics = measured(result)
        # Tune counts the deaths of a trial's process; only those in a row end the trial.
        trial.run_metadata.num_failures = 0
        self._add(
            REPORTED,
            trial=state.number,
            report=result[REPORT],
            epoch=result["epoch"],
            rung=result[RUNG_COUNT] if result[AT_RUNG] else None,
            metrics=metrics,
        )
        if not (result[ENDS] and result["epoch"] == 1):  # Its end says as much.
            say("tune", f"{self._name(state)} epoch {result['epoch']}: {self._line(metrics)}")

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Note the end of a trial that went through, was stopped, or failed by itself."""
        result = trial.last_result or {}
        if FAILURE in result:
            self._end(self._state(trial), FAILED, result[FAILURE])
        elif result.get(ENDS):
            self._end(self._state(trial), FINISHED, "trained to the end")
        elif self._experiment.objective.settles and reached(self._experiment.objective, result):
            self._end(self._state(trial), STOPPED, "reached the target")
        else:
            self._end(self._state(trial), STOPPED, "stopped at a rung")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Note the end of a trial whose process died again and again.

        Where that was for want of the storage, no other trial would fare better: the sweep ends,
        and this trial goes on when it is resumed.
        """
        cause = first_cause(trial)
        kind, _, text = cause.partition(": ")
        if kind == f"{StorageError.__module__}.{StorageError.__qualname__}":
            self.error = StorageError(text)
            raise self.error
        self._end(self._state(trial), FAILED, cause)

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Say that a trial's process died."""
        state = self._state(trial)
        say("tune", f"{self._name(state)} lost its process, and goes on from epoch {state.epoch}")

    def cut_off(self, why: str) -> None:
        """Note the end of the trials that are still under way, when the sweep is over."""
        for state in self._progress.interrupted():
            self._end(state, CUT, why)

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out: a sweep is resumed from its journal, not from Tune's state."""
        return {}

    def _end(self, state: TrialState, how: str, why: str) -> None:
        if state.ended is not None:
            return
        self._add(ENDED, trial=state.number, how=how, why=why, durable=True)
        self._study.tell(state)
        if how == FAILED:
            say("tune", f"{self._name(state)} FAILED: {why}")
        elif not state.best:
            say("tune", f"{self._name(state)} ended before its first report ({why})")
        else:
            best = self._progress.best or state
            say(
                "tune",
                f"{self._name(state)} ended after epoch {state.epoch} ({why}): "
                f"{self._objectives(state.best)} at epoch {state.best_epoch}; best so far "
                f"{self._objectives(best.best)}",
            )

    def _add(self, kind: str, **content: Any) -> None:
        try:
            self._progress.add(kind, **content)
        except StorageError as error:
            # Tune would tell its text alone.
            self.error = error
            raise

    def _state(self, trial: TuneTrial) -> TrialState:
        state = self._progress.of_attempt(trial.trial_id)
        assert state is not None, "Tune runs what the searcher gave it"
        return state

    def _name(self, state: TrialState) -> str:
        return f"trial {state.number + 1}/{self._study.num_trials}"

    def _objectives(self, metrics: Mapping[str, float]) -> str:
        return ", ".join(_told(each.metric, metrics) for each in self._experiment.objectives)

    def _line(self, metrics: Mapping[str, float]) -> str:
        first = [objective.metric for objective in self._experiment.objectives]
        names = [*first, *(n for n in ("train_loss", "images_per_s") if n in metrics)]
        return ", ".join(_told(name, metrics) for name in dict.fromkeys(names))


class Limits(tune.Stopper):
    """Ends a sweep at its target, when its time is spent, or after too many failures."""

    def __init__(
        self,
        progress: Progress,
        experiment: Experiment,
        report: SweepReport,
        budget_s: float = math.inf,
    ) -> None:
        self._progress = progress
        self._experiment = experiment
        self._report = report
        self._budget_s = budget_s
        self._reached = False

    @property
    def why(self) -> str | None:
        """Why the sweep is to end, if it is."""
        if self._report.error:
            return str(self._report.error)
        limit = self._experiment.max_failed_trials
        if limit is not None and self._progress.num_failed > limit:
            return f"more than {limit} trials failed"
        best = self._progress.best
        if self._reached or (best and reached(self._experiment.objective, best.best)):
            return f"the target of {self._experiment.objective.target} was reached"
        begun_s = self._report.begun_s
        if begun_s is not None and time.monotonic() - begun_s >= self._budget_s:
            return f"the time budget of {self._experiment.time_budget_s:g} s was spent"
        return None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take note of a report; end the trial that reached the target.

        Where what is reached may be lost again, the trial's end decides.
        """
        objective = self._experiment.objective
        now = objective.settles and reached(objective, result)
        self._reached |= now
        return now

    def stop_all(self) -> bool:
        """Whether the sweep is to end."""
        return self.why is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out, as the report does."""
        return {}


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a report that a trial measured itself."""
    return {
        name: float(value)
        for name, value in result.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in _TUNES_OWN
        and not name.startswith("config/")
        and math.isfinite(value)
    }


def first_cause(trial: TuneTrial) -> str:
    """Return what made a trial fail, in one line, without the frames that led there."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text() if file and file.exists() else "it died before it started"
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown")


def describe(params: Mapping[str, Any]) -> str:
    """Return a trial's parameters for one line of progress."""
    return ", ".join(_pair(name, value) for name, value in sorted(params.items()))


def _told(name: str, metrics: Mapping[str, float]) -> str:
    value = metrics[name]
    if name.endswith("accuracy"):
        return f"{name} {value:.2%}"
    return f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"


def _pair(name: str, value: Any) -> str:
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
