"""The systems that are measured: each is deployed as its users would, with the same ONNX model."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.onnx
import numpy as np
import onnx
import psutil
import requests
from mlflow.models import infer_signature

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
from tests.bench import models, wrk
from tests.bench.parts import (
    OURS_PORT,
    PEERS_PORT,
    ROOT,
    SERVE_PEER_PORT,
    command,
    in_session,
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
    folder: Path
    body: str = "image.raw"
    """File in `folder` that is posted: raw pixels, or JSON where a system takes nothing else."""
    content_type: str = "application/octet-stream"


@contextmanager
def rayline(
    folder: Path, change_env: Callable[[dict[str, str]], dict[str, str]] = dict
) -> Iterator[list[System]]:
    """Deploy the real gateway and versions on a head of the line's, a model in each placement."""
    line = _ours(folder, make_line(folder / "ours", OURS_PORT))
    with running(line, "ray", change_env):
        say("serving: deploying rayline")
        _deploy_rayline(line)
        yield [
            _ray_system(
                placement, f"rayline {placement}, 2 versions 90/10", line, f"/{name}", folder
            )
            for placement, name in _PLACEMENTS.items()
        ]


@contextmanager
def rayline_alone(
    temp: Path, change_env: Callable[[dict[str, str]], dict[str, str]] = dict
) -> Iterator[list[System]]:
    """Deploy Rayline without a peer, in a new folder, with the model and the bodies of requests."""
    wrk.require()
    # Several parts may be measured in one run.
    folder = Path(tempfile.mkdtemp(prefix="a", dir=temp))
    models.write_bundles(Storage(str(folder / "storage")), num_versions=len(WEIGHTS))
    write_bodies(folder, models.sample_image())
    with rayline(folder, change_env) as systems:
        yield systems


def _ours(folder: Path, line: Line) -> Line:
    return dataclasses.replace(line, storage_uri=str(folder / "storage"))


def settings_of(folder: Path) -> Settings:
    """Return the settings of the line that `rayline` brought up in a folder."""
    env = {"RAYLINE_HOME": str(folder / "ours"), "RAYLINE_STORAGE": str(folder / "storage")}
    return _settings(Line.from_env(env))


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
        yield _ray_system(
            "serve", "Ray Serve's defaults, router + 2 versions 90/10", line, "", folder
        )


@contextmanager
def fastapi(folder: Path) -> Iterator[System]:
    """Start FastAPI on uvicorn, from this environment."""
    arguments = [sys.executable, "-m", "tests.bench.peers.fastapi_peer", *_numbers(folder, 0)]
    with _server(folder, "fastapi", arguments, "openapi.json", {}) as (base, processes):
        yield System(
            name="fastapi",
            title="FastAPI + uvicorn, 1 version, 1 process",
            url=f"{base}/predict",
            processes=processes,
            folder=folder,
        )


@contextmanager
def litserve(folder: Path) -> Iterator[System]:
    """Start LitServe, from the peers' environment."""
    script = str(ROOT / "tests/bench/peers/litserve_peer.py")
    arguments = [str(peers_python()), script, *_numbers(folder, 1)]
    with _server(folder, "litserve", arguments, "health", {}, port=1) as (base, processes):
        yield System(
            name="litserve",
            title="LitServe, 1 version, 1 worker, batches ≤ 64, JSON",
            url=f"{base}/predict",
            processes=processes,
            folder=folder,
            body="image.json",
            content_type="application/json",
        )


@contextmanager
def bentoml(folder: Path) -> Iterator[System]:
    """Start BentoML, from the peers' environment."""
    model, *shape, port = _numbers(folder, 2)
    arguments = [str(peers_python().with_name("bentoml")), "serve", "bentoml_peer:Digits"]
    arguments += ["--host", "127.0.0.1", "--port", port]
    arguments += ["--working-dir", str(ROOT / "tests/bench/peers")]
    env = {"BENCH_MODEL": model, "BENCH_SHAPE": ",".join(shape), "BENTOML_DO_NOT_TRACK": "true"}
    with _server(folder, "bentoml", arguments, "healthz", env, port=2) as (base, processes):
        yield System(
            name="bentoml",
            title="BentoML, 1 version, 1 worker, JSON",
            url=f"{base}/predict",
            processes=processes,
            folder=folder,
            body="image.json",
            content_type="application/json",
        )


