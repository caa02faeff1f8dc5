"""What a model's answers on a split amount to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data.stream import Batch
from lib.serving.predictor import Predictor

EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Accuracy overall and per class. Classes without rows are left out of the macro numbers."""

    rows: int
    accuracy: float
    macro_accuracy: float
    """Mean over the classes of the share of their rows found (balanced accuracy)."""
    macro_f1: float
    per_class_accuracy: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    """Rows by true class, then by predicted class."""

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return the evaluation as JSON types."""
        return {
            "rows": self.rows,
            "accuracy": self.accuracy,
            "macro_accuracy": self.macro_accuracy,
            "macro_f1": self.macro_f1,
            "per_class_accuracy": self.per_class_accuracy,
            "class_names": list(class_names),
            "confusion": [list(row) for row in self.confusion],
        }


def predict_all(
    predictor: Predictor, images_NHWC: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Return the probabilities of a whole split, computed in batches."""
    batches = [
        predictor.predict(images_NHWC[start : start + EVALUATION_BATCH])
        for start in range(0, len(images_NHWC), EVALUATION_BATCH)
    ]
    return np.concatenate(batches)


def answer(
    predictor: Predictor, batches: Iterable[Batch]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the labels of all rows, in the order they come, and the probabilities of each."""
    pairs = [(batch.labels_N, predictor.predict(batch.images_NHWC)) for batch in batches]
    labels, probabilities = zip(*pairs, strict=True)
    return np.concatenate(labels), np.concatenate(probabilities)


def evaluate(
    labels_N: npt.NDArray[np.int64],
    probabilities_NK: npt.NDArray[np.float32],
    class_names: Sequence[str],
) -> Evaluation:
    """Compare the likeliest class of every row with its label."""
    num_classes = len(class_names)
    pairs = labels_N * num_classes + probabilities_NK.argmax(axis=1)
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    hits, truth, answers = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = truth > 0
    recall = hits[present] / truth[present]
    f1 = 2 * hits[present] / (truth[present] + answers[present])
    return Evaluation(
        rows=len(labels_N),
        accuracy=float(hits.sum() / len(labels_N)),
        macro_accuracy=float(recall.mean()),
        macro_f1=float(f1.mean()),
        per_class_accuracy={
            name: float(hits[index] / truth[index])
            for index, name in enumerate(class_names)
            if present[index]
        },
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )
