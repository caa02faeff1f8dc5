"""From rows of the prediction log to what the gates judge. Pure: a table in, arrays out.

The log has a row for each image, and all rows of a request have its one status and its one latency.
So errors and latency are judged by requests: as 32 answers, a failed batch of 32 would stop a
version that fails as seldom as the other one. What a version knows is judged by images, as if those
of one request were independent: callers whose batches hold near copies of one image see it decided
with less evidence than the gates ask for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.watch.betting import Blocks, Bools, Floats, Ints, blocks
from lib.watch.gates import NOTHING, Evidence, Limits, Paired

Array = npt.NDArray[Any]
COLUMNS = (
    "time_us",
    "request_id",
    "index",
    "version",
    "shadow",
    "latency_ms",
    "predicted",
    "probabilities",
    "status",
)
"""Of `lib.watch.predictions.joined`, which adds `label`."""
P99_ROWS = 1000
"""Newest answers of the champion that its p99 is taken from."""
_P99_EVERY = 250
_P99_MIN_ROWS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Which rows count."""

    candidate: int
    champion: int
    started_us: int
    """Of this stage."""
    is_shadow: bool
    """Whether the candidate answers no caller yet."""
    has_champion: bool = True
    """Whether the champion still answers callers."""


def gather(table: pa.Table, stage: Stage, limits: Limits) -> Evidence:
    """Return the evidence in a table sorted by `time_us`, which begins with the rollout."""
    versions = pa.array([stage.candidate, stage.champion], pa.int32())
    of_interest = pc.is_in(table["version"], value_set=versions)
    # 4xx is the caller's doing.
    is_callers = pc.and_(pc.greater_equal(table["status"], 400), pc.less(table["status"], 500))
    table = table.filter(pc.and_(of_interest, pc.invert(is_callers)))
    accuracy, disagreement, confidence = pairs(table, stage)
    answers = table.filter(pc.equal(table["index"], 0))
    is_candidate = _array(answers["version"]) == stage.candidate
    is_shadow, in_stage = _array(answers["shadow"]), _array(answers["time_us"]) >= stage.started_us
    counted = in_stage & is_candidate & (is_shadow == stage.is_shadow)
    failed = _array(answers["predicted"]) < 0
    latency, p99s = _latency(answers, stage, limits, is_candidate, is_shadow, in_stage)
    times = _array(answers["time_us"])[counted]
    return Evidence(
        requests=int(counted.sum()),
        champion_requests=int((in_stage & ~is_candidate).sum()),
        errors=blocks(is_candidate[in_stage], failed[in_stage]),
        latency=latency,
        candidate_p99_ms=p99s[0],
        champion_p99_ms=p99s[1],
        accuracy=accuracy,
        disagreement=disagreement,
        confidence=confidence,
        newest_us=int(times[-1]) if len(times) else None,
    )


def pairs(table: pa.Table, stage: Stage) -> tuple[Paired, Paired, Paired]:
    """Return accuracy, disagreement and confidence on images that both versions answered.

    One of them as a shadow of the other. What carries a request id that was used twice is left out.
    """
    worked = table.filter(pc.greater_equal(table["predicted"], 0))
    mine = _once(worked.filter(pc.equal(worked["version"], stage.candidate)))
    theirs = _once(worked.filter(pc.equal(worked["version"], stage.champion)))
    found = pc.index_in(mine["key"], value_set=theirs["key"].combine_chunks())
    mine = mine.filter(pc.is_valid(found))
    theirs = theirs.take(pc.drop_null(found))
    if not mine.num_rows:
        return NOTHING, NOTHING, NOTHING
    one, other = _array(mine["predicted"]), _array(theirs["predicted"])
    label = pc.fill_null(pc.coalesce(mine["label"], theirs["label"]), -1).to_numpy()
    known = label >= 0
    return (
        _paired((one == label)[known], (other == label)[known], is_good=True),
        _paired(one != other, np.zeros(len(one)), is_good=False),
        _paired(_confidence(mine), _confidence(theirs), is_good=True),
    )


def _paired(candidate: Array, champion: Array, *, is_good: bool) -> Paired:
    if not len(candidate):
        return NOTHING
    one, other = candidate.astype(np.float64), champion.astype(np.float64)
    harm = other - one if is_good else one - other
    return Paired(harm=harm, candidate=float(one.mean()), champion=float(other.mean()))


def _once(rows: pa.Table) -> pa.Table:
    """Return the rows with a column `key`, without those whose key is there twice."""
    index = pc.cast(rows["index"], pa.string())
    key = pc.binary_join_element_wise(rows["request_id"], index, "/").combine_chunks()
    counted = pc.value_counts(key)
    single = counted.field("values").filter(pc.equal(counted.field("counts"), 1))
    rows = rows.append_column("key", key)
    return rows.filter(pc.is_in(rows["key"], value_set=single))


def _confidence(rows: pa.Table) -> Floats:
    lists = rows["probabilities"]
    values = pc.list_flatten(lists).to_numpy().astype(np.float64)
    return np.asarray(values.reshape(rows.num_rows, -1).max(axis=1))


def _latency(
    answers: pa.Table,
    stage: Stage,
    limits: Limits,
    is_candidate: Bools,
    is_shadow: Bools,
    in_stage: Bools,
) -> tuple[Blocks | None, tuple[float | None, float | None]]:
    """Compare each answer with the champion's p99 of the answers just before it.

    A threshold from the same answers that it is applied to would make the test dishonest.
    """
    if stage.is_shadow or not stage.has_champion:
        # A shadow's time is that of its call alone.
        return None, (None, None)
    live = ~is_shadow
    latency_ms = _array(answers["latency_ms"])[live].astype(np.float64)
    is_candidate, in_stage = is_candidate[live], in_stage[live]
    before: Ints = np.cumsum(~is_candidate) - ~is_candidate
    epoch = before // _P99_EVERY
    limit_ms = _limits_ms(latency_ms[~is_candidate], int(epoch.max(initial=0)), limits)[epoch]
    used = in_stage & np.isfinite(limit_ms)
    p99s = tuple(
        float(np.percentile(chosen, 99)) if len(chosen) else None
        for chosen in (latency_ms[in_stage & is_candidate], latency_ms[in_stage & ~is_candidate])
    )
    return blocks(is_candidate[used], latency_ms[used] > limit_ms[used]), (p99s[0], p99s[1])


def _limits_ms(champion_ms: Floats, last: int, limits: Limits) -> Floats:
    """Return what is too slow, for each `_P99_EVERY` answers of the champion."""
    found = np.full(last + 1, np.inf)
    for epoch in range(last + 1):
        end = epoch * _P99_EVERY
        newest = champion_ms[max(0, end - P99_ROWS) : end]
        if len(newest) >= _P99_MIN_ROWS:
            p99_ms = float(np.percentile(newest, 99))
            found[epoch] = max(p99_ms * limits.latency_factor, p99_ms + limits.latency_floor_ms)
    return found


def _array(column: pa.ChunkedArray) -> Array:
    return np.asarray(column.to_numpy())
