"""What a sweep tells while it runs: progress lines for people, and the record in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from lib.cli import progress
from lib.registry.tracking import SweepRecord
from lib.train.trial import MODEL_FILE


class SweepReport(tune.Callback):
    """Follows the trials of a sweep. Trials that die before they start are recorded too."""

    def __init__(self, record: SweepRecord, num_trials: int, num_epochs: int) -> None:
        self._record = record
        self._num_trials = num_trials
        self._num_epochs = num_epochs
        self._numbers: dict[str, int] = {}
        self._ended: set[str] = set()
        self._best_accuracy = 0.0

    def get_state(self) -> dict[str, Any]:
        """Return what a restored sweep needs to go on with the same runs."""
        return {
            "run_ids": dict(self._record.run_ids),
            "params": dict(self._record.params),
            "best": dict(self._record.best),
            "numbers": dict(self._numbers),
            "ended": set(self._ended),
            "best_accuracy": self._best_accuracy,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        self._record.run_ids.update(state["run_ids"])
        self._record.params.update(state["params"])
        self._record.best.update(state["best"])
        self._numbers = dict(state["numbers"])
        self._ended = set(state["ended"])
        self._best_accuracy = state["best_accuracy"]

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Open the trial's run."""
        self._open(trial)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Record an epoch."""
        self._open(trial)
        self._record.trial_reported(trial.trial_id, result["epoch"], result)
        progress(
            "tune",
            f"{self._name(trial)} epoch {result['epoch']}: validation "
            f"{result['val_accuracy']:.2%}, loss {result['train_loss']:.3f}, "
            f"{result['images_per_s']:,.0f} images/s",
        )

    def on_checkpoint(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        checkpoint: tune.Checkpoint,
        **info: Any,
    ) -> None:
        """Keep the model of the best epoch."""
        result = trial.last_result
        accuracy, _ = self._record.best.get(trial.trial_id, (-1.0, 0))
        if result["val_accuracy"] > accuracy:
            with checkpoint.as_directory() as folder:
                model = (Path(folder) / MODEL_FILE).read_bytes()
            self._record.trial_improved(
                trial.trial_id, result["epoch"], result["val_accuracy"], model
            )

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Close the run of a trial that trained to the end or was stopped at a rung."""
        done = trial.last_result.get("epoch", 0) >= self._num_epochs
        self._close(trial, "trained to the end" if done else "stopped at a rung")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Close the run of a trial that failed; the sweep goes on."""
        self._open(trial)
        self._close(trial, first_cause(trial), failed=True)

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Close the runs of trials that the time budget cut off."""
        for trial in trials:
            if trial.trial_id in self._numbers and trial.trial_id not in self._ended:
                self._close(trial, "the time budget was spent")

    def _open(self, trial: TuneTrial) -> None:
        if trial.trial_id in self._numbers:
            return
        self._numbers[trial.trial_id] = len(self._numbers) + 1
        name = f"trial-{self._numbers[trial.trial_id]}"
        self._record.trial_started(trial.trial_id, name, trial.config)
        progress("tune", f"{self._name(trial)} starts: {describe(trial.config)}")

    def _close(self, trial: TuneTrial, why: str, *, failed: bool = False) -> None:
        if trial.trial_id in self._ended:
            return
        self._ended.add(trial.trial_id)
        epoch = int((trial.last_result or {}).get("epoch", 0))
        self._record.trial_ended(trial.trial_id, epoch, why, failed=failed)
        if failed:
            progress("tune", f"{self._name(trial)} FAILED: {why}")
            return
        if trial.trial_id not in self._record.best:
            progress("tune", f"{self._name(trial)} ended before its first epoch did ({why})")
            return
        accuracy, best_epoch = self._record.best[trial.trial_id]
        self._best_accuracy = max(self._best_accuracy, accuracy)
        progress(
            "tune",
            f"{self._name(trial)} ended after epoch {epoch} ({why}): {accuracy:.2%} at epoch "
            f"{best_epoch}; best so far {self._best_accuracy:.2%}",
        )

    def _name(self, trial: TuneTrial) -> str:
        return f"trial {self._numbers[trial.trial_id]}/{self._num_trials}"


def first_cause(trial: TuneTrial) -> str:
    """Return what made a trial fail, in one line, without the frames that led there."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text() if file and file.exists() else "it died before it started"
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown")


def describe(params: dict[str, Any]) -> str:
    """Return a trial's parameters for one line of progress."""
    return ", ".join(_pair(name, value) for name, value in sorted(params.items()))


def _pair(name: str, value: Any) -> str:
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
