"""What the drills do to a live line, and how they leave it as it was."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import psutil
from mlflow import MlflowClient
from onnx import ModelProto

from lib.config import Settings
from lib.errors import RolloutError
from lib.line.layout import PROJECT_ROOT
from lib.registry.models import logged_model_id
from lib.serving import deploy, policy
from lib.serving.bundle import ONNX_FILE, PT2_FILE, Card, read_card, write_bundle
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import live
from lib.watch import retrain_record as records
from lib.watch import rollout_state as states
from lib.watch.retrain_record import Record
from tests.e2e.clients import until
from tests.e2e.conftest import LiveLine

ROLLOUT_S = 420


@dataclass(frozen=True, kw_only=True, slots=True)
class Drill:
    """The line, and its registry."""

    line: LiveLine
    settings: Settings
    storage: Storage
    client: MlflowClient

    def traffic(self) -> ModelTraffic:
        found = policy.current(self.storage)
        assert found is not None
        return found.models[self.line.model]

    def state(self) -> states.State | None:
        return states.load(self.storage, self.line.model)

    def retrains(self) -> list[Record]:
        return records.history(self.storage, self.line.model)

    def versions(self) -> set[int]:
        found = self.client.search_model_versions(f"name = '{self.line.model}'")
        return {int(version.version) for version in found}

    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model(self.line.model).aliases
        return {alias: str(version) for alias, version in found.items()}

    def champion_card(self) -> Card:
        traffic = self.traffic()
        return read_card(self.storage, traffic.bundles[traffic.champion])

    def register(self, change: Callable[[ModelProto], ModelProto]) -> int:
        """Register the champion, changed, as a version of its own with a bundle."""
        traffic = self.traffic()
        bundle = traffic.bundles[traffic.champion]
        model = onnx.load_from_string(self.storage.read(f"{bundle}/{ONNX_FILE}"))
        pt2 = self.storage.read(f"{bundle}/{PT2_FILE}")
        return self.add(change(model).SerializeToString(), pt2)

    def add(self, onnx_model: bytes, pt2: bytes, **facts: Any) -> int:
        """Register a model beside the champion, with these facts on its card."""
        standing = self.client.get_model_version(self.line.model, str(self.traffic().champion))
        version = int(
            self.client.create_model_version(
                self.line.model,
                source=standing.source,
                run_id=standing.run_id,
                model_id=logged_model_id(standing),
                tags=dict(standing.tags),
                await_creation_for=0,
            ).version
        )
        card = replace(self.champion_card(), version=version, runtime="onnxruntime", **facts)
        write_bundle(self.storage, card, onnx_model, pt2)
        return version

    def start(self, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Start `python -m ARGUMENTS` as a user of the line; what it prints goes to a file."""
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("a")) if log else subprocess.PIPE
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=PROJECT_ROOT,
                env={**self.line.env, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait_for(self, version: int, stage: str) -> None:
        """Wait until a version's rollout serves by a stage."""

        def is_there() -> bool:
            state = self.state()
            is_over = state and state.candidate == version and state.status in states.ENDED
            assert not is_over, f"it ended before {stage}: {state}"
            return (
                state is not None
                and (state.candidate, state.stage) == (version, stage)
                and state.served_since_us is not None
            )

        until(is_there, deadline_s=ROLLOUT_S, what=f"{stage} of version {version}")

    def jobs(self, *verbs: str) -> list[psutil.Process]:
        """Return the processes of `python -m jobs.VERB` that Ray runs on the line."""
        return [process for process in self.line.processes() if _runs(process, verbs)]


def _runs(process: psutil.Process, verbs: tuple[str, ...]) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    # Not the shell, which has the whole command as one word.
    return any(f"jobs.{verb}" in words for verb in verbs)


@contextmanager
def left_as_it_was(line: LiveLine) -> Iterator[Drill]:
    """Let a drill go on; the other tests find traffic, registry and retrains as they were."""
    os.environ.update(line.env)
    settings = Settings.from_env(line.env)
    drill = Drill(
        line=line,
        settings=settings,
        storage=Storage(line.storage),
        client=MlflowClient(settings.mlflow_uri),
    )
    traffic, versions, aliases = drill.traffic(), drill.versions(), drill.aliases()
    retrains = {record.id for record in drill.retrains()}
    try:
        yield drill
    finally:
        for process in drill.jobs("retrain", "rollout"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(RolloutError):
            live.abort(settings, drill.storage, who="test")
        deploy.put(settings, drill.storage, traffic, who="test", why="after the drill")
        for alias in set(drill.aliases()) - set(aliases):
            drill.client.delete_registered_model_alias(line.model, alias)
        for alias, version in aliases.items():
            drill.client.set_registered_model_alias(line.model, alias, version)
        for version in drill.versions() - versions:
            drill.client.delete_model_version(line.model, str(version))
        for record in drill.retrains():
            if record.id not in retrains:
                drill.storage.delete(f"retrains/{line.model}/{record.id}.json")
