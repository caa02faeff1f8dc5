"""The rollout drill: real processes, real requests, and candidates that turn out worse on the way.

All candidates answer as the champion does until they meet marked images (see `tests.candidates`),
which callers begin to send when the candidate is a canary: what replay and shadow can't know yet.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from mlflow import MlflowClient
from onnx import ModelProto

from lib.config import Settings
from lib.line.layout import PROJECT_ROOT
from lib.registry.models import logged_model_id
from lib.registry.notes import EVIDENCE_TAG, REASON_TAG, ROLLOUT_TAG
from lib.serving import deploy, policy
from lib.serving.bundle import ONNX_FILE, PT2_FILE, read_card, write_bundle
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import rollout_state as states
from tests.candidates import erring, marked, raising, slow
from tests.data_sources import mnist
from tests.e2e.clients import RAW, connect, post, until
from tests.e2e.conftest import LiveLine

pytestmark = pytest.mark.long

TIMEOUT_S = 60
ROLLOUT_S = 420
STEPS = ("--steps", "10,50,100", "--min-requests", "100", "--step-timeout", "300")
PAUSE_S = 0.01
"""Of each caller between two requests: what is measured is a line with room to breathe."""


@dataclass(slots=True)
class Callers:
    """What the callers send and see."""

    marked_share: float = 0.0
    answered: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)
    """With the share of marked images at that time."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drill:
    """The line, and its registry."""

    line: LiveLine
    settings: Settings
    storage: Storage
    client: MlflowClient
    made: list[int] = field(default_factory=list)

    def traffic(self) -> ModelTraffic:
        found = policy.current(self.storage)
        assert found is not None
        return found.models[self.line.model]

    def state(self) -> states.State | None:
        return states.load(self.storage, self.line.model)

    def register(self, change: Callable[[ModelProto], ModelProto]) -> int:
        """Register the champion, changed, as a version of its own with a bundle."""
        traffic = self.traffic()
        bundle = traffic.bundles[traffic.champion]
        standing = self.client.get_model_version(self.line.model, str(traffic.champion))
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
        self.made.append(version)
        card = replace(read_card(self.storage, bundle), version=version, runtime="onnxruntime")
        model = onnx.load_from_string(self.storage.read(f"{bundle}/{ONNX_FILE}"))
        pt2 = self.storage.read(f"{bundle}/{PT2_FILE}")
        write_bundle(self.storage, card, change(model).SerializeToString(), pt2)
        return version

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.rollout", *arguments],
            cwd=PROJECT_ROOT,
            env=dict(self.line.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, version: int, stage: str) -> None:
        """Wait until a version's rollout serves by a stage."""

        def is_there() -> bool:
            state = self.state()
            assert state is None or state.candidate != version or state.status not in states.ENDED
            return (
                state is not None
                and (state.candidate, state.stage) == (version, stage)
                and state.served_since_us is not None
            )

        until(is_there, deadline_s=ROLLOUT_S, what=f"{stage} of version {version}")


@pytest.fixture(scope="module")
def drill(line: LiveLine) -> Iterator[Drill]:
    os.environ.update(line.env)
    settings = Settings.from_env(line.env)
    made = Drill(
        line=line,
        settings=settings,
        storage=Storage(line.storage),
        client=MlflowClient(settings.mlflow_uri),
    )
    before = made.traffic()
    yield made
    # The other tests find the line as it was.
    deploy.put(settings, made.storage, before, who="test", why="after the drill")
    deploy.align_registry(settings, before.champion)
    for version in made.made:
        made.client.delete_model_version(line.model, str(version))


@contextmanager
def calling(line: LiveLine, *, num_callers: int = 4, labels: bool = True) -> Iterator[Callers]:
    """Send test images, and their true labels once they are answered, while the block runs."""
    callers, stop = Callers(), threading.Event()
    plain_NHW, label_N = mnist("test")
    marked_NHW = marked(plain_NHW)

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        connection = connect(line.url)
        while not stop.wait(PAUSE_S):
            number, share = int(rng.integers(len(label_N))), callers.marked_share
            images = marked_NHW if rng.random() < share else plain_NHW
            status, body = post(connection, images[number].tobytes(), RAW)
            with callers.lock:
                callers.answered += status == 200
                if status != 200:
                    callers.failures.append((share, f"{status}: {body[:300]!r}"))
            if labels and status == 200:
                given = {
                    "request_id": json.loads(body)["request_id"],
                    "label": int(label_N[number]),
                }
                answer = requests.post(f"{line.url}/feedback", json=given, timeout=TIMEOUT_S)
                assert answer.ok, answer.text
        connection.close()

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(num_callers)]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ended(process: subprocess.Popen[str]) -> tuple[int, Any]:
    """Return the exit code and the JSON of the last line."""
    output, _ = process.communicate(timeout=ROLLOUT_S)
    print(output)
    return process.returncode, json.loads(output.strip().splitlines()[-1])


