"""Trials that do nothing, as both kinds of Tune trainable: what is left is Tune's own time."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from ray import tune

from tests.bench.report import BenchError

NUM_TRIALS = 16


class ClassTrial(tune.Trainable):
    """As the line's trials are: one process takes one configuration after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        self._x = config["x"]

    def step(self) -> dict[str, Any]:
        return {"score": self._x, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._x = new_config["x"]
        return True


def function_trial(config: dict[str, Any]) -> None:
    """As Ray Tune's documentation starts: a function, a process for each trial."""
    tune.report({"score": config["x"]})


def seconds(kind: str, folder: Path) -> float:
    """Run 16 trials, two at a time; return the seconds of it all."""
    reuse = kind == "class"
    trainable: Any = ClassTrial if reuse else function_trial
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 1}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", num_samples=NUM_TRIALS, reuse_actors=reuse
        ),
        run_config=tune.RunConfig(
            name=f"{kind}-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder),
            # Functions write no checkpoint unless they report one; neither do the classes here.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False) if reuse else None,
            verbose=0,
        ),
    )
    started = time.perf_counter()
    results = tuner.fit()
    taken_s = time.perf_counter() - started
    if len(results) != NUM_TRIALS or results.num_errors:
        raise BenchError(f"{results.num_errors} of {len(results)} trivial trials failed")
    return taken_s
