"""Samplers by name, Katib's names included, and the study that they draw from.

A sampler is made anew for every trial, seeded by the experiment's seed and the trial's number, and
sees nothing but the study. So what a trial gets depends on the seed, its number and the results
told before, and a resumed sweep draws what the interrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from lib.errors import ConfigError
from lib.train.experiment import MAXIMIZE, MINIMIZE, Experiment, Named, Value
from lib.train.progress import FAILED, FINISHED, TrialState
from lib.train.space import Space

ALIASES = {
    "multivariate-tpe": "tpe",
    "bayesianoptimization": "gp",
    "hyperband": "random",
    "pbt": "random",
}
"""Katib's names of algorithms → the sampler; the last two are schedulers in the first place."""

_DIRECTIONS = {MAXIMIZE: StudyDirection.MAXIMIZE, MINIMIZE: StudyDirection.MINIMIZE}
_Setting = tuple[str, Callable[[Any], Any]]
_STARTUP: dict[str, _Setting] = {"n_startup_trials": ("n_startup_trials", int)}
SETTINGS: dict[str, dict[str, _Setting]] = {
    "random": {},
    "grid": {},
    "sobol": {},
    "tpe": {**_STARTUP, "n_ei_candidates": ("n_ei_candidates", int)},
    "cmaes": {**_STARTUP, "sigma": ("sigma0", float)},
    "gp": {**_STARTUP, "n_initial_points": ("n_startup_trials", int)},
}
"""Sampler → its settings, as Katib or Optuna call them → Optuna's argument and its type.
`random_state`, the seed, is one of every sampler's."""
SAMPLERS = tuple(SETTINGS)


class Study:
    """What the sampler knows of a sweep: every trial that was asked for, every result."""

    def __init__(self, experiment: Experiment) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._experiment = experiment
        self._name = sampler_name(experiment.algorithm.name)
        self._arguments, self._seed = _arguments(experiment.algorithm, experiment.seed)
        self.space = study_space(experiment)
        self.num_trials = experiment.num_trials
        if self._name == "grid":
            self.num_trials = min(self.num_trials, self.space.size)
        if self._name == "cmaes" and len(experiment.objectives) > 1:
            raise ConfigError("cmaes searches by one objective; use tpe or gp for several")
        self._num_asked = 0
        self._storage = InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=self._sampler(0),
            directions=[_DIRECTIONS[objective.goal] for objective in experiment.objectives],
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)

    def ask(self) -> tuple[int, dict[str, Value], dict[str, Any]]:
        """Return the next trial: number, parameters, and what `restore` needs of it."""
        number = self.num_asked
        self._study.sampler = self._sampler(number)
        # A grid comes to all configurations anyhow.
        if number < len(self._experiment.first_guesses) and self._name != "grid":
            guess = self._experiment.first_guesses[number]
            self._study.enqueue_trial(self.space.drawn(guess))
        self._study.ask(self.space.distributions)
        self._num_asked += 1
        trial = self._study.get_trials(deepcopy=False)[number]
        sampled = {
            "drawn": trial.params,
            "trial": dict(trial.system_attrs),
            "study": self._storage.get_study_system_attrs(self._study_id),
        }
        return number, self.space.params(trial.params), sampled

    def restore(self, trial: TrialState) -> None:
        """Take in a trial that an earlier process asked for, in the order of their numbers."""
        self._study.add_trial(
            create_trial(
                state=OptunaState.RUNNING,
                params=dict(trial.sampled["drawn"]),
                distributions=self.space.distributions,
                system_attrs=dict(trial.sampled["trial"]),
            )
        )
        self._num_asked += 1
        for name, value in trial.sampled["study"].items():
            self._storage.set_study_system_attr(self._study_id, name, value)
        if trial.ended is not None:
            self.tell(trial)

    def tell(self, trial: TrialState) -> None:
        """Take in how a trial ended."""
        if trial.ended == FAILED or not trial.best:
            self._study.tell(trial.number, state=OptunaState.FAIL)
            return
        objectives = self._experiment.objectives
        pruned = trial.ended != FINISHED and trial.rungs and len(objectives) == 1
        if pruned and self._name == "tpe":
            # Of the samplers, this one compares what was stopped early with its like.
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(
                self._study_id, trial.number
            )
            for epoch, _, metrics in trial.rungs:
                value = metrics[self._experiment.objective.metric]
                self._storage.set_trial_intermediate_value(trial_id, epoch, value)
            self._study.tell(trial.number, state=OptunaState.PRUNED)
            return
        values = [trial.best[objective.metric] for objective in objectives]
        self._study.tell(trial.number, values)

    @property
    def num_asked(self) -> int:
        """How many trials were asked for."""
        return self._num_asked

    @property
    def num_observations(self) -> int:
        """How many results the sampler holds."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def _sampler(self, number: int) -> BaseSampler:
        seed = _seed(self._seed, number)
        independent = RandomSampler(seed=seed)
        with warnings.catch_warnings():
            # Said of Optuna's newer samplers; the version is pinned.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._name == "grid":
                return _Grid(self.space.indices(), seed=self._seed)
            if self._name == "sobol":
                return _Sobol(self.space, self._seed, independent)
            if self._name == "tpe":
                return TPESampler(seed=seed, **self._arguments)
            if self._name == "cmaes":
                return CmaEsSampler(
                    seed=seed,
                    independent_sampler=independent,
                    warn_independent_sampling=False,
                    **self._arguments,
                )
            if self._name == "gp":
                return GPSampler(
                    seed=seed,
                    independent_sampler=independent,
                    warn_independent_sampling=False,
                    **self._arguments,
                )
        return independent


class _Grid(GridSampler):
    """Optuna's, which would stop a loop that isn't there when the last point is told."""

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        pass


class _Sobol(QMCSampler):
    """Optuna's, told the space instead of guessing it: which trials have ended changes nothing."""

    def __init__(self, space: Space, seed: int, independent: BaseSampler) -> None:
        super().__init__(
            scramble=True,
            seed=seed,
            independent_sampler=independent,
            warn_independent_sampling=False,
        )
        self._space = space

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return dict(self._space.distributions)


def study_space(experiment: Experiment) -> Space:
    """Return what the sampler of an experiment draws from."""
    is_grid = sampler_name(experiment.algorithm.name) == "grid"
    return Space(experiment.parameters, grid=is_grid)


def sampler_name(algorithm: str) -> str:
    """Return the sampler of an algorithm; raise ConfigError with the known names otherwise."""
    name = ALIASES.get(algorithm, algorithm)
    if name not in SETTINGS:
        known = ", ".join(sorted({*SAMPLERS, *ALIASES}))
        raise ConfigError(f"unknown sampler {algorithm!r}; choose one of {known}")
    return name


def _arguments(algorithm: Named, seed: int) -> tuple[dict[str, Any], int]:
    """Return a sampler's arguments and its seed."""
    arguments: dict[str, Any] = {}
    known = SETTINGS[sampler_name(algorithm.name)]
    if algorithm.name in ("hyperband", "pbt"):
        return arguments, int(algorithm.settings.get("random_state", seed))
    for name, value in algorithm.settings.items():
        if name == "random_state":
            seed = int(value)
        elif name in known:
            argument, convert = known[name]
            arguments[argument] = convert(value)
        else:
            raise ConfigError(
                f"algorithm {algorithm.name} has no setting {name!r}; it has "
                f"{', '.join(['random_state', *known])}"
            )
    if algorithm.name == "multivariate-tpe":
        arguments["multivariate"] = True
    return arguments, seed


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")
