"""Around somebody's ONNX graph: uint8 images (N, H, W, C) in, probabilities in our order out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lib.errors import RefusedError

Array = npt.NDArray[Any]
_OLDEST_OPSET = 13
_DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.UINT8: np.dtype(np.uint8),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.DOUBLE: np.dtype(np.float64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """How a model wants its images."""

    layout: str
    """`NHWC`, `NCHW`, `NHW` (one channel) or `flat`."""
    dtype: np.dtype[Any]
    divisor: float = 1.0
    """What pixels of 0–255 are divided by."""

    def prepare(self, images_NHWC: npt.NDArray[np.uint8]) -> Array:
        """Return images as the model takes them: what the graph around it does, in numpy."""
        pixels: Array = images_NHWC.astype(self.dtype)
        if self.divisor != 1.0:
            pixels = pixels / self.dtype.type(self.divisor)
        if self.layout == "NCHW":
            return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        if self.layout == "NHW":
            return pixels[..., 0]
        return pixels.reshape(len(pixels), -1) if self.layout == "flat" else pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlet:
    """Which output of a model is taken, and how it becomes probabilities."""

    name: str
    softmax: bool
    """Whether it gives scores that are no probabilities yet."""
    order: tuple[int, ...] | None
    """Column of the model for each class of the data set; None if they are the same."""

    def finish(self, scores_NK: Array) -> npt.NDArray[np.float32]:
        """Return probabilities: what the graph around the model does, in numpy."""
        result = scores_NK.astype(np.float32)
        if self.softmax:
            result = np.exp(result - result.max(axis=1, keepdims=True))
            result = result / result.sum(axis=1, keepdims=True)
        return result if self.order is None else result[:, list(self.order)]


def read_signature(
    shape: Sequence[int], dtype: np.dtype[Any], image_shape: tuple[int, int, int]
) -> Intake:
    """Return how a model wants images by its signature; raise RefusedError if these do not fit."""
    if dtype not in _DTYPES.values():
        raise RefusedError(f"the signature takes {dtype}; images are uint8 or floats")
    return Intake(layout=_layout(tuple(shape), image_shape), dtype=dtype)


def match_graph(model: ModelProto, signed: Intake, image_shape: tuple[int, int, int]) -> Intake:
    """Return the intake with the graph's own type; raise RefusedError if the graph contradicts."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise RefusedError(
            f"the model has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); export it "
            "with one, the images"
        )
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in _DTYPES:
        raise RefusedError(
            f"the model takes {TensorProto.DataType.Name(kind.elem_type)}; images are uint8 or "
            "floats"
        )
    declared = [dim.dim_value or None for dim in kind.shape.dim]
    wanted = [None, *_shapes(image_shape)[signed.layout]]
    fits = not declared or (
        len(declared) == len(wanted)
        and all(one in (None, other) for one, other in zip(declared[1:], wanted[1:], strict=True))
    )
    if not fits:
        raise RefusedError(
            f"the signature says {wanted}, the graph takes {declared}; log the model with the "
            "signature that it has"
        )
    if declared and declared[0] is not None:
        raise RefusedError(
            f"the model takes batches of exactly {declared[0]}; export it with a dynamic batch"
        )
    return replace(signed, dtype=_DTYPES[kind.elem_type])


