"""Autoscaling by how busy replicas are, measured where the work is done.

Serve would count the requests in flight, but it does not see those of the fast lane, and a number
in flight says little where requests are batched: 128 keep-alive clients of an idle gateway are
not load, a few large pictures are. Serve sends the policy to its controller by value, so this
module imports nothing of the project.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUSY = "busy"
"""Name of the measure: the cores that a replica used, or the share of its time in which it could
take no further call; 0 to the number of its threads."""
CALLS = "calls"
"""Name of the measure: calls since the last reading. A version without any may go to zero."""
TARGET_BUSY = 0.7


class BusyMeter:
    """How busy a replica's threads were since the last reading.

    Time in which a thread waited for a core does not count: where the machine is full, one more
    replica would only make the others wait longer, and every batch smaller.
    """

    def __init__(self) -> None:
        self._threads: dict[int, tuple[float, float]] = {}
        self._wall_s = time.monotonic()
        self._taken_s = 0.0
        self.add_thread()

    def add_thread(self) -> None:
        """Measure the calling thread too."""
        self._threads[threading.get_native_id()] = _used(threading.get_native_id())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count the time within as busy, also where it uses no core, such as a GPU's answer."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._taken_s += time.monotonic() - start_s

    def read(self) -> float:
        """Return the measure since the last call."""
        wall_s = time.monotonic()
        if wall_s - self._wall_s < 0.01:
            return 0.0
        busy_s = waited_s = 0.0
        for thread, (ran_before_s, waited_before_s) in list(self._threads.items()):
            ran_s, now_waited_s = self._threads[thread] = _used(thread)
            busy_s += max(0.0, ran_s - ran_before_s)
            waited_s += max(0.0, now_waited_s - waited_before_s)
        busy_s = max(busy_s, self._taken_s - waited_s)
        result = min(float(len(self._threads)), busy_s / (wall_s - self._wall_s))
        self._wall_s, self._taken_s = wall_s, 0.0
        return result


def _used(thread: int) -> tuple[float, float]:
    """Return the seconds for which a thread ran and for which it waited for a core."""
    try:
        ran_ns, waited_ns, *_ = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
    except (OSError, ValueError):
        # It has ended, or this is no Linux, or a kernel that keeps no such record.
        return time.process_time() if thread == threading.get_native_id() else 0.0, 0.0
    return int(ran_ns) / 1e9, int(waited_ns) / 1e9


def by_busyness(contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
    """Return for every deployment as many replicas as would be busy TARGET_BUSY of the time.

    Serve applies delays and bounds to this, and brings a deployment back from zero by itself.

    Args:
        contexts: Serve's AutoscalingContext by deployment of one application.

    Returns:
        Replicas by deployment, and no state.
    """
    return {deployment: _wanted(context) for deployment, context in contexts.items()}, {}


def _wanted(context: Any) -> int:
    metrics = context.aggregated_metrics or {}
    busy = metrics.get(BUSY) or {}
    if not busy:
        return int(context.target_num_replicas)
    # A little less than a replica's worth of work is no reason for one more.
    wanted = math.ceil(sum(busy.values()) / TARGET_BUSY - 0.1)
    is_used = context.total_num_requests > 0 or any((metrics.get(CALLS) or {}).values())
    return max(wanted, 1 if is_used else 0)
