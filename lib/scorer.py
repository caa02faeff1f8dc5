"""The worker of batch scoring: holds a predictor, turns parts of an input into predictions."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.pictures import PICTURE_STARTS
from lib.device import granted_device
from lib.errors import DataError, RaylineError
from lib.serving.bundle import read_card
from lib.serving.payload import PayloadError, decode_picture
from lib.serving.predictor import load_predictor
from lib.storage import Storage

BATCH_ROWS = 256

Batch = tuple[list[str], list[bytes | None], bool]
"""Ids, images, and whether the images are raw pixels for certain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some of the input and the file that its predictions go to."""

    output: str
    paths: tuple[str, ...]
    """Pictures, or one Parquet file."""
    row_group: int | None
    """Of the Parquet file; None for pictures."""
    first_row: int
    """Number of the part's first row in its Parquet file."""


class Scorer:
    """A Ray Data actor: one part in, the number of its rows out, its predictions written."""

    def __init__(self, storage: Storage, bundle: str, source: Storage, target: Storage) -> None:
        self._card = read_card(storage, bundle)
        self._predictor = load_predictor(storage, bundle, self._card, device=granted_device())
        self._source = source
        self._target = target

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score a part; an error that the user can act on travels as a value."""
        try:
            return {"item": pickle.dumps(self.score_part(pickle.loads(row["item"])))}
        except RaylineError as error:
            return {"item": pickle.dumps(error)}

    def score_part(self, part: Part) -> int:
        """Write the predictions of a part and return how many rows it has."""
        if part.row_group is None:
            id_name, batches = "path", self._pictures(part)
        else:
            id_name, batches = "row_id", self._rows(part, part.row_group)
        table = pa.concat_tables([self._predict(id_name, batch) for batch in batches])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self._target.write(part.output, sink.getvalue())
        return int(table.num_rows)

    def _pictures(self, part: Part) -> Iterator[Batch]:
        for start in range(0, len(part.paths), BATCH_ROWS):
            paths = list(part.paths[start : start + BATCH_ROWS])
            yield paths, [self._source.read(path) for path in paths], False

    def _rows(self, part: Part, row_group: int) -> Iterator[Batch]:
        file = open_parquet(self._source, part.paths[0])
        columns = [name for name in ("image", "row_id") if name in file.schema_arrow.names]
        is_raw = pa.types.is_fixed_size_binary(file.schema_arrow.field("image").type)
        row = part.first_row
        try:
            for batch in file.iter_batches(BATCH_ROWS, [row_group], columns):
                ids: Sequence[Any] = range(row, row + batch.num_rows)
                if "row_id" in columns:
                    ids = batch.column("row_id").to_pylist()
                yield [_text(value) for value in ids], batch.column("image").to_pylist(), is_raw
                row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{part.paths[0]}: damaged near row {row}: {error}") from error

    def _predict(self, id_name: str, batch: Batch) -> pa.Table:
        ids, bodies, is_raw = batch
        images = np.zeros((len(bodies), *self._card.shape), dtype=np.uint8)
        errors: list[str | None] = [None] * len(bodies)
        for row, body in enumerate(bodies):
            try:
                images[row] = self._decode(body, is_raw)
            except PayloadError as error:
                # One bad picture of a million must not cost the others: its row says why.
                errors[row] = error.message
        probabilities = self._predictor.predict(images)
        indexes = probabilities.argmax(axis=1)
        failed = np.array([error is not None for error in errors])
        names = [self._card.class_names[index] for index in indexes]
        return pa.table(
            {
                id_name: pa.array(ids, pa.string()),
                "label": pa.array(names, pa.string(), mask=failed),
                "class_index": pa.array(indexes.astype(np.int32), mask=failed),
                "probabilities": _lists(probabilities, failed),
                "model_version": pa.array([self._card.version] * len(ids), pa.int32()),
                "error": pa.array(errors, pa.string()),
            }
        )

    def _decode(self, body: bytes | None, is_raw: bool) -> npt.NDArray[np.uint8]:
        if body is None:
            raise PayloadError(422, "the image is null")
        if is_raw or (len(body) == self._card.image_bytes and not body.startswith(PICTURE_STARTS)):
            if len(body) != self._card.image_bytes:
                raise PayloadError(
                    422,
                    f"{len(body)} raw bytes; one image of this model is {self._card.image_bytes}",
                )
            return np.frombuffer(body, np.uint8).reshape(self._card.shape)
        return decode_picture(body, self._card)


def open_parquet(root: Storage, path: str) -> pq.ParquetFile:
    """Open a Parquet file with a binary column `image`; raise DataError for anything else."""
    try:
        file = pq.ParquetFile(root.path(path), filesystem=root.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no whole Parquet file: {error}; write it again") from error
    schema = file.schema_arrow
    if "image" not in schema.names or not (
        pa.types.is_binary(schema.field("image").type)
        or pa.types.is_large_binary(schema.field("image").type)
        or pa.types.is_fixed_size_binary(schema.field("image").type)
    ):
        raise DataError(
            f"{path}: needs a column `image` of binary values (raw pixels or PNG/JPEG files); it "
            f"has {', '.join(schema.names)}"
        )
    return file


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _lists(probabilities: npt.NDArray[np.float32], failed: npt.NDArray[np.bool_]) -> pa.Array:
    num_classes = probabilities.shape[1]
    values = pa.array(np.ascontiguousarray(probabilities).reshape(-1))
    offsets = np.arange(0, probabilities.size + 1, num_classes, dtype=np.int32)
    mask = pa.array(failed) if failed.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)
