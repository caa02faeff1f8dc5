from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lib.errors import RefusedError
from lib.registry.adapter import (
    Intake,
    Outlet,
    adapt,
    column_order,
    declared_classes,
    match_graph,
    read_signature,
)

SHAPE = (4, 3, 1)
NUM_CLASSES = 3
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (5, *SHAPE), dtype=np.uint8)
WEIGHTS = RANDOM.normal(size=(12, NUM_CLASSES)).astype(np.float32)
INPUT_SHAPES = {"NHWC": SHAPE, "NCHW": (1, 4, 3), "NHW": (4, 3), "flat": (12,)}


def graph(layout: str, dtype: Any) -> Any:
    """Scores of the images; names are those that the graph around it uses too."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["probabilities"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    taken = helper.make_tensor_value_info("images", kind, ["n", *INPUT_SHAPES[layout]])
    given = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", NUM_CLASSES])
    weights = [numpy_helper.from_array(WEIGHTS, "weights")]
    return helper.make_model(
        helper.make_graph(nodes, "scores", [taken], [given], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def run(model: Any, images: Any) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize(
    ("layout", "dtype", "divisor"),
    [
        *itertools.product(INPUT_SHAPES, (np.float32, np.float64), (255.0,)),
        *itertools.product(INPUT_SHAPES, (np.uint8,), (1.0,)),
        ("NCHW", np.float16, 255.0),
    ],
)
def test_the_graph_around_a_model_does_what_numpy_does(
    layout: str, dtype: Any, divisor: float
) -> None:
    intake = Intake(layout=layout, dtype=np.dtype(dtype), divisor=divisor)
    outlet = Outlet(name="probabilities", softmax=True, order=(2, 0, 1))
    model = graph(layout, dtype)

    adapted = adapt(model, intake, outlet, SHAPE, NUM_CLASSES)

    found = run(adapted, IMAGES)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(axis=1), 1.0)
    # Every layout holds the same values in the same order here, since there is one channel.
    scores = (IMAGES.reshape(5, -1) / divisor).astype(np.float32) @ WEIGHTS
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = (exponents / exponents.sum(axis=1, keepdims=True))[:, [2, 0, 1]]
    assert np.allclose(found, wanted, atol=1e-2 if dtype == np.float16 else 1e-5)
    assert np.allclose(found, outlet.finish(run(model, intake.prepare(IMAGES))), atol=1e-6)


def test_colours_move_to_the_front() -> None:
    colour = RANDOM.integers(0, 256, (2, 4, 3, 3), dtype=np.uint8)
    intake = read_signature((-1, 3, 4, 3), np.dtype(np.float32), (4, 3, 3))
    assert intake.layout == "NCHW"
    assert intake.prepare(colour).shape == (2, 3, 4, 3)
    assert (intake.prepare(colour)[1, 2] == colour[1, :, :, 2]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((-1, 5, 5), np.float32, "must be one of"),
        ((2, 12), np.float32, "batches of exactly 2"),
        ((-1, 12), np.int64, "takes int64"),
        ((), np.uint8, "must be one of"),
    ],
)
def test_signatures_that_fit_no_image_are_refused(
    shape: tuple[int, ...], dtype: Any, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        read_signature(shape, np.dtype(dtype), SHAPE)


def test_the_graph_decides_the_type_and_must_have_the_signed_shape() -> None:
    signed = read_signature((-1, 12), np.dtype(np.float64), SHAPE)
    assert match_graph(graph("flat", np.float32), signed, SHAPE).dtype == np.float32
    with pytest.raises(RefusedError, match="the graph takes"):
        match_graph(graph("NHWC", np.float32), signed, SHAPE)


def test_columns_are_put_in_the_order_of_the_data_set() -> None:
    names = ("ring", "stroke", "hook")
    assert column_order(["hook", "ring", "stroke"], names) == (1, 2, 0)
    assert column_order(names, names) is None
    assert column_order([0, 1, 2], names) is None
    assert column_order([2, 1, 0], ("0", "1", "2")) == (2, 1, 0)
    with pytest.raises(RefusedError, match="knows the classes 1, 2, 3"):
        column_order([1, 2, 3], names)


def test_labels_are_read_from_classifiers_of_onnx() -> None:
    model = graph("flat", np.float32)
    assert declared_classes(model, NUM_CLASSES) is None
    model.graph.node.append(
        helper.make_node(
            "LinearClassifier",
            ["flat"],
            ["label", "scores"],
            domain="ai.onnx.ml",
            classlabels_strings=["b", "c", "a"],
            coefficients=[0.0] * 36,
        )
    )
    assert declared_classes(model, NUM_CLASSES) == ["b", "c", "a"]
