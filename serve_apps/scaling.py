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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUSY = "busy"
"""Name of the measure: the share of a core that a replica's event loop used, 0 to 1."""


CALLS = "calls"
"""Name of the measure: calls since the last reading. A version without any may go to zero."""
TARGET_BUSY = 0.7


class BusyMeter:
    """Share of a core that a thread used, since the last reading.

    Time in which it waited for a core does not count: where the machine is full, one more replica
    would only make the others wait longer, and every batch smaller.
    """

    def __init__(self) -> None:
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._last = self._now()

    def read(self) -> float:
        """Return the share since the last call, 0 to 1."""
        wall_s, busy_s = self._now()
        last_wall_s, last_busy_s = self._last
        if wall_s - last_wall_s < 0.01:
            return 0.0
        self._last = wall_s, busy_s
        return min(1.0, max(0.0, (busy_s - last_busy_s) / (wall_s - last_wall_s)))

    def _now(self) -> tuple[float, float]:
        try:
            ran_ns = int(self._schedstat.read_text().split()[0])
        except (OSError, ValueError):
            # Not Linux, or a kernel that keeps no such record.
            return time.monotonic(), time.process_time()
        return time.monotonic(), ran_ns / 1e9


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
