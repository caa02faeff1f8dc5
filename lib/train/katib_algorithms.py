"""Katib's algorithms and their settings: which are honoured, as what, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.errors import ConfigError
from lib.train.experiment import Named
from lib.train.katib_schema import AlgorithmSpec, Setting

HYPERBAND, PBT = "hyperband", "pbt"


def _text(text: str) -> str:
    return text


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is less than 1")
    return value


def _factor(text: str) -> int:
    value = int(float(text))
    if value < 2:
        raise ValueError(f"{value} is less than 2")
    return value


def _resource(text: str) -> int:
    value = int(float(text))
    if value < 1:
        raise ValueError(f"{value} is less than 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{value} does not lie between 0 and 1")
    return value


def _tail(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 0.5:
        raise ValueError(f"{value} does not lie above 0 and at most at 0.5")
    return value


def _spread(text: str) -> float:
    value = float(text)
    if not value > 0.0:
        raise ValueError(f"{value} is not positive")
    return value


def _only(*allowed: str) -> Callable[[str], None]:
    """Return the conversion of a setting whose one offered value needs no setting."""

    def convert(text: str) -> None:
        if text not in allowed:
            raise ValueError(f"only {' or '.join(allowed)} is offered, not {text!r}; "
                             "leave it out")  # fmt: skip

    return convert


_SEED = {"random_state": _whole}
_HYPEROPTS = ("gamma", "prior_weight")
"""Settings of tpe as stock Katib runs it, on hyperopt; Optuna's sampler has none such."""
_TPE = {
    **_SEED,
    "n_startup_trials": _whole,
    "n_ei_candidates": _positive,
    "n_EI_candidates": _positive,
    **dict.fromkeys(_HYPEROPTS, _spread),
}
_ALGORITHMS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "random": _SEED,
    "grid": _SEED,
    "sobol": _SEED,
    "tpe": _TPE,
    "multivariate-tpe": _TPE,
    "cmaes": {**_SEED, "sigma": _spread, "restart_strategy": _only("none", "None")},
    "bayesianoptimization": {
        **_SEED,
        "n_initial_points": _whole,
        "base_estimator": _only("GP"),
        "acq_func": _only("EI"),
        "acq_optimizer": _only("auto", "lbfgs"),
    },
    HYPERBAND: {**_SEED, "eta": _factor, "r_l": _resource, "resource_name": _text},
    PBT: {
        "n_population": _positive,
        "truncation_threshold": _tail,
        "resample_probability": _share,
        "suggestion_trial_dir": _text,
    },
}
_EARLY_STOPPING: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "medianstop": {"min_trials_required": _positive, "start_step": _positive},
}
_MEDIANSTOP_DEFAULTS = {"min_trials_required": 3, "start_step": 4}
_NAS = ("enas", "darts")


def algorithm(spec: AlgorithmSpec, *, num_numeric: int) -> Named:
    """Return the algorithm with its settings as numbers; raise ConfigError naming what is refused.

    `num_numeric` is how many parameters are double or int.
    """
    where = "spec.algorithm"
    if spec.algorithm_name in _NAS:
        raise ConfigError(
            f"{where}.algorithmName: {spec.algorithm_name} searches for architectures, which is "
            "not offered; give widths and depths as `parameters` to another algorithm"
        )
    named = _named(spec, _ALGORITHMS, where)
    if spec.algorithm_name.endswith("tpe"):
        settings = {name: v for name, v in named.settings.items() if name not in _HYPEROPTS}
        if candidates := settings.pop("n_EI_candidates", None):
            settings["n_ei_candidates"] = candidates
        named = Named(name=named.name, settings=settings)
    if named.name == "cmaes" and num_numeric < 2:
        raise ConfigError(f"{where}: cmaes needs two or more parameters of type double or int")
    if named.name == HYPERBAND and (missing := {"r_l", "resource_name"} - set(named.settings)):
        raise ConfigError(f"{where}: hyperband needs the settings {', '.join(sorted(missing))}")
    return named


def notes(spec: AlgorithmSpec) -> tuple[str, ...]:
    """Return what works in another way than under Katib, for people."""
    given = [each.name for each in spec.algorithm_settings if each.name in _HYPEROPTS]
    if not given:
        return ()
    return (f"{spec.algorithm_name}: {' and '.join(given)} are hyperopt's and change nothing: "
            "Optuna's sampler draws the trials",)  # fmt: skip


def early_stopping(spec: AlgorithmSpec | None) -> Named | None:
    """Return the early stopping, with Katib's defaults; raise ConfigError for an unknown one."""
    if spec is None:
        return None
    named = _named(spec, _EARLY_STOPPING, "spec.earlyStopping")
    return Named(name=named.name, settings={**_MEDIANSTOP_DEFAULTS, **named.settings})


def _named(
    spec: AlgorithmSpec, known: Mapping[str, Mapping[str, Callable[[str], Any]]], where: str
) -> Named:
    name = spec.algorithm_name
    if name not in known:
        raise ConfigError(
            f"{where}.algorithmName: {name!r} is not offered; choose one of {', '.join(known)}"
        )
    return Named(
        name=name, settings=_settings(spec.algorithm_settings, known[name], f"{where} {name}")
    )


def _settings(
    given: Sequence[Setting], known: Mapping[str, Callable[[str], Any]], where: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in given:
        if setting.name not in known:
            raise ConfigError(
                f"{where}: the setting {setting.name!r} is not offered; it has {', '.join(known)}"
            )
        if setting.name in found:
            raise ConfigError(f"{where}: the setting {setting.name!r} is given twice")
        try:
            found[setting.name] = known[setting.name](setting.value)
        except ValueError as error:
            raise ConfigError(f"{where}: {setting.name}={setting.value!r}: {error}") from error
    # None: what is asked for is what is done anyway.
    return {name: value for name, value in found.items() if value is not None}