def column_order(classes: Sequence[Any], class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return which of a model's columns is which class of the data set; None if in its order.

    Raises RefusedError if the model knows other classes.
    """
    found = [str(name) for name in classes]
    if sorted(found) == sorted(class_names):
        order = tuple(found.index(name) for name in class_names)
        return None if order == tuple(range(len(order))) else order
    if found == [str(index) for index in range(len(class_names))]:
        return None
    raise RefusedError(
        f"the model knows the classes {', '.join(found)}, the data set has "
        f"{', '.join(class_names)}; train it on the labels of the data set"
    )


def declared_classes(model: ModelProto, num_classes: int) -> list[Any] | None:
    """Return the labels that classifiers of ONNX's ML operators carry, None if there are none."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name.startswith("classlabels"):
                labels = [
                    label.decode() if isinstance(label, bytes) else label
                    for label in helper.get_attribute_value(attribute)
                ]
                if len(labels) == num_classes:
                    return labels
    return None


def adapt(
    model: ModelProto,
    intake: Intake,
    outlet: Outlet,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> ModelProto:
    """Return the model with the graph around it that serving needs."""
    height, width, channels = image_shape
    inner = onnx.compose.add_prefix(model, "model/")
    graph = inner.graph
    weights = {tensor.name for tensor in graph.initializer}
    source = next(value.name for value in graph.input if value.name not in weights)
    opset = next((entry.version for entry in inner.opset_import if not entry.domain), None)
    if opset is None:
        inner.opset_import.append(helper.make_opsetid("", onnx.defs.onnx_opset_version()))
    elif opset < _OLDEST_OPSET:
        raise RefusedError(f"the model has ONNX opset {opset}; export it with {_OLDEST_OPSET}+")

    before = _Chain("images")
    before.add("Cast", to=helper.np_dtype_to_tensor_dtype(intake.dtype))
    if intake.divisor != 1.0:
        before.add("Div", before.constant(np.array(intake.divisor, intake.dtype)))
    if intake.layout == "NCHW":
        before.add("Transpose", perm=[0, 3, 1, 2])
    elif intake.layout != "NHWC":
        # A 0 keeps the dimension, which is the batch.
        shape = [0, height, width] if intake.layout == "NHW" else [0, height * width * channels]
        before.add("Reshape", before.constant(np.array(shape, np.int64)))
    before.end(source)

    after = _Chain(f"model/{outlet.name}")
    after.add("Cast", to=TensorProto.FLOAT)
    if outlet.softmax:
        after.add("Softmax", axis=1)
    if outlet.order is not None:
        after.add("Gather", after.constant(np.array(outlet.order, np.int64)), axis=1)
    after.end("probabilities")

    nodes = [*before.nodes, *graph.node, *after.nodes]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*before.constants, *after.constants])
    for place, name, kind, sizes in (
        (graph.input, "images", TensorProto.UINT8, image_shape),
        (graph.output, "probabilities", TensorProto.FLOAT, (num_classes,)),
    ):
        place.append(helper.make_tensor_value_info(name, kind, ["batch", *sizes]))
    return inner


class _Chain:
    """Nodes one after the other, each on the output of the one before."""

    def __init__(self, start: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._start, self._last = start, start

    def constant(self, value: Array) -> str:
        """Add a tensor and return its name."""
        name = f"around/{self._start}/{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, *more: str, **attributes: Any) -> None:
        """Add an operator on the last output."""
        output = f"around/{self._start}/{operator}"
        node = helper.make_node(operator, [self._last, *more], [output], output, **attributes)
        self.nodes.append(node)
        self._last = output

    def end(self, name: str) -> None:
        """Give the last output a name."""
        self.nodes.append(helper.make_node("Identity", [self._last], [name], f"around/{name}"))


def _shapes(image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in which a model may take one image, by layout."""
    height, width, channels = image_shape
    shapes: dict[str, tuple[int, ...]] = {
        "NHWC": (height, width, channels),
        "NCHW": (channels, height, width),
        "flat": (height * width * channels,),
    }
    return shapes | ({"NHW": (height, width)} if channels == 1 else {})


def _layout(signature_shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> str:
    shapes = _shapes(image_shape)
    for layout, shape in shapes.items():
        if signature_shape == (-1, *shape):
            return layout
    if signature_shape and signature_shape[0] != -1 and signature_shape[1:] in shapes.values():
        raise RefusedError(
            f"the signature takes batches of exactly {signature_shape[0]}; log the model with -1 "
            "for the batch"
        )
    wanted = ", ".join(str((-1, *shape)) for shape in shapes.values())
    raise RefusedError(
        f"the signature takes images of shape {signature_shape}; for this data set it must be one "
        f"of {wanted}"
    )
