"""Preset `full` on MNIST, a seed a round: what half an hour on two cores reaches on test.

python -m tests.bench full --rounds 3

Every seed is a sweep of its own. Its best trial, and the best of those below 10,000 parameters,
are chosen by accuracy on validation; then each answers the test images, once.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from lib.config import Settings, preset
from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import Manifest
from lib.registry.trials import CHECKPOINT_PATH
from lib.storage import Storage
from lib.train.presets import preset_experiment
from lib.train.result import SweepResult, TrialResult
from lib.train.search import run_sweep
from lib.train.trial import confusion, examples
from lib.train.work import image_work
from tests.bench.parts import MLFLOW_PORT, local_ray, make_line, running
from tests.bench.report import BenchError, Options, Report, Table, say

SMALL = 10_000
"""Parameters below which the small end of the Pareto front begins."""
_CHOICES = {"best": "best on validation", "small": f"best below {SMALL:,} parameters"}


def run(options: Options) -> Report:
    seeds = []
    line = make_line(options.temp / "mlflow", MLFLOW_PORT)
    with running(line, "mlflow"), local_ray(options.temp / "ray-f"):
        storage = Storage(str(options.temp / "full"))
        settings = Settings(storage=storage.uri, mlflow_uri=line.tracking_uri, model="bench")
        manifest = ingest(storage, "mnist")
        for seed in range(options.rounds):
            seeds.append(_seed(settings, storage, manifest, seed))
    return _report(seeds)


def _seed(settings: Settings, storage: Storage, manifest: Manifest, seed: int) -> dict[str, Any]:
    """Search with a seed; return both choices with their test accuracy."""
    chosen = replace(preset("full"), seed=seed)
    experiment = preset_experiment(chosen)
    sweep = run_sweep(
        settings, storage, experiment, image_work(storage, manifest, chosen, experiment)
    )
    found = {
        "seconds": sweep.seconds,
        "trials": len(sweep.trials),
        "images_per_s": sweep.images_per_s,
        **{name: _tested(settings, storage, manifest, trial) for name, trial in _chosen(sweep)},
    }
    for name, title in _CHOICES.items():
        one = found[name]
        say(f"full: seed {seed}, {sweep.seconds:.0f} s, {title}: {one['params']}, epoch "
            f"{one['epoch']}, {one['num_parameters']:,} parameters, "
            f"validation {one['val_accuracy']:.2%}, test {one['test_accuracy']:.2%}")  # fmt: skip
    return found


def _chosen(sweep: SweepResult) -> list[tuple[str, TrialResult]]:
    """Return the two trials, by validation alone; the best one is first among all."""
    small = [trial for trial in sweep.trials if trial.metrics["num_parameters"] < SMALL]
    if not small:
        raise BenchError(f"no trial had fewer than {SMALL:,} parameters")
    return [("best", sweep.trials[0]), ("small", small[0])]


def _tested(
    settings: Settings, storage: Storage, manifest: Manifest, trial: TrialResult
) -> Mapping[str, Any]:
    client = MlflowClient(settings.mlflow_uri)
    model = Path(client.download_artifacts(trial.run_id, CHECKPOINT_PATH)).read_bytes()
    test = read_splits(storage, manifest, ("test",))["test"]
    counts = np.array(confusion(model, examples(test)))
    return {
        "params": dict(trial.params),
        "epoch": trial.epoch,
        "num_parameters": int(trial.metrics["num_parameters"]),
        "val_accuracy": trial.metrics["val_accuracy"],
        "test_accuracy": float(np.trace(counts) / counts.sum()),
    }


def _report(seeds: list[dict[str, Any]]) -> Report:
    rows = []
    for name, title in _CHOICES.items():
        accuracies = [seed[name]["test_accuracy"] for seed in seeds]
        rows.append(
            (
                title,
                f"{statistics.mean(accuracies):.2%}",
                ", ".join(f"{accuracy:.2%}" for accuracy in accuracies),
                ", ".join(f"{seed[name]['val_accuracy']:.2%}" for seed in seeds),
                ", ".join(f"{seed[name]['num_parameters']:,}" for seed in seeds),
            )
        )
    minutes = ", ".join(f"{seed['seconds'] / 60:.1f}" for seed in seeds)
    return Report(
        title="Preset full on MNIST",
        tables=[
            Table(
                title=f"Accuracy by seed (n = {len(seeds)})",
                columns=("chosen", "test: mean", "test", "validation", "parameters"),
                rows=rows,
            )
        ],
        notes=[
            f"Minutes of each sweep: {minutes}. Chosen by validation alone; the test images are "
            "looked at once for each choice, after it.",
        ],
        data={"seeds": seeds},
    )
