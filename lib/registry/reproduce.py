"""Trains a registered version again from what was recorded of it, and compares the results.

Compared are the weights with those of the recorded checkpoint, and the labels of the retrained net
with those of the file that serves. MLflow has no login, so no code comes from there alone: commits
must be in the clone, and uncommitted changes must have the digest that is kept under the storage
root, or be trusted explicitly. The process that trains gets no secrets but those of the storage.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.entities import Run

from lib.cli import progress
from lib.config import Settings
from lib.data.assemble import content_digest
from lib.data.direct import check_data, read_split
from lib.data.manifest import Manifest, load_manifest
from lib.data.stream import Batch, EpochStream, fits_in_memory
from lib.errors import DataError, RefusedError, RegistryError
from lib.rebuild import THIS_CODE, THIS_ENV, checked_out, ensure_venv, installed
from lib.registry.evaluate import EVALUATION_BATCH
from lib.registry.export import export, load_served
from lib.registry.inspection import PACKAGE_TAG
from lib.registry.models import PT2_PATH, Version, download_model, ensure_bundle
from lib.registry.server import connect, download, explained, pages
from lib.registry.sweep_runs import code_path
from lib.registry.trials import CHECKPOINT_PATH, best_metrics
from lib.registry.verdict import Noise, Reproduced, Served, compare, judge
from lib.secrets import bare_environment
from lib.serving.bundle import ONNX_FILE, PT2_FILE, check_model_file, file_sha256
from lib.serving.predictor import OnnxPredictor
from lib.storage import Storage
from lib.train.environment import PACKAGES, describe, differences

DIFF_PATH = "provenance/uncommitted.patch"
"""On a sweep's run: what differed from its commit."""
_RETRAIN = "lib/train/retrain.py"
_RETRAINED = "retrained.pt"
_NO_SECRETS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)
"""Variables that decide devices and bits."""
_PAGE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What may stand for the recorded state of things."""

    this_code: bool = False
    """Train with the code of this checkout."""
    this_env: bool = False
    """Go on although packages or devices differ that decide the result."""
    rebuild_env: bool = False
    """Install the recorded packages into a venv of their own."""
    trust_diff: bool = False
    """Run uncommitted changes from MLflow of which no digest is kept elsewhere."""


def reproduce(
    settings: Settings, storage: Storage, version: Version, *, root: Path, how: How
) -> Reproduced:
    """Rebuild code, data and environment of a version, train it again, compare the results.

    `root` is the project's checkout, which has the recorded commit.

    Raises:
        RefusedError: Something that decides the result is not on record, or not to be had.
        DataError: The data set is not the recorded one any more.
        FilesError, StorageError: A file of the version is not the one that was registered.
    """
    start_s = time.monotonic()
    if version.is_external:
        raise RefusedError(
            f"version {version.version} was not trained here: it came from {version.origin_uri} "
            f"({version.framework}); ask {version.owner or 'its owner'} to train it again"
        )
    with explained(settings, f"reading the record of version {version.version}"):
        run = connect(settings).get_run(version.run_id)
    with tempfile.TemporaryDirectory(prefix="rayline-reproduce-") as place:
        folder = Path(place)
        uri = f"{run.info.artifact_uri}/{CHECKPOINT_PATH}"
        checkpoint = download(settings, uri, folder)
        recorded = _load(checkpoint, version)
        manifest = _check_data(storage, version)
        onnx_file = _served_file(settings, storage, version, folder)
        _check_loads(checkpoint, manifest, version)
        with _code(settings, storage, version, run, root, folder, how) as (tree, code):
            progress("reproduce", f"code: {code}")
            python, packages = _environment(recorded["environment"], run, tree, how)
            config = _config(recorded, storage, manifest)
            retrained = _retrain(python, tree, config, folder, storage)
        served = _compare_served(storage, manifest, onnx_file, folder, version)
    weights = compare(recorded["model"], retrained["model"])
    accuracy = best_metrics(run)["val_accuracy"]
    noise = _noise(settings, run, accuracy, manifest.rows("val"))
    environment = packages | differences(recorded["environment"], retrained["environment"])
    difference = abs(retrained["metrics"]["val_accuracy"] - accuracy)
    return Reproduced(
        verdict=judge(weights, difference, noise, served),
        name=version.name,
        version=version.version,
        run_id=version.run_id,
        data_digest=manifest.digest,
        code=code,
        epoch=recorded["epoch"],
        weights=weights,
        served=served,
        recorded_val_accuracy=accuracy,
        val_accuracy=retrained["metrics"]["val_accuracy"],
        noise=noise,
        environment=environment,
        conditions=tuple(_conditions(version, how, environment)),
        seconds=round(time.monotonic() - start_s, 1),
    )


def _load(file: Path, version: Version) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    # Damage shows as an error of zip, pickle or torch, depending on the byte.
    except Exception as error:
        raise RegistryError(
            f"the checkpoint of run {version.run_id} can't be loaded ({error}), so there is "
            "nothing to compare with"
        ) from error
    if content.get("inherited"):
        raise RefusedError(
            f"the trial of version {version.version} went on from weights of another one "
            "(population-based training), so its configuration alone does not lead to its own; "
            "reproduce a version of another kind of sweep"
        )
    if not content.get("environment"):
        progress("reproduce", "WARNING: no environment was recorded; one thread on a CPU is taken")
    return {"environment": {}, **content}


def _check_data(storage: Storage, version: Version) -> Manifest:
    manifest = load_manifest(storage, version.data_digest)
    digest = content_digest(
        manifest.shape,
        manifest.class_names,
        manifest.split_digests,
        manifest.format_version,
        manifest.preprocess.grey_range,
    )
    if digest != version.data_digest:
        raise DataError(
            f"the manifest of data set {version.data_digest} was changed: its content is that of "
            f"{digest}; run jobs.ingest again with its source, {manifest.source}"
        )
    rows = check_data(storage, manifest)
    progress("reproduce", f"data: {digest[:12]} is what was recorded, all {rows:,} rows")
    return manifest


def _served_file(settings: Settings, storage: Storage, version: Version, folder: Path) -> Path:
    """Return the ONNX file that serves; raise if one of the version's files was changed.

    The bundle serves; MLflow's files are what it is published from, and what people fetch.
    """
    model = download_model(settings, version, folder / "registered")
    bundle = ensure_bundle(settings, storage, version)
    for name, path in ((ONNX_FILE, ONNX_FILE), (PT2_FILE, PT2_PATH)):
        # Also without registered digests, which both were compared with already.
        check_model_file(storage, bundle, name, file_sha256(model / path))
    progress(
        "reproduce",
        "model files: those in MLflow are those that serve"
        + (", and that were registered" if version.onnx_sha256 else ""),
    )
    return model / ONNX_FILE


def _check_loads(checkpoint: Path, manifest: Manifest, version: Version) -> None:
    """Raise RefusedError if the code of this process can't export nets of the version's kind."""
    try:
        load_served(checkpoint, manifest)
    except RegistryError as error:
        raise RefusedError(
            f"the net of version {version.version} can't be exported for comparison by the code of "
            f"this checkout ({error}); check out its commit, and run this there"
        ) from error


def _compare_served(
    storage: Storage, manifest: Manifest, onnx_file: Path, folder: Path, version: Version
) -> Served:
    """Export the retrained net, and compare its labels on the test set with those served."""
    batches = _test_batches(storage, manifest)
    first = next(batches)
    exported = export(
        load_served(folder / _RETRAINED, manifest),
        np.array(first.images_NHWC[:2]),
        folder / "exported",
        version.run_id,
    )
    ours, serving = OnnxPredictor(exported.onnx_file), OnnxPredictor(onnx_file)
    images = differing = serving_hits = our_hits = 0
    for batch in chain([first], batches):
        serving_N = serving.predict(batch.images_NHWC).argmax(axis=1)
        ours_N = ours.predict(batch.images_NHWC).argmax(axis=1)
        images += len(batch.labels_N)
        differing += int((serving_N != ours_N).sum())
        serving_hits += int((serving_N == batch.labels_N).sum())
        our_hits += int((ours_N == batch.labels_N).sum())
    return Served(
        images=images,
        differing_labels=differing,
        test_accuracy=serving_hits / images,
        retrained_test_accuracy=our_hits / images,
    )


def _test_batches(storage: Storage, manifest: Manifest) -> Iterator[Batch]:
    if not fits_in_memory(manifest, "test"):
        yield from EpochStream(
            storage=storage, manifest=manifest, split="test", batch_size=EVALUATION_BATCH
        ).epoch(0)
        return
    images_NHWC, labels_N = read_split(storage, manifest, "test")
    for start in range(0, len(labels_N), EVALUATION_BATCH):
        stop = start + EVALUATION_BATCH
        yield Batch(images_NHWC=images_NHWC[start:stop], labels_N=labels_N[start:stop])


def _conditions(version: Version, how: How, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield, in words, where something stood for what was recorded, or was not recorded."""
    if how.this_code:
        yield "trained with this checkout's code, not the recorded commit's"
    elif version.git_dirty and how.trust_diff:
        yield "uncommitted changes as MLflow has them (--trust-diff)"
    if environment:
        yield f"in another environment ({', '.join(environment)})"
    if version.onnx_sha256 is None:
        yield "no digests of its model files were registered"


