"""Which runtime serves a version: measured when it is registered, on the device that serves."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
import torch

from lib.cli import progress
from lib.device import granted_device
from lib.serving.bundle import ONNX_FILE, PT2_FILE
from lib.serving.plan import replica_gpus
from lib.serving.predictor import OnnxPredictor, Predictor, TorchPredictor

BATCH_SIZES = (1, 128)
"""A request alone, and a full micro-batch under load."""
_ROUNDS = 5
_ROUND_S = 0.06
_GPU_WAIT_S = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Images per second of each runtime, one thread, median call."""

    device: str
    images_per_s: Mapping[str, Mapping[int, float]]
    """Runtime → batch size → images/s."""
    labels_agree: bool
    """Whether both runtimes gave the probe images the same labels on this device."""

    @property
    def fastest(self) -> str:
        """The runtime to serve with: the best geometric mean over the batch sizes.

        ONNX Runtime always computes in float32 on the CPU, as the accuracy was measured; another
        runtime is taken only if its labels agree with it.
        """
        if not self.labels_agree:
            return "onnxruntime"
        return max(self.images_per_s, key=lambda name: math.prod(self.images_per_s[name].values()))

    def rounded(self) -> dict[str, dict[str, float]]:
        """Return the rates as JSON types."""
        return {
            name: {str(size): round(rate, 1) for size, rate in rates.items()}
            for name, rates in self.images_per_s.items()
        }


def measure(onnx: bytes, pt2: bytes | None, probe_NHWC: npt.NDArray[np.uint8]) -> Measured:
    """Time the runtimes there is a file for in this process, on its GPU if it has one."""
    num_threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="rayline-runtime-") as folder:
            onnx_file, pt2_file = Path(folder) / ONNX_FILE, Path(folder) / PT2_FILE
            onnx_file.write_bytes(onnx)
            predictors: dict[str, Predictor] = {"onnxruntime": OnnxPredictor(onnx_file)}
            if pt2 is not None:
                pt2_file.write_bytes(pt2)
                predictors["torch"] = TorchPredictor(pt2_file, device=granted_device())
            return _compare(predictors, probe_NHWC)
    finally:
        torch.set_num_threads(num_threads)


def measure_where_served(
    onnx: bytes, pt2: bytes | None, probe_NHWC: npt.NDArray[np.uint8]
) -> Measured:
    """Time the runtimes on a GPU if replicas are given one, else here on the CPU."""
    gpus = replica_gpus()
    if pt2 is not None and gpus and ray.is_initialized() and ray.cluster_resources().get("GPU", 0):
        task = ray.remote(num_gpus=gpus, num_cpus=0)(measure).remote(onnx, pt2, probe_NHWC)
        ready, _ = ray.wait([task], timeout=_GPU_WAIT_S)
        if ready:
            return ray.get(task)
        ray.cancel(task, force=True)
        progress("register", f"no GPU came free in {_GPU_WAIT_S} s: runtimes compared on the CPU")
    return measure(onnx, pt2, probe_NHWC)


def _compare(predictors: Mapping[str, Predictor], probe_NHWC: npt.NDArray[np.uint8]) -> Measured:
    labels = [predictor.predict(probe_NHWC).argmax(axis=1) for predictor in predictors.values()]
    batches = {
        size: np.ascontiguousarray(np.resize(probe_NHWC, (size, *probe_NHWC.shape[1:])))
        for size in BATCH_SIZES
    }
    calls_s: dict[tuple[str, int], list[float]] = {}
    # In turns, so that a busy moment of the machine hits both runtimes alike.
    for _ in range(_ROUNDS):
        for name, predictor in predictors.items():
            for size, batch in batches.items():
                predictor.predict(batch)
                calls_s.setdefault((name, size), []).extend(_time_calls(predictor, batch))
    return Measured(
        device=granted_device(),
        images_per_s={
            name: {size: size / float(np.median(calls_s[name, size])) for size in BATCH_SIZES}
            for name in predictors
        },
        labels_agree=all(bool((other == labels[0]).all()) for other in labels[1:]),
    )


def _time_calls(predictor: Predictor, batch: npt.NDArray[np.uint8]) -> list[float]:
    calls_s: list[float] = []
    while sum(calls_s) < _ROUND_S:
        start_s = time.perf_counter()
        predictor.predict(batch)
        calls_s.append(time.perf_counter() - start_s)
    return calls_s
