"""The pictures of a report: SVG to stand in the page, drawn the same way for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lib.train.experiment import MAXIMIZE
from lib.watch.dossier import Dossier

BLUE, ORANGE, GREY, RED, INK = "#1f5fa8", "#c7651b", "#9aa4b2", "#b3261e", "#14181f"
_PALE = "#dfe5ec"
_WIDTH = 6.4
_STYLE: Any = {
    # As text: it can be searched and read aloud, and takes the page's font.
    "svg.fonttype": "none",
    "svg.hashsalt": "rayline",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
_MAX_LABELLED = 24
"""Classes up to which every one gets a name and a number."""
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_NAMES = {"val_accuracy": "validation accuracy", "val_loss": "validation loss"}
Picture = str | None
"""SVG, or None where there is nothing to draw."""


def data(dossier: Dossier) -> Picture:
    """Rows of each class, by split."""
    if not dossier.manifests:
        return None
    manifest = dossier.manifests[0]
    names, counts = manifest["class_names"], manifest["counts"]
    with _figure(2.4) as (figure, done):
        axes = figure.add_subplot()
        bottom = np.zeros(len(names))
        colours = {"train": BLUE, "val": "#7aa5d8", "test": GREY, "live": ORANGE}
        for split, rows in counts.items():
            label = f"{split} ({sum(rows):,})"
            axes.bar(range(len(names)), rows, bottom=bottom, label=label,
                     color=colours.get(split, INK), width=0.75)  # fmt: skip
            bottom += rows
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("rows")
        _name_classes(axes.xaxis, names)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.22), columnspacing=1.2)
        return done()


def search(dossier: Dossier) -> Picture:
    """The objective of every trial, and over the parameters that were varied."""
    metric = dossier.objective.metric
    trials = [trial for trial in dossier.trials if metric in trial["metrics"]]
    if not trials:
        return None
    scores = np.array([trial["metrics"][metric] for trial in trials])
    best = np.maximum if dossier.objective.goal == MAXIMIZE else np.minimum
    chosen = dossier.facts.get("lineage", {}).get("run_id")
    colours = [ORANGE if trial["run_id"] == chosen else BLUE for trial in trials]
    varied = _varied(trials)[:6]
    rows = 1 + (len(varied) + 2) // 3
    with _figure(1.9 * rows) as (figure, done):
        grid = figure.add_gridspec(rows, 3)
        axes = figure.add_subplot(grid[0, :])
        numbers = np.arange(1, len(trials) + 1)
        axes.step(numbers, best.accumulate(scores), where="post", color=GREY, label="best")
        axes.scatter(numbers, scores, c=colours, s=22, zorder=3)
        axes.set_xlabel("trial")
        axes.set_ylabel(_NAMES.get(metric, metric))
        axes.xaxis.get_major_locator().set_params(integer=True)
        for index, name in enumerate(varied):
            small = figure.add_subplot(grid[1 + index // 3, index % 3])
            values = [trial["params"].get(name, "") for trial in trials]
            small.scatter(_numbers(values), scores, c=colours, s=14, zorder=3)
            if _is_logarithmic(values):
                small.set_xscale("log")
                small.xaxis.get_major_locator().set_params(numticks=4)
                small.xaxis.set_minor_formatter(lambda value, place: "")
            small.set_title(name.replace("_", " "), fontsize=9)
            small.tick_params(labelsize=7)
        return done()


def confusion(dossier: Dossier) -> Picture:
    """Rows of test by true and predicted class; the errors set the colours."""
    if not dossier.evaluation:
        return None
    names = dossier.evaluation["class_names"]
    matrix = np.array(dossier.evaluation["confusion"])
    errors = np.where(np.eye(len(names), dtype=bool), 0, matrix)
    with _figure(5.0 if len(names) > 4 else 3.2) as (figure, done):
        axes = figure.add_subplot()
        axes.imshow(errors, cmap="Oranges", vmin=0, vmax=max(1, errors.max()))
        axes.grid(visible=False)
        if len(names) <= _MAX_LABELLED:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    strong = row != column and errors[row, column] > 0.6 * errors.max()
                    colour = "white" if strong else GREY if row == column else INK
                    axes.text(column, row, f"{count:,}", ha="center", va="center",
                              color=colour, fontsize=8 if len(names) <= 12 else 6)  # fmt: skip
        _name_classes(axes.xaxis, names)
        _name_classes(axes.yaxis, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return done()


def classes(dossier: Dossier) -> Picture:
    """Accuracy of every class on test, the worst at the top."""
    if not dossier.evaluation or not dossier.evaluation["per_class_accuracy"]:
        return None
    found = sorted(dossier.evaluation["per_class_accuracy"].items(), key=lambda item: -item[1])
    found = found[-30:]
    shares = np.array([share for _, share in found])
    with _figure(0.5 + 0.22 * max(4, len(found))) as (figure, done):
        axes = figure.add_subplot()
        places = np.arange(len(found))
        start = max(0.0, shares.min() - 0.25 * (1.001 - shares.min()) - 0.002)
        axes.hlines(places, start, shares, color=_PALE, linewidth=5)
        axes.plot(shares, places, "o", color=BLUE, markersize=5)
        axes.axvline(dossier.evaluation["accuracy"], color=GREY, linewidth=1, linestyle="--")
        for place, share in zip(places, shares, strict=True):
            axes.annotate(f"{100 * share:.2f} %", (share, place), xytext=(6, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        axes.set_yticks(places, [name for name, _ in found])
        axes.set_xlim(start, 1 + 0.18 * (1 - start))
        axes.set_xticks([tick for tick in axes.get_xticks() if start <= tick <= 1])
        axes.xaxis.set_major_formatter(_percent)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy on test (dashed: all classes)")
        return done()


def gap(dossier: Dossier) -> Picture:
    """Validation and test accuracy of every version on the same data set."""
    digest = dossier.facts.get("data", {}).get("digest")
    rows = [row for row in dossier.versions if row["data_digest"] == digest][-25:]
    if not rows:
        return None
    with _figure(0.8 + 0.26 * max(3, len(rows))) as (figure, done):
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        val = np.array([row["val_accuracy"] for row in rows])
        test = np.array([row["test_accuracy"] for row in rows])
        axes.hlines(places, val, test, color=_PALE, linewidth=4)
        axes.plot(val, places, "o", color=GREY, markersize=5, label="validation")
        axes.plot(test, places, "o", color=BLUE, markersize=5, label="test")
        axes.set_yticks(places, [f"version {row['version']}" for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row["version"] == dossier.version:
                label.set_fontweight("bold")
            if row["gap_holds"] is False:
                label.set_color(RED)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(_percent)
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return done()


def drift(dossier: Dossier) -> Picture:
    """p-value of the worst window of each step of the last hour; alarms are marked."""
    points = [point for point in dossier.watch.get("history", ()) if "drift" in point]
    if not points:
        return None
    times = [_time(point["time"]) for point in points]
    series = [point["drift"] for point in points]
    p_values = np.maximum([point["p_value"] for point in series], 1e-12)
    alarm = np.array([bool(point.get("alarm")) for point in series])
    with _figure(2.2) as (figure, done):
        axes = figure.add_subplot()
        axes.plot(times, p_values, color=BLUE, marker="o", markersize=3)
        if alarm.any():
            axes.plot(np.array(times)[alarm], p_values[alarm], "o", color=RED, markersize=6,
                      label="alarm")  # fmt: skip
            axes.legend(loc="lower left")
        axes.set_yscale("log")
        axes.set_ylim(top=2)
        axes.set_ylabel("p-value")
        _dates(axes)
        return done()


def quality(dossier: Dossier) -> Picture:
    """Accuracy on labelled live requests over time, by version."""
    lines: dict[int, list[tuple[Any, ...]]] = {}
    for point in dossier.watch.get("history", ()):
        for version, found in point["versions"].items():
            if found["accuracy"] is not None:
                entry = (_time(point["time"]), found["accuracy"], found["low"], found["high"])
                lines.setdefault(int(version), []).append(entry)
    if not lines:
        return None
    with _figure(2.2) as (figure, done):
        axes = figure.add_subplot()
        for version, points in sorted(lines.items()):
            times, share, low, high = zip(*points, strict=True)
            colour = BLUE if version == dossier.version else GREY
            axes.plot(times, share, color=colour, marker="o", markersize=3,
                      label=f"version {version}")  # fmt: skip
            axes.fill_between(times, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.yaxis.set_major_formatter(_percent)
        axes.legend(loc="lower left", ncols=3)
        _dates(axes)
        return done()


def shares(dossier: Dossier) -> Picture:
    """The version's share of the traffic over time."""
    points = []
    for made in dossier.policies:
        total = sum(made["weights"].values())
        share = 100 * made["weights"].get(str(dossier.version), 0.0) / total
        points.append((datetime.fromisoformat(made["when"]), share))
    if not any(share for _, share in points):
        return None
    points.append((_time(dossier.now_s), points[-1][1]))
    first = next(index for index, (_, share) in enumerate(points) if share)
    times, percent = zip(*points[max(0, first - 1) :], strict=True)
    with _figure(1.8) as (figure, done):
        axes = figure.add_subplot()
        axes.step(times, percent, where="post", color=BLUE)
        axes.fill_between(times, percent, step="post", color=BLUE, alpha=0.12, linewidth=0)
        axes.set_ylim(0, 105)
        axes.set_ylabel("% of requests")
        _dates(axes)
        return done()


