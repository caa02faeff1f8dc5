"""Schedulers by name, Katib's names included. They compare trials at rungs and nowhere else."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from lib.cli import progress as say
from lib.errors import ConfigError
from lib.train.experiment import (
    INT,
    LOG_NORMAL,
    LOG_UNIFORM,
    MAXIMIZE,
    Experiment,
    Named,
    Parameter,
)
from lib.train.progress import Progress, TrialState
from lib.train.space import grid_values
from lib.train.trainable import AT_RUNG, FAILED, RUNG_COUNT

ALIASES = {"medianstop": "medianstopping"}
"""Katib's names → ours."""
REDUCTION_FACTOR = 3
"""About one trial of this many goes on after a rung."""

_Setting = tuple[str, Callable[[Any], Any]]
_ETA: dict[str, _Setting] = {
    "reduction_factor": ("reduction_factor", int),
    "eta": ("reduction_factor", int),
}
_LIMIT: dict[str, _Setting] = {"r_l": ("max_t", lambda v: int(float(v)))}
SETTINGS: dict[str, dict[str, _Setting]] = {
    "none": {},
    "asha": {**_ETA, **_LIMIT},
    "hyperband": {**_ETA, **_LIMIT},
    "medianstopping": {
        "min_trials_required": ("min_samples_required", int),
        "min_samples_required": ("min_samples_required", int),
        "start_step": ("grace_period", int),
    },
    "pbt": {
        "truncation_threshold": ("quantile_fraction", float),
        "quantile_fraction": ("quantile_fraction", float),
        "resample_probability": ("resample_probability", float),
    },
}
"""Scheduler → its settings, as Katib or Tune call them → Tune's argument and its type."""
SCHEDULERS = tuple(SETTINGS)
_REPLAYED, _FORGETTING = ("asha", "medianstopping"), ("hyperband", "pbt")
"""What a resumed sweep's scheduler knows of the trials before: all, or nothing."""
_UNLEARNED = ("random", "sobol", "grid")
"""Samplers that do not look at results."""


