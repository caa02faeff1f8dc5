"""The Open Inference Protocol v2: its requests to arrays, arrays to its responses.

JSON tensors and the binary tensor data extension (Inference-Header-Content-Length). One input,
`images`, UINT8 of shape [N, H, W, C]; one output, `probabilities`, FP32 of shape [N, classes].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from lib.serving.bundle import Card
from lib.serving.feedback import PROBE_ID, REQUEST_ID
from lib.serving.payload import MAX_BATCH, PayloadError, load_json

INPUT, OUTPUT = "images", "probabilities"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
"""Of the protocol; of the repository's, only the index."""
TAG = "Open Inference Protocol"
"""In the OpenAPI document."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed request: images (N, H, W, C), the caller's id, and how it wants the output."""

    images_NHWC: npt.NDArray[np.uint8]
    id: str | None
    binary_output: bool


def platform(card: Card) -> str:
    """Return the one of Triton's platforms that is nearest to a version's runtime."""
    return "onnxruntime_onnx" if card.runtime == "onnxruntime" else "pytorch_libtorch"


def model_metadata(name: str, card: Card, versions: list[int]) -> dict[str, Any]:
    """Return the protocol's metadata of a model."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": platform(card),
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *card.shape]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(card.class_names)]}],
        "class_names": list(card.class_names),
    }


def parse_infer(body: bytes, header_length: str | None, card: Card) -> InferRequest:
    """Parse an infer request; raise PayloadError 400 for bad syntax and 422 for a bad tensor."""
    if header_length is None:
        header, binary = body, b""
    else:
        # Python refuses to convert very long numbers, hence the bound on the digits.
        is_number = header_length.isdecimal() and len(header_length) < 20
        if not is_number or int(header_length) > len(body):
            raise PayloadError(400, "Inference-Header-Content-Length is not a length in the body")
        header, binary = body[: int(header_length)], body[int(header_length) :]
    content = load_json(header)
    if not isinstance(content, dict):
        raise PayloadError(400, "the request is not a JSON object")
    tensor = _only_input(content)
    identifier = content.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise PayloadError(400, "`id` must be a string")
    check_parameters("the input", tensor.get("parameters"), {"binary_data_size"})
    wants_binary = _wants_binary(content)
    return InferRequest(_images(tensor, binary, card), check_id(identifier), wants_binary)


def check_parameters(where: str, parameters: Any, known: Collection[str]) -> None:
    """Raise PayloadError 400 for parameters that would change the answer, if they were honoured."""
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise PayloadError(400, f"`parameters` of {where} must be an object")
    if unknown := sorted(set(parameters) - set(known)):
        hint = (
            "; the output holds the probability of every class, so take the largest of them"
            if "classification" in unknown
            else ""
        )
        names = ", ".join(map(repr, unknown))
        raise PayloadError(400, f"parameters of {where} that are not supported: {names}{hint}")


def check_id(identifier: str | None) -> str | None:
    """Return a request's `id`, None if it has none; raise PayloadError 400 for a bad one.

    It is the id of the request everywhere: in the answer, in the log and for `/feedback`.
    """
    if identifier and not REQUEST_ID.fullmatch(identifier):
        raise PayloadError(400, "`id`: at most 128 letters, digits, `.`, `_`, `-`")
    if identifier == PROBE_ID:
        raise PayloadError(400, f"`id`: {PROBE_ID} is for the line's own requests")
    return identifier or None


def _only_input(content: dict[str, Any]) -> dict[str, Any]:
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise PayloadError(422, f"`inputs` must hold one tensor, named {INPUT!r}")
    tensor: dict[str, Any] = inputs[0]
    return tensor


def check_input(name: Any, datatype: Any, shape: Any, card: Card) -> list[int]:
    """Return the shape of an input tensor; raise PayloadError 422 or 413 if it can't be taken."""
    if name != INPUT or datatype != "UINT8":
        raise PayloadError(422, f"the input must be named {INPUT!r} with datatype UINT8")
    if (
        not isinstance(shape, list)
        or len(shape) != 4
        or not all(isinstance(size, int) for size in shape)
        or tuple(shape[1:]) != card.shape
        or shape[0] < 1
    ):
        raise PayloadError(422, f"shape {shape!r} is not [N, {', '.join(map(str, card.shape))}]")
    if shape[0] > MAX_BATCH:
        raise PayloadError(413, f"a batch of {shape[0]}; at most {MAX_BATCH} images a request")
    return shape


def _images(tensor: dict[str, Any], binary: bytes, card: Card) -> npt.NDArray[np.uint8]:
    shape = check_input(tensor.get("name"), tensor.get("datatype"), tensor.get("shape"), card)
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    expected = shape[0] * card.image_bytes
    if size is not None:
        if size != expected or len(binary) != expected:
            raise PayloadError(422, f"{len(binary)} bytes of binary data; {shape} needs {expected}")
        return np.frombuffer(binary, np.uint8).reshape(shape)
    return _from_data(tensor.get("data"), shape, expected)


def _from_data(data: Any, shape: list[int], expected: int) -> npt.NDArray[np.uint8]:
    if not isinstance(data, list):
        raise PayloadError(422, "the input has neither `data` nor `binary_data_size`")
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise PayloadError(422, "the rows of `data` differ in length") from error
    if array.size != expected or array.shape not in {tuple(shape), (expected,)}:
        raise PayloadError(422, f"`data` holds {array.size} values; {shape} needs {expected}")
    if array.dtype.kind != "i" or array.min() < 0 or array.max() > 255:
        raise PayloadError(422, "`data` must hold integers 0–255")
    return array.astype(np.uint8).reshape(shape)


def _wants_binary(content: dict[str, Any]) -> bool:
    parameters = content.get("parameters")
    check_parameters("the request", parameters, {"binary_data_output"})
    wanted = bool((parameters or {}).get("binary_data_output"))
    outputs = content.get("outputs")
    if outputs is None:
        return wanted
    if not isinstance(outputs, list):
        raise PayloadError(422, "`outputs` must be a list")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            raise PayloadError(422, f"the only output is {OUTPUT!r}")
        parameters = output.get("parameters")
        check_parameters("the output", parameters, {"binary_data"})
        if parameters and "binary_data" in parameters:
            wanted = bool(parameters["binary_data"])
    return wanted


def render_infer(
    card: Card, request: InferRequest, probabilities_NK: npt.NDArray[np.float32], request_id: str
) -> tuple[bytes, int | None]:
    """Return the response's body and, for binary output, the length of its JSON part."""
    output: dict[str, Any] = {
        "name": OUTPUT,
        "datatype": "FP32",
        "shape": list(probabilities_NK.shape),
    }
    response = {
        "model_name": card.name,
        "model_version": str(card.version),
        "id": request_id,
        "outputs": [output],
    }
    if not request.binary_output:
        output["data"] = np.ascontiguousarray(probabilities_NK).ravel()
        return orjson.dumps(response, option=orjson.OPT_SERIALIZE_NUMPY), None
    binary = np.ascontiguousarray(probabilities_NK).tobytes()
    output["parameters"] = {"binary_data_size": len(binary)}
    header = orjson.dumps(response)
    return header + binary, len(header)
