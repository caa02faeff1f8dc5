"""What a sweep found, for the code that started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.train.experiment import Experiment
from lib.train.progress import TrialState


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """A trial that left a result."""

    number: int
    run_id: str
    value: float
    """Of the first objective, at the best report; what the trial kept is of that report."""
    metrics: Mapping[str, float]
    """All that this report held."""
    epoch: int
    params: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the trial as a job prints it."""
        return {
            "run_id": self.run_id,
            **self.metrics,
            "epoch": self.epoch,
            "params": dict(self.params),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep found; all of it is in MLflow too."""

    sweep_run_id: str
    data_digest: str | None
    trials: tuple[TrialResult, ...]
    """Best first."""
    pareto: tuple[TrialResult, ...]
    """Those that no other trial beats in one objective without losing in another."""
    num_failed: int
    num_observations: int
    """Results that the sampler holds."""
    images_per_s: float
    """Images trained on by all trials, per second of the sweep."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return the result as a job prints it."""
        return {
            "sweep_run_id": self.sweep_run_id,
            "data_digest": self.data_digest,
            "trials": len(self.trials),
            "failed_trials": self.num_failed,
            "best": self.trials[0].summary(),
            "pareto": [trial.summary() for trial in self.pareto],
            "seconds": round(self.seconds, 1),
            "images_per_s": round(self.images_per_s),
        }


def trial_result(experiment: Experiment, trial: TrialState) -> TrialResult:
    """Return a trial that left a result."""
    return TrialResult(
        number=trial.number,
        run_id=trial.run_id or "",
        value=trial.best[experiment.objectives[0].metric],
        metrics=trial.best,
        epoch=trial.best_epoch,
        params=trial.params,
    )
