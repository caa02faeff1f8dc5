"""What a search is asked for: objectives, parameters, algorithm, early stopping, limits.

Presets and Katib's experiment files both become this, and the search knows nothing else. The terms
are Katib's, which are the field's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.errors import ConfigError

MAXIMIZE, MINIMIZE = "maximize", "minimize"
DOUBLE, INT, DISCRETE, CATEGORICAL = "double", "int", "discrete", "categorical"
UNIFORM, LOG_UNIFORM, NORMAL, LOG_NORMAL = "uniform", "logUniform", "normal", "logNormal"

Value = float | int | str


VAL_LOSS = "val_loss"
"""Metric: the loss on validation, which tells results of equal accuracy apart."""
NUM_PARAMETERS = "num_parameters"
"""Metric: the size of a net."""
LATENCY_MS = "latency_ms"
"""Metric: milliseconds that the exported net takes for one image, on one thread of a CPU."""
CONSTANT_METRICS = (NUM_PARAMETERS, LATENCY_MS)
"""Metrics of Rayline's nets that training does not change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A metric that a search improves."""

    metric: str
    goal: str
    """`maximize` or `minimize`."""
    target: float | None = None
    """The search ends once a trial reaches this."""
    by_last: bool = False
    """A trial's last report is its result, not its best one."""
    settles: bool = True
    """Whether a target that a report has reached stays reached, whatever the trial reports next."""
    constant: bool = False
    """Whether all reports of a trial have the same value: it can't tell its epochs apart."""

    def __post_init__(self) -> None:
        """Refuse a goal that is neither."""
        if self.goal not in (MAXIMIZE, MINIMIZE):
            raise ConfigError(f"objective {self.metric}: goal={self.goal!r} is neither maximize "
                              "nor minimize")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One dimension of the search space."""

    name: str
    kind: str
    """`double`, `int`, `discrete` (numbers in an order) or `categorical`."""
    low: float | None = None
    """Of double and int: the least value."""
    high: float | None = None
    """Of double and int: the greatest value."""
    step: float | None = None
    distribution: str = UNIFORM
    """Of double and int: `uniform`, `logUniform`, `normal` or `logNormal`."""
    values: tuple[Value, ...] = ()
    """Of discrete and categorical."""

    def __post_init__(self) -> None:
        """Refuse what can't be sampled."""
        if self.kind in (DISCRETE, CATEGORICAL):
            if not self.values:
                raise ConfigError(f"parameter {self.name}: {self.kind} needs a list of values")
            return
        if self.kind not in (DOUBLE, INT):
            raise ConfigError(f"parameter {self.name}: kind={self.kind!r} is not known")
        if self.low is None or self.high is None or not self.low <= self.high:
            raise ConfigError(f"parameter {self.name}: low={self.low} and high={self.high} "
                              "must be numbers in order")  # fmt: skip
        if self.step is not None and self.step <= 0:
            raise ConfigError(f"parameter {self.name}: step={self.step} must be positive")
        if self.distribution not in (UNIFORM, LOG_UNIFORM, NORMAL, LOG_NORMAL):
            raise ConfigError(f"parameter {self.name}: distribution={self.distribution!r} is not "
                              "known")  # fmt: skip
        if self.distribution in (LOG_UNIFORM, LOG_NORMAL) and self.low <= 0:
            raise ConfigError(f"parameter {self.name}: a logarithmic distribution needs low > 0, "
                              f"not {self.low}")  # fmt: skip
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ConfigError(f"parameter {self.name}: low and high must be finite")


@dataclass(frozen=True, slots=True)
class Named:
    """An algorithm, of sampling or of early stopping, by name with its settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """All that a search is asked for."""

    name: str
    objectives: tuple[Objective, ...]
    """They rank trials, the first one foremost; with more than one, the Pareto front counts."""
    parameters: tuple[Parameter, ...]
    algorithm: Named
    early_stopping: Named | None = None
    num_trials: int
    num_parallel: int | None = None
    """Trials at a time; as many as the cluster has room for if None."""
    max_failed_trials: int | None = None
    """More failed trials than this end the search; None sets no limit."""
    time_budget_s: float = math.inf
    first_guesses: tuple[Mapping[str, Value], ...] = ()
    """Configurations tried first."""
    additional_metrics: tuple[str, ...] = ()
    """Recorded, not searched by."""
    resume_policy: str = "LongRunning"
    """Katib's: `Never`, `LongRunning` or `FromVolume`; a `Never` can't be resumed."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the limits that a search relies on."""
        if not self.objectives:
            raise ConfigError(f"experiment {self.name}: it needs an objective")
        if all(objective.constant for objective in self.objectives):
            metrics = " and ".join(objective.metric for objective in self.objectives)
            raise ConfigError(
                f"experiment {self.name}: training does not change {metrics}, so no epoch of a "
                "trial is its best one; add an objective that it changes, such as val_accuracy"
            )
        if self.num_trials < 1:
            raise ConfigError(f"experiment {self.name}: num_trials={self.num_trials} must be ≥ 1")
        if self.num_parallel is not None and self.num_parallel < 1:
            raise ConfigError(f"experiment {self.name}: num_parallel={self.num_parallel} must be "
                              "≥ 1")  # fmt: skip
        if not self.time_budget_s > 0:
            raise ConfigError(f"experiment {self.name}: time_budget_s must be positive")
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) != len(names):
            raise ConfigError(f"experiment {self.name}: two parameters have one name")
        for guess in self.first_guesses:
            if unknown := set(guess) - set(names):
                raise ConfigError(f"experiment {self.name}: first guess of unknown {unknown}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Experiment:
        """Rebuild an experiment from what `asdict` and JSON made of it."""
        stopping = content["early_stopping"]
        parameters = [{**item, "values": tuple(item["values"])} for item in content["parameters"]]
        return cls(
            **{
                **content,
                "objectives": tuple(Objective(**item) for item in content["objectives"]),
                "parameters": tuple(Parameter(**item) for item in parameters),
                "algorithm": Named(**content["algorithm"]),
                "early_stopping": Named(**stopping) if stopping else None,
                "first_guesses": tuple(content["first_guesses"]),
                "additional_metrics": tuple(content["additional_metrics"]),
            }
        )

    @property
    def objective(self) -> Objective:
        """The objective by which reports are compared, within a trial and at rungs."""
        return varying(self.objectives)


def varying(objectives: Sequence[Objective]) -> Objective:
    """Return the first objective that training changes."""
    return next(objective for objective in objectives if not objective.constant)


def rank_key(objectives: Sequence[Objective], metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Return what sorts results best first.

    That is by the first objective that training changes, if equal by the next, then by `val_loss`
    where it is reported: on a few validation images many results have the same accuracy. Constant
    objectives, such as the size of a net, come last: the smallest net is not the best because it
    is small.
    """
    varying, constant = (
        [
            -metrics[each.metric] if each.goal == MAXIMIZE else metrics[each.metric]
            for each in objectives
            if each.constant == is_constant
        ]
        for is_constant in (False, True)
    )
    loss = metrics.get(VAL_LOSS, math.inf)
    return (*varying, loss if math.isfinite(loss) else math.inf, *constant)
