"""Trains a registered version again from what was recorded of it, and compares the results."""

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
from pathlib import Path
from typing import Any

import torch
from mlflow.entities import Run

from lib.cli import progress
from lib.config import Settings
from lib.data.assemble import content_digest
from lib.data.direct import check_data
from lib.data.manifest import Manifest, load_manifest
from lib.errors import DataError, RefusedError, RegistryError
from lib.rebuild import THIS_CODE, checked_out, ensure_venv
from lib.registry.models import Version
from lib.registry.server import connect, download, explained
from lib.registry.trials import CHECKPOINT_PATH
from lib.registry.verdict import Noise, Reproduced, compare, judge
from lib.storage import Storage
from lib.train.environment import describe, differences

DIFF_PATH = "provenance/uncommitted.patch"
"""On a sweep's run: what differed from its commit."""
_RETRAIN = "lib/train/retrain.py"
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


def reproduce(
    settings: Settings, storage: Storage, version: Version, *, root: Path, how: How
) -> Reproduced:
    """Rebuild code, data and environment of a version, train it again, compare the weights.

    `root` is the project's checkout, which has the recorded commit.

    Raises:
        RefusedError: Something that decides the result is not on record, or not to be had.
        DataError: The data set is not the recorded one any more.
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
        recorded = _load(download(settings, uri, folder), version)
        manifest = _check_data(storage, version)
        with _code(settings, version, run, root, folder, how) as (tree, code):
            progress("reproduce", f"code: {code}")
            python = _environment(recorded["environment"], tree, how)
            config = _config(recorded, storage, manifest)
            retrained = _retrain(python, tree, config, folder)
    weights = compare(recorded["model"], retrained["model"])
    accuracy = run.data.metrics["val_accuracy"]
    noise = _noise(settings, run, accuracy, manifest.rows("val"))
    return Reproduced(
        verdict=judge(weights, abs(retrained["metrics"]["val_accuracy"] - accuracy), noise),
        name=version.name,
        version=version.version,
        run_id=version.run_id,
        data_digest=manifest.digest,
        code=code,
        epoch=recorded["epoch"],
        weights=weights,
        recorded_val_accuracy=accuracy,
        val_accuracy=retrained["metrics"]["val_accuracy"],
        noise=noise,
        environment=differences(recorded["environment"], retrained["environment"]),
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


@contextmanager
def _code(
    settings: Settings, version: Version, run: Run, root: Path, folder: Path, how: How
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
    diff = _recorded_diff(settings, version, run, folder) if version.git_dirty else None
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


def _environment(wanted: dict[str, Any], tree: Path, how: How) -> Path:
    """Return the Python to train with; say what differs, refuse what decides the result."""
    device = _device(wanted)
    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            f"version was trained on {wanted['device']} and this machine has no GPU; run it where "
            "one is"
        )
    if how.rebuild_env:
        if "python" not in wanted:
            raise RefusedError("no environment was recorded that could be rebuilt")
        return ensure_venv(tree / "requirements.txt", wanted["python"])
    present = {**describe(device), "num_threads": wanted.get("num_threads")}
    found = differences(wanted, present)
    for name, change in found.items():
        progress("reproduce", f"environment: {name} {change}")
    if wanted and not found:
        progress("reproduce", "environment: as recorded")
    if "torch" in found and not how.this_env:
        raise RefusedError(
            f"torch decides the result and differs ({found['torch']}); add --rebuild-env to "
            "install the recorded packages into a venv, or --this-env to go on with these"
        )
    return Path(sys.executable)


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


def _retrain(python: Path, tree: Path, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the code of `tree` in a process of its own; return the checkpoint that it wrote."""
    file, out = folder / "config.json", folder / "retrained.pt"
    file.write_text(json.dumps(config))
    command = [str(python), "-m", "lib.train.retrain", "--config", str(file), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
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


def _noise(settings: Settings, run: Run, accuracy: float, val_rows: int) -> Noise:
    """Return the noise on record: of the validation set, and over trials with other seeds."""
    tags = {"rayline.kind": "trial"} | {
        name: run.data.tags[name]
        for name in ("rayline.data_digest", "rayline.preset")
        if name in run.data.tags
    }
    same = "".join(f" and tags.`{name}` = '{value}'" for name, value in tags.items())
    with explained(settings, "looking up trials with other seeds"):
        others = connect(settings).search_runs(
            [run.info.experiment_id], f"attributes.status = 'FINISHED'{same}", max_results=_PAGE
        )
    by_seed = {run.data.tags.get("rayline.seed"): accuracy}
    for other in others:
        if other.data.params == run.data.params and "val_accuracy" in other.data.metrics:
            seed = other.data.tags.get("rayline.seed")
            by_seed.setdefault(seed, other.data.metrics["val_accuracy"])
    return Noise(
        standard_error=math.sqrt(accuracy * (1 - accuracy) / val_rows),
        seeds=len(by_seed),
        seed_deviation=statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
    )
