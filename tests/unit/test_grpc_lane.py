"""The Open Inference Protocol over gRPC, over a stand-in model, without Serve or a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2 as model_config
from tritonclient.grpc import service_pb2 as messages

from lib.serving.keys import add_key
from lib.serving.router import Router
from lib.storage import Storage
from lib.watch.predictions import read
from lib.watch.segments import MAX_US
from serve_apps.asgi import App
from serve_apps.grpc_lane import GrpcLane
from serve_apps.repository import Repository
from tests.unit.serving_parts import app_over, make_replicas, publish

IMAGES = np.arange(2 * 24, dtype=np.uint8).reshape(2, 4, 6, 1)
"""First pixels 0 and 24: class 0 both, by the stand-in."""


class Context:
    """What Serve hands to a method."""

    def __init__(self, **metadata: str) -> None:
        self._metadata = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None:
        self.trailing = dict(metadata)


class Lane(GrpcLane):
    def __init__(self, router: Router, app: App) -> None:
        self._router, self._app = router, app
        self._repository = Repository(router, lambda: (app.record, {}))


def run(tmp_path: Path, scenario: Callable[[Lane], Awaitable[None]]) -> None:
    async def main() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 90, 2: 10})
        router = Router(storage, make_replicas)
        await router.refresh()
        await scenario(Lane(router, app_over(router, storage)))

    asyncio.run(main())


def infer_request(images_NHWC: np.ndarray[Any, Any] = IMAGES, **fields: Any) -> Any:
    request = messages.ModelInferRequest(**{"model_name": "shapes", **fields})
    request.inputs.add(name="images", datatype="UINT8", shape=images_NHWC.shape)
    request.raw_input_contents.append(images_NHWC.tobytes())
    return request


def as_numbers(request: Any, values: list[int]) -> Any:
    del request.raw_input_contents[:]
    request.inputs[0].contents.uint_contents.extend(values)
    return request


def test_a_callers_trace_is_returned_and_logged_and_a_failure_has_its_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"

    async def scenario(lane: Lane) -> None:
        given = f"00-{trace_id}-00f067aa0ba902b7-01"
        context = Context(traceparent=given)
        await lane.ModelInfer(infer_request(id="mine"), context)
        assert context.trailing["traceparent"] == given
        await lane._router.recorder.flush()
        version = lane._router.table.versions["shapes", 1]
        version.batcher._predict = lane._router.table.versions["shapes", 2].batcher._predict = None
        await lane.ModelInfer(infer_request(id="broken"), context)
        assert context.code == grpc.StatusCode.INTERNAL

    run(tmp_path, scenario)
    window = {"start_us": 0, "end_us": MAX_US}
    rows = read(Storage(str(tmp_path)), "shapes", **window, columns=["trace_id"])
    assert set(rows["trace_id"].to_pylist()) == {trace_id}
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.fields["request_id"] == "broken"  # type: ignore[attr-defined]
    assert record.exc_info


def test_an_unusable_request_id_in_the_metadata_is_replaced(tmp_path: Path) -> None:
    async def scenario(lane: Lane) -> None:
        context = Context(x_request_id="a#1", x_model_version="")
        answer = await lane.ModelInfer(infer_request(), context)
        assert context.code is None
        assert context.trailing["x-request-id"] == answer.id != "a#1"

    run(tmp_path, scenario)


def test_triton_s_extensions_say_what_http_says(tmp_path: Path) -> None:
    async def scenario(lane: Lane) -> None:
        index = await lane.RepositoryIndex(messages.RepositoryIndexRequest(), Context())
        assert [(m.name, m.version, m.state) for m in index.models] == [
            ("shapes", "1", "READY"),
            ("shapes", "2", "READY"),
        ]
        asked = messages.ModelConfigRequest(name="shapes", version="2")
        config = (await lane.ModelConfig(asked, Context())).config
        assert (config.platform, list(config.input[0].dims)) == ("onnxruntime_onnx", [4, 6, 1])
        assert config.input[0].data_type == model_config.TYPE_UINT8
        assert list(config.version_policy.specific.versions) == [1, 2]
        await lane.ModelInfer(infer_request(), Context(x_model_version="2"))
        asked = messages.ModelStatisticsRequest(name="shapes", version="2")
        (counted,) = (await lane.ModelStatistics(asked, Context())).model_stats
        assert (counted.inference_count, counted.inference_stats.success.count) == (2, 1)
        assert counted.inference_stats.success.ns > 0
        unknown = Context()
        await lane.ModelConfig(messages.ModelConfigRequest(name="cats"), unknown)
        assert unknown.code == grpc.StatusCode.NOT_FOUND
        server = await lane.ServerMetadata(messages.ServerMetadataRequest(), Context())
        assert "binary_tensor_data" in server.extensions

    run(tmp_path, scenario)


def with_class_count(request: Any) -> None:
    output = request.outputs.add(name="probabilities")
    output.parameters["classification"].int64_param = 2


def test_raw_and_plain_contents_give_the_same_answer_with_version_and_request_id(
    tmp_path: Path,
) -> None:
    async def scenario(lane: Lane) -> None:
        context = Context(x_request_id="abc-1", x_model_version="2")
        answer = await lane.ModelInfer(infer_request(id="mine"), context)
        assert context.code is None
        # One id: the message's, although the metadata has another, as proxies add it.
        assert context.trailing == {"x-request-id": "mine", "x-model-version": "2"}
        assert (answer.model_name, answer.model_version, answer.id) == ("shapes", "2", "mine")
        assert list(answer.outputs[0].shape) == [2, 3]
        probabilities = np.frombuffer(answer.raw_output_contents[0], np.float32)
        assert probabilities.tolist() == [1, 0, 0, 1, 0, 0]
        plain = as_numbers(infer_request(), IMAGES.ravel().tolist())
        again = await lane.ModelInfer(plain, Context())
        assert again.raw_output_contents[0] == answer.raw_output_contents[0]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda r: setattr(r, "model_name", "cats"), "NOT_FOUND", "there are: shapes"),
        (lambda r: setattr(r, "model_version", "7"), "NOT_FOUND", "there are: 1, 2"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "INVALID_ARGUMENT", "UINT8"),
        (lambda r: r.inputs[0].shape.append(1), "INVALID_ARGUMENT", "[N, 4, 6, 1]"),
        (lambda r: r.inputs.add(name="more"), "INVALID_ARGUMENT", "one tensor"),
        (lambda r: r.outputs.add(name="logits"), "INVALID_ARGUMENT", "probabilities"),
        (with_class_count, "INVALID_ARGUMENT", "'classification'"),
        (lambda r: r.raw_input_contents.append(b"x"), "INVALID_ARGUMENT", "raw contents"),
        (lambda r: as_numbers(r, [1, 2]), "INVALID_ARGUMENT", "2 values"),
        (lambda r: as_numbers(r, [256] * 48), "INVALID_ARGUMENT", "0–255"),
        (lambda r: r.inputs[0].shape.__setitem__(0, 2000), "INVALID_ARGUMENT", "1024 images"),
    ],
)
def test_every_error_has_its_code_and_says_what_to_do(
    tmp_path: Path, change: Callable[[Any], Any], code: str, message: str
) -> None:
    async def scenario(lane: Lane) -> None:
        request, context = infer_request(), Context()
        change(request)
        answer = await lane.ModelInfer(request, context)
        assert context.code == grpc.StatusCode[code]
        assert message in context.details
        assert not answer.outputs

    run(tmp_path, scenario)


def test_a_key_is_asked_for_and_named_as_over_http(tmp_path: Path) -> None:
    key = add_key(Storage(str(tmp_path)), "day")

    async def scenario(lane: Lane) -> None:
        refused = Context()
        await lane.ModelInfer(infer_request(), refused)
        assert refused.code == grpc.StatusCode.UNAUTHENTICATED
        admitted = Context(authorization=f"Bearer {key}", x_model_version="1")
        assert (await lane.ModelInfer(infer_request(), admitted)).outputs
        assert lane._app.record.requests == {
            ("", "", "unknown", 401): 1,
            ("shapes", "1", "day", 200): 1,
        }
        assert lane._app.in_flight == 0
        # Probes of a load balancer have no key.
        assert (await lane.ServerLive(messages.ServerLiveRequest(), Context())).live

    run(tmp_path, scenario)


def test_answers_are_logged_as_over_http(tmp_path: Path) -> None:
    async def scenario(lane: Lane) -> None:
        await lane.ModelInfer(infer_request(), Context(x_request_id="a", x_model_version="2"))
        await lane.ModelInfer(infer_request(model_name="cats"), Context())
        pinned = Context(x_model_version="2")
        await lane.ModelInfer(infer_request(IMAGES[:1], id="order-17"), pinned)
        refused = Context()
        await lane.ModelInfer(infer_request(id="a/b"), refused)
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "`id`" in refused.details
        recorder = lane._app.recorder
        assert recorder is not None
        await recorder.flush()
        log = read(Storage(str(tmp_path)), "shapes", start_us=0, end_us=MAX_US)
        assert log["request_id"].to_pylist() == ["a", "a", "order-17"]
        assert log["version"].to_pylist() == [2, 2, 2]
        assert log["index"].to_pylist() == [0, 1, 0]
        assert log["image"].to_pylist() == [IMAGES[index].tobytes() for index in (0, 1, 0)]
        assert log["caller"].to_pylist() == ["anyone"] * 3

    run(tmp_path, scenario)


def test_metadata_names_the_served_versions(tmp_path: Path) -> None:
    async def scenario(lane: Lane) -> None:
        metadata = await lane.ModelMetadata(messages.ModelMetadataRequest(name="shapes"), Context())
        assert list(metadata.versions) == ["1", "2"]
        assert list(metadata.inputs[0].shape) == [-1, 4, 6, 1]
        ready = await lane.ModelReady(messages.ModelReadyRequest(name="shapes"), Context())
        assert ready.ready
        unknown = Context()
        ready = await lane.ModelReady(messages.ModelReadyRequest(name="cats"), unknown)
        assert not ready.ready
        assert unknown.code == grpc.StatusCode.NOT_FOUND

    run(tmp_path, scenario)
