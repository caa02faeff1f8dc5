"""A sweep that takes its time and next to no processor, and a driver of it.

python -m tests.cluster.sweep STORAGE MLFLOW_URI FOLDER  (on a node of the cluster)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from lib.config import Settings
from lib.line.layout import PROJECT_ROOT
from lib.storage import Storage
from lib.train.search import run_sweep
from tests.sweeps import TinyTrial, tiny_experiment, tiny_work

EPOCH_S = 5.0
"""Long enough that both workers have begun before one of them could do it all."""


class SlowTrial(TinyTrial):
    """Takes longer for an epoch, so that a node can be lost in the middle of many."""

    def advance(self) -> Mapping[str, Any]:
        time.sleep(EPOCH_S)
        return super().advance()


def main(storage_uri: str, mlflow_uri: str, folder: str) -> None:
    """Run the sweep; every epoch that is worked is written to `epochs.log` in the folder."""
    ray.init(
        logging_level="warning",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}},
    )
    settings = Settings(storage=storage_uri, mlflow_uri=mlflow_uri, model="tiny")
    # The folder is the tests' own: all nodes see it, and what a sweep keeps is in the store alone.
    work = replace(tiny_work(Storage(folder)), trainable=SlowTrial)
    result = run_sweep(settings, Storage(storage_uri), tiny_experiment(), work)
    print(json.dumps({"sweep_run_id": result.sweep_run_id, "num_failed": result.num_failed}))


if __name__ == "__main__":
    # Of the module that trials import too, not of `__main__`.
    from tests.cluster.sweep import main as run

    run(*sys.argv[1:])
