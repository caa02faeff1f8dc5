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

from lib.train.axes import (
    DPI,
    INK,
    MAX_NAMED_CLASSES,
    MUTED,
    ParameterScale,
    ResultScale,
    cells,
    escaped,
    format_axis,
    headline,
    new_figure,
    plain,
    readable,
    scale_axis,
    told,
    value_axis,
    wrapped,
)
from lib.train.experiment import MAXIMIZE, Objective, Parameter, Value, rank_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE = "#0072b2", "#d55e00"
_MAX_COUNTED_CLASSES = 16
_SPREAD = 0.012
_MAX_NUMBERED = 12


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

    figure, axes = new_figure(7.2, 4.2)
    best = best_of(trials, (objective,))
    alpha = max(0.35, min(0.8, 8 / max(1, len(trials))))
    # One entry of the legend stands for all trials of a kind; the best one is drawn on top.
    kinds = ((True, MUTED, "others, stopped early"), (False, _BLUE, "others, to the end"))
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
    value_axis(axes, objective, values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(x_name)
    headline(axes, f"{readable(objective.metric).capitalize()} of {_count(len(trials), 'trial')}")
    if axes.lines:
        axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def importance(shares: Mapping[str, float], of: str) -> Figure:
    """Draw how much each parameter decides; `of` says what, and from how many trials."""
    figure, axes = new_figure(7.2, 1.3 + 0.42 * len(shares))
    names = sorted(shares, key=lambda name: shares[name])
    values = [shares[name] for name in names]
    bars = axes.barh([escaped(readable(n)) for n in names], values, color=_BLUE, height=0.62)
    axes.bar_label(bars, labels=[f"{value:.0%}" for value in values], padding=4, color=INK,
                   fontsize=9)  # fmt: skip
    axes.set_xlim(0, max(values, default=1.0) * 1.14 or 1.0)
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    headline(axes, "Which parameters decide", of)
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
    scales = [ParameterScale(parameter) for parameter in parameters if varies(parameter)]
    last = ResultScale(results, objective)
    figure, axes = new_figure(max(7.2, 1.25 * (len(scales) + 1)), 4.6)
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
    all_scales: list[ParameterScale | ResultScale] = [*scales, last]
    for position, scale in enumerate(all_scales):
        scale_axis(axes, position, scale.ticks())
    names = [*(wrapped(scale.name) for scale in scales), wrapped(objective.metric)]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(-0.25, len(scales) + 0.45)
    axes.set_ylim(-0.04, 1.04)
    axes.grid(False)
    axes.yaxis.set_visible(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    headline(
        axes, f"Parameters of {_count(len(shown), 'trial')}", "darker is better, orange the best"
    )
    return figure


def pareto(trials: Sequence[Drawn], front: set[int], objectives: Sequence[Objective]) -> Figure:
    """Draw the first objective against each other one; `front` are numbers of trials."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first, *others = objectives
    shown = [trial for trial in trials if trial.metrics]
    figure = Figure(figsize=(max(5.4, 4.4 * len(others)), 4.4), dpi=DPI, layout="constrained")
    for index, other in enumerate(others):
        axes = figure.add_subplot(1, len(others), index + 1)
        plain(axes)
        for on_front, colour, size in ((False, MUTED, 22), (True, _ORANGE, 42)):
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
        for trial in best[:_MAX_NUMBERED]:
            place = (trial.metrics[other.metric], trial.metrics[first.metric])
            axes.annotate(str(trial.number), place, xytext=(5, -10), textcoords="offset points",
                          fontsize=8, color=INK)  # fmt: skip
        axes.margins(0.09)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        format_axis(axes.yaxis, first.metric)
        format_axis(axes.xaxis, other.metric)
        axes.set_xlabel(f"{escaped(readable(other.metric))} ({_better(other)})")
        if index == 0:
            axes.set_ylabel(f"{escaped(readable(first.metric))} ({_better(first)})")
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Pareto front of {_count(len(shown), 'trial')}", x=0.01, ha="left",
                    fontsize=12, fontweight="bold", color=INK)  # fmt: skip
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
    figure, axes = new_figure(side + 0.8, side)
    axes.set_facecolor("#dce9f5")
    most = float(np.nanmax(shares_KK)) if num_classes > 1 else 0.0
    colours = LinearSegmentedColormap.from_list("errors", ["white", "#f0a868", _ORANGE])
    image = axes.imshow(shares_KK, cmap=colours, vmin=0.0, vmax=max(most, 1e-9))
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    colour_bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    colour_bar.ax.tick_params(labelsize=8)
    colour_bar.set_label("of the class taken for another", fontsize=8, color=INK)
    colour_bar.outline.set_visible(False)
    cells(axes, num_classes)
    if num_classes <= _MAX_COUNTED_CLASSES:
        for row, column in np.ndindex(num_classes, num_classes):
            count = counts_KK[row, column]
            if count:
                dark = row != column and shares_KK[row, column] > 0.8 * most
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8,
                          color="white" if dark else INK)  # fmt: skip
    if num_classes <= MAX_NAMED_CLASSES:
        names = [escaped(name[:16]) for name in class_names]
        turned = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(num_classes), names, rotation=turned, fontsize=9)
        axes.set_yticks(range(num_classes), names, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for spine in axes.spines.values():
        spine.set_visible(False)
    wrong = _count(total - right, "error")
    headline(axes, f"{wrong} on {total:,} images ({right / max(total, 1):.2%} right)", of)
    return figure


def varies(parameter: Parameter) -> bool:
    """Whether a parameter has more than one value."""
    return len(parameter.values) > 1 or parameter.low != parameter.high


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def best_of(trials: Sequence[Drawn], objectives: Sequence[Objective]) -> Drawn | None:
    """Return the trial with the best result, the earlier one if equal; None if none left one."""
    with_result = [trial for trial in trials if trial.metrics]
    key = lambda t: (rank_key(objectives, t.metrics), t.number)  # noqa: E731
    return min(with_result, key=key, default=None)


def _line(
    axes: Axes, trial: Drawn, colour: str, *, alpha: float, width: float, label: str | None
) -> None:
    epochs, values = zip(*trial.curve, strict=True)
    axes.plot(epochs, values, color=colour, alpha=alpha, linewidth=width, label=label,
              marker="o", markevery=[len(epochs) - 1], markersize=2 + width)  # fmt: skip


def _better(objective: Objective) -> str:
    return "more is better" if objective.goal == MAXIMIZE else "less is better"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
