"""Everything that may happen to a line in one sequence, while callers keep asking.

RAYLINE_CHAOS_REQUESTS=200000 makes it as long as it was measured once; CI runs it shorter.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from lib.config import Settings
from lib.errors import ServingError
from lib.line.layout import PROJECT_ROOT
from lib.serving import deploy, policy
from lib.serving.apply import apply
from lib.serving.bundle import ONNX_FILE, PT2_FILE, read_card, write_bundle
from lib.serving.client import ServeClient, live_applications
from lib.serving.plan import serve_config
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from tests.data_sources import mnist
from tests.e2e.clients import Counts, load, until
from tests.e2e.conftest import LiveLine
from tests.e2e.test_serving import replicas

NUM_REQUESTS = int(os.environ.get("RAYLINE_CHAOS_REQUESTS", "20000"))
NEW, BROKEN = 71, 72
RAW = {"Content-Type": "application/octet-stream"}


class Scene:
    """The line, and what can be done to it."""

    def __init__(self, line: LiveLine) -> None:
        os.environ.update(line.env)
        self.line = line
        self.settings = Settings.from_env(line.env)
        self.storage = Storage(line.storage)
        self.client = ServeClient(self.settings)
        self.by: dict[str, Any] = {"who": "test", "why": "chaos"}

    def traffic(self) -> tuple[policy.Policy, ModelTraffic]:
        base = policy.current(self.storage)
        assert base is not None
        return base, base.models["digits"]

    def bundle(self, number: int, *, broken: bool = False) -> str:
        """Publish a copy of the champion as another version, or one that can't be loaded."""
        _, traffic = self.traffic()
        champion = traffic.bundles[traffic.champion]
        card = replace(read_card(self.storage, champion), version=number)
        onnx, pt2 = (self.storage.read(f"{champion}/{name}") for name in (ONNX_FILE, PT2_FILE))
        return write_bundle(self.storage, card, b"broken" if broken else onnx, pt2)

    def serve(self, number: int, weight: float, *, broken: bool = False) -> None:
        base, traffic = self.traffic()
        bundles = {**traffic.bundles, number: self.bundle(number, broken=broken)}
        wanted = replace(traffic, bundles=bundles, weights={**traffic.weights, number: weight})
        apply(self.settings, self.storage, base, wanted, **self.by)

    def weights(self, weights: dict[int, float]) -> None:
        base, traffic = self.traffic()
        apply(self.settings, self.storage, base, replace(traffic, weights=weights), **self.by)

    def scale(self, application: str, **options: float) -> None:
        """Change autoscaling options of a live application."""
        live = copy.deepcopy(live_applications(self.client.details()))
        for deployment in live[application]["deployments"]:
            deployment["autoscaling_config"].update(options)
        self.client.apply(serve_config(self.settings, list(live.values())))

    def num(self, application: str) -> int:
        return len(replicas(self.client, application))

    def kill(self, application: str) -> None:
        before = replicas(self.client, application)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        until(
            lambda: bool(set(replicas(self.client, application)) - set(before)),
            what=f"a new replica of {application}",
        )

    def roll_out(self, folder: Path) -> None:
        """Deploy changed gateway code from another checkout."""
        for name in ("lib", "jobs", "serve_apps"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT_ROOT / name, folder / name, ignore=ignore)
        with (folder / "serve_apps" / "gateway.py").open("a") as file:
            file.write(f"\n# {folder.name}\n")
        before = set(replicas(self.client, "gateway"))
        done = subprocess.run(
            [sys.executable, "-m", "jobs.deploy", "--new-code"],
            cwd=folder,
            env=dict(self.line.env),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        until(
            lambda: not before & set(replicas(self.client, "gateway")) and self.num("gateway") > 1,
            deadline_s=180,
            what="gateways with the new code alone",
        )


@pytest.mark.timeout(1500)
def test_no_request_fails_whatever_changes(line: LiveLine, tmp_path: Path) -> None:
    scene = Scene(line)
    image = mnist("test")[0][0].tobytes()
    before, traffic = scene.traffic()
    champion = traffic.champion
    other = next(number for number in traffic.bundles if number != champion)
    with load(line.url, image) as counts:

        def then(what: str, change: Callable[[], object]) -> None:
            """Make a change; what comes after it is still answered."""
            change()
            answered = counts.answered
            until(lambda: counts.answered > answered + 200, what=f"200 answers after {what}")
            assert counts.failures == [], f"{what}: {counts.failures[:3]}"

        then("other weights", lambda: scene.weights({champion: 50.0, other: 50.0}))
        then("a new version", lambda: scene.serve(NEW, 10.0))
        then("a promotion", lambda: promote(scene, other))
        then("a rollback", lambda: deploy.rollback(scene.settings, scene.storage, **scene.by))
        then("a killed replica", lambda: scene.kill(f"digits-v{champion}"))
        then("a broken version", lambda: broken(scene))
        then("one gateway", lambda: gateways(scene, 1))
        then("three gateways", lambda: gateways(scene, 3))
        scene.scale("gateway", min_replicas=1, max_replicas=1)
        # The two that leave drain meanwhile.
        then("a promotion during a drain", lambda: promote(scene, other))
        then("two gateways", lambda: gateways(scene, 2))
        then("a version that was at zero", lambda: to_zero_and_back(scene, image))
        then("new gateway code", lambda: scene.roll_out(tmp_path / "project"))
        until(
            lambda: counts.answered >= NUM_REQUESTS,
            deadline_s=1200,
            what=f"{NUM_REQUESTS} answers",
        )
    assert counts.failures == []
    loses_at_most_what_is_inside(scene, image)
    base, now = scene.traffic()
    apply(scene.settings, scene.storage, base, before.models["digits"], **scene.by)
    deploy.deploy(scene.settings, scene.storage, **scene.by)
    assert now.champion == other


def promote(scene: Scene, version: int) -> None:
    made = deploy.promote(scene.settings, scene.storage, version, **scene.by)
    assert made["champion"] == version


def broken(scene: Scene) -> None:
    """A version that does not load changes nothing and leaves nothing."""
    generation = scene.traffic()[0].generation
    with pytest.raises(ServingError, match=f"digits-v{BROKEN} failed to start"):
        scene.serve(BROKEN, 50.0, broken=True)
    assert scene.traffic()[0].generation == generation
    until(
        lambda: f"digits-v{BROKEN}" not in scene.client.details()["applications"],
        what="the broken application's end",
    )


def gateways(scene: Scene, number: int) -> None:
    scene.scale("gateway", min_replicas=number, max_replicas=max(number, 1))
    until(lambda: scene.num("gateway") == number, deadline_s=180, what=f"{number} gateways")


def to_zero_and_back(scene: Scene, image: bytes) -> None:
    scene.serve(NEW, 0.0)
    name = f"digits-v{NEW}"
    scene.scale(name, downscale_delay_s=2, downscale_to_zero_delay_s=2)
    until(lambda: scene.num(name) == 0, deadline_s=120, what=f"{name} at zero")
    # The first request waits for it.
    answer = requests.post(
        f"{scene.line.url}/predict", image, headers={**RAW, "X-Model-Version": str(NEW)}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"] == NEW


def loses_at_most_what_is_inside(scene: Scene, image: bytes) -> None:
    num_clients = 8
    until(lambda: scene.num("gateway") >= 2, what="two gateways")

    def enough(counts: Counts) -> None:
        answered = counts.answered
        until(lambda: counts.answered > answered + 200, what="200 answers")

    with load(scene.line.url, image, num_clients=num_clients) as counts:
        enough(counts)
        scene.kill("gateway")
        enough(counts)
    assert len(counts.failures) <= num_clients, counts.failures
