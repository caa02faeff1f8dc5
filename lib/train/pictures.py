"""What a sweep looks like: matplotlib figures from plain records, without any state of pyplot.

matplotlib is imported where it draws: importing it looks for fonts and takes half a second.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

_DPI = 150
_INK, _MUTED, _GRID = "#24292f", "#8c959f", "#e6e9ec"
_BLUE, _ORANGE = "#0072b2", "#d55e00"
_MAX_NAMED_CLASSES = 40
_MAX_COUNTED_CLASSES = 16
_SPREAD = 0.012
_MAX_TICKS = 6
"""On an axis of parallel coordinates with values in a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A trial as pictures show it."""

    number: int
    """From 1, as people are told."""
    params: Mapping[str, Value]
    curve: Sequence[tuple[float, float]]
    """Epoch and first objective of every report."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the report that counts; empty: the trial left no result."""
    stopped: bool = False
    """Whether it was ended before it came to its own end."""


def curves(trials: Sequence[Drawn], objective: Objective, x_name: str = "epoch") -> Figure:
    """Draw the objective over the epochs, a line a trial, the best one in colour."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(7.2, 4.2)
    best = best_of(trials, objective)
    alpha = max(0.35, min(0.8, 8 / max(1, len(trials))))
    # One entry of the legend stands for all trials of a kind; the best one is drawn on top.
    kinds = ((True, _MUTED, "others, stopped early"), (False, _BLUE, "others, to the end"))
    for stopped, colour, kind in kinds:
        found = [t for t in trials if t.stopped == stopped and t is not best and t.curve]
        for index, trial in enumerate(found):
            label = f"{kind} ({len(found)})" if index == 0 else None
            _line(axes, trial, colour, alpha=alpha, width=1.2, label=label)
    if best is not None:
        value = told(objective.metric, best.metrics[objective.metric])
        label = f"best: trial {best.number}, {value}"
        _line(axes, best, _ORANGE, alpha=1.0, width=2.2, label=label)
    values = [value for trial in trials for _, value in trial.curve if math.isfinite(value)]
    _value_axis(axes, objective, values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(x_name)
    _title(axes, f"{readable(objective.metric).capitalize()} of {_count(len(trials), 'trial')}")
    if axes.lines:
        axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def importance(shares: Mapping[str, float], of: str) -> Figure:
    """Draw how much each parameter decides; `of` says what, and from how many trials."""
    figure, axes = _figure(7.2, 1.3 + 0.42 * len(shares))
    names = sorted(shares, key=lambda name: shares[name])
    values = [shares[name] for name in names]
    bars = axes.barh([_escaped(readable(n)) for n in names], values, color=_BLUE, height=0.62)
    axes.bar_label(bars, labels=[f"{value:.0%}" for value in values], padding=4, color=_INK,
                   fontsize=9)  # fmt: skip
    axes.set_xlim(0, max(values, default=1.0) * 1.14 or 1.0)
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    _title(axes, "Which parameters decide", of)
    return figure


def parallel_coordinates(
    trials: Sequence[Drawn], parameters: Sequence[Parameter], objective: Objective
) -> Figure:
    """Draw every trial as a line through its parameters to the objective, coloured by that.

    A parameter of one value is left out.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    shown = [trial for trial in trials if trial.metrics]
    results = [trial.metrics[objective.metric] for trial in shown]
    scales = [_ParameterScale(parameter) for parameter in parameters if varies(parameter)]
    last = _ResultScale(results, objective)
    figure, axes = _figure(max(7.2, 1.25 * (len(scales) + 1)), 4.6)
    # Of the same values lines would cover each other: they are spread a little.
    spread = np.linspace(-_SPREAD, _SPREAD, len(shown)) if len(shown) > 1 else [0.0]
    rows = [
        [*(s.place(t.params.get(s.name)) + s.is_list * aside for s in scales), last.place(result)]
        for t, result, aside in zip(shown, results, spread, strict=True)
    ]
    # The best ones last, on top.
    order = np.argsort([row[-1] if objective.goal == MAXIMIZE else 1 - row[-1] for row in rows])
    lines = [list(enumerate(rows[index])) for index in order]
    blues = [colormaps["Blues"](rank) for rank in np.linspace(0.25, 0.95, len(lines))]
    widths = [1.1] * (len(lines) - 1) + [2.6]
    axes.add_collection(
        LineCollection(lines, colors=[*blues[:-1], _ORANGE], linewidths=widths, alpha=0.9)
    )
    all_scales: list[_ParameterScale | _ResultScale] = [*scales, last]
    for position, scale in enumerate(all_scales):
        _scale_axis(axes, position, scale.ticks())
    names = [*(_wrapped(scale.name) for scale in scales), _wrapped(objective.metric)]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(-0.25, len(scales) + 0.45)
    axes.set_ylim(-0.04, 1.04)
    axes.grid(False)
    axes.yaxis.set_visible(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    _title(
        axes, f"Parameters of {_count(len(shown), 'trial')}", "darker is better, orange the best"
    )
    return figure


def pareto(trials: Sequence[Drawn], front: set[int], objectives: Sequence[Objective]) -> Figure:
    """Draw the first objective against each other one; `front` are numbers of trials."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first, *others = objectives
    shown = [trial for trial in trials if trial.metrics]
    figure = Figure(figsize=(max(5.4, 4.4 * len(others)), 4.4), dpi=_DPI, layout="constrained")
    for index, other in enumerate(others):
        axes = figure.add_subplot(1, len(others), index + 1)
        _plain(axes)
        for on_front, colour, size in ((False, _MUTED, 22), (True, _ORANGE, 42)):
            some = [trial for trial in shown if (trial.number in front) == on_front]
            label = f"{'on the front' if on_front else 'beaten'} ({len(some)})"
            x, y = ([trial.metrics[o.metric] for trial in some] for o in (other, first))
            axes.scatter(x, y, s=size, color=colour, label=label, alpha=0.9, linewidths=0)
        by_other = sorted(
            (trial.metrics[other.metric], trial.number, trial)
            for trial in shown
            if trial.number in front
        )
        best = [trial for _, _, trial in by_other]
        if len(others) == 1 and best:
            x, y = ([trial.metrics[o.metric] for trial in best] for o in (other, first))
            where: Any = "post" if other.goal != MAXIMIZE else "pre"
            axes.step(x, y, where=where, color=_ORANGE, linewidth=1.0, alpha=0.6)
        for trial in best[: 2 * _MAX_TICKS]:
            place = (trial.metrics[other.metric], trial.metrics[first.metric])
            axes.annotate(str(trial.number), place, xytext=(5, -10), textcoords="offset points",
                          fontsize=8, color=_INK)  # fmt: skip
        axes.margins(0.09)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _format(axes.yaxis, first.metric)
        _format(axes.xaxis, other.metric)
        axes.set_xlabel(f"{_escaped(readable(other.metric))} ({_better(other)})")
        if index == 0:
            axes.set_ylabel(f"{_escaped(readable(first.metric))} ({_better(first)})")
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Pareto front of {_count(len(shown), 'trial')}", x=0.01, ha="left",
                    fontsize=12, fontweight="bold", color=_INK)  # fmt: skip
    return figure


def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str], of: str) -> Figure:
    """Draw rows by true class, columns by predicted class; `of` says which model and images.

    What is right would drown what is wrong in one scale of colours: only errors are coloured.
    """
    from matplotlib.colors import LinearSegmentedColormap

    counts_KK = np.asarray(counts)
    num_classes, right = len(class_names), int(np.trace(counts_KK))
    total = int(counts_KK.sum())
    truth_K1 = np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    shares_KK = counts_KK / truth_K1
    np.fill_diagonal(shares_KK, np.nan)
    side = min(12.0, max(4.8, 1.6 + 0.46 * num_classes))
    figure, axes = _figure(side + 0.8, side)
    axes.set_facecolor("#dce9f5")
    most = float(np.nanmax(shares_KK)) if num_classes > 1 else 0.0
    colours = LinearSegmentedColormap.from_list("errors", ["white", "#f0a868", _ORANGE])
    image = axes.imshow(shares_KK, cmap=colours, vmin=0.0, vmax=max(most, 1e-9))
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    colour_bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    colour_bar.ax.tick_params(labelsize=8)
    colour_bar.set_label("of the class taken for another", fontsize=8, color=_INK)
    colour_bar.outline.set_visible(False)
    _cells(axes, num_classes)
    if num_classes <= _MAX_COUNTED_CLASSES:
        for row, column in np.ndindex(num_classes, num_classes):
            count = counts_KK[row, column]
            if count:
                dark = row != column and shares_KK[row, column] > 0.8 * most
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8,
                          color="white" if dark else _INK)  # fmt: skip
    if num_classes <= _MAX_NAMED_CLASSES:
        names = [_escaped(name[:16]) for name in class_names]
        turned = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(num_classes), names, rotation=turned, fontsize=9)
        axes.set_yticks(range(num_classes), names, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for spine in axes.spines.values():
        spine.set_visible(False)
    wrong = _count(total - right, "error")
    _title(axes, f"{wrong} on {total:,} images ({right / max(total, 1):.2%} right)", of)
    return figure


def varies(parameter: Parameter) -> bool:
    """Whether a parameter has more than one value."""
    return len(parameter.values) > 1 or parameter.low != parameter.high


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def best_of(trials: Sequence[Drawn], objective: Objective) -> Drawn | None:
    """Return the trial with the best result, the earlier one if equal; None if none left one."""
    sign = -1 if objective.goal == MAXIMIZE else 1
    with_result = [trial for trial in trials if trial.metrics]
    key = lambda t: (sign * t.metrics[objective.metric], t.number)  # noqa: E731
    return min(with_result, key=key, default=None)


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


class _ParameterScale:
    """Where a parameter's values lie on its axis, from 0 to 1."""

    def __init__(self, parameter: Parameter) -> None:
        self.name = parameter.name
        self._values = list(parameter.values)
        self.is_list = bool(self._values) or parameter.step is not None
        self._log = parameter.distribution in (LOG_UNIFORM, LOG_NORMAL)
        self._low, self._high = parameter.low or 0.0, parameter.high or 0.0

    def place(self, value: Value | None) -> float:
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
        if self._values:
            every = math.ceil(len(self._values) / _MAX_TICKS)
            chosen = self._values[::every]
            return [(self.place(value), f"{value}"[:14]) for value in chosen]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        return [(self.place(value), f"{value:.3g}") for value in (self._low, middle, self._high)]


class _ResultScale:
    """Where a result lies on the last axis, from 0 to 1."""

    def __init__(self, results: Sequence[float], objective: Objective) -> None:
        self._low, self._high = min(results), max(results)
        self._metric = objective.metric

    def place(self, value: float) -> float:
        return (value - self._low) / (self._high - self._low) if self._high > self._low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        values = np.linspace(self._low, self._high, 4) if self._high > self._low else [self._low]
        return [(self.place(value), told(self._metric, value)) for value in values]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _title(axes: Axes, title: str, below: str = "") -> None:
    axes.set_title(_escaped(title), loc="left", fontsize=12, fontweight="bold", color=_INK,
                   pad=22 if below else 10)  # fmt: skip
    if below:
        axes.annotate(_escaped(below), (0, 1), xycoords="axes fraction", xytext=(0, 7),
                      textcoords="offset points", fontsize=9, color=_MUTED)  # fmt: skip


def _line(
    axes: Axes, trial: Drawn, colour: str, *, alpha: float, width: float, label: str | None
) -> None:
    epochs, values = zip(*trial.curve, strict=True)
    axes.plot(epochs, values, color=colour, alpha=alpha, linewidth=width, label=label,
              marker="o", markevery=[len(epochs) - 1], markersize=2 + width)  # fmt: skip


def _value_axis(axes: Axes, objective: Objective, values: Sequence[float]) -> None:
    axes.set_ylabel(_escaped(readable(objective.metric)))
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
    _format(axes.yaxis, objective.metric)


def _format(axis: Any, metric: str) -> None:
    if metric.endswith("accuracy"):
        axis.set_major_formatter(lambda value, _: f"{value * 100:.4g}%")
    elif metric.startswith("num_"):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _scale_axis(axes: Axes, position: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([position, position], [0, 1], color=_INK, linewidth=0.9, zorder=3)
    for place, text in ticks:
        axes.annotate(_escaped(text), (position, place), xytext=(5, 0), va="center", fontsize=8,
                      textcoords="offset points", color=_INK, zorder=4,
                      bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
                      )  # fmt: skip


def _cells(axes: Axes, num_classes: int) -> None:
    """Draw the lines between the cells of a matrix."""
    axes.grid(False)
    edges = np.arange(num_classes + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    if num_classes <= _MAX_NAMED_CLASSES:
        axes.grid(which="minor", color=_GRID, linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _wrapped(name: str) -> str:
    return _escaped(readable(name)).replace(" ", "\n")


def _better(objective: Objective) -> str:
    return "more is better" if objective.goal == MAXIMIZE else "less is better"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _escaped(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
