"""A net as ONNX, the form in which it serves on a CPU, and how long that takes for one image."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.serving.predictor import OnnxPredictor
from lib.train.model import ConvNet, ModelConfig, Served

ONNX_OPSET = 18
_CALLS, _CALLS_S = 50, 0.3
"""At least so many, and so many seconds: longer than the time slice of another process."""


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write the ONNX twin of a torch.export program: uint8 `images` in, `probabilities` out."""
    onnx_program: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        opset_version=ONNX_OPSET,
        verbose=False,
    )
    onnx_program.save(file, external_data=False)


def exported_latency_ms(config: ModelConfig) -> float:
    """Return the least time of one image through a net of this shape, exported, in milliseconds.

    In ONNX Runtime on one thread of a CPU. Weights don't matter for it, so any will do. The least
    of many calls is what the net takes: other trials, which load the machine, only add to it.
    """
    # Two images: a batch of one would be taken for a constant.
    shape = (config.height, config.width, config.channels)
    example_NHWC = torch.zeros((2, *shape), dtype=torch.uint8)
    served = Served(ConvNet(config)).eval()
    with quiet(), tempfile.TemporaryDirectory(prefix="rayline-") as folder:
        batch = torch.export.Dim("batch")
        program = torch.export.export(served, (example_NHWC,), dynamic_shapes=({0: batch},))
        file = Path(folder) / "model.onnx"
        write_onnx(program, file)
        predictor = OnnxPredictor(file)
    image_NHWC = np.zeros((1, *shape), dtype=np.uint8)
    taken_s: list[float] = []
    while len(taken_s) < _CALLS or sum(taken_s) < _CALLS_S:
        start_s = time.perf_counter()
        predictor.predict(image_NHWC)
        taken_s.append(time.perf_counter() - start_s)
    return min(taken_s) * 1000


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters say about every model and nobody can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Channels-last weights are not "complete" to torch's archive writer; they are whole.
            warnings.filterwarnings("ignore", message="No complete tensor found")
            # About MLflow's own classes, whenever its pyfunc module is imported.
            warnings.filterwarnings("ignore", message=".*Any type hint is inferred")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
