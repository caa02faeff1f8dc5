"""What nothing refers to any more: found and listed first, removed when asked to.

Looked through are the storage root and all experiments of the MLflow server. Runs, with their
parameters and metrics, are never touched; neither are checkpoints that can become a version,
unless fewer trials of a sweep are to be kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion

from lib.cli import progress
from lib.config import Settings
from lib.errors import ConfigError, RegistryError, ServingError, StorageError
from lib.registry.claims import CLAIMS, is_over
from lib.registry.models import MODEL_NAME_TAG, TRIAL_TAG, logged_model_id
from lib.registry.removal import GRACE_S, artifact_bytes, remove_artifacts, remove_model
from lib.registry.server import connect, explained, pages
from lib.registry.trials import ranked_trials
from lib.serving import policy
from lib.serving.bundle import bundle_path
from lib.serving.client import ServeClient, live_applications
from lib.storage import Storage

TUNE_GRACE_S = 7 * 24 * 3600.0
"""Of the state of a sweep that ended without cleaning up: until then it can be resumed."""
_COLLECTED_TAG = "rayline.checkpoint_collected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One thing that nothing refers to."""

    kind: str
    what: str
    """Path below the storage root, or the run or logged model."""
    why: str
    size_bytes: int
    remove: Callable[[], None] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what it is as JSON types."""
        return {"kind": self.kind, "what": self.what, "why": self.why, "bytes": self.size_bytes}


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """Looks for garbage; nothing is removed by looking."""

    settings: Settings
    storage: Storage
    client: MlflowClient
    grace_s: float = GRACE_S
    tune_grace_s: float = TUNE_GRACE_S
    keep_trials: int | None = None
    """Finished trials of a sweep, the best ones, whose checkpoints stay; None: all."""
    now_s: float = field(default_factory=time.time)
    notes: list[str] = field(default_factory=list)
    """What could not be looked at, and why."""

    def find(self) -> tuple[list[Garbage], list[str]]:
        """Return what nothing refers to, and notes on what could not be looked at."""
        with explained(self.settings, "looking for what nothing refers to"):
            experiments = pages(self.client.search_experiments)
            versions = pages(self.client.search_model_versions)
            found = [
                *self._logged_models(experiments, {logged_model_id(v) for v in versions}),
                *self._checkpoints(experiments, {version.run_id for version in versions}),
                *self._surplus(experiments, {v.tags.get(TRIAL_TAG) or v.run_id for v in versions}),
                *self._sweep_state(),
                *self._half_written(),
                *self._claims(),
            ]
            kept = self._registered_bundles(versions)
            bundles = self._folders("models", depth=2)
            steps, live_steps = self._steps(experiments)
            # Another server knows neither: what it lacks is not garbage.
            if kept & set(bundles) or live_steps:
                found += [*self._bundles(bundles, kept), *steps]
            elif bundles or steps:
                self.notes.append(
                    f"bundles and steps were left alone: {self.settings.mlflow_uri} has no version "
                    "and no sweep of any of them; is MLFLOW_TRACKING_URI the server of this "
                    "storage?"
                )
        try:
            found += self._code()
        except ServingError:
            self.notes.append(
                "code archives were left alone: only a Serve that answers knows its own"
            )
        return found, self.notes

    def _registered_bundles(self, versions: list[ModelVersion]) -> set[str]:
        """Return the bundles that versions have; models of other tools have none."""
        kept: set[str] = set()
        others: set[str] = set()
        for version in versions:
            try:
                kept.add(bundle_path(version.name, int(version.version), version.run_id or ""))
            except StorageError:
                others.add(version.name)
        if others:
            names = ", ".join(sorted(others))
            self.notes.append(f"{len(others)} models of other tools were left alone: {names}")
        return kept

    def _logged_models(
        self, experiments: list[Experiment], taken: set[str | None]
    ) -> Iterator[Garbage]:
        """Models that an interrupted registration or delete left."""
        ids = [experiment.experiment_id for experiment in experiments]
        models = pages(self.client.search_logged_models, experiment_ids=ids) if ids else []
        for model in models:
            is_ours = MODEL_NAME_TAG in model.tags and model.model_id not in taken
            if is_ours and self._is_old(model.creation_timestamp / 1000, self.grace_s):
                yield from self._logged_model(model)

    def _logged_model(self, model: LoggedModel) -> Iterator[Garbage]:
        size_bytes = self._size(f"logged model {model.model_id}", model.artifact_location)
        if size_bytes is None:
            return

        def remove() -> None:
            remove_model(self.client, self.settings, model.model_id, model.artifact_location)

        yield Garbage(
            kind="logged model",
            what=model.model_id,
            why=f"no version of {model.tags[MODEL_NAME_TAG]} has it",
            size_bytes=size_bytes,
            remove=remove,
        )

    def _size(self, what: str, location: str) -> int | None:
        """Return the bytes at an artifact URI; None, with a note, if it can't be looked at."""
        try:
            return artifact_bytes(self.settings, location)
        # Every artifact store has exceptions of its own for files that it can't list.
        except Exception as error:
            self.notes.append(f"{what} was left alone: {location} can't be listed: {error}")
            return None

    def _checkpoints(
        self, experiments: list[Experiment], taken: set[str | None]
    ) -> Iterator[Garbage]:
        """Checkpoints of trials that failed or were cut off: only finished ones are registered."""
        query = "tags.`rayline.kind` = 'trial' and attributes.status != 'FINISHED'"
        ids = [experiment.experiment_id for experiment in experiments]
        runs = pages(self.client.search_runs, experiment_ids=ids, filter_string=query)
        for run in runs:
            is_over = run.info.status in ("FAILED", "KILLED")
            ended_s = (run.info.end_time or 0) / 1000
            seen = run.info.run_id in taken or _COLLECTED_TAG in run.data.tags
            if is_over and not seen and self._is_old(ended_s, self.tune_grace_s):
                yield from self._checkpoint(run, f"its trial ended {run.info.status}")

    def _surplus(self, experiments: list[Experiment], taken: set[str | None]) -> Iterator[Garbage]:
        """Checkpoints of finished trials beyond those that are to be kept of an ended sweep."""
        if self.keep_trials is None or not experiments:
            return
        ids = [experiment.experiment_id for experiment in experiments]
        query = "tags.`rayline.kind` = 'sweep' and attributes.status != 'RUNNING'"
        for sweep in pages(self.client.search_runs, experiment_ids=ids, filter_string=query):
            digest = sweep.data.tags.get("rayline.data_digest", "")
            try:
                trials = ranked_trials(self.client, sweep.info.run_id, digest)
            except RegistryError:
                continue  # It has no finished trial.
            for trial in trials[self.keep_trials :]:
                run = self.client.get_run(trial.run_id)
                if trial.run_id not in taken and _COLLECTED_TAG not in run.data.tags:
                    why = f"not of the {self.keep_trials} best trials of its sweep, and no version"
                    yield from self._checkpoint(run, why)

    def _checkpoint(self, run: Run, why: str) -> Iterator[Garbage]:
        location = f"{run.info.artifact_uri}/checkpoint"
        size_bytes = self._size(f"the checkpoint of run {run.info.run_id}", location)
        if not size_bytes:
            return

        def remove() -> None:
            remove_artifacts(self.settings, location)
            # Else every later look would ask for its files again.
            self.client.set_tag(run.info.run_id, _COLLECTED_TAG, "true")

        yield Garbage(
            kind="checkpoint",
            what=run.info.run_id,
            why=why,
            size_bytes=size_bytes,
            remove=remove,
        )

    def _bundles(
        self, bundles: Mapping[str, tuple[int, float]], registered: set[str]
    ) -> Iterator[Garbage]:
        served = policy.current(self.storage)
        kept = set(registered)
        for traffic in served.models.values() if served else ():
            kept |= set(traffic.bundles.values())
        for path, (size_bytes, newest_s) in bundles.items():
            if path not in kept and self._is_old(newest_s, self.grace_s):
                why = "no version, and nothing that is served, has it"
                yield self._folder("bundle", path, why, size_bytes)

    def _steps(self, experiments: list[Experiment]) -> tuple[list[Garbage], bool]:
        """Return kept results of sweeps that are gone, and whether MLflow has any of them.

        Such a step would not count any more.
        """
        ids = [experiment.experiment_id for experiment in experiments]
        query = "tags.`rayline.kind` = 'sweep'"
        sweeps = pages(self.client.search_runs, experiment_ids=ids, filter_string=query)
        there = {run.info.run_id for run in sweeps}
        gone: list[Garbage] = []
        is_any_there = False
        for path, info in self._files("steps/tune").items():
            try:
                sweep = self.storage.read_json(path)["result"]["sweep_run_id"]
            except (StorageError, KeyError, TypeError) as error:
                self.notes.append(f"step {path} was left alone: it can't be read ({error!r})")
                continue
            is_any_there |= sweep in there
            if sweep not in there and self._is_old(info.mtime.timestamp(), self.grace_s):
                gone.append(self._file("step", path, f"MLflow has no sweep {sweep}", info.size))
        return gone, is_any_there

    def _sweep_state(self) -> Iterator[Garbage]:
        """What trials of a sweep that never ended would go on from; its journal is kept."""
        for path, (size_bytes, newest_s) in self._folders("sweeps", depth=2).items():
            if not path.endswith("/journal") and self._is_old(newest_s, self.tune_grace_s):
                days = (self.now_s - newest_s) / 86400
                why = f"state of a sweep that stopped {days:.0f} days ago"
                yield self._folder("sweep state", path, why, size_bytes)

    def _half_written(self) -> Iterator[Garbage]:
        for path, info in self._files("", hidden=True).items():
            is_ours = info.base_name.startswith(".tmp-")
            if is_ours and self._is_old(info.mtime.timestamp(), self.grace_s):
                yield self._file("half-written", path, "its writer died", info.size)

    def _claims(self) -> Iterator[Garbage]:
        for path, info in self._files(CLAIMS).items():
            if is_over(self.storage, path) and self._is_old(info.mtime.timestamp(), self.grace_s):
                yield self._file("claim", path, "its registration died", info.size)

    def _code(self) -> Iterator[Garbage]:
        files = self._files("code")
        if not files:
            return
        live = live_applications(ServeClient(self.settings).details())
        used = {str(config.get("runtime_env", {}).get("working_dir")) for config in live.values()}
        for path, info in files.items():
            is_used = any(uri.endswith(f"/{path}") for uri in used)
            if not is_used and self._is_old(info.mtime.timestamp(), self.grace_s):
                yield self._file("code", path, "no application runs it", info.size)

    def _is_old(self, then_s: float, grace_s: float) -> bool:
        return self.now_s - then_s >= grace_s

    def _folder(self, kind: str, path: str, why: str, size_bytes: int) -> Garbage:
        def remove() -> None:
            self.storage.delete_folder(path)

        return Garbage(kind=kind, what=path, why=why, size_bytes=size_bytes, remove=remove)

    def _file(self, kind: str, path: str, why: str, size_bytes: int | None) -> Garbage:
        def remove() -> None:
            self.storage.delete(path)

        return Garbage(kind=kind, what=path, why=why, size_bytes=size_bytes or 0, remove=remove)

    def _files(self, folder: str, *, hidden: bool = False) -> dict[str, pafs.FileInfo]:
        prefix = len(self.storage.root) + 1
        return {
            info.path[prefix:]: info
            for info in self.storage.walk(folder, recursive=True)
            if info.type == pafs.FileType.File
            and (hidden or not info.base_name.startswith(".tmp-"))
        }

    def _folders(self, base: str, *, depth: int) -> dict[str, tuple[int, float]]:
        """Return bytes and newest change of every folder `depth` levels below `base`."""
        folders: dict[str, tuple[int, float]] = {}
        for path, info in self._files(base, hidden=True).items():
            parts = path.split("/")
            if len(parts) > depth + 1:
                name = "/".join(parts[: depth + 1])
                size_bytes, newest_s = folders.get(name, (0, 0.0))
                newest_s = max(newest_s, info.mtime.timestamp())
                folders[name] = (size_bytes + (info.size or 0), newest_s)
        return folders


