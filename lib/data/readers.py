"""Readers of row ranges: what a task on any node needs to read its part of a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lib.data.pictures import DECODE_ERRORS, MODE_NAMES, decode, value_range
from lib.errors import DataError, StorageError
from lib.storage import Storage

Images = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]
"""Height, width, channels."""


class Reader(Protocol):
    """Reads rows of one split of a source."""

    def part(self, start: int, stop: int) -> Reader:
        """Return a reader of some of the rows, small enough to be sent to a task."""
        ...

    def read(self, shape: Shape) -> Images:
        """Return all rows, (N, H, W, C); raise DataError naming file and row."""
        ...

    def where(self, row: int) -> str:
        """Return the file and row that people know the row by."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RawReader:
    """Rows of raw pixels, one after the other in a file."""

    name: str
    """The file that messages name: the user's, also when `path` is a staged copy."""
    root: Storage
    path: str
    """Relative to `root`."""
    offset_bytes: int
    """Of row 0 of the file."""
    start: int
    stop: int

    def part(self, start: int, stop: int) -> RawReader:
        """Return a reader of rows `start` to `stop`, counted from this reader's first."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, shape: Shape) -> Images:
        """Read the range without copying it."""
        row_bytes = int(np.prod(shape))
        num_bytes = (self.stop - self.start) * row_bytes
        try:
            with self.root.filesystem.open_input_file(self.root.path(self.path)) as file:
                file.seek(self.offset_bytes + self.start * row_bytes)
                buffer = file.read_buffer(num_bytes)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if buffer.size != num_bytes:
            row = self.start + buffer.size // row_bytes
            raise DataError(f"{self.name}: truncated: it ends in row {row}; fetch it again")
        return np.frombuffer(buffer, dtype=np.uint8).reshape(-1, *shape)

    def where(self, row: int) -> str:
        """Return the file and row."""
        return f"{self.name} row {self.start + row}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureReader:
    """One picture file per row."""

    root: Storage
    paths: tuple[str, ...]
    """Relative to `root`."""
    mode: str
    """Of the data set: a key of `MODE_CHANNELS`."""
    mode_from: str
    """The file that set size and mode."""
    grey_range: tuple[int, int] | None = None
    """Of a set of 16-bit pictures."""

    def part(self, start: int, stop: int) -> PictureReader:
        """Return a reader of rows `start` to `stop`."""
        return replace(self, paths=self.paths[start:stop])

    def read(self, shape: Shape) -> Images:
        """Decode the pictures; all must have the size and mode of the first of the set."""
        images = np.empty((len(self.paths), *shape), dtype=np.uint8)
        for row, (path, body) in enumerate(self._bodies()):
            try:
                pixels, mode = decode(body, self.grey_range)
            except DECODE_ERRORS as error:
                raise DataError(
                    f"{path} (row {row} of its chunk): unreadable picture: {error}; repair or "
                    "remove it"
                ) from error
            if pixels.shape[:2] != shape[:2]:
                raise DataError(
                    f"mixed image sizes: {path} is {pixels.shape[0]}×{pixels.shape[1]} pixels, "
                    f"{self.mode_from} is {shape[0]}×{shape[1]} (height×width); scale all to one "
                    "size"
                )
            if mode != self.mode:
                raise DataError(
                    f"mixed colour modes: {path} is {MODE_NAMES[mode]}, {self.mode_from} is "
                    f"{MODE_NAMES[self.mode]}; save all pictures in one mode"
                )
            images[row] = pixels
        return images

    def where(self, row: int) -> str:
        """Return the file."""
        return self.paths[row]

    def _bodies(self) -> Iterator[tuple[str, bytes]]:
        for path in self.paths:
            try:
                yield path, self.root.read(path)
            except (OSError, StorageError) as error:
                raise _unreadable(path, error) from error


def checked_range(name: str, body: Any) -> tuple[int, int]:
    """Return the range of a 16-bit picture; raise DataError naming it if it can't be decoded."""
    try:
        return value_range(body)
    except (*DECODE_ERRORS, TypeError) as error:
        raise DataError(f"{name}: unreadable picture: {error}; repair or remove it") from error


def merged_range(ranges: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the range of all pictures, wide enough to be divided by."""
    lows, highs = zip(*ranges, strict=True)
    return min(lows), max(*highs, min(lows) + 1)


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name} can't be read: {error}; on a cluster of several nodes the source must be on a "
        "disk that all of them mount, or a URI such as s3://bucket/folder"
    )
