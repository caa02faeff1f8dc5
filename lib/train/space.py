"""A search space: from the parameters of an experiment to Optuna's distributions and back.

Optuna has no normal distribution and no step on a logarithmic scale, and a grid needs lists. So
what the sampler draws (a number in a simple range) and what a trial gets are mapped to each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lib.errors import ConfigError
from lib.train.experiment import (
    CATEGORICAL,
    DISCRETE,
    INT,
    LOG_NORMAL,
    LOG_UNIFORM,
    NORMAL,
    UNIFORM,
    Parameter,
    Value,
)

_SIGMAS = 3.0
"""low and high of a normal distribution lie this far from its mean, as in Katib."""


class Space:
    """What a sampler draws from. For a grid every parameter is an index into its values."""

    def __init__(self, parameters: Sequence[Parameter], *, grid: bool = False) -> None:
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self._lists: dict[str, Sequence[Value]] = {
            name: grid_values(parameter) if grid else parameter.values
            for name, parameter in self.parameters.items()
            if grid or parameter.kind == DISCRETE
        }
        self.distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(self._lists[name]) - 1)
            if name in self._lists
            else _distribution(parameter)
            for name, parameter in self.parameters.items()
        }

    @property
    def size(self) -> int:
        """How many configurations a grid has."""
        return math.prod(len(values) for values in self._lists.values())

    def indices(self) -> dict[str, list[int]]:
        """Return the indices of a grid, by parameter."""
        return {name: list(range(len(values))) for name, values in self._lists.items()}

    def params(self, drawn: Mapping[str, Any]) -> dict[str, Value]:
        """Return what a trial gets for what the sampler drew."""
        return {name: self._value(name, value) for name, value in drawn.items()}

    def drawn(self, params: Mapping[str, Value]) -> dict[str, Any]:
        """Return what the sampler would have drawn for these values; the inverse of `params`."""
        return {name: self._draw(name, value) for name, value in params.items()}

    def _value(self, name: str, drawn: Any) -> Value:
        if name in self._lists:
            return self._lists[name][int(drawn)]
        parameter = self.parameters[name]
        if parameter.kind == CATEGORICAL:
            return drawn
        assert parameter.low is not None
        assert parameter.high is not None
        value = float(drawn)
        if parameter.distribution in (NORMAL, LOG_NORMAL):
            value = _normal(parameter).inv_cdf(value)
            value = math.exp(value) if parameter.distribution == LOG_NORMAL else value
        if parameter.step is not None:
            value = parameter.low + round((value - parameter.low) / parameter.step) * parameter.step
        value = min(max(value, parameter.low), parameter.high)
        return round(value) if parameter.kind == INT else value

    def _draw(self, name: str, value: Value) -> Any:
        if name in self._lists:
            if value not in self._lists[name]:
                raise ConfigError(f"parameter {name}: {value!r} is none of {self._lists[name]}")
            return list(self._lists[name]).index(value)
        parameter = self.parameters[name]
        if parameter.kind == CATEGORICAL or parameter.distribution in (UNIFORM, LOG_UNIFORM):
            return value
        number = float(value)
        if parameter.distribution == LOG_NORMAL:
            number = math.log(number)
        return _normal(parameter).cdf(number)


def grid_values(parameter: Parameter) -> Sequence[Value]:
    """Return all values of a parameter; raise ConfigError if there is no end of them."""
    if parameter.values:
        return parameter.values
    assert parameter.low is not None
    assert parameter.high is not None
    step = parameter.step or (1.0 if parameter.kind == INT else None)
    if step is None and parameter.low < parameter.high:
        raise ConfigError(f"parameter {parameter.name}: a grid needs a step")
    count = math.floor((parameter.high - parameter.low) / step + 1e-9) + 1 if step else 1
    values = [parameter.low + index * (step or 0.0) for index in range(count)]
    return [round(value) for value in values] if parameter.kind == INT else values


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == CATEGORICAL:
        return CategoricalDistribution(parameter.values)
    low, high, step = parameter.low, parameter.high, parameter.step
    assert low is not None
    assert high is not None
    if parameter.distribution in (NORMAL, LOG_NORMAL):
        edge = NormalDist().cdf(_SIGMAS)
        return FloatDistribution(1.0 - edge, edge)
    log = parameter.distribution == LOG_UNIFORM
    if parameter.kind == INT and (step is None or step == 1 or float(step).is_integer()):
        if log:
            return IntDistribution(round(low), round(high), log=True)
        return IntDistribution(round(low), round(high), step=round(step or 1))
    return FloatDistribution(low, high, log=log, step=None if log else step)


def _normal(parameter: Parameter) -> NormalDist:
    assert parameter.low is not None
    assert parameter.high is not None
    low, high = parameter.low, parameter.high
    if parameter.distribution == LOG_NORMAL:
        low, high = math.log(low), math.log(high)
    return NormalDist((low + high) / 2, max((high - low) / (2 * _SIGMAS), 1e-12))
