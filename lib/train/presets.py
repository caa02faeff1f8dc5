"""A preset as an experiment: what a sweep over Rayline's own nets varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lib.config import Preset
from lib.errors import ConfigError
from lib.train.experiment import (
    CONSTANT_METRICS,
    DISCRETE,
    DOUBLE,
    LATENCY_MS,
    LOG_UNIFORM,
    MAXIMIZE,
    MINIMIZE,
    NUM_PARAMETERS,
    Experiment,
    Named,
    Objective,
    Parameter,
    Value,
)

GOALS = {
    "val_accuracy": MAXIMIZE,
    "val_loss": MINIMIZE,
    NUM_PARAMETERS: MINIMIZE,
    LATENCY_MS: MINIMIZE,
}
"""What a search can be for, by metric of a trial."""
_GRID_POINTS = 3
"""Values that a grid takes of a parameter without steps."""


def preset_experiment(
    preset: Preset,
    *,
    sampler: str = "tpe",
    scheduler: str = "asha",
    objectives: Sequence[str] = ("val_accuracy",),
) -> Experiment:
    """Return the search that a preset stands for, by a sampler and a scheduler of these names.

    Trials are ranked by the objectives in their order, and stopped early by the first one that
    training changes. Raises ConfigError for a metric that is none of `GOALS`.
    """
    parameters = search_space(preset)
    if sampler == "grid":
        parameters = tuple(_on_grid(parameter) for parameter in parameters)
    settings = {"n_startup_trials": max(3, preset.num_trials // 4)} if sampler == "tpe" else {}
    return Experiment(
        name=preset.name,
        objectives=_objectives(objectives),
        parameters=parameters,
        algorithm=Named(sampler, settings),
        early_stopping=Named(scheduler),
        num_trials=preset.num_trials,
        time_budget_s=preset.time_budget_s,
        first_guesses=() if sampler == "grid" else first_guesses(preset),
        additional_metrics=("val_loss", "train_loss", NUM_PARAMETERS),
        seed=preset.seed,
    )


def _objectives(metrics: Sequence[str]) -> tuple[Objective, ...]:
    unknown = [metric for metric in metrics if metric not in GOALS]
    if unknown or len(set(metrics)) < len(metrics) or not metrics:
        raise ConfigError(
            f"objectives {', '.join(metrics) or 'none'}: give one or more of {', '.join(GOALS)}, "
            "each once, the one to rank by first"
        )
    return tuple(
        Objective(metric=metric, goal=GOALS[metric], constant=metric in CONSTANT_METRICS)
        for metric in metrics
    )


def search_space(preset: Preset) -> tuple[Parameter, ...]:
    """Return what a sweep varies."""
    return (
        Parameter(name="stage_width", kind=DISCRETE, values=preset.widths),
        Parameter(name="depth", kind=DISCRETE, values=preset.depths),
        Parameter(name="growth", kind=DISCRETE, values=preset.growths),
        Parameter(
            name="learning_rate",
            kind=DOUBLE,
            low=0.03,
            high=0.3,
            distribution=LOG_UNIFORM,
        ),
        Parameter(name="weight_decay", kind=DOUBLE, low=1e-4, high=2e-3, distribution=LOG_UNIFORM),
        Parameter(name="label_smoothing", kind=DOUBLE, low=0.0, high=0.15, step=0.05),
        Parameter(
            name="augmentation",
            kind=DOUBLE,
            low=0.0,
            high=1.0,
            step=0.25,
        ),
    )


def first_guesses(preset: Preset) -> tuple[Mapping[str, Value], ...]:
    """Return the configurations that a sweep tries first: known to train well."""
    usual: Mapping[str, Value] = {
        "stage_width": max(preset.widths),
        "depth": min(preset.depths),
        "growth": max(preset.growths),
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "augmentation": 0.5,
    }
    return tuple({**usual, **guess} for guess in preset.first_guesses or ({},))


def _on_grid(parameter: Parameter) -> Parameter:
    """Return the parameter cut into a few values where it has no steps, as a grid needs."""
    low, high = parameter.low, parameter.high
    if parameter.kind != DOUBLE or parameter.step is not None or low is None or high is None:
        return parameter
    shares = [index / (_GRID_POINTS - 1) for index in range(_GRID_POINTS)]
    if parameter.distribution == LOG_UNIFORM:
        values = tuple(low * (high / low) ** share for share in shares)
    else:
        values = tuple(low + (high - low) * share for share in shares)
    return Parameter(name=parameter.name, kind=DISCRETE, values=values)
