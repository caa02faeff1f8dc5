"""Cuts the log into windows that never share a request, and tests each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lib.watch import drift
from lib.watch.memory import Memory
from lib.watch.populations import Reference
from lib.watch.rows import DRIFT_COLUMNS, drift_rows, drift_window
from lib.watch.sequence import BLOCK

Read = Callable[[int, int, Sequence[str]], pa.Table]
"""From, to (microseconds) and columns → rows of the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """How large windows are."""

    rows: int = 250
    """Drift that begins in the middle of a window fills the next: it shows within twice as many."""
    most_windows: int = 8
    """In one look; of more rows evenly spaced ones are tested."""
    max_age_s: float = 900.0
    """Rows that are older are tested as a smaller window."""
    min_rows: int = 50

    def __post_init__(self) -> None:
        """Refuse windows that could not be tested."""
        if not 2 <= self.min_rows <= self.rows or self.most_windows < 1:
            raise ValueError(f"rows, min_rows and most_windows must be positive: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """What became of the rows since the last look."""

    windows: list[dict[str, Any]]
    block: dict[str, Any] | None
    """The newest block of windows that was completed, tested as one."""
    memory: Memory


def judge_windows(
    memory: Memory, reference: Reference, read: Read, cutting: Cutting, *, end_us: int
) -> Tested:
    """Test every window that is full; the rows that are left wait for the next look."""
    rows = drift_rows(read(memory.cursor_us + 1, end_us, DRIFT_COLUMNS))
    done: list[dict[str, Any]] = []
    block = None
    for part in _cut(rows, cutting, end_us):
        times = part.column("time_us")
        result = _score(reference, part)
        evidence = memory.evidence.after_window(result.p_value, alarm=result.alarm)
        first_us, last_us = times[0].as_py(), times[-1].as_py()
        done.append({"start": first_us / 1e6, "end": last_us / 1e6, **result.to_json()})
        memory = replace(memory, cursor_us=last_us, evidence=evidence)
        if evidence.ends_block:
            whole = drift_rows(read(memory.block_from_us + 1, last_us + 1, DRIFT_COLUMNS))
            result = _score(reference, _thinned(whole, BLOCK * cutting.rows))
            block = {
                "start": memory.block_from_us / 1e6,
                "end": last_us / 1e6,
                **result.to_json(),
            }
            memory = replace(
                memory, block_from_us=last_us, evidence=evidence.after_block(result.p_value)
            )
    if done:
        memory = replace(memory, number=memory.number + 1)
    return Tested(windows=done, block=block, memory=memory)


def _score(reference: Reference, rows: pa.Table) -> drift.DriftResult:
    return drift.score(reference, drift_window(rows, len(reference.feature_names)))


def _cut(rows: pa.Table, cutting: Cutting, end_us: int) -> Iterator[pa.Table]:
    rows = _thinned(rows, cutting.most_windows * cutting.rows)
    whole = rows.num_rows - rows.num_rows % cutting.rows
    for start in range(0, whole, cutting.rows):
        yield rows.slice(start, cutting.rows)
    left = rows.slice(whole)
    if left.num_rows >= cutting.min_rows:
        age_us = end_us - left.column("time_us")[0].as_py()
        if age_us >= cutting.max_age_s * 1e6:
            yield left


def _thinned(rows: pa.Table, most: int) -> pa.Table:
    if rows.num_rows <= most:
        return rows
    return rows.take(np.linspace(0, rows.num_rows - 1, most).astype(np.int64))