@contextmanager
def _code(
    settings: Settings,
    storage: Storage,
    version: Version,
    run: Run,
    root: Path,
    folder: Path,
    how: How,
) -> Iterator[tuple[Path, str]]:
    """Yield the folder of the code that trains, and what to call it."""
    commit = version.git_commit
    if how.this_code:
        yield root, f"this checkout, {root}, instead of commit {(commit or 'unknown')[:12]}"
        return
    if not commit:
        raise RefusedError(
            f"no commit was recorded for version {version.version}: its sweep was not submitted "
            f"from a git checkout with jobs.submit; {THIS_CODE}"
        )
    diff = None
    if version.git_dirty:
        diff = _recorded_diff(settings, version, run, folder)
        _check_trusted(storage, version, diff, how)
    with checked_out(root, commit, diff) as tree:
        if not (tree / _RETRAIN).exists():
            raise RefusedError(f"commit {commit[:12]} is from before {_RETRAIN}; {THIS_CODE}")
        yield tree, f"commit {commit[:12]}{' with its uncommitted changes' if diff else ''}"


def _recorded_diff(settings: Settings, version: Version, run: Run, folder: Path) -> str:
    client = connect(settings)
    with explained(settings, f"looking up the diff of sweep {version.sweep_run_id}"):
        there = [file.path for file in client.list_artifacts(version.sweep_run_id, "provenance")]
        sweep = client.get_run(version.sweep_run_id)
    wanted = run.data.tags.get("rayline.git_diff_sha256")
    if DIFF_PATH not in there:
        raise RefusedError(
            f"version {version.version} was trained with uncommitted changes that were too many "
            f"to record (SHA-256 {wanted}); {THIS_CODE}"
        )
    file = download(settings, f"{sweep.info.artifact_uri}/{DIFF_PATH}", folder)
    content = file.read_bytes()
    if wanted and sha256(content).hexdigest() != wanted:
        raise RefusedError(
            f"the recorded diff of sweep {version.sweep_run_id} is not the one that was hashed at "
            f"submission ({wanted}); {THIS_CODE}"
        )
    return content.decode()


