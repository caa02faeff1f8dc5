"""A RayService is told what is live, by an API that asks for the pod's token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib.config import Settings
from lib.errors import ServingError
from lib.serving import apply, plan, policy, rayservice
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage

PATH = "/apis/ray.io/v1/namespaces/team/rayservices/rayline-serve"
TRAFFIC = ModelTraffic(weights={1: 100.0}, bundles={1: "b/1"}, champion=1)


@dataclass
class Kubernetes:
    """The part of its API that is called: one RayService, which one token may patch."""

    url: str
    account: Path
    may: bool = True
    spec: dict[str, Any] = field(default_factory=lambda: {"rayClusterConfig": {"kept": True}})
    num_patches: int = 0

    def answer(self, path: str, headers: Any, body: bytes) -> int:
        if headers["Authorization"] != "Bearer right":
            return 401
        if path.partition("?")[0] != PATH:
            return 404
        if not self.may:
            return 403
        if headers["Content-Type"] != "application/merge-patch+json":
            return 415
        self.spec |= json.loads(body)["spec"]
        self.num_patches += 1
        return 200


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(there.answer(self.path, self.headers, body))
            self.end_headers()
            self.wfile.write(b"said so")

        def log_message(self, *_: Any) -> None:
            pass

    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("right\n")
    (account / "namespace").write_text("team")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Kubernetes(f"http://127.0.0.1:{server.server_port}", account)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield there
    server.shutdown()
    thread.join()
    server.server_close()


def patch(kubernetes: Kubernetes, name: str = "rayline-serve") -> None:
    change = {"spec": {"serveConfigV2": "applications: []"}}
    rayservice.patch(name, change, api=kubernetes.url, account=kubernetes.account)


def test_the_text_is_changed_and_the_rest_is_left(kubernetes: Kubernetes) -> None:
    patch(kubernetes)
    expected = {"rayClusterConfig": {"kept": True}, "serveConfigV2": "applications: []"}
    assert kubernetes.spec == expected


def test_a_refusal_says_what_to_do(kubernetes: Kubernetes) -> None:
    with pytest.raises(
        ServingError, match=r"RayService other in namespace team.*none of that name"
    ):
        patch(kubernetes, "other")
    kubernetes.may = False
    with pytest.raises(ServingError, match=r"base/access.yaml \(403 said so\)"):
        patch(kubernetes)
    (kubernetes.account / "token").write_text("wrong")
    with pytest.raises(ServingError, match="token is not taken") as caught:
        patch(kubernetes)
    assert "wrong" not in str(caught.value)
    kubernetes.url = "http://127.0.0.1:1"
    with pytest.raises(ServingError, match="can't be told"):
        patch(kubernetes)
    (kubernetes.account / "token").unlink()
    with pytest.raises(ServingError, match="RAYLINE_RAYSERVICE=rayline-serve.*make rayservice"):
        patch(kubernetes)


def test_a_deploy_tells_it_before_traffic_goes_there_and_after_what_left(
    kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    settings = Settings(storage=storage.root, mlflow_uri="http://m", rayservice="rayline-serve")
    before = {"digits": replace(TRAFFIC, bundles={1: "b/1", 2: "b/2"})}
    config = plan.serve_config(settings, plan.applications(settings, {}, "file:///c.zip", before))
    sent = [config]
    generations = []

    class Serve:
        def details(self) -> dict[str, Any]:
            live = {app["name"]: {"deployed_app_config": app} for app in sent[-1]["applications"]}
            return {"applications": live}

        def apply(self, config: dict[str, Any]) -> None:
            sent.append(config)

    def told(name: str, change: dict[str, Any]) -> None:
        current = policy.current(storage)
        generations.append(current.generation if current else 0)
        rayservice_patch(name, change, api=kubernetes.url, account=kubernetes.account)

    rayservice_patch = rayservice.patch
    monkeypatch.setattr(rayservice, "patch", told)
    monkeypatch.setattr(apply, "ServeClient", lambda settings: Serve())
    for phase in ("_bring_up", "_wait_followed", "_probe"):
        monkeypatch.setattr(apply, phase, lambda *_, **__: None)

    kubernetes.may = False
    with pytest.raises(ServingError, match="403"):
        apply.apply(settings, storage, None, TRAFFIC, who="me", why="test")
    assert policy.current(storage) is None
    kubernetes.may = True
    made = apply.apply(settings, storage, None, TRAFFIC, who="me", why="test")
    assert generations == [0, 0, made.generation]
    names = [
        app["name"] for app in yaml.safe_load(kubernetes.spec["serveConfigV2"])["applications"]
    ]
    assert names == ["digits-v1", "gateway"]
    # Nothing leaves the second time; without the setting nobody is told.
    apply.apply(settings, storage, made, TRAFFIC, who="me", why="test")
    apply.apply(replace(settings, rayservice=""), storage, made, TRAFFIC, who="me", why="test")
    assert kubernetes.num_patches == 3
