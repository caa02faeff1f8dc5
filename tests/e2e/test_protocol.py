"""The line seen by public clients: Triton's for the Open Inference Protocol, and schemathesis."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.data_sources import mnist
from tests.e2e.conftest import LiveLine


@pytest.fixture(scope="module")
def client(line: LiveLine) -> Iterator[Any]:
    made = triton.InferenceServerClient(line.url.removeprefix("http://"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def images_NHWC() -> np.ndarray[Any, Any]:
    images, _ = mnist("test")
    return np.ascontiguousarray(images[:7, :, :, None])


def infer(
    client: Any, images_NHWC: np.ndarray[Any, Any], *, binary: bool, version: str = ""
) -> np.ndarray[Any, Any]:
    tensor = triton.InferInput("images", list(images_NHWC.shape), "UINT8")
    tensor.set_data_from_numpy(images_NHWC, binary_data=binary)
    output = triton.InferRequestedOutput("probabilities", binary_data=binary)
    result = client.infer("digits", [tensor], model_version=version, outputs=[output])
    found: np.ndarray[Any, Any] = result.as_numpy("probabilities")
    return found


def test_health_and_metadata(client: Any, line: LiveLine) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.get_server_metadata()["name"] == "rayline"
    metadata = client.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}]
    version = metadata["versions"][0]
    assert client.is_model_ready("digits", version)
    assert client.get_model_config("digits")["input"][0]["data_type"] == "TYPE_UINT8"
    index = client.get_model_repository_index()
    # Another test may have brought up a second model.
    listed = {each["version"] for each in index if each["name"] == "digits"}
    assert listed == set(metadata["versions"])
    # Of whichever gateway answers.
    (counted,) = client.get_inference_statistics("digits", version)["model_stats"]
    assert (counted["name"], counted["version"]) == ("digits", version)
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("no-such-model")


def test_json_and_binary_tensors_give_the_same_for_every_version(
    client: Any, images_NHWC: np.ndarray[Any, Any]
) -> None:
    answers = []
    for version in client.get_model_metadata("digits")["versions"]:
        as_json = infer(client, images_NHWC, binary=False, version=version)
        as_binary = infer(client, images_NHWC, binary=True, version=version)
        assert as_binary.shape == (7, 10)
        assert as_binary.sum(axis=1) == pytest.approx([1.0] * 7, abs=1e-5)
        assert np.allclose(as_json, as_binary, atol=1e-7)
        answers.append(as_binary)
    assert not np.array_equal(answers[0], answers[1])


def test_compressed_requests_and_labels_by_the_protocol_s_id_work(
    client: Any, line: LiveLine, images_NHWC: np.ndarray[Any, Any]
) -> None:
    expected = infer(client, images_NHWC[:1], binary=True, version="1")
    tensor = triton.InferInput("images", [1, 28, 28, 1], "UINT8")
    tensor.set_data_from_numpy(images_NHWC[:1])
    name = f"order-{uuid.uuid4().hex}"
    for number, algorithm in enumerate(("gzip", "deflate")):
        result = client.infer(
            "digits",
            [tensor],
            model_version="1",
            request_id=f"{name}-{number}",
            request_compression_algorithm=algorithm,
        )
        assert result.get_response()["id"] == f"{name}-{number}"
        assert np.allclose(result.as_numpy("probabilities"), expected)
    grpc = triton_grpc.InferenceServerClient(line.grpc)
    over_grpc = triton_grpc.InferInput("images", [1, 28, 28, 1], "UINT8")
    over_grpc.set_data_from_numpy(images_NHWC[:1])
    grpc.infer("digits", [over_grpc], request_id=f"{name}-2")
    grpc.close()
    for request_id, known in ((f"{name}-0", True), (f"{name}-2", True), (f"{name}-9", False)):
        body = {"request_id": request_id, "label": "7"}
        answer = requests.post(f"{line.url}/feedback", json=body, timeout=60)
        assert (answer.status_code, answer.json()["known"]) == (200, known), answer.text
    head = requests.head(f"{line.url}/v2/health/ready", timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert requests.get(f"{line.url}/predict", headers=upgrade, timeout=60).status_code == 403


def test_grpc_gives_what_http_gives(
    client: Any, line: LiveLine, images_NHWC: np.ndarray[Any, Any]
) -> None:
    grpc = triton_grpc.InferenceServerClient(line.grpc)
    assert grpc.is_server_live()
    assert grpc.is_server_ready()
    assert grpc.is_model_ready("digits")
    metadata = grpc.get_model_metadata("digits")
    assert list(metadata.inputs[0].shape) == [-1, 28, 28, 1]
    tensor = triton_grpc.InferInput("images", list(images_NHWC.shape), "UINT8")
    tensor.set_data_from_numpy(images_NHWC)
    for version in metadata.versions:
        result = grpc.infer("digits", [tensor], model_version=version)
        assert result.get_response().model_version == version
        over_http = infer(client, images_NHWC, binary=True, version=version)
        assert np.allclose(result.as_numpy("probabilities"), over_http, atol=1e-6)
    with pytest.raises(InferenceServerException, match="there are"):
        grpc.infer("digits", [tensor], model_version="999")
    config = grpc.get_model_config("digits").config
    assert list(config.input[0].dims) == [28, 28, 1]
    assert {model.version for model in grpc.get_model_repository_index().models} == set(
        metadata.versions
    )
    assert len(grpc.get_inference_statistics("digits").model_stats) == len(metadata.versions)
    with pytest.raises(InferenceServerException, match="Rayline does not serve this"):
        grpc.load_model("digits")
    grpc.close()


def test_a_wrong_tensor_is_an_error_that_says_so(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="28"):
        infer(client, np.zeros((2, 9, 9, 1), np.uint8), binary=True)


def test_the_openapi_document_is_kept_whatever_is_sent(line: LiveLine, tmp_path: Path) -> None:
    assert requests.get(f"{line.url}/openapi.json", timeout=60).json()["paths"]
    # No schema can say which bytes are a picture, or how many numbers an image has.
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        "[checks.positive_data_acceptance]\n"
        'expected-statuses = ["2xx", "400", "401", "403", "404", "413", "415", "422", "503"]\n'
    )
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)]
    command += ["run", f"{line.url}/openapi.json", "--url", line.url, "--checks", "all"]
    command += ["--max-examples", "25", "--seed", "1", "--generation-database", "none"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