def _check_trusted(storage: Storage, version: Version, diff: str, how: How) -> None:
    """Raise RefusedError if the diff, which will run, is known from MLflow alone or was changed."""
    path, found = code_path(version.sweep_run_id), sha256(diff.encode()).hexdigest()
    where = f"run {version.sweep_run_id}, {DIFF_PATH}"
    if storage.exists(path):
        kept = storage.read_json(path)["diff_sha256"]
        if kept != found:
            raise RefusedError(
                f"the uncommitted changes in MLflow ({where}) are not those that were submitted: "
                f"their SHA-256 is {found}, {storage.path(path)} has {kept}. Somebody changed "
                f"them; {THIS_CODE}"
            )
    elif how.trust_diff:
        progress("reproduce", f"WARNING: code from MLflow is run, on --trust-diff ({where})")
    else:
        raise RefusedError(
            f"version {version.version} was trained with uncommitted changes that are in MLflow "
            f"alone, where everybody who reaches it can write: read them ({where}), then add "
            f"--trust-diff to run them, or {THIS_CODE}"
        )


def _environment(
    wanted: dict[str, Any], run: Run, tree: Path, how: How
) -> tuple[Path, dict[str, str]]:
    """Return the Python to train with, and which of its packages differ from those recorded.

    Says what differs, and refuses what decides the result.
    """
    device = _device(wanted)
    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            f"version was trained on {wanted['device']} and this machine has no GPU; run it where "
            "one is"
        )
    if how.rebuild_env:
        if "python" not in wanted:
            raise RefusedError("no environment was recorded that could be rebuilt")
        python = ensure_venv(tree / "requirements.txt", wanted["python"])
        # The pins are the commit's: what the trial ran with may have been another environment.
        recorded = {
            name.removeprefix(PACKAGE_TAG): value
            for name, value in run.data.tags.items()
            if name.startswith(PACKAGE_TAG)
        } | {name: wanted[name] for name in ("python", *PACKAGES) if name in wanted}
        present = installed(python, recorded.keys() - {"python"})
        way_out = THIS_ENV
    else:
        python, recorded = Path(sys.executable), wanted
        present = {**describe(device), "num_threads": wanted.get("num_threads")}
        way_out = (
            "add --rebuild-env to install the recorded packages into a venv, or --this-env to go "
            "on with these"
        )
    found = differences(recorded, present)
    for name, change in found.items():
        progress("reproduce", f"environment: {name} {change}")
    if recorded and not found:
        progress("reproduce", "environment: as recorded")
    if "torch" in found and not how.this_env:
        raise RefusedError(f"torch decides the result and differs ({found['torch']}); {way_out}")
    return python, found if how.rebuild_env else {}