@contextmanager
def mlflow_server(folder: Path) -> Iterator[System]:
    """Start MLflow's scoring server, from this environment, on the same ONNX file."""
    model, *_, port = _numbers(folder, 3)
    saved = folder / "mlflow-model"
    example = np.zeros((2, *models.SHAPE), np.uint8)
    signature = infer_signature(example, np.zeros((2, 10), np.float32))
    mlflow.onnx.save_model(onnx.load(model), str(saved), signature=signature)
    arguments = [str(Path(sys.executable).with_name("mlflow")), "models", "serve"]
    arguments += ["--model-uri", str(saved), "--env-manager", "local", "--workers", "1"]
    arguments += ["--host", "127.0.0.1", "--port", port]
    # It starts uvicorn by name.
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with _server(folder, "mlflow", arguments, "health", env, port=3) as (base, processes):
        yield System(
            name="mlflow",
            title="MLflow's scoring server, 1 version, 1 worker, JSON",
            url=f"{base}/invocations",
            processes=processes,
            folder=folder,
            body="inputs.json",
            content_type="application/json",
        )


def peers_python() -> Path:
    """Return Python of the peers' own environment; make that if it is missing."""
    home = ROOT / ".rayline" / "bench" / "peers"
    python = home / "bin" / "python"
    wanted = (ROOT / "tests/bench/peers/requirements.txt").read_text()
    done = home / "installed.txt"
    if not done.exists() or done.read_text() != wanted:
        say("serving: installing the peers in an environment of their own")
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "--clear", str(home)], check=True)
        requirements = str(ROOT / "tests/bench/peers/requirements.txt")
        install = [*uv, "pip", "install", "-q", "--python", str(python), "-r", requirements]
        subprocess.run(install, check=True)
        done.write_text(wanted)
    return python


def write_bodies(folder: Path, image: np.ndarray[Any, Any]) -> None:
    """Write the same image in every form that a system takes."""
    (folder / "image.raw").write_bytes(image.tobytes())
    encoded = base64.b64encode(image.tobytes()).decode()
    (folder / "image.json").write_text(json.dumps({"image": encoded}))
    (folder / "inputs.json").write_text(json.dumps({"inputs": image[None].tolist()}))


def _numbers(folder: Path, index: int) -> list[str]:
    """Return model file, shape and port, as the peers' scripts take them."""
    bundle = models.bundle(models.ISOLATED_NAME, 1)
    model = Storage(str(folder / "storage")).path(f"{bundle}/{ONNX_FILE}")
    return [model, *(str(number) for number in (*models.SHAPE, PEERS_PORT + index))]


@contextmanager
def _server(
    folder: Path,
    name: str,
    arguments: list[str],
    health: str,
    env: Mapping[str, str],
    *,
    port: int = 0,
) -> Iterator[tuple[str, Callable[[], list[psutil.Process]]]]:
    base = f"http://127.0.0.1:{PEERS_PORT + port}"
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    with command(
        arguments, env=merged, url=f"{base}/{health}", log=folder / f"{name}.log"
    ) as process:
        say(f"serving: {name} is up")
        # By session: LitServe's workers are no children of the process that was started.
        yield base, lambda: in_session(process.pid)


def _ray_system(name: str, title: str, line: Line, path: str, folder: Path) -> System:
    return System(
        name=name,
        title=title,
        url=f"{line.serve_url}/predict{path}",
        processes=lambda: find(line.line_id, line.private_dir, "ray"),
        folder=folder,
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
            headers = {"Content-Type": system.content_type, "X-Model-Version": "1"}
            body = (system.folder / system.body).read_bytes()
            try:
                answer = requests.post(system.url, body, headers=headers, timeout=30)
            except requests.RequestException as error:
                last = str(error)
                return False
            last = f"{answer.status_code} {answer.text[:1000]}"
            return answer.ok

        try:
            wait_until(answers, deadline_s=_READY_S, what=f"first answer of {system.name}")
        except ServingError as error:
            raise BenchError(f"{error}; last: {last}") from error
        got = _probabilities(last.split(" ", 1)[1])
        if not np.allclose(got, expected, atol=1e-5):
            raise BenchError(f"{system.name} answers {got}, the model says {expected}")


def _probabilities(text: str) -> list[float]:
    content = json.loads(text)
    if "predictions" in content:
        found = content["predictions"]
        return list((found["probabilities"] if isinstance(found, dict) else found)[0])
    found = content["probabilities"]
    return list(found.values()) if isinstance(found, dict) else list(found)
