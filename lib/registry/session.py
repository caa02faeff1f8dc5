"""An ONNX graph as its owner made it, in ONNX Runtime: what it takes, gives, and how fast."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from lib.errors import RefusedError

MAX_BYTES = 512 * 2**20
"""Of the ONNX file: every replica holds it in memory."""
MAX_IMAGE_S = 0.5
"""For one image on one thread; a gateway gives up on a batch of them after 30 s."""
_BATCH = 128


class Session:
    """The owner's graph before anything is put around it."""

    def __init__(self, model: ModelProto) -> None:
        # Imported here: importing it writes files to the user's home.
        import onnxruntime

        content = model.SerializeToString()
        if len(content) > MAX_BYTES:
            raise RefusedError(
                f"the model has {len(content) / 2**20:.0f} MiB, more than {MAX_BYTES / 2**20:.0f}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime has an exception class a reason, without a common base.
        except Exception as error:
            raise RefusedError(f"ONNX Runtime can't load the model: {one_line(error)}") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, images: npt.NDArray[Any], output: str) -> npt.NDArray[Any]:
        """Return one output, computed in batches."""
        parts = [
            self._session.run([output], {self._input: images[start : start + _BATCH]})[0]
            for start in range(0, len(images), _BATCH)
        ]
        return np.concatenate(parts)

    def check_speed(self, image: npt.NDArray[Any]) -> None:
        """Raise RefusedError if one image takes too long."""
        calls_s = []
        for _ in range(3):
            start_s = time.perf_counter()
            self._session.run(None, {self._input: image})
            calls_s.append(time.perf_counter() - start_s)
        if min(calls_s) > MAX_IMAGE_S:
            raise RefusedError(
                f"the model takes {min(calls_s):.2f} s for one image on one thread, more than "
                f"{MAX_IMAGE_S} s"
            )

    def scores_name(self, images: npt.NDArray[Any], num_classes: int) -> str:
        """Return the one output with a score per class; raise RefusedError with what there is."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            self._session.run(names, {self._input: images[:1]})
            results = self._session.run(names, {self._input: images})
        except Exception as error:
            raise RefusedError(
                f"the model fails on batches of 1 and {len(images)} images: {one_line(error)}; "
                "export it with a dynamic batch"
            ) from error
        shapes = {
            name: result.shape if isinstance(result, np.ndarray) else type(result).__name__
            for name, result in zip(names, results, strict=True)
        }
        floats = {name for name, r in zip(names, results, strict=True) if _is_float(r)}
        found = [name for name in names if shapes[name] == (len(images), num_classes)]
        found = [name for name in found if name in floats]
        if len(found) != 1:
            raise RefusedError(
                f"for {len(images)} images and the {num_classes} classes of the data set the model "
                f"must have one output of shape {(len(images), num_classes)}, floats; it gives "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                + (" (convert with zipmap off)" if "list" in shapes.values() else "")
            )
        return found[0]


def one_line(error: Exception) -> str:
    """Return what an error says, shortened, on one line."""
    return " ".join(str(error).split())[:400]


def _is_float(result: Any) -> bool:
    return isinstance(result, np.ndarray) and np.issubdtype(result.dtype, np.floating)
