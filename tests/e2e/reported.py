"""What jobs would report, reported: one value of every gauge, until standard input ends.

python -m tests.e2e.reported MODEL VERSION
"""

from __future__ import annotations

import sys

from lib.watch import metrics
from lib.watch.gauges import connect


def main() -> None:
    model, version = sys.argv[1:]
    gauges = connect()
    assert gauges is not None
    known = {"model": model, "version": version, "state": "canary", "kind": "inputs"}
    for metric in metrics.GAUGES:
        gauges.set(metric, 1.0, *(known.get(label, label) for label in metric.labels))
    # Two that alerts ask for.
    gauges.set(metrics.LABELLED_ROWS, 500.0, model, version)
    for state in ("paused", "rolled_back"):
        gauges.set(metrics.ROLLOUT_STATE, 0.0, model, version, state)
    gauges.set(metrics.SWEEP_TRIALS, 0.0, "sweep", "failed")
    print("reported", flush=True)
    sys.stdin.read()
    gauges.close()


if __name__ == "__main__":
    main()
