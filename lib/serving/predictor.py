"""Predictors: uint8 images in, probabilities out, one class per runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lib.errors import ServingError
from lib.serving.bundle import ONNX_FILE, PT2_FILE, Card, local_model_file
from lib.storage import Storage

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]


class Predictor(Protocol):
    """Something that turns images into probabilities."""

    def predict(self, images_NHWC: Images) -> Probabilities:
        """Return probabilities of shape (N, classes) for uint8 images (N, H, W, C)."""
        ...


class OnnxPredictor:
    """ONNX Runtime on the CPU."""

    def __init__(self, model_file: Path, *, num_threads: int = 1) -> None:
        # Imported here: a process that only routes must not pay for a runtime.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the core that the next request is parsed on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            str(model_file), options, providers=["CPUExecutionProvider"]
        )

    def predict(self, images_NHWC: Images) -> Probabilities:
        """Return probabilities of shape (N, classes)."""
        outputs: list[Probabilities] = self._session.run(None, {"images": images_NHWC})
        return outputs[0]


class TorchPredictor:
    """A torch.export program, on `cpu` or `cuda`."""

    def __init__(self, model_file: Path, *, num_threads: int = 1, device: str = "cpu") -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._torch = torch
        self._device = device
        program = torch.export.load(str(model_file))
        if self._device == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._module = program.module()

    def predict(self, images_NHWC: Images) -> Probabilities:
        """Return probabilities of shape (N, classes)."""
        torch = self._torch
        with torch.inference_mode():
            # The request's buffer is read-only, which torch warns about: a copy is cheaper.
            images = torch.from_numpy(np.array(images_NHWC)).to(self._device)
            result: Probabilities = self._module(images).float().cpu().numpy()
        return result


def load_predictor(
    storage: Storage, path: str, card: Card, *, num_threads: int = 1, device: str = "cpu"
) -> Predictor:
    """Load a bundle's model in the runtime its card names and run it once to warm it.

    `device` is that of torch: `lib.device.granted_device` in a process of Ray's.

    Raises ServingError if the model gives another shape than the card promises, or NaN or infinity,
    StorageError if its file is not the one that was published.
    """
    predictor: Predictor
    if card.runtime == "onnxruntime":
        with local_model_file(storage, path, ONNX_FILE, card.onnx_sha256) as file:
            predictor = OnnxPredictor(file, num_threads=num_threads)
    elif card.runtime == "torch":
        with local_model_file(storage, path, PT2_FILE, card.pt2_sha256) as file:
            predictor = TorchPredictor(file, num_threads=num_threads, device=device)
    else:
        raise ServingError(f"{path}: unknown runtime {card.runtime!r}")
    noise = np.random.default_rng(0).integers(0, 256, card.shape, np.uint8)
    warm = predictor.predict(np.stack([np.zeros(card.shape, np.uint8), noise]))
    if warm.shape != (2, len(card.class_names)):
        raise ServingError(
            f"{path}: the model gives {warm.shape}, its card promises {(2, len(card.class_names))}"
        )
    if not np.isfinite(warm).all():
        raise ServingError(f"{path}: the model answers NaN or infinity; train it again")
    return predictor