class AtRungs(TrialScheduler):
    """A scheduler of Tune's that sees the reports at rungs alone, and no failed trial's.

    Between rungs the learning rate is high and accuracies say little. A resumed sweep's trials are
    shown to it again, as far as they had come, where the scheduler can take that in.
    """

    def __init__(
        self,
        name: str,
        inner: TrialScheduler,
        progress: Progress,
        may_resume: Callable[[], bool] = lambda: True,
    ) -> None:
        self._inner = inner
        self._may_resume = may_resume
        self._progress = progress
        self._replay = name in _REPLAYED
        self._mutates = name == "pbt"
        self._shown: set[str] = set()
        self._past = [trial for trial in progress.trials.values() if self._replay]

    @property
    def metric(self) -> str | None:
        """The metric that trials are compared by."""
        return self._inner.metric

    @property
    def supports_buffered_results(self) -> bool:
        """Whether results may come late."""
        return self._inner.supports_buffered_results

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Keep the inner scheduler's own metric and mode."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take in a trial, and before the first one what earlier drivers have seen."""
        past, self._past = self._past, []
        for state in past:
            if state.ended is not None:
                self._show(tune_controller, _Past(state), state, over=True)
        controller: Any = _Unsearched() if self._mutates else tune_controller
        self._inner.on_trial_add(controller, trial)
        mine = self._progress.of_attempt(trial.trial_id)
        # A trial whose process died is added again, and was seen before.
        if self._replay and mine and trial.trial_id not in self._shown:
            self._show(tune_controller, trial, mine, over=False)
        self._shown.add(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide at a rung."""
        if not result.get(AT_RUNG):
            return TrialScheduler.CONTINUE
        return self._inner.on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take in the end of a trial."""
        if FAILED in result or RUNG_COUNT not in result:
            self._inner.on_trial_error(tune_controller, trial)
        else:
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Take in a trial whose process is gone."""
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Take in a trial that was cut off."""
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the trial to start next; one that was paused needs a slot again.

        Tune gives it the process of a trial that has just ended, and ends its own if that is still
        starting. Of trials shorter than the start of a process, one process would then do all. So
        it is not one whose process is starting.
        """
        chosen = self._inner.choose_trial_to_run(tune_controller)
        if chosen is None:
            return None
        if chosen.status == Trial.PAUSED:
            return chosen if self._may_resume() else None
        if not _is_starting(tune_controller, chosen):
            return chosen
        waiting = (trial for trial in tune_controller.get_trials() if trial.status == Trial.PENDING)
        return next((trial for trial in waiting if not _is_starting(tune_controller, trial)), None)

    def debug_string(self) -> str:
        """Return what the inner scheduler says of itself."""
        return self._inner.debug_string()

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out: a sweep is resumed from its journal, not from Tune's state."""
        return {}

    def _show(self, controller: Any, trial: Any, state: TrialState, *, over: bool) -> None:
        if over:
            self._inner.on_trial_add(controller, trial)
        for epoch, rung_count, metrics in state.rungs:
            result = {**metrics, "epoch": epoch, RUNG_COUNT: rung_count}
            self._inner.on_trial_result(controller, trial, result)


def _is_starting(tune_controller: Any, pending: Trial) -> bool:
    """Whether there is a process for a trial that waits, and not only a request for one."""
    # No scheduler is told of processes, so this looks behind what Tune hands to it.
    controller = getattr(tune_controller, "_tune_controller", None)
    if controller is None:
        return False
    actor = controller._trial_to_actor.get(pending)
    return actor is not None and bool(controller._actor_manager.is_actor_started(actor))


class _Unsearched:
    """A controller as population-based training takes one when a trial is added.

    Tune's refuses every searcher, since most would learn wrong things from configurations that
    change; `scheduler_of` refuses those that learn.
    """

    search_alg = None


class _Past:
    """A trial that ended under an earlier driver, as far as schedulers look at one."""

    def __init__(self, state: TrialState) -> None:
        self.trial_id = state.attempts[-1] if state.attempts else str(state.number)
        self.status = Trial.TERMINATED


def scheduler_of(experiment: Experiment) -> Named:
    """Return the scheduler of an experiment, which Katib may give as an algorithm."""
    if experiment.algorithm.name in ("hyperband", "pbt"):
        return experiment.algorithm
    named = experiment.early_stopping or Named("none")
    name = ALIASES.get(named.name, named.name)
    if name not in SETTINGS:
        known = ", ".join(sorted({*SCHEDULERS, *ALIASES}))
        raise ConfigError(f"unknown scheduler {named.name!r}; choose one of {known}")
    if name == "pbt" and experiment.algorithm.name not in _UNLEARNED:
        raise ConfigError(
            f"pbt changes configurations while they train, from which {experiment.algorithm.name} "
            f"would learn wrong things; choose {', '.join(f'{s}/pbt' for s in _UNLEARNED)}"
        )
    return Named(name, named.settings)


def rung_counts(named: Named, rungs: Sequence[int]) -> tuple[int, ...]:
    """Return the time that each rung counts as, so that the scheduler's own rungs are these.

    ASHA's lie at powers of its factor f. Hyperband's brackets sum them up: 1, 1 + f, …, at most
    f to the number of rungs less one. Median stopping counts in epochs, as its settings do.
    """
    if named.name == "medianstopping":
        return tuple(rungs)
    factor, num_rungs = _factor(named), len(rungs)
    powers = [factor**rung for rung in range(num_rungs)]
    if named.name == "hyperband":
        return tuple(min(sum(powers[: rung + 1]), powers[-1]) for rung in range(num_rungs))
    if named.name == "asha":
        return tuple(powers)
    return tuple(range(1, num_rungs + 1))


def build_scheduler(
    experiment: Experiment,
    progress: Progress,
    *,
    num_rungs: int,
    fixed: frozenset[str],
    may_resume: Callable[[], bool] = lambda: True,
) -> TrialScheduler:
    """Return the scheduler of an experiment.

    `fixed` are the parameters that no trial can change; `may_resume` tells whether there is a slot
    for a trial that was paused.

    Raises ConfigError naming a setting that the scheduler hasn't got.
    """
    named = scheduler_of(experiment)
    arguments = _arguments(named)
    common: dict[str, Any] = {
        "time_attr": RUNG_COUNT,
        "metric": experiment.objective.metric,
        "mode": "max" if experiment.objective.goal == MAXIMIZE else "min",
    }
    inner: TrialScheduler
    if named.name in ("asha", "hyperband"):
        if num_rungs:
            arguments["max_t"] = _factor(named) ** (num_rungs - 1)
        kind: Any = ASHAScheduler if named.name == "asha" else HyperBandScheduler
        inner = kind(**common, **{"reduction_factor": REDUCTION_FACTOR, **arguments})
    elif named.name == "medianstopping":
        inner = MedianStoppingRule(
            **common,
            # Never pause a trial until others catch up: a command would have to start again.
            min_time_slice=cast(int, math.inf),
            **{"grace_period": 1, **arguments},
        )
    elif named.name == "pbt":
        free = [parameter for parameter in experiment.parameters if parameter.name not in fixed]
        if not free:
            raise ConfigError("pbt needs a parameter that may change within a trial")
        # Tune draws from the global generators.
        random.seed(experiment.seed)
        np.random.seed(experiment.seed % 2**32)
        inner = PopulationBasedTraining(
            **common,
            perturbation_interval=1,
            **arguments,
            hyperparam_mutations=_mutations(free),
            custom_explore_fn=_clamp(free),
            log_config=False,
        )
    else:
        inner = FIFOScheduler()
    past = sum(trial.ended is not None for trial in progress.trials.values())
    if named.name in _FORGETTING and past:
        # Its brackets and populations can't be made anew from trials that have ended.
        say("tune", f"{named.name} compares the trials that go on with each other alone, and not "
            f"with the {past} that ended before the sweep was interrupted")  # fmt: skip
    return AtRungs(named.name, inner, progress, may_resume)


def _factor(named: Named) -> int:
    settings: Mapping[str, Any] = named.settings
    return int(settings.get("reduction_factor", settings.get("eta", REDUCTION_FACTOR)))


def _arguments(named: Named) -> dict[str, Any]:
    arguments = {}
    known = SETTINGS[named.name]
    for name, value in named.settings.items():
        if name == "random_state":
            continue
        if name not in known:
            raise ConfigError(
                f"{named.name} has no setting {name!r}; it has {', '.join(known) or 'none'}"
            )
        argument, convert = known[name]
        arguments[argument] = convert(value)
    return arguments


def _mutations(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Return what each parameter that may change is drawn from: a list, or a range."""
    found: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.values or parameter.step or parameter.kind == INT:
            found[parameter.name] = list(grid_values(parameter))
            continue
        low, high = float(parameter.low or 0.0), float(parameter.high or 0.0)
        log = parameter.distribution in (LOG_UNIFORM, LOG_NORMAL)
        found[parameter.name] = (tune.loguniform if log else tune.uniform)(low, high)
    return found


def _clamp(parameters: Sequence[Parameter]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what keeps a changed configuration inside the space."""
    ranges = {p.name: (p.low, p.high) for p in parameters if p.low is not None}

    def clamp(config: dict[str, Any]) -> dict[str, Any]:
        for name, (low, high) in ranges.items():
            config[name] = min(max(config[name], low), high)
        return config

    return clamp
