"""A sweep whose storage is an S3 store that fails requests now and then."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from lib.config import PRESETS, Settings
from lib.storage import Storage
from lib.train.experiment import Named
from lib.train.presets import preset_experiment
from lib.train.search import run_sweep
from lib.train.work import image_work
from tests.made_set import made_set
from tests.object_store import SLOW_DOWN, TIMEOUT, ObjectStore, object_store

pytestmark = pytest.mark.long

PRESET = replace(PRESETS["smoke"], num_trials=4, rungs=(1, 3), time_budget_s=300)


def result_of_sweep(store: ObjectStore, mlflow_uri: str, name: str) -> dict[str, Any]:
    """Return what each trial of a sweep came to, by its parameters."""
    endpoint = store.url.removeprefix("http://")
    # All in the URI: processes of Ray have an environment of their own.
    uri = f"s3://key:secret@bucket/{name}?region=us-east-1&scheme=http&endpoint_override={endpoint}"
    storage = Storage(uri)
    settings = Settings(storage=f"s3://bucket/{name}", mlflow_uri=mlflow_uri, model=name)
    experiment = replace(
        # Neither what is tried next nor when it ends may depend on which trial was faster.
        preset_experiment(PRESET),
        algorithm=Named("random"),
        early_stopping=None,
    )
    work = image_work(storage, made_set(storage), PRESET, experiment)
    result = run_sweep(settings, storage, experiment, work)
    assert result.num_failed == 0
    return {
        str(sorted(trial.params.items())): (
            trial.epoch,
            *(trial.metrics[name] for name in ("val_accuracy", "val_loss", "train_loss")),
        )
        for trial in result.trials
    }


def test_a_sweep_on_a_store_that_fails_requests_has_the_same_results(
    local_ray: None, mlflow_server: str
) -> None:
    with object_store("bucket") as store:
        undisturbed = result_of_sweep(store, mlflow_server, "undisturbed")
        draws, faults = random.Random(9), []

        def fault(request: str) -> str | None:
            draw = draws.random()
            found = SLOW_DOWN if draw < 0.02 else TIMEOUT if draw < 0.03 else None
            faults.append(found)
            return found

        store.fault = fault
        disturbed = result_of_sweep(store, mlflow_server, "disturbed")
    assert len(disturbed) == PRESET.num_trials
    assert disturbed == undisturbed
    assert faults.count(SLOW_DOWN) >= 2
    assert faults.count(TIMEOUT) >= 1
