"""What a model must answer before it is served."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lib.errors import ServingError
from lib.serving.bundle import read_card, write_bundle
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from tests.unit.serving_parts import card


def model(*, offset: float, sign: float) -> bytes:
    """Return a model whose three answers are all √(offset + sign × mean of the pixels)."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["mean", "sign"], ["signed"]),
        helper.make_node("Add", ["signed", "offset"], ["moved"]),
        helper.make_node("Sqrt", ["moved"], ["root"]),
        helper.make_node("Concat", ["root", "root", "root"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "roots",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 4, 6, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor("sign", TensorProto.FLOAT, [1], [sign]),
            helper.make_tensor("offset", TensorProto.FLOAT, [1], [offset]),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("offset", "sign", "is_fine"),
    [(1, 1, True), (-1, 1, False), (1, -1, False), (float("inf"), 0, False)],
    ids=["finite", "NaN where black", "NaN where not black", "infinity"],
)
def test_a_model_that_answers_no_numbers_is_not_loaded(
    tmp_path: Path, offset: float, sign: float, is_fine: bool
) -> None:
    storage = Storage(str(tmp_path))
    bundle = write_bundle(storage, card(), model(offset=offset, sign=sign), b"")
    if not is_fine:
        with pytest.raises(ServingError, match="NaN or infinity"):
            load_predictor(storage, bundle, read_card(storage, bundle))
        return
    answers = load_predictor(storage, bundle, read_card(storage, bundle)).predict(
        np.full((2, 4, 6, 1), 3, np.uint8)
    )
    np.testing.assert_allclose(answers, 2.0)


@pytest.mark.parametrize("is_fine", [True, False])
def test_a_model_of_remote_storage_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fine: bool
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    bundle = write_bundle(storage, card(), model(offset=1, sign=1) if is_fine else b"?", b"")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(Storage, "is_local", property(lambda self: False))
    if is_fine:
        answers = load_predictor(storage, bundle, read_card(storage, bundle)).predict(
            np.zeros((2, 4, 6, 1), np.uint8)
        )
        np.testing.assert_allclose(answers, 1.0)
    else:
        with pytest.raises(Exception, match="Protobuf parsing failed"):
            load_predictor(storage, bundle, read_card(storage, bundle))
    assert not list(folder.iterdir())
