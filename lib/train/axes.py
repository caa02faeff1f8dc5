"""Axes as all pictures of a sweep have them, and where values lie on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.train.experiment import (
    LOG_NORMAL,
    LOG_UNIFORM,
    MAXIMIZE,
    Objective,
    Parameter,
    Value,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
INK, MUTED, GRID = "#24292f", "#8c959f", "#e6e9ec"
MAX_NAMED_CLASSES = 40
_MAX_TICKS = 6
"""On an axis of parallel coordinates with values in a list."""


def readable(metric: str) -> str:
    """Return the name of a metric or parameter as people say it."""
    words = metric.replace("_", " ").removesuffix(" ms")
    words = f"validation {words.removeprefix('val ')}" if words.startswith("val ") else words
    unit = ", ms" if metric.endswith("_ms") else ""
    return words.replace("num parameters", "parameters") + unit


def told(metric: str, value: float) -> str:
    """Return a metric's value as people read it."""
    if metric.endswith("accuracy") and 0.0 <= value <= 1.0:
        return f"{value:.2%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class ParameterScale:
    """Where a parameter's values lie on its axis, from 0 to 1."""

    def __init__(self, parameter: Parameter) -> None:
        self.name = parameter.name
        self._values = list(parameter.values)
        self.is_list = bool(self._values) or parameter.step is not None
        self._log = parameter.distribution in (LOG_UNIFORM, LOG_NORMAL)
        self._low, self._high = parameter.low or 0.0, parameter.high or 0.0

    def place(self, value: Value | None) -> float:
        """Return where a value lies; NaN for none, or one that is not on the axis."""
        if value is None:
            return math.nan
        if self._values:
            return self._values.index(value) / max(1, len(self._values) - 1) \
                if value in self._values else math.nan  # fmt: skip
        low, high, at = self._low, self._high, float(value)
        if self._log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return places with what is written at them."""
        if self._values:
            every = math.ceil(len(self._values) / _MAX_TICKS)
            chosen = self._values[::every]
            return [(self.place(value), f"{value}"[:14]) for value in chosen]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        return [(self.place(value), f"{value:.3g}") for value in (self._low, middle, self._high)]


class ResultScale:
    """Where a result lies on the last axis, from 0 to 1."""

    def __init__(self, results: Sequence[float], objective: Objective) -> None:
        self._low, self._high = min(results), max(results)
        self._metric = objective.metric

    def place(self, value: float) -> float:
        """Return where a result lies."""
        return (value - self._low) / (self._high - self._low) if self._high > self._low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return places with what is written at them."""
        values = np.linspace(self._low, self._high, 4) if self._high > self._low else [self._low]
        return [(self.place(value), told(self._metric, value)) for value in values]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Take from axes all that is not needed to read them."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def headline(axes: Axes, text: str, below: str = "") -> None:
    """Write a title, and a smaller line below it."""
    axes.set_title(escaped(text), loc="left", fontsize=12, fontweight="bold", color=INK,
                   pad=22 if below else 10)  # fmt: skip
    if below:
        axes.annotate(escaped(below), (0, 1), xycoords="axes fraction", xytext=(0, 7),
                      textcoords="offset points", fontsize=9, color=MUTED)  # fmt: skip


def value_axis(axes: Axes, objective: Objective, values: Sequence[float]) -> None:
    """Let the vertical axis tell the objective, where most of its values are."""
    axes.set_ylabel(escaped(readable(objective.metric)))
    if not values:
        return
    low, high = min(values), max(values)
    if objective.goal != MAXIMIZE and low > 0 and high / low > 20:
        axes.set_yscale("log")
        return
    # First epochs may lie so far off that nothing else could be told apart.
    good, bad = (high, low) if objective.goal == MAXIMIZE else (low, high)
    edge = float(np.quantile(values, 0.1 if objective.goal == MAXIMIZE else 0.9))
    if abs(good - bad) > 4 * abs(good - edge) > 0:
        margin = 0.08 * abs(good - edge)
        bad = edge
        low, high = min(good, bad) - margin, max(good, bad) + margin
        axes.set_ylim(low, high)
    format_axis(axes.yaxis, objective.metric)


def format_axis(axis: Any, metric: str) -> None:
    """Let an axis tell values of a metric as people read them."""
    if metric.endswith("accuracy"):
        axis.set_major_formatter(lambda value, _: f"{value * 100:.4g}%")
    elif metric.startswith("num_"):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def scale_axis(axes: Axes, position: int, ticks: Sequence[tuple[float, str]]) -> None:
    """Draw one axis of parallel coordinates."""
    axes.plot([position, position], [0, 1], color=INK, linewidth=0.9, zorder=3)
    for place, text in ticks:
        axes.annotate(escaped(text), (position, place), xytext=(5, 0), va="center", fontsize=8,
                      textcoords="offset points", color=INK, zorder=4,
                      bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
                      )  # fmt: skip


def cells(axes: Axes, num_classes: int) -> None:
    """Draw the lines between the cells of a matrix."""
    axes.grid(False)
    edges = np.arange(num_classes + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    if num_classes <= MAX_NAMED_CLASSES:
        axes.grid(which="minor", color=GRID, linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def wrapped(name: str) -> str:
    """Return the name of a metric or parameter with a line for each word."""
    return escaped(readable(name)).replace(" ", "\n")


def escaped(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