def collect(
    settings: Settings,
    storage: Storage,
    *,
    remove: bool,
    grace_s: float = GRACE_S,
    tune_grace_s: float = TUNE_GRACE_S,
    keep_trials: int | None = None,
) -> Mapping[str, Any]:
    """List what nothing refers to, and remove it if asked to; what can't be removed is said."""
    if keep_trials is not None and keep_trials < 0:
        raise ConfigError(f"keep_trials={keep_trials}: it is a number of trials, 0 or more")
    collector = Collector(
        settings=settings,
        storage=storage,
        client=connect(settings),
        grace_s=grace_s,
        tune_grace_s=tune_grace_s,
        keep_trials=keep_trials,
    )
    found, notes = collector.find()
    failed: list[str] = []
    for garbage in found if remove else ():
        try:
            with explained(settings, f"removing {garbage.what}"):
                garbage.remove()
        # One thing that can't be removed, for whatever reason of its store, keeps no other one.
        except Exception as error:
            failed.append(f"{garbage.kind} {garbage.what}: {error}")
            progress("models", f"WARNING: not removed: {failed[-1]}")
    return {
        "garbage": [garbage.to_json() for garbage in found],
        "bytes": sum(garbage.size_bytes for garbage in found),
        "removed": remove,
        "failed": failed,
        "notes": notes,
    }