def sections(points: Mapping[str, float]) -> Picture:
    """Points of the scorecard's sections, of seven each."""
    with _figure(1.5) as (figure, done):
        axes = figure.add_subplot()
        names = list(points)[::-1]
        values = [points[name] for name in names]
        worst = min(values)
        colours = [ORANGE if value == worst else BLUE for value in values]
        axes.barh(names, [7] * len(names), color=_PALE, height=0.6)
        axes.barh(names, values, color=colours, height=0.6)
        for place, value in enumerate(values):
            axes.text(7.1, place, f"{value:g}", va="center")
        axes.set_xlim(0, 7.6)
        axes.set_xticks(range(8))
        axes.grid(axis="y", visible=False)
        return done()


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    # Imported here: it makes folders in the user's home.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, lambda: _svg(figure)


def _svg(figure: Any) -> str:
    """Return the drawing without what only a file of its own needs."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = re.sub(r' height="[\d.]+pt"', "", svg[svg.index("<svg") :], count=1)
    return re.sub(r'width="[\d.]+pt"', 'width="100%"', svg, count=1)


def _name_classes(axis: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // _MAX_LABELLED)
    places = range(0, len(names), step)
    labels = [names[place] if len(names[place]) <= 12 else names[place][:11] + "…"
              for place in places]  # fmt: skip
    longest = max(len(label) for label in labels)
    is_turned = axis.axis_name == "x" and longest * len(labels) > 60
    axis.set_ticks(places, labels, **({"rotation": 60, "ha": "right"} if is_turned else {}))


def _varied(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted({name for trial in trials for name in trial["params"]})
    return [name for name in names if len({t["params"].get(name) for t in trials}) > 1]


def _numbers(values: Sequence[str]) -> list[float] | list[str]:
    try:
        return [float(value) for value in values]
    except ValueError:
        return list(values)


def _is_logarithmic(values: Sequence[str]) -> bool:
    numbers = _numbers(values)
    positive = [value for value in numbers if isinstance(value, float) and value > 0]
    return len(positive) == len(numbers) and max(positive) / min(positive) > 8


def _percent(value: float, place: int) -> str:
    return f"{100 * value:.4g} %"


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _dates(axes: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
