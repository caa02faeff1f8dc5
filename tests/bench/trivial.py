"""Trials that do nothing: what is left is the search's own time.

python -m tests.bench.trivial STORAGE MLFLOW_URI NUM_TRIALS   (a driver of its own, for its memory)
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from lib.config import Settings
from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Experiment, Named, Objective, Parameter
from lib.train.search import run_sweep
from lib.train.work import Work
from tests.bench.nothing import NothingTrial, function_trial
from tests.bench.report import BenchError

NUM_TRIALS = 16


def sweep_seconds(settings: Settings, storage: Storage, num_trials: int) -> dict[str, float]:
    """Run a whole sweep, with journal, sampler and MLflow; return its seconds.

    `first_s` is until the first trial has ended: the start of processes, mostly.
    """
    experiment = Experiment(
        name="trivial",
        objectives=(Objective(metric="score", goal=MAXIMIZE),),
        parameters=(Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),),
        algorithm=Named("tpe"),
        num_trials=num_trials,
    )
    work = Work(kind="trivial", spec={}, trainable=NothingTrial, shared=lambda resources: {})
    started = time.perf_counter()
    started_ms = time.time() * 1000
    # Pictures are drawn when a sweep has ended, once, however many trials it has.
    result = run_sweep(settings, storage, experiment, work, draw=False)
    taken_s = time.perf_counter() - started
    if len(result.trials) != num_trials:
        raise BenchError(f"{len(result.trials)} of {num_trials} trivial trials left a result")
    ends_ms = [event["time_ms"] for event in events(storage, result.sweep_run_id)
               if event["event"] == "ended"]  # fmt: skip
    return {
        "seconds": taken_s,
        "first_s": (ends_ms[0] - started_ms) / 1000,
        "last_s": (ends_ms[-1] - started_ms) / 1000,
    }


def events(storage: Storage, sweep_run_id: str) -> list[dict[str, Any]]:
    """Return a sweep's journal."""
    content = storage.read(f"sweeps/{sweep_run_id}/journal.jsonl")
    return [json.loads(line) for line in content.splitlines()]


def function_seconds(folder: Path) -> float:
    """Run 16 function trainables, two at a time, without any record; return the seconds."""
    tuner = tune.Tuner(
        tune.with_resources(function_trial, {"CPU": 1}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(metric="score", mode="max", num_samples=NUM_TRIALS),
        run_config=tune.RunConfig(
            name=f"function-{uuid.uuid4().hex[:8]}", storage_path=str(folder), verbose=0
        ),
    )
    started = time.perf_counter()
    results = tuner.fit()
    taken_s = time.perf_counter() - started
    if len(results) != NUM_TRIALS or results.num_errors:
        raise BenchError(f"{results.num_errors} of {len(results)} trivial trials failed")
    return taken_s


def main(storage_uri: str, mlflow_uri: str, num_trials: str) -> None:
    """Run one sweep on the running Ray; print its seconds and this process's memory meanwhile."""
    everywhere = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}
    ray.init(logging_level="warning", log_to_driver=False, runtime_env=everywhere)
    storage = Storage(storage_uri)
    settings = Settings(storage=storage_uri, mlflow_uri=mlflow_uri, model="trivial")
    samples: list[tuple[int, float]] = []
    over = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not over.wait(1.0):
            journals = list(Path(storage.root).glob("sweeps/*/journal.jsonl"))
            ended = sum(j.read_bytes().count(b'"event": "ended"') for j in journals)
            samples.append((ended, process.memory_info().rss / 2**20))

    watcher = threading.Thread(target=watch)
    watcher.start()
    taken = sweep_seconds(settings, storage, int(num_trials))
    over.set()
    watcher.join()
    print(json.dumps({**taken, "ended_and_mib": samples}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
