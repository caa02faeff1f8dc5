"""The whole line as one job: ingest → tune → register → deploy, and nothing done twice.

Ingest, register and deploy find by themselves what is there already. A sweep is the costly step,
so its outcome is kept under the storage root, named by the digest of what it depends on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lib.cli import progress
from lib.config import Preset, Settings
from lib.data.ingest import IngestConfig, ingest_source
from lib.data.manifest import Manifest
from lib.errors import RegistryError
from lib.provenance import training_code_digest
from lib.registry.models import resolve
from lib.registry.registration import register
from lib.registry.server import connect
from lib.registry.trials import ranked_trials
from lib.serving.deploy import deploy
from lib.serving.reach import check_host
from lib.steps import Step, run_step
from lib.storage import Storage
from lib.train.presets import preset_experiment
from lib.train.same_sweep import resume_same_sweep
from lib.train.search import run_sweep
from lib.train.work import image_work


def run_pipeline(
    settings: Settings,
    storage: Storage,
    source: str,
    preset: Preset,
    *,
    who: str,
    serve: bool = True,
) -> dict[str, Any]:
    """Bring a served model up from a source; return what each step did.

    Without `serve` the last step is left out: nothing that is served changes.

    Ray must be initialised. Raises what the steps raise: each message says what to do.
    """
    start = time.monotonic()
    if serve:
        check_host(settings)
    ingested = ingest_source(storage, source, IngestConfig())
    manifest = ingested.manifest
    progress("pipeline", f"data set {manifest.digest[:12]} ({ingested.seconds:.1f} s)")
    sweep = tune_once(settings, storage, manifest, preset)
    sweep_run_id = str(sweep.result["sweep_run_id"])
    mark = time.monotonic()
    registered = register(settings, storage, manifest, sweep_run_id)
    register_s = time.monotonic() - mark
    weights: Mapping[str, float] = {}
    if serve:
        why = f"pipeline: {preset.name} sweep {sweep_run_id}"
        weights = deploy(settings, storage, who=who, why=why)["weights"]
    deploy_s = time.monotonic() - mark - register_s
    champion = resolve(settings, settings.model, "champion")
    return {
        "model": settings.model,
        "data_digest": manifest.digest,
        "data_reused": ingested.reused,
        "num_images": sum(sum(counts) for counts in manifest.counts.values()),
        "sweep_run_id": sweep_run_id,
        "sweep_reused": sweep.reused,
        "num_trials": sweep.result["num_trials"],
        "registered": [version.version for version in registered],
        "champion": champion.version,
        "test_accuracy": champion.test_accuracy,
        "val_accuracy": champion.val_accuracy,
        "weights": weights,
        "seconds": {
            "ingest": round(ingested.seconds, 1),
            "tune": round(sweep.seconds, 1),
            "register": round(register_s, 1),
            "deploy": round(deploy_s, 1),
            "total": round(time.monotonic() - start, 1),
        },
    }


def tune_once(settings: Settings, storage: Storage, manifest: Manifest, preset: Preset) -> Step:
    """Return the sweep over this data with this preset and code; run it if MLflow has none."""

    def search() -> Mapping[str, Any]:
        experiment = preset_experiment(preset)
        work = image_work(storage, manifest, preset, experiment)
        found = resume_same_sweep(settings, storage, experiment, work)
        if found is None:
            found = run_sweep(settings, storage, experiment, work)
        return {"sweep_run_id": found.sweep_run_id, "num_trials": len(found.trials)}

    def is_true(result: Mapping[str, Any]) -> bool:
        try:
            ranked_trials(connect(settings), str(result["sweep_run_id"]), manifest.digest)
        except RegistryError as error:
            progress("tune", f"the sweep of an earlier run is of no use: {error}")
            return False
        return True

    inputs = {
        "data_digest": manifest.digest,
        "preset": asdict(preset),
        "code": training_code_digest(),
    }
    return run_step(storage, "tune", inputs, search, is_true)
