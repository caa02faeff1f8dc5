"""A sweep: parallel trials with Ray Tune, Optuna's TPE sampler and early stopping at rungs."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from lib.cli import progress
from lib.config import Preset, Settings
from lib.data.loader import Split, read_splits
from lib.data.manifest import Manifest
from lib.errors import SearchError
from lib.registry.tracking import SweepRecord, start_sweep
from lib.storage import Storage
from lib.train.report import SweepReport
from lib.train.resources import TrialResources, trial_resources
from lib.train.trial import Trial

METRIC = "val_accuracy"
REDUCTION_FACTOR = 3
"""About one trial of this many goes on after a rung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """A trial that left a model."""

    run_id: str
    val_accuracy: float
    """Of its best epoch, whose checkpoint is on the run."""
    epoch: int
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep found; all of it is in MLflow too."""

    sweep_run_id: str
    trials: tuple[TrialResult, ...]
    """Best validation accuracy first."""
    num_failed: int
    images_per_s: float
    """Images trained on by all trials, per second of the sweep."""
    seconds: float


def run_sweep(
    settings: Settings, storage: Storage, manifest: Manifest, preset: Preset
) -> SweepResult:
    """Search the preset's space on a data set's train split, judged on its validation split.

    Ray must be initialised. Raises SearchError if no trial left a model, and RegistryError if
    MLflow is away or its record of the sweep is incomplete.
    """
    start_s = time.monotonic()
    resources = trial_resources(preset)
    progress("tune", resources.describe())
    record = start_sweep(settings, storage, manifest, preset, _facts(resources))
    ended: list[tune.Result] = []
    metrics: dict[str, float] = {}
    try:
        splits = read_splits(storage, manifest, ("train", "val"))
        rows = ", ".join(f"{len(split.labels_N):,} {name}" for name, split in splits.items())
        progress("tune", f"sweep {record.sweep_run_id}: {preset.num_trials} trials on {rows}")
        ended = _fit(storage, manifest, preset, resources, splits, record)
        metrics = _sweep_metrics(ended, manifest, record, time.monotonic() - start_s)
    finally:
        record.close(metrics, failed=not record.best)
    if not record.best:
        raise SearchError(
            f"none of {len(ended)} trials left a model ({metrics['failed_trials']:.0f} failed, "
            f"the others were cut off by the time budget of {preset.time_budget_s:.0f} s); the "
            f"reasons are on the runs below sweep {record.sweep_run_id} in MLflow"
        )
    record.check()
    return SweepResult(
        sweep_run_id=record.sweep_run_id,
        trials=_ranked(record),
        num_failed=int(metrics["failed_trials"]),
        images_per_s=metrics["images_per_s"],
        seconds=metrics["seconds"],
    )


def search_space(preset: Preset) -> dict[str, BaseDistribution]:
    """Return what a sweep varies."""
    return {
        "stage_width": CategoricalDistribution(preset.widths),
        "depth": CategoricalDistribution(preset.depths),
        "growth": CategoricalDistribution(preset.growths),
        "learning_rate": FloatDistribution(*preset.learning_rates, log=True),
        "weight_decay": FloatDistribution(1e-4, 2e-3, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.15, step=0.05),
        "augmentation": FloatDistribution(*preset.augmentations, step=0.25),
    }


def first_guess(preset: Preset) -> dict[str, Any]:
    """Return the configuration that a sweep tries first unless its preset knows better."""
    return {
        "stage_width": max(preset.widths),
        "depth": min(preset.depths),
        "growth": max(preset.growths),
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "augmentation": 0.5,
    }


def _fit(
    storage: Storage,
    manifest: Manifest,
    preset: Preset,
    resources: TrialResources,
    splits: Mapping[str, Split],
    record: SweepRecord,
) -> list[tune.Result]:
    # The writers of CSV, JSON and TensorBoard files would slow every report; MLflow has it all.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Progress and failures are reported in one line each, by SweepReport.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of its own in every sweep: a second experiment of one name overwrites the first one's state.
    name = f"{preset.name}-{uuid.uuid4().hex[:12]}"
    trainable = tune.with_parameters(
        Trial,
        manifest=manifest,
        splits=dict(splits),
        rungs=preset.rungs,
        reduction_factor=REDUCTION_FACTOR,
        num_threads=resources.num_threads,
        train_seed=preset.seed,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources.request()),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            search_alg=ConcurrencyLimiter(_searcher(preset), resources.num_parallel),
            scheduler=_scheduler(preset),
            num_samples=preset.num_trials,
            time_budget_s=preset.time_budget_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage.path("tune"),
            storage_filesystem=storage.filesystem,
            callbacks=[SweepReport(record, preset.num_trials, preset.rungs[-1])],
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_frequency=1, checkpoint_at_end=False
            ),
            verbose=0,
        ),
    )
    results = tuner.fit()
    ended = [results[index] for index in range(len(results))]
    # The models are on the runs in MLflow; what is left is Tune's own state.
    storage.filesystem.delete_dir(storage.path(f"tune/{name}"))
    return ended


def _searcher(preset: Preset) -> OptunaSearch:
    return OptunaSearch(
        search_space(preset),
        metric=METRIC,
        mode="max",
        points_to_evaluate=[
            {**first_guess(preset), **guess} for guess in preset.first_guesses or ({},)
        ],
        sampler=TPESampler(seed=preset.seed, n_startup_trials=max(3, preset.num_trials // 4)),
    )


def _scheduler(preset: Preset) -> ASHAScheduler:
    # ASHA counts in powers of its factor; trials report such a count instead of epochs, so that
    # they are compared at the preset's rungs, whatever these are, and nowhere else.
    return ASHAScheduler(
        time_attr="rung_count",
        grace_period=1,
        reduction_factor=REDUCTION_FACTOR,
        max_t=REDUCTION_FACTOR ** (len(preset.rungs) - 1),
    )


def _sweep_metrics(
    ended: list[tune.Result], manifest: Manifest, record: SweepRecord, seconds: float
) -> dict[str, float]:
    epochs = sum((result.metrics or {}).get("epoch", 0) for result in ended)
    metrics = {
        "trials": float(len(ended)),
        "failed_trials": float(sum(result.error is not None for result in ended)),
        "images_per_s": epochs * manifest.rows("train") / seconds,
        "seconds": seconds,
    }
    if record.best:
        metrics[METRIC] = max(accuracy for accuracy, _ in record.best.values())
    return metrics


def _ranked(record: SweepRecord) -> tuple[TrialResult, ...]:
    found = [
        TrialResult(
            run_id=record.run_ids[trial],
            val_accuracy=accuracy,
            epoch=epoch,
            params=record.params[trial],
        )
        for trial, (accuracy, epoch) in record.best.items()
    ]
    return tuple(sorted(found, key=lambda trial: (-trial.val_accuracy, trial.run_id)))


def _facts(resources: TrialResources) -> dict[str, Any]:
    return {
        "sampler": "optuna TPE",
        "scheduler": f"ASHA, factor {REDUCTION_FACTOR}",
        "cpus_per_trial": resources.cpus,
        "gpus_per_trial": resources.gpus,
        "parallel_trials": resources.num_parallel,
    }