def _device(environment: Mapping[str, Any]) -> str:
    return "cpu" if environment.get("device", "cpu") == "cpu" else "cuda"


def _config(recorded: Mapping[str, Any], storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Return what `lib.train.retrain` is told."""
    return {
        "storage": storage.uri,
        "data_digest": manifest.digest,
        "model_config": recorded["model_config"],
        "train_config": recorded["train_config"],
        "epoch": recorded["epoch"],
        "num_threads": recorded["environment"].get("num_threads", 1),
        "device": _device(recorded["environment"]),
    }


def _retrain(
    python: Path, tree: Path, config: Mapping[str, Any], folder: Path, storage: Storage
) -> dict[str, Any]:
    """Run the code of `tree` in a process of its own; return the checkpoint that it wrote."""
    file, out = folder / "config.json", folder / _RETRAINED
    file.write_text(json.dumps(config))
    command = [str(python), "-m", "lib.train.retrain", "--config", str(file), "--out", str(out)]
    home = folder / "home"
    home.mkdir()
    env = bare_environment(str(home), tree)
    env |= {name: os.environ[name] for name in _NO_SECRETS if name in os.environ}
    if not storage.is_local:
        progress("reproduce", f"the process that trains gets the credentials of {storage.uri}")
        env |= _credentials()
    last = ""
    with subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                last = line.rstrip()
                progress("reproduce", last)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or not out.exists():
        raise RegistryError(
            f"training again failed with exit code {process.returncode}: {last}; what it said is "
            "above"
        )
    content: dict[str, Any] = torch.load(out, map_location="cpu", weights_only=True)
    return content


def _credentials() -> dict[str, str]:
    """Return what object stores are opened with."""
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": Path.home() / ".aws" / "credentials",
        "AWS_CONFIG_FILE": Path.home() / ".aws" / "config",
    }
    usual = {name: str(file) for name, file in files.items() if file.exists()}
    given = {n: value for n, value in os.environ.items() if n.startswith(("AWS_", "GOOGLE_"))}
    return {**usual, **given}


def _noise(settings: Settings, run: Run, accuracy: float, val_rows: int) -> Noise:
    """Return the noise on record: of the validation set, and over trials with other seeds."""
    tags = {"rayline.kind": "trial"} | {
        name: run.data.tags[name]
        for name in ("rayline.data_digest", "rayline.preset")
        if name in run.data.tags
    }
    same = "".join(f" and tags.`{name}` = '{value}'" for name, value in tags.items())
    with explained(settings, "looking up trials with other seeds"):
        others = pages(
            connect(settings).search_runs,
            experiment_ids=[run.info.experiment_id],
            filter_string=f"attributes.status = 'FINISHED'{same}",
            max_results=_PAGE,
        )
    by_seed = {run.data.tags.get("rayline.seed"): accuracy}
    for other in others:
        found = best_metrics(other).get("val_accuracy")
        if other.data.params == run.data.params and found is not None:
            by_seed.setdefault(other.data.tags.get("rayline.seed"), found)
    return Noise(
        standard_error=math.sqrt(accuracy * (1 - accuracy) / val_rows),
        seeds=len(by_seed),
        seed_deviation=statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
    )
