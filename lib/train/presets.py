"""A preset as an experiment: what a sweep over Rayline's own nets varies."""

from __future__ import annotations

from collections.abc import Mapping

from lib.config import Preset
from lib.train.experiment import (
    DISCRETE,
    DOUBLE,
    LOG_UNIFORM,
    MAXIMIZE,
    Experiment,
    Named,
    Objective,
    Parameter,
    Value,
)

_GRID_POINTS = 3
"""Values that a grid takes of a parameter without steps."""


def preset_experiment(
    preset: Preset, *, sampler: str = "tpe", scheduler: str = "asha"
) -> Experiment:
    """Return the search that a preset stands for, by a sampler and a scheduler of these names."""
    parameters = search_space(preset)
    if sampler == "grid":
        parameters = tuple(_on_grid(parameter) for parameter in parameters)
    settings = {"n_startup_trials": max(3, preset.num_trials // 4)} if sampler == "tpe" else {}
    return Experiment(
        name=preset.name,
        objectives=(Objective(metric="val_accuracy", goal=MAXIMIZE),),
        parameters=parameters,
        algorithm=Named(sampler, settings),
        early_stopping=Named(scheduler),
        num_trials=preset.num_trials,
        time_budget_s=preset.time_budget_s,
        first_guesses=() if sampler == "grid" else first_guesses(preset),
        additional_metrics=("val_loss", "train_loss", "num_parameters"),
        seed=preset.seed,
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
            low=preset.learning_rates[0],
            high=preset.learning_rates[1],
            distribution=LOG_UNIFORM,
        ),
        Parameter(name="weight_decay", kind=DOUBLE, low=1e-4, high=2e-3, distribution=LOG_UNIFORM),
        Parameter(name="label_smoothing", kind=DOUBLE, low=0.0, high=0.15, step=0.05),
        Parameter(
            name="augmentation",
            kind=DOUBLE,
            low=preset.augmentations[0],
            high=preset.augmentations[1],
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
