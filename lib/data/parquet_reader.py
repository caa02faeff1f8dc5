"""Reads ranges of rows of Parquet files, whatever their row groups are."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.pictures import DECODE_ERRORS, decode
from lib.data.readers import Images, RawReader, Shape
from lib.errors import DataError
from lib.storage import Storage

IMAGE = "image"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some rows of one row group."""

    path: str
    group: int
    file_row: int
    """Row of the file at which the row group begins."""
    start: int
    """Counted from there."""
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetReader:
    """Rows of Parquet files, one file after the other."""

    root: Storage
    pieces: tuple[Piece, ...]
    mode: str
    """Of the data set: `L` or `RGB`."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Rows at which a row group ends: each is decoded as a whole, whatever is read of it."""
        return tuple(itertools.accumulate(piece.stop - piece.start for piece in self.pieces))

    def part(self, start: int, stop: int) -> ParquetReader:
        """Return a reader of rows `start` to `stop`."""
        chosen, row = [], 0
        for piece in self.pieces:
            rows = piece.stop - piece.start
            first, last = max(start - row, 0), min(stop - row, rows)
            if first < last:
                chosen.append(replace(piece, start=piece.start + first, stop=piece.start + last))
            row += rows
        return replace(self, pieces=tuple(chosen))

    def read(self, shape: Shape) -> Images:
        """Decode the row groups, and keep the rows that are asked for."""
        parts = [self._read(piece, shape) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def where(self, row: int) -> str:
        """Return the file and row."""
        for piece in self.pieces:
            rows = piece.stop - piece.start
            if row < rows:
                return f"{piece.path} row {piece.file_row + piece.start + row}"
            row -= rows
        raise IndexError(row)

    def _read(self, piece: Piece, shape: Shape) -> Images:
        with opened(self.root, piece.path) as file:
            column = file.read_row_group(piece.group, columns=[IMAGE], use_threads=False).column(0)
        row = piece.file_row + piece.start
        rows = column.slice(piece.start, piece.stop - piece.start)
        parts = []
        for chunk in rows.chunks:
            parts.append(pictures(chunk, shape, self.mode, piece.path, row))
            row += len(chunk)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedReader:
    """Rows unpacked to a file of raw pixels; messages name where they come from."""

    raw: RawReader
    names: ParquetReader

    def part(self, start: int, stop: int) -> StagedReader:
        """Return a reader of rows `start` to `stop`."""
        return StagedReader(raw=self.raw.part(start, stop), names=self.names.part(start, stop))

    def read(self, shape: Shape) -> Images:
        """Read the unpacked range."""
        return self.raw.read(shape)

    def where(self, row: int) -> str:
        """Return the file and row."""
        return self.names.where(row)


@contextlib.contextmanager
def opened(root: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; raise DataError naming it if it is damaged or can't be read."""
    try:
        with root.filesystem.open_input_file(root.path(path)) as file:
            yield pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no Parquet file, or damaged: {error}; fetch it again") from error


def pictures(column: pa.Array, shape: Shape, mode: str, path: str, row: int) -> Images:
    """Return a column as (N, H, W, C); raw pixels without a copy. `row` is the first one's."""
    if column.null_count:
        missing = row + column.is_null().index(True).as_py()
        raise DataError(f"{path}: row {missing}: no image; remove the row")
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        if width != np.prod(shape):
            raise DataError(f"{path}: row {row}: {width} bytes are no image of {shape}")
        pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
        start = column.offset * width
        return pixels[start : start + len(column) * width].reshape(-1, *shape)
    images = np.empty((len(column), *shape), dtype=np.uint8)
    bodies = column.field("bytes") if pa.types.is_struct(column.type) else column
    for index, body in enumerate(bodies):
        where = f"{path}: row {row + index}"
        try:
            decoded, found_mode = decode(body.as_py())
        except (*DECODE_ERRORS, TypeError) as error:
            raise DataError(f"{where}: unreadable picture: {error}; repair or remove it") from error
        if (*decoded.shape[:2], found_mode) != (*shape[:2], mode):
            raise DataError(
                f"mixed image sizes or colour modes: {where} is {decoded.shape[0]}×"
                f"{decoded.shape[1]} {found_mode}, the first row {shape[0]}×{shape[1]} {mode}"
            )
        images[index] = decoded
    return images
