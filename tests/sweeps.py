"""A sweep that costs next to nothing, and a driver of it that a test can kill.

python -m tests.sweeps STORAGE MLFLOW_URI RAY_ADDRESS SAMPLER  (`local`: a Ray of its own)

TINY_TRIALS is how many trials it has, RAYLINE_OWNER_LIMITS what its owner may have running.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from lib.config import Settings
from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Experiment, Named, Objective, Parameter
from lib.train.search import run_sweep
from lib.train.trainable import SweepTrial
from lib.train.work import Work

NUM_TRIALS, NUM_EPOCHS, EPOCH_S = 8, 4, 0.15


class TinyTrial(SweepTrial):
    """Climbs to its parameter, a quarter an epoch, and writes down every epoch that it works."""

    def prepare(self, *, log: str) -> None:
        self._log = log

    def begin(self, params: Mapping[str, Any]) -> None:
        self._x, self._epoch = params["x"], 0

    def advance(self) -> Mapping[str, Any]:
        time.sleep(float(os.environ.get("TINY_EPOCH_S", EPOCH_S)))  # The work.
        self._epoch += 1
        with open(self._log, "a") as stream:
            stream.write(json.dumps([self._x, self._epoch, os.getpid()]) + "\n")
        score = self._x * self._epoch / NUM_EPOCHS
        return {
            "score": float("nan") if self._x > 0.999 else score,
            "cost": self._x,
            "done": self._epoch >= NUM_EPOCHS,
        }

    def state(self) -> bytes:
        return str(self._epoch).encode()

    def load(self, state: bytes) -> None:
        self._epoch = int(state)

    def artifacts(self, is_best: bool) -> Mapping[str, bytes]:
        return {"best.txt": str(self._epoch).encode()} if is_best else {}


def tiny_experiment(sampler: str = "random", **changes: Any) -> Experiment:
    step = 0.125 if sampler == "grid" else None
    fields: dict[str, Any] = {
        "name": "tiny",
        "objectives": (Objective(metric="score", goal=MAXIMIZE),),
        "parameters": (Parameter(name="x", kind=DOUBLE, low=0.0, high=0.9, step=step),),
        "algorithm": Named(sampler),
        "num_trials": NUM_TRIALS,
        **changes,
    }
    return Experiment(**fields)


def tiny_work(storage: Storage, *ignored: Any) -> Work:
    log = storage.path("epochs.log")
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    return Work(
        kind="tiny",
        spec={},
        trainable=TinyTrial,
        shared=lambda resources: {"log": log},
        artifacts={"best.txt": "kept/best.txt"},
    )


def main(storage_uri: str, mlflow_uri: str, ray_address: str, sampler: str) -> None:
    """Run one sweep."""
    everywhere = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    if "TINY_EPOCH_S" in os.environ:
        everywhere["env_vars"]["TINY_EPOCH_S"] = os.environ["TINY_EPOCH_S"]
    if ray_address == "local":
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=False,
            runtime_env=everywhere,
            _temp_dir=os.environ["TINY_RAY_DIR"],
        )
    else:
        ray.init(
            address=ray_address,
            logging_level="warning",
            log_to_driver=False,
            runtime_env=everywhere,
        )
    storage = Storage(storage_uri)
    limits = os.environ.get("RAYLINE_OWNER_LIMITS", "")
    settings = Settings(
        storage=storage_uri, mlflow_uri=mlflow_uri, model="tiny", owner_limits=limits
    )
    num_trials = int(os.environ.get("TINY_TRIALS", NUM_TRIALS))
    experiment = tiny_experiment(sampler, num_trials=num_trials)
    result = run_sweep(settings, storage, experiment, tiny_work(storage))
    print(json.dumps({"sweep_run_id": result.sweep_run_id}), flush=True)


if __name__ == "__main__":
    # Of the module that trials import too, not of `__main__`.
    from tests.sweeps import main as run

    run(*sys.argv[1:])
