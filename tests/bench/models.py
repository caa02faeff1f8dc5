"""The model that every system serves: an untrained net of the line's family, exported for real."""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lib.data.manifest import Preprocess
from lib.registry.export import export
from lib.serving.bundle import ONNX_FILE, Card, bundle_path, write_bundle
from lib.storage import Storage
from lib.train.model import ConvNet, ModelConfig, Served
from tests.bench.parts import ROOT

ISOLATED_NAME = "digits"
COLOCATED_NAME = "digits-colocated"
SHAPE = (28, 28, 1)
_CLASSES = tuple("0123456789")


def bundle(name: str, version: int) -> str:
    """Return a version's folder below the storage root."""
    return bundle_path(name, version, _run_id(version))


def write_bundles(storage: Storage, *, num_versions: int) -> list[Path]:
    """Export versions of the smallest default model under both names; return their ONNX files.

    Speed does not depend on the weights, so they are random: version N has seed N.
    """
    files = []
    for version in range(1, num_versions + 1):
        card = Card(
            name=ISOLATED_NAME,
            version=version,
            run_id=_run_id(version),
            data_digest="0" * 32,
            height=SHAPE[0],
            width=SHAPE[1],
            channels=SHAPE[2],
            class_names=_CLASSES,
            preprocess=Preprocess(mode="L", fill=(0,)),
            runtime="onnxruntime",
            git_commit=None,
            test_accuracy=0.0,
        )
        with tempfile.TemporaryDirectory() as folder:
            exported = export(
                _served(version),
                np.zeros((2, *SHAPE), np.uint8),
                Path(folder) / "model",
                card.run_id,
            )
            onnx, pt2 = exported.onnx_file.read_bytes(), exported.pt2_file.read_bytes()
        path = write_bundle(storage, card, onnx, pt2)
        write_bundle(storage, replace(card, name=COLOCATED_NAME), onnx, pt2)
        files.append(Path(storage.path(f"{path}/{ONNX_FILE}")))
    return files


def sample_image() -> npt.NDArray[np.uint8]:
    """Return the first test image of MNIST, (28, 28, 1)."""
    path = ROOT / "lib" / "data" / "mnist" / "t10k-images-idx3-ubyte.gz"
    with gzip.open(path) as stream:
        stream.read(16)
        pixels = stream.read(int(np.prod(SHAPE)))
    return np.frombuffer(pixels, np.uint8).reshape(SHAPE)


def _served(seed: int) -> Served:
    torch.manual_seed(seed)
    config = ModelConfig(
        height=SHAPE[0],
        width=SHAPE[1],
        channels=SHAPE[2],
        num_classes=len(_CLASSES),
        stage_width=16,
        depth=1,
        pixel_mean=(0.1307,),
        pixel_std=(0.3081,),
    )
    return Served(ConvNet(config)).eval()


def _run_id(version: int) -> str:
    return f"{version:08d}".ljust(32, "0")