def assert_taken_back(drill: Drill, version: int, before: ModelTraffic, gate: str) -> None:
    """The champion has everything again, and the version says why."""
    traffic = drill.traffic()
    assert traffic.champion == before.champion
    assert not traffic.weights.get(version)
    assert version not in traffic.bundles
    tags = drill.client.get_model_version(drill.line.model, str(version)).tags
    assert tags[ROLLOUT_TAG] == "rolled_back"
    assert gate in tags[REASON_TAG]
    evidence = json.loads(tags[EVIDENCE_TAG])
    assert [g["name"] for g in evidence["gates"] if g["verdict"] == "breach"] == [gate]
    champion = drill.client.get_model_version_by_alias(drill.line.model, "champion")
    assert int(champion.version) == before.champion


def test_an_equal_candidate_is_promoted_though_its_rollout_is_killed_on_the_way(
    drill: Drill,
) -> None:
    before = drill.traffic()
    version = drill.register(lambda model: model)
    with calling(drill.line) as callers:
        process = drill.start(str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert drill.traffic().weights[version] == 10
        code, result = ended(drill.start("--resume"))
        assert code == 0, result
    assert callers.failures == []
    assert (result["status"], result["champion"]) == ("promoted", version)
    traffic = drill.traffic()
    assert (traffic.champion, traffic.previous_champion) == (version, before.champion)
    assert traffic.shadows == {}
    name = drill.line.model
    assert int(drill.client.get_model_version_by_alias(name, "champion").version) == version
    assert drill.client.get_model_version(name, str(version)).tags[ROLLOUT_TAG] == "promoted"


@pytest.mark.parametrize(
    ("change", "share", "gate"),
    [(erring, 0.2, "accuracy"), (slow, 0.0, "p99_latency")],
    ids=["errs", "slow"],
)
def test_a_worse_candidate_is_taken_back_and_no_caller_sees_an_error(
    drill: Drill, change: Callable[[ModelProto], ModelProto], share: float, gate: str
) -> None:
    before = drill.traffic()
    version = drill.register(change)
    with calling(drill.line) as callers:
        process = drill.start(str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        callers.marked_share = share
        code, result = ended(process)
    assert callers.failures == []
    assert (code, result["error"], result["status"]) == (1, "RolloutError", "rolled_back")
    assert result["stage"].startswith("canary-")
    assert_taken_back(drill, version, before, gate)


def test_one_that_raises_on_two_percent_costs_its_canary_share_and_no_more(drill: Drill) -> None:
    before = drill.traffic()
    version = drill.register(raising)
    with calling(drill.line, num_callers=6, labels=False) as callers:
        process = drill.start(str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        callers.marked_share = 0.02
        code, result = ended(process)
        failed = len(callers.failures)
        answered = callers.answered
        until(lambda: callers.answered > answered + 200, what="200 answers after it")
        # Marked images still come, and the champion answers them.
        assert len(callers.failures) == failed
    assert (code, result["status"]) == (1, "rolled_back")
    assert_taken_back(drill, version, before, "error_rate")
    assert failed > 0
    assert all(share > 0 and text.startswith("500") for share, text in callers.failures)
    # Two percent of a canary's share, and those that were in one batch with them.
    assert failed < 0.05 * (callers.answered + failed)


def test_without_callers_a_rollout_is_held_and_the_candidate_gets_nothing(drill: Drill) -> None:
    before = drill.traffic()
    version = drill.register(lambda model: model)
    code, result = ended(drill.start(str(version), "--step-timeout", "20"))
    assert (code, result["status"], result["stage"]) == (1, "held", "shadow")
    traffic = drill.traffic()
    assert traffic.champion == before.champion
    assert not traffic.weights.get(version)
    code, result = ended(drill.start("--abort"))
    assert (code, result["status"]) == (0, "aborted")
