"""Public clients of the Open Inference Protocol, on a gateway without Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from lib.storage import Storage
from tests.console_line import publish_models, served

KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

async def main(url):
    client = InferenceRESTClient(config=RESTConfig(protocol="v2", timeout=60))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "digits")
    images = np.zeros((2, 28, 28, 1), np.uint8)
    found = []
    for is_binary in (False, True):
        tensor = InferInput(name="images", shape=list(images.shape), datatype="UINT8")
        tensor.set_data_from_numpy(images, binary_data=is_binary)
        request = InferRequest(model_name="digits", infer_inputs=[tensor], request_id="ks-1")
        answer = await client.infer(url, request, model_name="digits")
        assert answer.id == "ks-1"
        found.append(answer.outputs[0].as_numpy().reshape(2, 10))
    assert np.allclose(found[0], found[1])

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    storage = Storage(str(tmp_path_factory.mktemp("gateway")))
    publish_models(storage)
    with served(storage) as line:
        yield line.url


def test_triton_s_client_finds_configures_and_counts_the_models(url: str) -> None:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        index = client.get_model_repository_index()
        assert {model["name"] for model in index} == {"digits", "shapes"}
        assert client.is_model_ready("digits", "3")
        config = client.get_model_config("digits")
        (given,) = config["input"]
        assert given["data_type"] == "TYPE_UINT8"
        assert client.get_model_metadata("digits")["platform"] == config["platform"]
        images = np.zeros((2, *given["dims"]), np.uint8)
        tensor = triton.InferInput(given["name"], list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images)
        for _ in range(3):
            client.infer("digits", [tensor], model_version="3")
        (counted,) = client.get_inference_statistics("digits", "3")["model_stats"]
        assert counted["inference_count"] == 6
        assert counted["inference_stats"]["success"]["count"] == 3
        assert counted["last_inference"] > 0


# KServe pins other versions of FastAPI and Ray than Rayline, so it gets an environment of its own.
@pytest.mark.long
def test_kserve_s_client_gets_answers(url: str, tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(KSERVE)
    command = [sys.executable, "-m", "uv", "run", "--no-project", "--python", sys.executable]
    command += ["--with", "kserve==0.21.0", "python", str(script), url]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
