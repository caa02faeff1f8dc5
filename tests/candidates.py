"""Versions that are worse than the champion in one way: one trained on wrong labels, the others as
ONNX graphs around the champion's own.

What fails or errs in these does so on marked images alone, which have a white corner, so that a
test says when it begins, and no hook is needed in what is tested. Each has a corner of its own:
images that were marked for one are in the log afterwards, and replay would show them to the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lib.data.direct import read_split
from lib.data.manifest import Manifest
from lib.registry.export import Exported, export, load_served
from lib.storage import Storage
from lib.train.augment import Augmentation
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig

MARK = 255
ERRS_AT, RAISES_AT = 0, -1
"""Corners that are marked, as the index of their row and column: the first and the last."""
_IMAGES, _OUTPUT, _INNER = "images", "probabilities", "drill/inner"
_WIDTH = 1024


def marked(images: npt.NDArray[np.uint8], corner: int) -> npt.NDArray[np.uint8]:
    """Return a copy of images (N, 28, 28) on which the candidate of that corner is worse."""
    copy = images.copy()
    copy[..., corner, corner] = MARK
    return copy


def erring(model: ModelProto) -> ModelProto:
    """Return a model that gives marked images the probabilities of other classes."""
    num_classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = np.roll(np.arange(num_classes), 1)
    return _around(
        model,
        {**_white_at(ERRS_AT), "order": order, "one": np.array([1])},
        [
            *_mark(),
            helper.make_node("Gather", [_INNER, "drill/order"], ["drill/rolled"], axis=1),
            helper.make_node("Unsqueeze", ["drill/mark", "drill/one"], ["drill/column"]),
            helper.make_node(
                "Cast", ["drill/column"], ["drill/is_marked"], to=onnx.TensorProto.BOOL
            ),
            helper.make_node("Where", ["drill/is_marked", "drill/rolled", _INNER], [_OUTPUT]),
        ],
    )


def raising(model: ModelProto) -> ModelProto:
    """Return a model that fails on a batch with a marked image: its index is out of bounds."""
    return _around(
        model,
        {**_white_at(RAISES_AT), "one": np.array([1]), "table": np.zeros(1, np.float32)},
        [
            *_mark(),
            helper.make_node("Gather", ["drill/table", "drill/mark"], ["drill/zeros"], axis=0),
            helper.make_node("Unsqueeze", ["drill/zeros", "drill/one"], ["drill/column"]),
            helper.make_node("Add", [_INNER, "drill/column"], [_OUTPUT]),
        ],
    )


def slow(model: ModelProto, num_products: int = 200) -> ModelProto:
    """Return a model that multiplies large matrices first, and then goes by what it always did."""
    nodes = [
        helper.make_node("Cast", [_IMAGES], ["drill/floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["drill/floats", "drill/axes"], ["drill/mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["drill/mean", "drill/one"], ["drill/column"]),
        helper.make_node("MatMul", ["drill/column", "drill/wide"], ["drill/product0"]),
    ]
    nodes += [
        helper.make_node(
            "MatMul", [f"drill/product{step}", "drill/matrix"], [f"drill/product{step + 1}"]
        )
        for step in range(num_products)
    ]
    last = f"drill/product{num_products}"
    nodes += [
        helper.make_node("MatMul", [last, "drill/nothing"], ["drill/zero"]),
        helper.make_node("Add", [_INNER, "drill/zero"], [_OUTPUT]),
    ]
    constants = {
        "axes": np.array([1, 2, 3]),
        "one": np.array([1]),
        "wide": np.ones((1, _WIDTH), np.float32),
        "matrix": np.full((_WIDTH, _WIDTH), 1 / _WIDTH, np.float32),
        "nothing": np.zeros((_WIDTH, 1), np.float32),
    }
    return _around(model, constants, nodes)


def trained_on_noise(
    storage: Storage, manifest: Manifest, folder: Path, *, share: float, seed: int = 0
) -> Exported:
    """Train a net on a data set with a share of wrong labels; export it as registration does.

    It learns the wrong labels by heart: after as few epochs as a small search gives its trials, and
    with their smoothing, it would hardly be worse than one trained on the right ones (2 points on
    2,700 digits with a fifth of wrong labels; so, it is 10).
    """
    images_NHWC, label_N = read_split(storage, manifest, "train")
    rng = np.random.default_rng(seed)
    is_wrong = rng.random(len(label_N)) < share
    shift = rng.integers(1, manifest.num_classes, is_wrong.sum())
    label_N[is_wrong] = (label_N[is_wrong] + shift) % manifest.num_classes
    config = TrainConfig(
        rungs=(20,),
        label_smoothing=0.0,
        weight_decay=1e-5,
        augmentation=Augmentation(strength=0.0),
        seed=seed,
    )
    trainer = Trainer(
        ModelConfig.from_manifest(manifest, stage_width=8, depth=1),
        config,
        train=Examples(
            images_NHWC=torch.from_numpy(images_NHWC), labels_N=torch.from_numpy(label_N)
        ),
    )
    for _ in range(config.rungs[-1]):
        trainer.run_epoch()
    checkpoint = folder / "checkpoint.pt"
    torch.save(trainer.checkpoint(), checkpoint)
    served = load_served(checkpoint, manifest)
    return export(served, images_NHWC[:2], folder / "model", "0" * 32)


def _mark() -> list[Any]:
    """Return nodes that make `drill/mark`, int64 (N,): 1 for marked images, else 0.

    They take the constants of `_white_at`.
    """
    nodes, name = [], _IMAGES
    for step in range(3):
        # A row, of it a column, of it a channel; images have one.
        at = f"drill/at{step}"
        nodes.append(helper.make_node("Gather", [name, "drill/corner"], [at], axis=1))
        name = at
    return [
        *nodes,
        helper.make_node("Cast", [name], ["drill/pixel"], to=TensorProto.INT64),
        helper.make_node("Div", ["drill/pixel", "drill/white"], ["drill/mark"]),
    ]


def _white_at(corner: int) -> dict[str, Any]:
    return {"corner": np.array(corner), "white": np.array(MARK)}


def _around(model: ModelProto, constants: dict[str, Any], nodes: list[Any]) -> ModelProto:
    """Return a copy whose output goes through further nodes."""
    wrapped = ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == _OUTPUT:
                node.output[place] = _INNER
        for place, name in enumerate(node.input):
            if name == _OUTPUT:
                node.input[place] = _INNER
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(value, f"drill/{name}"))
    graph.node.extend(nodes)
    onnx.checker.check_model(wrapped)
    return wrapped
