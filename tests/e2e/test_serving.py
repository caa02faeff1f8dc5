"""What a caller of the live line sees: answers, shares, errors, and losses that go unnoticed."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests

from lib.config import Settings
from lib.data.manifest import Manifest, load_manifest
from lib.serving.bundle import read_card
from lib.serving.client import ServeClient
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from lib.watch.labels import read_labels
from lib.watch.segments import MAX_US
from tests.e2e.clients import load, post_all, until
from tests.e2e.conftest import LiveLine

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def storage(line: LiveLine) -> Storage:
    return Storage(line.storage)


@pytest.fixture(scope="module")
def traffic(line: LiveLine) -> Any:
    return requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()


@pytest.fixture(scope="module")
def manifest(storage: Storage, traffic: Any) -> Manifest:
    champion = traffic["models"]["digits"]["champion"]
    return load_manifest(storage, traffic["versions"][f"digits/{champion}"]["data_digest"])


@pytest.fixture(scope="module")
def images_NHWC(storage: Storage, manifest: Manifest) -> np.ndarray[Any, Any]:
    shards = [shard.path for shard in manifest.shards if shard.split == "test"]
    pixels = [
        pixels
        for path in shards
        for pixels in pq.read_table(storage.path(path))["image"].to_pylist()
    ]
    return np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *manifest.shape)


@pytest.fixture(scope="module")
def serve_api(line: LiveLine) -> ServeClient:
    os.environ.update(line.env)
    return ServeClient(Settings.from_env(line.env))


def replicas(serve_api: ServeClient, application: str) -> dict[str, int]:
    """Return replica → process id of those that are running."""
    details = serve_api.details()["applications"][application]
    return {
        replica["replica_id"]: replica["pid"]
        for deployment in details["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def test_every_version_is_an_application_of_its_own(serve_api: ServeClient, traffic: Any) -> None:
    applications = serve_api.details()["applications"]
    versions = [f"digits-v{version}" for version in traffic["models"]["digits"]["bundles"]]
    assert len(versions) == 2
    for name in ("gateway", *versions):
        assert applications[name]["status"] == "RUNNING"


def test_all_test_images_over_http_give_the_labels_computed_offline(
    line: LiveLine, storage: Storage, traffic: Any, images_NHWC: np.ndarray[Any, Any]
) -> None:
    for version, bundle in traffic["models"]["digits"]["bundles"].items():
        predictor = load_predictor(storage, bundle, read_card(storage, bundle))
        offline = predictor.predict(images_NHWC).argmax(axis=1).tolist()
        pinned = {"X-Model-Version": version}
        answers = post_all(line.url, [(image.tobytes(), pinned) for image in images_NHWC])
        assert {answer["model_version"] for answer in answers} == {int(version)}
        assert [answer["digit"] for answer in answers] == offline


def test_without_a_pin_each_version_answers_its_share_of_the_keys(
    line: LiveLine, traffic: Any, images_NHWC: np.ndarray[Any, Any]
) -> None:
    image = images_NHWC[0].tobytes()
    keyed = [(image, {"X-Routing-Key": f"user-{number}"}) for number in range(8000)]
    answers = post_all(line.url, keyed)
    weights = traffic["models"]["digits"]["weights"]
    for version, weight in weights.items():
        share = sum(answer["model_version"] == int(version) for answer in answers) / len(answers)
        assert share == pytest.approx(weight / sum(weights.values()), abs=0.01)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {"Content-Type": "application/json"}, 400),
        (b'{"image": [NaN]}', {"Content-Type": "application/json"}, 400),
        (b'{"image": [[1, 2]]}', {"Content-Type": "application/json"}, 422),
        (b"123", {"Content-Type": "application/octet-stream"}, 422),
        (b"123", {"Content-Type": "text/plain"}, 415),
        (b"\x89PNG\r\n\x1a\nbroken", {"Content-Type": "image/png"}, 400),
        (b"123", {"Content-Type": "application/octet-stream", "X-Model-Version": "99"}, 404),
        (bytes(17 * 2**20), {"Content-Type": "application/octet-stream"}, 413),
    ],
)
def test_every_error_of_the_contract_comes_through_the_whole_line(
    line: LiveLine, body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = requests.post(f"{line.url}/predict", body, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == status
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
    assert len(answer.json()["error"]) > 10


def test_feedback_is_under_the_storage_root_when_it_is_acknowledged(
    line: LiveLine, storage: Storage
) -> None:
    body = {"request_id": "e2e-feedback", "label": "7"}
    answer = requests.post(f"{line.url}/feedback", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    labels = read_labels(storage, line.model, start_us=0, end_us=MAX_US).to_pylist()
    assert [row["label"] for row in labels if row["request_id"] == "e2e-feedback"] == [7]


def test_a_killed_replica_of_a_version_fails_no_request(
    line: LiveLine, serve_api: ServeClient, traffic: Any, images_NHWC: np.ndarray[Any, Any]
) -> None:
    application = f"digits-v{traffic['models']['digits']['champion']}"
    before = replicas(serve_api, application)
    with load(line.url, images_NHWC[0].tobytes()) as counts:
        until(lambda: counts.answered > 200, what="200 answers before the kill")
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        until(
            lambda: bool(set(replicas(serve_api, application)) - set(before)),
            what=f"a new replica of {application}",
        )
        answered = counts.answered
        until(lambda: counts.answered > answered + 200, what="200 answers after it")
    assert counts.failures == []


def test_one_killed_gateway_of_two_loses_at_most_the_requests_inside_it(
    line: LiveLine, serve_api: ServeClient, images_NHWC: np.ndarray[Any, Any]
) -> None:
    until(lambda: len(replicas(serve_api, "gateway")) >= 2, what="two gateways")
    before = replicas(serve_api, "gateway")
    num_clients = 8
    with load(line.url, images_NHWC[0].tobytes(), num_clients=num_clients) as counts:
        until(lambda: counts.answered > 200, what="200 answers before the kill")
        os.kill(next(iter(before.values())), signal.SIGKILL)
        answered = counts.answered
        until(lambda: counts.answered > answered + 200, what="200 answers after the kill")
        until(
            lambda: len(set(replicas(serve_api, "gateway")) - set(before)) >= 1,
            what="a gateway in its place",
        )
    assert len(counts.failures) <= num_clients, counts.failures
    until(lambda: len(replicas(serve_api, "gateway")) >= 2, what="two gateways again")


def test_the_protocol_and_the_docs_are_served(line: LiveLine, manifest: Manifest) -> None:
    metadata = requests.get(f"{line.url}/v2/models/digits", timeout=TIMEOUT_S).json()
    shape = [2, *metadata["inputs"][0]["shape"][1:]]
    assert tuple(shape[1:]) == manifest.shape
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": shape,
        "data": [0] * int(np.prod(shape)),
    }
    answer = requests.post(
        f"{line.url}/v2/models/digits/infer", json={"inputs": [tensor]}, timeout=TIMEOUT_S
    )
    output = answer.json()["outputs"][0]
    assert output["shape"] == [2, manifest.num_classes]
    assert np.reshape(output["data"], output["shape"]).sum(axis=1) == pytest.approx([1, 1])
    assert requests.get(f"{line.url}/docs", timeout=TIMEOUT_S).status_code == 200
    document = requests.get(f"{line.url}/openapi.json", timeout=TIMEOUT_S)
    assert "/predict" in json.loads(document.text)["paths"]
