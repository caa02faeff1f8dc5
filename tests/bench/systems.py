"""The systems that are measured: each is deployed as its users would, with the same ONNX model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from lib.config import Settings
from lib.errors import ServingError
from lib.line.layout import Line
from lib.line.processes import find
from lib.serving import policy
from lib.serving.apply import apply
from lib.serving.bundle import ONNX_FILE
from lib.serving.client import ServeClient, wait_until
from lib.serving.predictor import OnnxPredictor
from lib.serving.traffic import COLOCATED, ISOLATED, ModelTraffic
from lib.storage import Storage
from tests.bench import models
from tests.bench.parts import (
    FASTAPI_PORT,
    OURS_PORT,
    ROOT,
    SERVE_PEER_PORT,
    command,
    make_line,
    running,
)
from tests.bench.report import BenchError, say

WEIGHTS = (90, 10)
_PLACEMENTS = {ISOLATED: models.ISOLATED_NAME, COLOCATED: models.COLOCATED_NAME}
_READY_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """Something that answers `POST /predict`."""

    name: str
    title: str
    url: str
    processes: Callable[[], list[psutil.Process]]
    """Everything that it runs."""


@contextmanager
def rayline(folder: Path) -> Iterator[list[System]]:
    """Deploy the real gateway and versions on a head of the line's, a model in each placement."""
    line = dataclasses.replace(
        make_line(folder / "ours", OURS_PORT), storage_uri=str(folder / "storage")
    )
    with running(line, "ray"):
        say("serving: deploying rayline")
        _deploy_rayline(line)
        yield [
            _ray_system(placement, f"rayline {placement}, 2 versions 90/10", line, f"/{name}")
            for placement, name in _PLACEMENTS.items()
        ]


def _deploy_rayline(line: Line) -> None:
    settings, storage = _settings(line), Storage(line.storage)
    for placement, name in _PLACEMENTS.items():
        bundles = {v: models.bundle(name, v) for v in range(1, len(WEIGHTS) + 1)}
        weights = dict(zip(bundles, WEIGHTS, strict=True))
        traffic = ModelTraffic(weights=weights, bundles=bundles, champion=1, placement=placement)
        own = dataclasses.replace(settings, model=name)
        apply(own, storage, policy.current(storage), traffic, who="bench", why="bench")


@contextmanager
def serve_defaults(folder: Path) -> Iterator[System]:
    """Deploy the peer's application on a head that has none of the line's Serve settings."""
    line = make_line(folder / "defaults", SERVE_PEER_PORT)

    def without_settings(env: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in env.items() if not name.startswith("RAY_SERVE_")}
        return kept | {"PYTHONPATH": str(ROOT)}

    with running(line, "ray", without_settings):
        say("serving: deploying Ray Serve's defaults")
        storage = Storage(str(folder / "storage"))
        files = [
            storage.path(f"{models.bundle(models.ISOLATED_NAME, version)}/{ONNX_FILE}")
            for version in range(1, len(WEIGHTS) + 1)
        ]
        client = _client(line)
        client.apply(
            {
                "http_options": {"host": "127.0.0.1", "port": line.ports["http"]},
                "applications": [
                    {
                        "name": "defaults",
                        "import_path": "tests.bench.serve_peer:build",
                        "args": {
                            "models": files,
                            "weights": list(WEIGHTS),
                            "shape": list(models.SHAPE),
                        },
                    }
                ],
            }
        )
        _await_running(client, ["defaults"])
        yield _ray_system("serve", "Ray Serve's defaults, router + 2 versions 90/10", line, "")


@contextmanager
def fastapi(folder: Path) -> Iterator[System]:
    model = Storage(str(folder / "storage")).path(
        f"{models.bundle(models.ISOLATED_NAME, 1)}/{ONNX_FILE}"
    )
    arguments = [sys.executable, "-m", "tests.bench.fastapi_peer", model]
    arguments += [str(number) for number in (*models.SHAPE, FASTAPI_PORT)]
    base = f"http://127.0.0.1:{FASTAPI_PORT}"
    log = folder / "fastapi.log"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with command(arguments, env=env, url=f"{base}/openapi.json", log=log) as process:
        say("serving: FastAPI + uvicorn is up")
        whole = psutil.Process(process.pid)
        yield System(
            name="fastapi",
            title="FastAPI + uvicorn, 1 version, 1 process",
            url=f"{base}/predict",
            processes=lambda: [whole, *whole.children(recursive=True)],
        )


def _ray_system(name: str, title: str, line: Line, path: str) -> System:
    return System(
        name=name,
        title=title,
        url=f"{line.serve_url}/predict{path}",
        processes=lambda: find(line.line_id, line.ray_temp_dir, "ray"),
    )


def _settings(line: Line) -> Settings:
    return Settings.from_env(line.settings_env())


def _client(line: Line) -> ServeClient:
    return ServeClient(_settings(line))


def _await_running(client: ServeClient, names: Sequence[str]) -> None:
    def all_running() -> bool:
        try:
            applications = client.details().get("applications", {})
        except ServingError:  # While replicas start, two cores are busy for long.
            return False
        for name in names:
            if applications.get(name, {}).get("status") in {"DEPLOY_FAILED", "UNHEALTHY"}:
                raise BenchError(f"{name} did not start: {applications[name]}")
        return all(applications.get(name, {}).get("status") == "RUNNING" for name in names)

    wait_until(all_running, deadline_s=_READY_S, what=f"start of {', '.join(names)}")


def check_answers(
    systems: Sequence[System], image: np.ndarray[Any, Any], predictor: OnnxPredictor
) -> None:
    """See that every system gives the probabilities of version 1, computed here."""
    expected = predictor.predict(image[None])[0]
    for system in systems:
        last = "no answer"

        def answers(system: System = system) -> bool:
            nonlocal last
            try:
                answer = requests.post(
                    system.url,
                    image.tobytes(),
                    headers={
                        "Content-Type": "application/octet-stream",
                        "X-Model-Version": "1",
                    },
                    timeout=30,
                )
            except requests.RequestException as error:
                last = str(error)
                return False
            last = f"{answer.status_code} {answer.text[:500]}"
            return answer.ok

        try:
            wait_until(answers, deadline_s=_READY_S, what=f"first answer of {system.name}")
        except ServingError as error:
            raise BenchError(f"{error}; last: {last}") from error
        got = _probabilities(last.split(" ", 1)[1])
        if not np.allclose(got, expected, atol=1e-5):
            raise BenchError(f"{system.name} answers {got}, the model says {expected}")


def _probabilities(text: str) -> list[float]:
    found = json.loads(text)["probabilities"]
    return list(found.values()) if isinstance(found, dict) else list(found)
