"""The Open Inference Protocol's gRPC messages to arrays, and back.

The messages are those of Triton's client package, so that no generated code lives here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as messages

from lib.serving import oip
from lib.serving.bundle import Card
from lib.serving.payload import PayloadError


def parse_infer(request: Any, card: Card) -> npt.NDArray[np.uint8]:
    """Return the images (N, H, W, C) of a ModelInferRequest; raise PayloadError if it is wrong."""
    if len(request.inputs) != 1:
        raise PayloadError(422, f"`inputs` must hold one tensor, named {oip.INPUT!r}")
    if any(output.name != oip.OUTPUT for output in request.outputs):
        raise PayloadError(422, f"the only output is {oip.OUTPUT!r}")
    tensor = request.inputs[0]
    oip.check_parameters("the request", request.parameters, ())
    oip.check_parameters("the input", tensor.parameters, ())
    for output in request.outputs:
        oip.check_parameters("the output", output.parameters, ())
    shape = oip.check_input(tensor.name, tensor.datatype, list(tensor.shape), card)
    expected = shape[0] * card.image_bytes
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
        if len(request.raw_input_contents) != 1 or len(raw) != expected:
            raise PayloadError(422, f"{len(raw)} bytes of raw contents; {shape} needs {expected}")
        return np.frombuffer(raw, np.uint8).reshape(shape)
    values = np.fromiter(tensor.contents.uint_contents, np.uint32)
    if len(values) != expected:
        raise PayloadError(422, f"`uint_contents` holds {len(values)} values, not {expected}")
    if values.max() > 255:
        raise PayloadError(422, "`uint_contents` must hold integers 0–255")
    return values.astype(np.uint8).reshape(shape)


def render_infer(card: Card, probabilities_NK: npt.NDArray[np.float32], request_id: str) -> Any:
    """Return the ModelInferResponse; probabilities go out as raw contents."""
    response = messages.ModelInferResponse(
        model_name=card.name, model_version=str(card.version), id=request_id
    )
    response.outputs.add(name=oip.OUTPUT, datatype="FP32", shape=probabilities_NK.shape)
    response.raw_output_contents.append(np.ascontiguousarray(probabilities_NK).tobytes())
    return response


def render_metadata(card: Card, versions: list[int]) -> Any:
    """Return the ModelMetadataResponse: what `lib.serving.oip.model_metadata` says."""
    content = oip.model_metadata(card.name, card, versions)
    del content["class_names"]
    return messages.ModelMetadataResponse(**content)
