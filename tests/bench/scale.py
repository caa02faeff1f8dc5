"""Scale: what grows with trials, versions, replicas and rows; without Ray, in one process.

python -m tests.bench scale

Every cost is measured at three sizes, each ten times the one before. Of what grows of it, a
constant part taken off, the exponent is told: 1 grows as what it depends on, 2 with its square.
Where the cost would pass what can be borne follows from the last two sizes; what seems to grow
less than linearly is taken to grow linearly there, so it passes it no earlier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import scale_search, scale_serving, scale_watch
from tests.bench.report import Options, Report, Table, say
from tests.bench.scale_cost import Cost

_PARTS: tuple[tuple[str, Callable[[Path], list[Cost]]], ...] = (
    ("search", scale_search.costs),
    ("serving", scale_serving.costs),
    ("log and registry", scale_watch.costs),
)
_NOISE = 0.3
"""What a cost may differ by between two sizes without having grown."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A cost, how it grows, and where it breaks."""

    cost: Cost
    exponent: float
    breaks_at: float
    """Size at which the cost passes its bound."""


def growth(cost: Cost) -> Growth:
    """Work out how a cost grows: as a + b · size ** exponent."""
    first, second, last = cost.values
    sizes = cost.sizes
    if last - second < _NOISE * second:
        return Growth(cost, 0.0, math.inf)
    ratio = math.log(sizes[2] / sizes[1])
    if second - first < _NOISE * first:
        # What grows shows at the last size alone.
        exponent = max(1.0, math.log(last / second) / ratio)
    else:
        exponent = math.log((last - second) / (second - first)) / ratio
    power = max(1.0, exponent)
    factor = (last - second) / (sizes[2] ** power - sizes[1] ** power)
    constant = last - factor * sizes[2] ** power
    if cost.bound <= last:
        return Growth(cost, exponent, _between(cost))
    return Growth(cost, exponent, ((cost.bound - constant) / factor) ** (1 / power))


def _between(cost: Cost) -> float:
    """Return the size at which a cost came to its bound, of those that were measured."""
    pairs = list(zip(cost.sizes, cost.values, strict=True))
    for (size, value), (next_size, next_value) in itertools.pairwise(pairs):
        if value < cost.bound <= next_value:
            part = math.log(cost.bound / value) / math.log(next_value / value)
            return size * (next_size / size) ** part
    return float(cost.sizes[0])


def run(options: Options) -> Report:
    tables, data = [], {}
    for name, measure in _PARTS:
        say(f"scale: {name}")
        folder = options.temp / f"scale-{name.replace(' ', '-')}"
        folder.mkdir()
        grown = [growth(cost) for cost in measure(folder)]
        tables.append(_table(name, grown))
        data[name] = [_row_data(one) for one in grown]
    then = [
        f"{one['what']}: {one['then']}" for rows in data.values() for one in rows if one["then"]
    ]
    return Report(
        title="Scale",
        tables=tables,
        notes=[
            "Fake trials, versions, replicas and rows; storage is a local disk. Tune, Serve and "
            "MLflow have costs of their own: `search` and `serving` measure with them.",
            *then,
        ],
        data=data,
    )


def _table(name: str, grown: Sequence[Growth]) -> Table:
    return Table(
        title=f"What grows: {name}",
        columns=("", "with", "sizes", "cost", "exponent", "bound", "passes it at"),
        rows=[
            (
                one.cost.what,
                one.cost.by,
                " / ".join(_short(size) for size in one.cost.sizes),
                f"{' / '.join(_short(value) for value in one.cost.values)} {one.cost.unit}",
                f"{one.exponent:.1f}",
                f"{_short(one.cost.bound)} {one.cost.unit}",
                "never" if math.isinf(one.breaks_at) else _short(one.breaks_at),
            )
            for one in grown
        ],
    )


def _row_data(one: Growth) -> dict[str, object]:
    cost = one.cost
    return {
        "what": cost.what,
        "by": cost.by,
        "unit": cost.unit,
        "sizes": list(cost.sizes),
        "values": list(cost.values),
        "exponent": one.exponent,
        "bound": cost.bound,
        "breaks_at": None if math.isinf(one.breaks_at) else one.breaks_at,
        "then": cost.then,
    }


def _short(value: float) -> str:
    """Return a number with two figures, as people read it."""
    if value >= 1e15:
        return f"{value:.0e}"
    if value >= 10:
        digits = 1 - math.floor(math.log10(value))
        return f"{round(value, digits):,.0f}"
    return f"{value:.2g}"
