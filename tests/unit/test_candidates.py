"""The candidates of the rollout drill are worse in the one way that they are meant to be."""

from __future__ import annotations

import timeit
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lib.serving.predictor import Images, OnnxPredictor, Probabilities
from tests.candidates import ERRS_AT, RAISES_AT, erring, marked, raising, slow


def champion() -> ModelProto:
    weights = np.random.default_rng(0).normal(size=(784, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "champion",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 28, 28, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def images_NHWC() -> Images:
    images: Images = np.random.default_rng(1).integers(0, 250, (8, 28, 28), np.uint8)
    return images[..., np.newaxis]


def answer(tmp_path: Path, model: ModelProto, images_NHWC: Images) -> Probabilities:
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    return OnnxPredictor(file).predict(images_NHWC)


def mark_some(images_NHWC: Images, corner: int) -> Images:
    some = marked(images_NHWC[4:, ..., 0], corner)[..., np.newaxis]
    return np.concatenate([images_NHWC[:4], some])


def test_all_of_them_answer_plain_images_as_the_champion_does(
    tmp_path: Path, images_NHWC: Images
) -> None:
    standing = answer(tmp_path, champion(), images_NHWC)
    for change in (erring, raising, slow):
        np.testing.assert_allclose(answer(tmp_path, change(champion()), images_NHWC), standing)


def test_one_errs_and_one_raises_on_marked_images(tmp_path: Path, images_NHWC: Images) -> None:
    some = mark_some(images_NHWC, ERRS_AT)
    standing = answer(tmp_path, champion(), some)
    found = answer(tmp_path, erring(champion()), some)
    np.testing.assert_allclose(found[:4], standing[:4])
    np.testing.assert_allclose(found[4:], np.roll(standing[4:], 1, axis=1))
    others = mark_some(images_NHWC, RAISES_AT)
    with pytest.raises(Exception, match="out of data bounds"):
        answer(tmp_path, raising(champion()), others)


def test_what_is_marked_for_one_is_plain_to_the_other(tmp_path: Path, images_NHWC: Images) -> None:
    for change, corner in ((erring, RAISES_AT), (raising, ERRS_AT)):
        some = mark_some(images_NHWC, corner)
        found = answer(tmp_path, change(champion()), some)
        np.testing.assert_allclose(found, answer(tmp_path, champion(), some))


def test_one_takes_its_time(tmp_path: Path, images_NHWC: Images) -> None:
    def least_s(model: ModelProto) -> float:
        file = tmp_path / "model.onnx"
        onnx.save(model, file)
        predictor = OnnxPredictor(file)
        return min(timeit.repeat(lambda: predictor.predict(images_NHWC[:1]), number=1, repeat=5))

    # Both on one machine, however fast it is; measured were hundreds to thousands of times.
    assert least_s(slow(champion())) > 20 * least_s(champion())
