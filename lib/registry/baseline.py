"""The floor under every version: logistic regression on the same data set."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lib.cli import progress
from lib.data.direct import read_some
from lib.data.loader import read_splits
from lib.data.manifest import Manifest
from lib.data.stream import fits_in_memory
from lib.errors import RefusedError
from lib.storage import Storage

FAR_BELOW = 0.02
"""Validation accuracy that a version may lack to the baseline before it is refused."""
_MAX_SIDE = 32
"""Larger images are averaged down: a floor needs no detail, and training stays at seconds."""
_MAX_VALUES = 16_000_000
"""Pixel values trained on at most; more rows gain a floor little and cost seconds."""
_CHUNK_ROWS = 512
"""Images that are floats at full size at the same time."""
_L2 = 1e-4
_MAX_ITERATIONS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """How good logistic regression is on a data set."""

    val_accuracy: float
    train_rows: int
    seconds: float


def baseline_path(digest: str) -> str:
    """Return where a data set's baseline is kept, relative to the storage root."""
    return f"baseline/{digest}.json"


def ensure_baseline(storage: Storage, manifest: Manifest) -> Baseline:
    """Return the data set's baseline, trained now if it never was."""
    path = baseline_path(manifest.digest)
    if storage.exists(path):
        return Baseline(**storage.read_json(path))
    progress("register", "training the baseline, a logistic regression on the same data")
    rows = sampled_rows(manifest.rows("train"), manifest.shape, manifest.num_classes)
    images_NHWC, labels_N = read_some(storage, manifest, "train", rows)
    baseline = train_baseline(
        images_NHWC, labels_N, *_validation(storage, manifest), manifest.num_classes
    )
    storage.write_json(path, asdict(baseline))
    progress(
        "register",
        f"baseline: validation accuracy {baseline.val_accuracy:.4f} from {baseline.train_rows:,} "
        f"rows in {baseline.seconds:.1f} s",
    )
    return baseline


def _validation(
    storage: Storage, manifest: Manifest
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the validation split, or so much of it as is trained on of a larger one."""
    if fits_in_memory(manifest, "val"):
        val = read_splits(storage, manifest, ["val"])["val"]
        return val.images_NHWC, val.labels_N
    rows = sampled_rows(manifest.rows("val"), manifest.shape, manifest.num_classes)
    return read_some(storage, manifest, "val", rows)


def sampled_rows(
    num_rows: int, shape: tuple[int, int, int], num_classes: int
) -> npt.NDArray[np.int64]:
    """Return the rows to train on: evenly spaced, so every class has its share in any order."""
    height, width, channels = shape
    values = min(height, _MAX_SIDE) * min(width, _MAX_SIDE) * channels
    sampled = min(num_rows, max(num_classes, _MAX_VALUES // values))
    return np.linspace(0, num_rows - 1, sampled).astype(np.int64)


def train_baseline(
    train_images_NHWC: npt.NDArray[np.uint8],
    train_labels_N: npt.NDArray[np.int64],
    val_images_NHWC: npt.NDArray[np.uint8],
    val_labels_N: npt.NDArray[np.int64],
    num_classes: int,
) -> Baseline:
    """Fit softmax regression by L-BFGS from zero weights: the same data give the same result."""
    start_s = time.monotonic()
    features = _features(train_images_NHWC)
    labels = torch.from_numpy(train_labels_N)
    mean = features.mean(dim=0)
    # One scale for all pixels: those at the border hardly vary and would be blown up by their own.
    scale = features.std(dim=0).mean().clamp(min=1e-3)
    features.sub_(mean).div_(scale)
    weights = torch.zeros(features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ weights + bias, labels)
        loss = loss + _L2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.inference_mode():
        logits = (_features(val_images_NHWC).sub_(mean).div_(scale)) @ weights + bias
    val_accuracy = float((logits.argmax(dim=1).numpy() == val_labels_N).mean())
    return Baseline(
        val_accuracy=val_accuracy,
        train_rows=len(train_labels_N),
        seconds=round(time.monotonic() - start_s, 3),
    )


def check_against(baseline: Baseline, val_accuracy: float, trial_run_id: str) -> None:
    """Raise RefusedError if a trial is far below the baseline."""
    if val_accuracy < baseline.val_accuracy - FAR_BELOW:
        raise RefusedError(
            f"trial {trial_run_id} is refused: its validation accuracy {val_accuracy:.4f} is far "
            f"below that of logistic regression on the same data, {baseline.val_accuracy:.4f} "
            f"(allowed: {FAR_BELOW} less); look at its loss in MLflow, then search longer with "
            "`python -m jobs.tune --preset full`, or check the labels of the data set"
        )


def _features(images_NHWC: npt.NDArray[np.uint8]) -> Tensor:
    height, width, channels = images_NHWC.shape[1:]
    size = (min(height, _MAX_SIDE), min(width, _MAX_SIDE))
    features = torch.empty(len(images_NHWC), size[0] * size[1] * channels)
    for start in range(0, len(images_NHWC), _CHUNK_ROWS):
        chunk = torch.tensor(images_NHWC[start : start + _CHUNK_ROWS])
        images = chunk.permute(0, 3, 1, 2).float().div_(255)
        if size != (height, width):
            images = functional.adaptive_avg_pool2d(images, size)
        features[start : start + _CHUNK_ROWS] = images.flatten(start_dim=1)
    return features
