"""The gateway's HTTP contract over a stand-in model, without Serve."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import StorageError
from lib.serving import payload
from lib.serving.batcher import Unavailable
from lib.serving.bundle import Card
from lib.serving.feedback import PROBE_ID, new_request_id, second_of
from lib.serving.router import Images, Probabilities, Replicas, Router, unless_gone
from lib.storage import Storage
from lib.watch.predictions import joined, num_answers, read, read_labels
from lib.watch.recorder import Recorder
from lib.watch.segments import MAX_US
from serve_apps.asgi import App
from serve_apps.fast_lane import FastLane
from tests.unit.serving_parts import (
    Response,
    app_over,
    card,
    gateway,
    make_replicas,
    picture,
    publish,
    request,
)

RAW = {"content-type": "application/octet-stream"}
JSON = {"content-type": "application/json"}
IMAGE = bytes([1] + [0] * 23)
CLASSES = ("square", "circle", "star")


def run(tmp_path: Path, scenario: Callable[[App], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 90, 2: 10})
        await scenario(await gateway(storage, **options))

    asyncio.run(main())


def test_an_answer_carries_label_probabilities_version_and_request_id(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        headers = {**RAW, "X-Request-Id": "abc-1", "X-Model-Version": "2"}
        answer = await request(app, "POST", "/predict", IMAGE, headers)
        assert answer.status == 200
        assert answer.headers["x-model-version"] == "2"
        assert answer.json == {
            "label": "circle",
            "digit": 1,
            "probabilities": [0.0, 1.0, 0.0],
            "model": "shapes",
            "model_version": 2,
            "request_id": "abc-1",
        }
        png = picture(np.full((4, 6), 2, np.uint8))
        named = await request(app, "POST", "/predict/shapes", png, {"content-type": "image/png"})
        assert named.json["label"] == "star"

    run(tmp_path, scenario)


def test_a_routing_key_is_sticky_and_keys_are_shared_by_weight(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        versions = []
        for number in range(2000):
            headers = {**RAW, "X-Routing-Key": f"user-{number}"}
            first = await request(app, "POST", "/predict", IMAGE, headers)
            again = await request(app, "POST", "/predict", IMAGE, headers)
            assert first.json["model_version"] == again.json["model_version"]
            versions.append(first.json["model_version"])
        assert versions.count(2) / len(versions) == pytest.approx(0.1, abs=0.02)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/predict", IMAGE, {**RAW, "x-model-version": "3"}, 404, "there are: 1, 2"),
        ("POST", "/predict", IMAGE, {**RAW, "x-model-version": "latest"}, 404, "there are: 1, 2"),
        ("POST", "/predict", IMAGE, {**RAW, "x-model-version": "²"}, 404, "there are: 1, 2"),
        ("POST", "/predict/cats", IMAGE, RAW, 404, "there are: shapes"),
        ("POST", "/feedback", b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        ("POST", "/predict", IMAGE, {**RAW, "content-length": "9" * 5000}, 413, "larger"),
        ("POST", "/predict", IMAGE, {"content-type": "a/b"}, 415, "send image/png"),
        ("POST", "/predict", b"123", RAW, 422, "24 bytes"),
        ("POST", "/predict", IMAGE, {**RAW, "content-length": "99999999"}, 413, "larger"),
        ("POST", "/predict", IMAGE, {**RAW, "content-length": "x"}, 413, "larger"),
        ("GET", "/predict", b"", {}, 405, "takes POST"),
        ("GET", "/nothing", b"", {}, 404, "see /docs"),
        ("POST", "/feedback", b"{", JSON, 400, "malformed JSON"),
        ("POST", "/feedback", b"[]", JSON, 422, "send"),
        ("POST", "/feedback", b'{"request_id": "a"}', JSON, 422, "send"),
        ("POST", "/feedback", b'{"request_id": "/", "label": 1}', JSON, 422, "request_id"),
        ("POST", "/feedback", b'{"request_id": "a", "label": 3}', JSON, 422, "0–2"),
        ("POST", "/feedback", b'{"request_id": "a", "label": "cat"}', JSON, 422, "square"),
        ("POST", "/feedback", b'{"request_id": "a", "label": [1]}', JSON, 422, "square"),
        ("POST", "/feedback", b'{"request_id": "a", "label": 1, "index": -1}', JSON, 422, "index"),
        ("POST", "/feedback", b'{"request_id": "a", "label": 1, "index": "0"}', JSON, 422, "index"),
        ("GET", "/v2/models/cats", b"", {}, 404, "shapes"),
        ("GET", "/v2/models/shapes/versions/9", b"", {}, 404, "1, 2"),
        ("POST", "/v2/models/shapes/infer", b"[]", {}, 400, "JSON object"),
        ("POST", "/v2/models/shapes/infer", b"{}", {}, 422, "inputs"),
    ],
)
def test_every_error_of_the_contract_says_what_to_do(
    tmp_path: Path,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    message: str,
) -> None:
    async def scenario(app: App) -> None:
        latin = {name: value.encode().decode("latin-1") for name, value in headers.items()}
        answer = await request(app, method, path, body, latin)
        assert answer.status == status, answer.body
        assert message in answer.json["error"]

    run(tmp_path, scenario)


def test_an_oversize_body_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.bodies.MAX_BODY_BYTES", 1500)

    async def scenario(app: App) -> None:
        # No Content-Length, as with chunked transfer.
        answer = await request(app, "POST", "/predict", bytes(4000), RAW)
        assert answer.status == 413

    run(tmp_path, scenario)


def bare_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(body) + stream.flush()


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("Deflate", bare_deflate),
        ("identity", bytes),
    ],
)
def test_compressed_bodies_are_answered_as_plain_ones(
    tmp_path: Path, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 6, 1]}
    header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 24}}]}).encode()

    async def scenario(app: App) -> None:
        headers = {**RAW, "Content-Encoding": encoding}
        answer = await request(app, "POST", "/predict", encode(IMAGE), headers)
        assert (answer.status, answer.json["label"]) == (200, "circle")
        # The lengths in the headers of the protocol are those before compression.
        headers["Inference-Header-Content-Length"] = str(len(header))
        path = "/v2/models/shapes/infer"
        answer = await request(app, "POST", path, encode(header + IMAGE), headers)
        assert answer.json["outputs"][0]["data"] == [0, 1, 0]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(bytes(16 * 2**20 + 1)), "gzip", 413),
        (gzip.compress(IMAGE)[:-9], "gzip", 400),
        (gzip.compress(IMAGE) * 2, "gzip", 400),
        (IMAGE, "gzip", 400),
        (IMAGE, "br", 415),
        (gzip.compress(gzip.compress(IMAGE)), "gzip, gzip", 415),
    ],
)
def test_a_compressed_body_that_can_not_be_taken_gets_its_status(
    tmp_path: Path, body: bytes, encoding: str, status: int
) -> None:
    async def scenario(app: App) -> None:
        headers = {**RAW, "Content-Encoding": encoding}
        answer = await request(app, "POST", "/predict", body, headers)
        assert answer.status == status, answer.body
        assert ("accept-encoding" in answer.headers) == (status == 415)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"priority": 3}},
        {"parameters": [1]},
        {"outputs": [{"name": "probabilities", "parameters": {"classification": 2}}]},
        {"input_parameters": {"shared_memory_region": "x"}},
    ],
)
def test_parameters_that_are_not_honoured_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 6, 1], "data": [0] * 24}
    if "input_parameters" in change:
        tensor["parameters"] = change["input_parameters"]

    async def scenario(app: App) -> None:
        body = json.dumps({"inputs": [tensor], **change}).encode()
        answer = await request(app, "POST", "/v2/models/shapes/infer", body)
        assert (answer.status, "parameters" in answer.json["error"]) == (400, True)

    run(tmp_path, scenario)


def test_head_is_a_get_without_a_body_and_405_says_what_is_allowed(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        for path in ("/", "/docs", "/v2/health/live", "/v2/health/ready", "/v2/models/shapes"):
            got, head = [await request(app, method, path) for method in ("GET", "HEAD")]
            assert (head.status, head.body) == (200, b"")
            assert head.headers["content-length"] == str(len(got.body))
        refused = await request(app, "HEAD", "/predict")
        assert (refused.status, refused.headers["allow"]) == (405, "OPTIONS, POST")
        assert refused.json["request_id"]
        for path in ("/traffic", "/", "/console/console.js"):
            for method, status in (("POST", 405), ("OPTIONS", 204)):
                answer = await request(app, method, path)
                assert (answer.status, answer.headers["allow"]) == (status, "GET, HEAD, OPTIONS")
        asked = await request(app, "OPTIONS", "/v2/models/shapes/versions/1/infer")
        assert (asked.status, asked.body, asked.headers["allow"]) == (204, b"", "OPTIONS, POST")
        assert (await request(app, "OPTIONS", "/nothing")).status == 404

    run(tmp_path, scenario)


def test_a_slash_at_the_end_of_a_path_changes_nothing(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        for path in ("/predict/", "/predict/shapes/"):
            assert (await request(app, "POST", path, IMAGE, RAW)).json["label"] == "circle"
        for path in ("/v2/", "/v2/models/shapes/", "/traffic/", "/docs/"):
            assert (await request(app, "GET", path)).status == 200
        assert (await request(app, "POST", "/v2/models/shapes/infer/", b"{}")).status == 422
        assert (await request(app, "GET", "/predict/")).status == 405

    run(tmp_path, scenario)


def test_an_unusable_request_id_is_replaced(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        # As Kong makes them, and others.
        for given in ("f47ac10b-58cc#1", "a b", "x" * 129, ""):
            headers = {**RAW, "X-Request-Id": given, "X-Model-Version": ""}
            answer = await request(app, "POST", "/predict", IMAGE, headers)
            assert answer.status == 200
            assert second_of(answer.json["request_id"]) is not None
            refused = await request(app, "GET", "/nothing", b"", headers)
            assert second_of(refused.json["request_id"]) is not None
        refused = await request(app, "GET", "/nothing", b"", {"X-Request-Id": "mine"})
        assert refused.json["request_id"] == "mine"

    run(tmp_path, scenario)


def test_what_is_large_is_compressed_for_who_takes_it(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        for path in ("/docs/swagger-ui.css", "/openapi.json"):
            plain = await request(app, "GET", path)
            packed = await request(app, "GET", path, b"", {"Accept-Encoding": "gzip"})
            assert (packed.status, packed.headers["content-encoding"]) == (200, "gzip")
            assert gzip.decompress(packed.body) == plain.body
            assert len(packed.body) < len(plain.body) / 3

    run(tmp_path, scenario)


def test_a_websocket_is_refused_before_it_is_accepted(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        scope: dict[str, Any] = {"type": "websocket", "path": "/predict", "headers": []}
        await app(scope, receive, send)
        await FastLane(app, refuses=False)(scope, receive, send)
        assert sent == ["websocket.close"] * 2

    run(tmp_path, scenario)


def test_feedback_is_on_disk_when_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        given: list[int] = []
        for label in (1, "star"):
            body = json.dumps({"request_id": "abc", "label": label}).encode()
            assert (await request(app, "POST", "/feedback", body, JSON)).json["stored"] is True
            given.append(CLASSES.index(label) if isinstance(label, str) else label)
            labels = read_labels(Storage(str(tmp_path)), "shapes", start_us=0, end_us=MAX_US)
            assert [(row["request_id"], row["label"]) for row in labels.to_pylist()] == [
                ("abc", given[-1])
            ]
        assert labels["is_contradicted"].to_pylist() == [True]

    run(tmp_path, scenario)


def test_a_label_that_can_not_be_stored_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Storage, relative: str, content: Any) -> None:
        raise StorageError("no space left")

    async def scenario(app: App) -> None:
        body = json.dumps({"request_id": "abc", "label": 1}).encode()
        monkeypatch.setattr(Storage, "write", full)
        answer = await request(app, "POST", "/feedback", body, JSON)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        monkeypatch.undo()
        assert (await request(app, "POST", "/feedback", body, JSON)).status == 200
        labels = read_labels(Storage(str(tmp_path)), "shapes", start_us=0, end_us=MAX_US)
        assert labels["label"].to_pylist() == [1]

    run(tmp_path, scenario)


async def feedback(app: App, request_id: str, index: int = 0) -> Any:
    body = json.dumps({"request_id": request_id, "label": 1, "index": index}).encode()
    answer = await request(app, "POST", "/feedback", body, JSON)
    assert (answer.status, answer.json["stored"]) == (200, True)
    return answer.json["known"]


def test_an_answer_has_one_id_by_which_its_label_is_joined(tmp_path: Path) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 6, 1], "data": [1] + 23 * [0]}

    async def scenario(app: App) -> None:
        path = "/v2/models/shapes/infer"
        body = json.dumps({"id": "order-17", "inputs": [tensor]}).encode()
        # As a proxy adds it.
        answer = await request(app, "POST", path, body, {"X-Request-Id": "proxy-1"})
        assert answer.json["id"] == "order-17"
        unnamed = await request(app, "POST", path, json.dumps({"inputs": [tensor]}).encode())
        ids = ["order-17", unnamed.json["id"]]
        ids.append((await request(app, "POST", "/predict", IMAGE, RAW)).json["request_id"])
        # In memory alone, then in the log.
        for _ in range(2):
            assert [await feedback(app, request_id) for request_id in ids] == [True] * 3
            await logged(app, tmp_path)
        rows = joined(Storage(str(tmp_path)), "shapes", start_us=0, end_us=MAX_US).to_pylist()
        assert {row["request_id"]: row["label"] for row in rows} == dict.fromkeys(ids, 1)
        for wrong in ("a/b", "x" * 129):
            body = json.dumps({"id": wrong, "inputs": [tensor]}).encode()
            refused = await request(app, "POST", path, body)
            assert (refused.status, "`id`" in refused.json["error"]) == (400, True)

    run(tmp_path, scenario)


def test_feedback_says_whether_there_is_an_answer_that_it_is_for(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        assert await feedback(app, "nobody") is False
        await request(app, "POST", "/predict", IMAGE, {**RAW, "X-Request-Id": "one"})
        assert await feedback(app, "one", index=1) is False
        assert await feedback(app, "one") is True
        await request(app, "POST", "/predict", IMAGE, {**RAW, "X-Request-Id": "one"})
        # Used twice: which of the answers is meant?
        assert await feedback(app, "one") is False
        await logged(app, tmp_path)
        assert await feedback(app, "one") is False
        # Answered by another gateway, which writes into the same log.
        other = await gateway(Storage(str(tmp_path)))
        answer = await request(other, "POST", "/predict", IMAGE, RAW)
        assert await feedback(app, answer.json["request_id"]) is False
        await logged(other, tmp_path)
        assert await feedback(app, answer.json["request_id"]) is True

    run(tmp_path, scenario)


def test_the_answer_to_an_old_label_is_found_by_the_time_in_its_id(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    now_s = 1_800_014_400.0
    old_id = f"{int(now_s) - 20 * 86_400:08x}" + "0" * 24
    recorder = Recorder(storage, clock=lambda: now_s - 20 * 86_400)
    answers: dict[str, Any] = {"caller": "day", "latency_s": 0.1}
    images, probabilities = np.zeros((1, 4, 6, 1), np.uint8), np.eye(3, dtype=np.float32)[:1]
    recorder.add(card(), images, probabilities, request_id=old_id, **answers)
    recorder.close()
    found = partial(num_answers, storage, "shapes", old_id, 0)
    second = second_of(old_id)
    assert second == now_s - 20 * 86_400
    assert found(start_us=(second - 60) * 10**6, end_us=(second + 60) * 10**6) == 1
    assert found(start_us=0, end_us=int(now_s * 1e6)) == 1
    assert found(start_us=0, end_us=int(now_s * 1e6), budget_s=-1) == 1
    other = partial(num_answers, storage, "shapes", "other", 0)
    assert other(start_us=0, end_us=int(now_s * 1e6)) == 0
    assert other(start_us=0, end_us=int(now_s * 1e6), budget_s=-1) is None
    made = new_request_id()
    assert abs((second_of(made) or 0) - time.time()) < 5
    assert second_of("order-17") is None


async def logged(app: App, tmp_path: Path) -> list[dict[str, Any]]:
    """What the prediction log says."""
    assert app.recorder is not None
    await app.recorder.flush()
    rows: list[dict[str, Any]] = read(
        Storage(str(tmp_path)), "shapes", start_us=0, end_us=MAX_US
    ).to_pylist()
    return rows


def test_answers_are_logged_one_row_for_each_image(tmp_path: Path) -> None:
    batch = np.zeros((3, 4, 6, 1), np.uint8)
    batch[:, 0, 0, 0] = [2, 1, 0]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [3, 4, 6, 1]}
    infer = json.dumps({"inputs": [{**tensor, "data": batch.tolist()}]}).encode()

    async def scenario(app: App) -> None:
        headers = {**RAW, "X-Request-Id": "one", "X-Model-Version": "2"}
        await request(app, "POST", "/predict", IMAGE, headers)
        large = picture(np.random.default_rng(0).integers(0, 255, (400, 400), np.uint8))
        assert len(large) > 2**16
        await request(app, "POST", "/predict", large, {"X-Request-Id": "large"})
        path = "/v2/models/shapes/versions/1/infer"
        await request(app, "POST", path, infer, {"X-Request-Id": "batch"})
        await request(app, "POST", path, infer, {"X-Request-Id": PROBE_ID})
        # What is wrong with a request is not the version's doing.
        await request(app, "POST", "/predict", b"123", RAW)
        await request(app, "POST", path, b"{}")
        await request(app, "POST", "/predict", IMAGE, {**RAW, "x-model-version": "9"})
        one, _, *rest = rows = await logged(app, tmp_path)
        assert [row["request_id"] for row in rows] == ["one", "large", *3 * ["batch"]]
        assert (one["version"], one["predicted"], one["image"]) == (2, 1, IMAGE)
        assert one["probabilities"] == [0, 1, 0]
        assert (one["caller"], one["status"], one["shadow"]) == ("anyone", 200, False)
        assert 0 < one["latency_ms"] < 60_000
        assert [(row["index"], row["predicted"]) for row in rest] == [(0, 2), (1, 1), (2, 0)]
        assert [row["image"] for row in rest] == [image.tobytes() for image in batch]
        assert {row["version"] for row in rest} == {1}

    run(tmp_path, scenario)


@pytest.mark.parametrize(("is_late", "status"), [(True, 503), (False, 500)])
def test_what_a_version_failed_on_is_logged_with_its_status(
    tmp_path: Path, is_late: bool, status: int
) -> None:
    async def bad(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            if is_late:
                await asyncio.Event().wait()
            raise RuntimeError("broken")

        return Replicas(predict)

    async def scenario(app: App) -> None:
        headers = {**RAW, "X-Model-Version": "2"}
        assert (await request(app, "POST", "/predict", IMAGE, headers)).status == status
        (row,) = await logged(app, tmp_path)
        assert (row["version"], row["status"]) == (2, status)
        assert (row["predicted"], row["probabilities"]) == (-1, None)
        assert row["image"] == IMAGE

    run(tmp_path, scenario, make_replicas=bad, deadline_s=0.05)


def test_infer_takes_batches_in_json_and_binary_and_answers_in_either(tmp_path: Path) -> None:
    batch = np.zeros((5, 4, 6, 1), np.uint8)
    batch[:, 0, 0, 0] = [0, 1, 2, 0, 1]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [5, 4, 6, 1]}
    header = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": batch.size}}],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
    ).encode()

    async def scenario(app: App) -> None:
        body = json.dumps({"id": "x", "inputs": [{**tensor, "data": batch.tolist()}]}).encode()
        answer = await request(app, "POST", "/v2/models/shapes/versions/1/infer", body)
        output = answer.json["outputs"][0]
        assert (answer.json["id"], answer.json["model_version"]) == ("x", "1")
        assert output["shape"] == [5, 3]
        assert np.reshape(output["data"], (5, 3)).argmax(axis=1).tolist() == [0, 1, 2, 0, 1]
        length = {"inference-header-content-length": str(len(header))}
        binary = await request(
            app, "POST", "/v2/models/shapes/infer", header + batch.tobytes(), length
        )
        split = int(binary.headers["inference-header-content-length"])
        values = np.frombuffer(binary.body[split:], np.float32).reshape(5, 3)
        assert values.argmax(axis=1).tolist() == [0, 1, 2, 0, 1]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"shape": [1, 4, 6, 2]}, 422),
        ({"shape": [0, 4, 6, 1]}, 422),
        ({"shape": [2, 4, 6, 1]}, 422),
        ({"shape": [10**6, 4, 6, 1]}, 413),
        ({"shape": "4"}, 422),
        ({"datatype": "FP32"}, 422),
        ({"name": "image"}, 422),
        ({"data": [0.5] * 24}, 422),
        ({"data": [300] * 24}, 422),
        ({"data": [[1], [2, 3]]}, 422),
        ({"data": None}, 422),
        ({"parameters": {"binary_data_size": 24}}, 422),
    ],
)
def test_a_bad_tensor_gets_its_status(tmp_path: Path, change: dict[str, Any], status: int) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 6, 1], "data": [0] * 24}

    async def scenario(app: App) -> None:
        body = json.dumps({"inputs": [{**tensor, **change}]}).encode()
        answer = await request(app, "POST", "/v2/models/shapes/infer", body)
        assert answer.status == status, answer.body

    run(tmp_path, scenario)


def test_metadata_traffic_and_health_describe_what_is_served(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        metadata = (await request(app, "GET", "/v2/models/shapes")).json
        assert metadata["versions"] == ["1", "2"]
        assert metadata["inputs"][0]["shape"] == [-1, 4, 6, 1]
        traffic = (await request(app, "GET", "/traffic")).json
        assert traffic["models"]["shapes"]["weights"] == {"1": 90, "2": 10}
        assert traffic["versions"]["shapes/2"]["class_names"] == ["square", "circle", "star"]
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/shapes/ready"):
            assert (await request(app, "GET", path)).status == 200
        document = (await request(app, "GET", "/openapi.json")).json
        assert {"/predict", "/feedback", "/traffic", "/v2/models/{model}/infer"} <= set(
            document["paths"]
        )
        assert "415" in document["paths"]["/predict"]["post"]["responses"]
        assert b"swagger" in (await request(app, "GET", "/docs")).body

    run(tmp_path, scenario)


def test_a_version_whose_application_is_gone_is_not_ready_and_gets_no_request(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 50, 2: 50})
        router = Router(storage, make_replicas)
        await router.refresh()
        app = app_over(router, storage)

        async def status(path: str) -> int:
            return (await request(app, "GET", path)).status

        async def answered_by() -> set[int]:
            headers = [{**RAW, "X-Routing-Key": f"user-{number}"} for number in range(40)]
            answers = [await request(app, "POST", "/predict", IMAGE, each) for each in headers]
            assert {answer.status for answer in answers} == {200}
            return {answer.json["model_version"] for answer in answers}

        assert await answered_by() == {1, 2}
        router.set_gone({("shapes", 2)})
        assert await answered_by() == {1}
        pinned = await request(app, "POST", "/predict", IMAGE, {**RAW, "X-Model-Version": "2"})
        assert (pinned.status, pinned.headers["retry-after"]) == (503, "1")
        assert "version 2 of shapes is not up in Serve" in pinned.json["error"]
        assert await status("/v2/models/shapes/versions/2/ready") == 503
        assert await status("/v2/models/shapes/versions/2") == 200
        for path in ("/v2/models/shapes/versions/1/ready", "/v2/models/shapes/ready"):
            assert await status(path) == 200
        assert await status("/v2/health/ready") == 200
        # A new policy does not bring it back; its application, once it is there again, does.
        publish(storage, {1: 90, 2: 10})
        await router.refresh()
        assert await answered_by() == {1}
        router.set_gone({("shapes", 1), ("shapes", 2)})
        for path in ("/v2/health/ready", "/v2/models/shapes/ready"):
            assert await status(path) == 503
        assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 503
        router.set_gone(())
        assert await status("/v2/health/ready") == 200
        assert 2 in await answered_by()

    asyncio.run(scenario())


def test_a_call_to_an_application_that_goes_ends_at_once() -> None:
    async def scenario() -> None:
        gone = asyncio.Event()
        never = asyncio.get_running_loop().create_future()
        call = asyncio.ensure_future(unless_gone(gone, never))
        await asyncio.sleep(0)
        gone.set()
        with pytest.raises(Unavailable, match="application is gone"):
            await asyncio.wait_for(call, 5)
        assert never.cancelled()
        gone.clear()
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(np.eye(1, dtype=np.float32))
        assert (await unless_gone(gone, answer)).tolist() == [[1]]

    asyncio.run(scenario())


def test_triton_s_extensions_list_configure_and_count_what_is_served(tmp_path: Path) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [3, 4, 6, 1], "data": [0] * 72}

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 90, 2: 10})
        router = Router(storage, make_replicas)
        await router.refresh()
        router.set_gone({("shapes", 2)})
        app = app_over(router, storage)
        infer = json.dumps({"inputs": [tensor]}).encode()
        await request(app, "POST", "/v2/models/shapes/versions/1/infer", infer)
        await request(app, "POST", "/v2/models/shapes/versions/1/infer", b"{}")

        async def ask(path: str) -> Any:
            answer = await request(app, "GET", path)
            assert answer.status == 200, answer.body
            return answer.json

        assert await ask("/v2/models") == {"models": ["shapes"]}
        for base in ("/v2/models/shapes", "/v2/models/shapes/versions/2"):
            config = await ask(f"{base}/config")
            assert (config["name"], config["max_batch_size"]) == ("shapes", payload.MAX_BATCH)
            assert config["input"][0]["dims"] == [4, 6, 1]
            assert config["output"][0]["dims"] == [3]
        everything = (await ask("/v2/models/stats"))["model_stats"]
        of_model = (await ask("/v2/models/shapes/stats"))["model_stats"]
        assert [each["inference_stats"] for each in of_model] == [
            each["inference_stats"] for each in everything
        ]
        first, second = everything
        assert [first["version"], second["version"]] == ["1", "2"]
        assert first["inference_count"] == 3
        stats = first["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 1)
        assert min(stats["success"]["ns"], stats["fail"]["ns"]) > 0
        assert second["inference_stats"]["success"] == {"count": 0, "ns": 0}
        assert (await request(app, "GET", "/v2/models/shapes/versions/9/stats")).status == 404
        for body, versions in ((b"", ["1", "2"]), (b'{"ready": true}', ["1"])):
            index = (await request(app, "POST", "/v2/repository/index", body)).json
            assert [each["version"] for each in index] == versions
        assert index[0]["state"] == "READY"
        assert (await request(app, "POST", "/v2/repository/index", b"[]")).status == 422

    asyncio.run(scenario())


def test_before_the_first_deploy_the_gateway_is_live_and_not_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = await gateway(Storage(str(tmp_path)))
        assert (await request(app, "GET", "/v2/health/live")).status == 200
        for method, path in (("GET", "/v2/health/ready"), ("POST", "/predict")):
            answer = await request(app, method, path)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"

    asyncio.run(scenario())


def test_a_version_that_does_not_answer_is_a_503_at_the_deadline(tmp_path: Path) -> None:
    async def never(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            await asyncio.Event().wait()
            raise AssertionError

        return Replicas(predict)

    async def scenario(app: App) -> None:
        answer: Response = await request(app, "POST", "/predict", IMAGE, RAW)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert "no answer in time" in answer.json["error"]

    run(tmp_path, scenario, make_replicas=never, deadline_s=0.05)


def test_a_fault_of_the_server_is_a_500_that_tells_no_internals(tmp_path: Path) -> None:
    async def broken(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            raise RuntimeError("secret path")

        return Replicas(predict)

    async def scenario(app: App) -> None:
        answer = await request(app, "POST", "/predict", IMAGE, {**RAW, "x-request-id": "r1"})
        assert answer.status == 500
        assert answer.json["request_id"] == "r1"
        assert b"secret" not in answer.body

    run(tmp_path, scenario, make_replicas=broken)


def test_a_new_policy_is_followed_and_what_it_left_is_drained(tmp_path: Path) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100, 2: 0})
        router = Router(storage, make_replicas)
        assert await router.refresh()
        assert not await router.refresh()
        old = router.table.pick(None, "1", "")
        publish(storage, {2: 100})
        assert await router.refresh()
        await asyncio.wait_for(router.drained(), 5)
        assert router.table.pick(None, None, "key").card.version == 2
        with pytest.raises(payload.PayloadError, match="no version '1'"):
            router.table.pick(None, "1", "")
        # A request that started before the change is still answered.
        assert (await router.answer(old, np.zeros((1, 4, 6, 1), np.uint8))).shape == (1, 3)

    asyncio.run(scenario())
