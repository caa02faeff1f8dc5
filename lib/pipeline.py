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
from lib.errors import RefusedError, RegistryError
from lib.provenance import training_code_digest
from lib.registry.models import CHAMPION, check_same, resolve, versions
from lib.registry.registration import register
from lib.registry.server import connect
from lib.registry.trials import ranked_trials
from lib.serving import policy
from lib.serving.bundle import CARD_FILE, read_card
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
    check_model(settings, storage, manifest)
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
        "ignored": [asdict(ignored) for ignored in ingested.ignored],
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


def check_model(settings: Settings, storage: Storage, manifest: Manifest) -> None:
    """Refuse, before the search, a model that its versions could not become versions of.

    Raises:
        RefusedError: The model has other classes or another shape than this data, or what is served
            under its name is not what the registry has under it.
    """
    model, known = settings.model, versions(settings)
    base = policy.current(storage)
    traffic = base.models.get(model) if base else None
    check_same(traffic, known)
    if traffic and not any(version.version in traffic.bundles for version in known):
        raise RefusedError(
            f"version {traffic.champion} of {model} is served ({traffic.bundles[traffic.champion]})"
            f", and the registry at {settings.mlflow_uri} has no version that is: its registered "
            "model was deleted, or MLFLOW_TRACKING_URI is another registry. Train another model "
            "(MODEL=another-name), or bring the registry back "
            "(`python -m jobs.models restore DIR`)"
        )
    champion = next((version.bundle for version in known if CHAMPION in version.aliases), None)
    bundle = traffic.bundles[traffic.champion] if traffic else champion
    if bundle is None or not storage.exists(f"{bundle}/{CARD_FILE}"):
        return
    if difference := read_card(storage, bundle).difference(manifest.class_names, manifest.shape):
        raise RefusedError(
            f"{manifest.source} has {difference}, those of the model {model!r}: it would become a "
            f"version of that model. Give it a name of its own: MODEL={model}-2, or any other"
        )


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
