"""From tables of the prediction log to the arrays that quality and drift work on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.watch.populations import Answers, Window
from lib.watch.quality import FAILED, NO_LABEL, Rows

QUALITY_COLUMNS = (
    "time_us",
    "request_id",
    "index",
    "version",
    "shadow",
    "predicted",
    "probabilities",
)
DRIFT_COLUMNS = ("time_us", "version", "shadow", "predicted", "probabilities", "features")


def quality_rows(table: pa.Table) -> Rows:
    """Return the rows of `predictions.joined`; a request has one for each of its images."""
    index = pc.cast(table.column("index"), pa.string())
    image = pc.binary_join_element_wise(table.column("request_id"), index, "/")
    confidence, entropy = _of_probabilities(table.column("probabilities"))
    return Rows(
        image_id_N=image.to_numpy(),
        time_us_N=table.column("time_us").to_numpy(),
        version_N=table.column("version").to_numpy(),
        shadow_N=table.column("shadow").to_numpy(),
        predicted_N=pc.fill_null(table.column("predicted"), FAILED).to_numpy(),
        confidence_N=confidence,
        entropy_N=entropy,
        label_N=pc.fill_null(table.column("label"), NO_LABEL).to_numpy(),
    )


def drift_rows(table: pa.Table) -> pa.Table:
    """Return the rows that drift is judged by: answers that callers got, each image once.

    Where features are logged for a share of the requests, those are the sample that is tested.
    """
    table = table.filter(pc.invert(table.column("shadow")))
    known = pc.is_valid(table.column("features"))
    return table.filter(known) if pc.any(known).as_py() else table


def drift_window(table: pa.Table, num_features: int) -> Window:
    """Return the window that some of the rows are; features of another length are left out."""
    features = table.column("features")
    whole = pc.equal(pc.list_value_length(features), num_features)
    features_NF = _matrix(features.filter(pc.fill_null(whole, False)), num_features)
    worked = table.filter(pc.is_valid(table.column("probabilities")))
    versions = worked.column("version").to_numpy()
    answers = {}
    for version in np.unique(versions):
        mine = worked.column("probabilities").filter(pa.array(versions == version))
        num_classes = pc.max(pc.list_value_length(mine)).as_py()
        answers[int(version)] = Answers.of(_matrix(mine, num_classes))
    return Window(features_NF=features_NF, answers=answers)


def _matrix(lists: pa.ChunkedArray, width: int) -> npt.NDArray[np.float32]:
    values: Any = pc.list_flatten(lists).to_numpy()
    return np.asarray(values, dtype=np.float32).reshape(-1, width)


def _of_probabilities(
    lists: pa.ChunkedArray,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return confidence and entropy per row, NaN where there are no probabilities."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    confidence = np.full(len(lengths), np.nan, np.float32)
    entropy = np.full(len(lengths), np.nan, np.float32)
    for width in np.unique(lengths[lengths > 0]):
        chosen = lengths == width
        answers = Answers.of(_matrix(lists.filter(pa.array(chosen)), int(width)))
        confidence[chosen], entropy[chosen] = answers.confidence_N, answers.entropy_N
    return confidence, entropy
