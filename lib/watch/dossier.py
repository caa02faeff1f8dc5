"""All there is to say about a version: its own records, what was seen of it live, what CI runs.

All of it as plain data, so that report and scorecard are functions of it. What is not there is
empty, and nothing is filled in for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.cli import progress
from lib.data.direct import byte_rows, read_shard
from lib.data.manifest import Manifest, load_manifest
from lib.errors import DataError, RaylineError, StorageError
from lib.serving import policy
from lib.storage import Storage
from lib.train.experiment import MAXIMIZE, Objective

DAY_S = 86400.0
ATTESTED = "scorecard"
_SAMPLES_PER_CLASS = 10
_CI_FILES = (".ci/run", "Makefile")
_CI_FOLDERS = (".github", "deploy/ci")
_CODE_FOLDERS = ("tests", "lib", "jobs", "serve_apps")
Json = Mapping[str, Any]
ReadLog = Callable[..., pa.Table]
"""`lib.watch.predictions.read`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dossier:
    """All that is known of a version at a time."""

    model: str
    version: int
    now_s: float
    facts: Json = field(default_factory=dict)
    """`lib.registry.inspection.describe`."""
    evaluation: Json | None = None
    """Of the test split, with the confusion matrix."""
    trials: Sequence[Json] = ()
    """Of its sweep."""
    objective: Objective = Objective(metric="val_accuracy", goal=MAXIMIZE)
    """What ranks the trials."""
    versions: Sequence[Json] = ()
    """All versions of the model, as rows of the leaderboard."""
    manifests: Sequence[Json] = ()
    """Of its data set, then of those that it extends; without the lists of shards."""
    num_missing_shards: int = 0
    policies: Sequence[Json] = ()
    """Every traffic policy of the model, oldest first: `generation`, `when`, `who`, `why`,
    `weights`, `champion`, `previous_champion`, `bundles`."""
    watch: Json = field(default_factory=dict)
    """The monitor's state."""
    rollouts: Sequence[Json] = ()
    retrains: Sequence[Json] = ()
    requests: Json = field(default_factory=dict)
    """Of the prediction log, what this version answered lately."""
    attested: Mapping[str, Json] = field(default_factory=dict)
    """Check of the scorecard → who did it by hand, when, and what was found."""
    files: frozenset[str] = frozenset()
    """Of the project's checkout."""
    ci: str = ""
    """What CI runs: the text of its files."""
    samples: Json = field(default_factory=dict)
    """Split → a few images of each class, and the images' shape."""


def attest(storage: Storage, model: str, check: str, *, who: str, note: str) -> str:
    """Put on record that a check was done by hand; return where."""
    path = f"{ATTESTED}/{model}/{check}.json"
    storage.write_json(path, {"who": who, "note": note, "when_s": time.time()})
    return path


def policies_of(storage: Storage, model: str, version: int, bundle: str) -> list[dict[str, Any]]:
    """Return a model's traffic in every policy that does not mean another one by this version."""
    found = []
    for made in policy.history(storage):
        traffic = made.models.get(model)
        if traffic is None or traffic.bundles.get(version, bundle) != bundle:
            continue
        found.append(
            {
                "generation": made.generation,
                "when": made.when,
                "who": made.who,
                "why": made.why,
                "weights": {str(number): share for number, share in traffic.weights.items()},
                "champion": traffic.champion,
                "previous_champion": traffic.previous_champion,
                "bundles": sorted(traffic.bundles),
            }
        )
    return found


def rollouts_of(storage: Storage, model: str, version: int, bundle: str) -> list[dict[str, Any]]:
    """Return a model's rollouts, oldest first; the last one may be under way.

    Without those of another version that had this number, as far as they are told apart.
    """
    found = all_json(storage, f"rollouts/{model}/history")
    newest = json_at(storage, f"rollouts/{model}/state.json")
    if newest and newest.get("id") not in {rollout.get("id") for rollout in found}:
        found.append(newest)
    return [rollout for rollout in found if means(rollout, version, bundle)]


def means(content: Json, version: int, bundle: str) -> bool:
    """Whether a state means this version by its number: it is not of one with another bundle.

    In a state of before, which has no `bundles`, the number is all there is.
    """
    return bool(content.get("bundles", {}).get(str(version), bundle) == bundle)


def project_files(root: Path) -> frozenset[str]:
    """Return the files of the project that checks can ask for."""
    found = [path for folder in _CODE_FOLDERS for path in (root / folder).rglob("*.py")]
    found += [path for folder in _CI_FOLDERS for path in (root / folder).rglob("*")]
    found += root.glob("*")
    return frozenset(path.relative_to(root).as_posix() for path in found if path.is_file())


def ci_text(root: Path) -> str:
    """Return what CI runs."""
    files = [root / name for name in _CI_FILES]
    for folder in _CI_FOLDERS:
        files += sorted((root / folder).rglob("*.y*ml"))
    return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())


def requests_of(table: pa.Table, version: int, now_s: float) -> dict[str, Any]:
    """Sum up what a version answered: the last day, and the days before it."""
    mine = table.filter(
        pc.and_(pc.equal(table.column("version"), version), pc.invert(table.column("shadow")))
    )
    if not mine.num_rows:
        return {}
    is_new = mine.column("time_us").to_numpy() >= (now_s - DAY_S) * 1e6
    latency = mine.column("latency_ms").to_numpy()
    status = mine.column("status").to_numpy()
    values = pc.list_flatten(mine.column("probabilities")).to_numpy()
    summary: dict[str, Any] = {
        "rows": mine.num_rows,
        "rows_of_a_day": int(is_new.sum()),
        "failed": int((status >= 500).sum()),
        "not_finite": int((~np.isfinite(values)).sum()),
        "out_of_range": int(((values < -1e-4) | (values > 1 + 1e-4)).sum()),
    }
    for name, chosen in (("", is_new), ("_before", ~is_new)):
        if chosen.any():
            p50, p99 = np.percentile(latency[chosen], (50, 99))
            summary |= {f"p50{name}_ms": float(p50), f"p99{name}_ms": float(p99)}
    return summary


def logged_requests(
    storage: Storage,
    model: str,
    version: int,
    bundle: str,
    now_s: float,
    read_log: ReadLog | None,
) -> Json:
    """Sum up what a version answered in a week; empty where the log can't be read."""
    if read_log is None:
        return {}
    columns = ["time_us", "version", "shadow", "latency_ms", "status", "probabilities"]
    try:
        table = read_log(
            storage,
            model,
            start_us=int((now_s - 7 * DAY_S) * 1e6),
            end_us=int(now_s * 1e6),
            columns=columns,
            bundles={version: bundle},
        )
    except (RaylineError, OSError, pa.ArrowException) as error:
        progress("report", f"the prediction log can't be read, and is left out: {error}")
        return {}
    return requests_of(table, version, now_s)


def manifests_of(storage: Storage, digest: str) -> tuple[list[dict[str, Any]], int]:
    """Return a data set's manifest and those of its ancestors, and how many shards it lacks."""
    found: list[dict[str, Any]] = []
    num_missing = 0
    wanted: str | None = digest
    while wanted is not None:
        try:
            manifest = load_manifest(storage, wanted)
        except DataError:
            break
        if not found:
            infos = storage.infos([shard.path for shard in manifest.shards])
            num_missing = sum(not info.is_file for info in infos)
        content = {**manifest.to_json(), "num_shards": len(manifest.shards)}
        del content["shards"], content["live_shards"]
        found.append(content)
        wanted = manifest.parent
    return found, num_missing


def samples_of(storage: Storage, digest: str) -> dict[str, Any]:
    """Return a few images of each class from the first shard of train and of live requests."""
    try:
        manifest = load_manifest(storage, digest)
    except DataError:
        return {}
    found: dict[str, Any] = {"shape": manifest.shape}
    for split in ("train", "live"):
        shards = [shard for shard in manifest.shards if shard.split == split]
        if shards:
            found[split] = _of_shard(storage, manifest, shards[0])
    return found


def _of_shard(storage: Storage, manifest: Manifest, shard: Any) -> list[list[bytes]]:
    try:
        table = read_shard(storage, shard, ["image", "label"])
    except (DataError, StorageError) as error:
        progress("report", f"no pictures of images: {error}")
        return []
    images = byte_rows(table.column("image"), int(np.prod(manifest.shape)))
    labels = table.column("label").to_numpy()
    return [
        [images[row].tobytes() for row in np.flatnonzero(labels == label)[:_SAMPLES_PER_CLASS]]
        for label in range(manifest.num_classes)
    ]


def json_at(storage: Storage, path: str) -> dict[str, Any]:
    """Return a JSON file, empty if there is none."""
    return dict(storage.read_json(path)) if storage.exists(path) else {}


def all_json(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """Return the JSON files right below a folder, by name; `name` tells them apart."""
    return [
        {"name": Path(path).stem, **storage.read_json(path)}
        for path in storage.list(folder)
        if path.endswith(".json")
    ]
