"""A cost at several sizes, and how it is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MS, US = 1e3, 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What something costs at three sizes of what it depends on."""

    what: str
    by: str
    """What it depends on."""
    unit: str
    sizes: Sequence[int]
    values: Sequence[float]
    bound: float
    """What can be borne of it, in its unit."""
    then: str = ""
    """What to do where it passes that."""


def seconds(work: Callable[[], object], *, repeat: int = 1, rounds: int = 3) -> float:
    """Return the seconds of one call: of some rounds of `repeat` calls the one least disturbed."""
    taken = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for _ in range(repeat):
            work()
        taken.append((time.perf_counter() - start_s) / repeat)
    return min(taken)
