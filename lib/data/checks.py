"""What stops an ingest: pure checks whose messages name the file and the row.

Rows are counted from 0, as in the source.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.errors import DataError

IDX_IMAGES_MAGIC = 0x00000803
IDX_LABELS_MAGIC = 0x00000801
IDX_IMAGES_HEADER_BYTES = 16
IDX_LABELS_HEADER_BYTES = 8
ROW_ID_BYTES = 16
_FILTER_BITS = 25

Labels = npt.NDArray[np.int32]
RowIds = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class IdxHeader:
    """What the head of an IDX file promises."""

    rows: int
    row_shape: tuple[int, ...]
    """(height, width) of images, () of labels."""
    header_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row_shape, dtype=np.int64))


def parse_idx_header(name: str, head: bytes, *, images: bool) -> IdxHeader:
    """Read an IDX header; raise DataError for another magic number or a file that ends in it."""
    magic_wanted = IDX_IMAGES_MAGIC if images else IDX_LABELS_MAGIC
    header_bytes = IDX_IMAGES_HEADER_BYTES if images else IDX_LABELS_HEADER_BYTES
    kind = "images" if images else "labels"
    if len(head) >= 4:
        (magic,) = struct.unpack(">I", head[:4])
        if magic != magic_wanted:
            raise DataError(
                f"{name}: wrong magic number 0x{magic:08x} before row 0; an IDX file of {kind} "
                f"starts with 0x{magic_wanted:08x}: is it another file under this name?"
            )
    if len(head) < header_bytes:
        raise DataError(
            f"{name}: truncated: it ends before row 0, after {len(head)} of the "
            f"{header_bytes} bytes of its header; fetch it again"
        )
    rows, *row_shape = struct.unpack(f">{header_bytes // 4 - 1}I", head[4:header_bytes])
    if images and 0 in row_shape:
        raise DataError(f"{name}: images of {row_shape[0]}×{row_shape[1]} pixels; fetch it again")
    return IdxHeader(rows=rows, row_shape=tuple(row_shape), header_bytes=header_bytes)


def check_idx_size(name: str, header: IdxHeader, size_bytes: int) -> None:
    """Raise DataError if a file (unpacked) is shorter or longer than its header promises."""
    expected = header.header_bytes + header.rows * header.row_bytes
    if size_bytes < expected:
        row = (size_bytes - header.header_bytes) // header.row_bytes
        raise DataError(
            f"{name}: truncated: its header promises {header.rows} rows, it ends in row {row} "
            f"({size_bytes} of {expected} bytes); fetch it again"
        )
    if size_bytes > expected:
        raise DataError(
            f"{name}: {size_bytes - expected} bytes follow its last row, row {header.rows - 1}; "
            "the header or the file is damaged: fetch it again"
        )


def check_row_counts(images_name: str, num_images: int, labels_name: str, num_labels: int) -> None:
    """Raise DataError if images and labels differ in number."""
    if num_images != num_labels:
        raise DataError(
            f"{images_name} has {num_images} images, {labels_name} has {num_labels} labels: row "
            f"{min(num_images, num_labels)} has no partner; both must be of the same set"
        )


def check_labels(name: str, labels: Labels, num_classes: int, classes_from: str) -> None:
    """Raise DataError naming the first row whose label is not 0 … num_classes − 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{name}: row {row}: label {labels[row]} is out of range; {classes_from} gives "
            f"{num_classes} classes, 0–{num_classes - 1} ({wrong.size} such rows, counted from 0)"
        )


def check_class_names(name: str, class_names: Sequence[str]) -> None:
    """Raise DataError for fewer than two classes, an empty name, or two that look the same."""
    if len(class_names) < 2:
        raise DataError(f"{name}: {len(class_names)} classes; at least 2 are needed")
    seen: dict[str, int] = {}
    for row, class_name in enumerate(class_names):
        if not class_name:
            raise DataError(f"{name}: row {row}: an empty class name")
        # The same accented letter may be one character or two, and comes as both from two systems.
        shown = unicodedata.normalize("NFC", class_name)
        if shown in seen:
            raise DataError(
                f"{name}: row {row}: class {class_name!r} stands in row {seen[shown]} already; "
                "put the two together under one name"
            )
        seen[shown] = row


def check_rows_per_class(
    name: str, split: str, labels: Labels, class_names: Sequence[str], minimum: int
) -> None:
    """Raise DataError for a class with no rows, or fewer than its splits need."""
    counts = np.bincount(labels, minlength=len(class_names))
    for index in np.flatnonzero(counts < minimum).tolist():
        where = f"{name}: class {class_names[index]!r} (label {index})"
        if counts[index] == 0:
            raise DataError(f"{where} is empty in {split}: none of its {labels.size} rows has it")
        raise DataError(
            f"{where} has {counts[index]} row(s) in {split}, first in row "
            f"{int(np.argmax(labels == index))}; {minimum} are needed, one for each split of it"
        )


def check_same_shape(
    shapes: Mapping[str, tuple[int, int, int]],
) -> None:
    """Raise DataError if files hold images of different sizes or colours."""
    first_name, first = next(iter(shapes.items()))
    for name, shape in shapes.items():
        if shape[:2] != first[:2]:
            raise DataError(
                f"mixed image sizes: {name} row 0 is {shape[0]}×{shape[1]} pixels, {first_name} "
                f"row 0 is {first[0]}×{first[1]} (height×width); all must be of one size"
            )
        if shape[2] != first[2]:
            raise DataError(
                f"mixed colour modes: {name} row 0 has {shape[2]} channels, {first_name} row 0 "
                f"has {first[2]}; save all pictures as grey or all as colour"
            )


def find_duplicates(ids: RowIds, is_test: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (chosen row, first other row with the same pixels) for ids of shape (N, 16)."""
    heads, tails = np.ascontiguousarray(ids).view(np.uint64).T
    # A few bits of an id rule out nearly all rows, a few of its other half most that are left; the
    # whole id decides.
    others = np.flatnonzero(_marked(heads[is_test])[_bits(heads)] & ~is_test)
    others = others[_marked(tails[is_test])[_bits(tails[others])]]
    tests = np.flatnonzero(_marked(heads[others])[_bits(heads)] & is_test)
    first: dict[bytes, int] = {}
    for row in others:
        first.setdefault(ids[row].tobytes(), int(row))
    found = ((int(row), first.get(ids[row].tobytes())) for row in tests)
    return [(test, other) for test, other in found if other is not None]


def _bits(halves: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return halves >> np.uint64(64 - _FILTER_BITS)


def _marked(halves: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return for all bits whether some of these halves of ids begin with them."""
    marked = np.zeros(2**_FILTER_BITS, dtype=np.bool_)
    marked[_bits(halves)] = True
    return marked


def check_duplicates(
    split: str, pairs: Sequence[tuple[str, str]], num_rows: int, max_fraction: float
) -> None:
    """Raise DataError if too many of the rows of val or test are in another split too.

    `pairs` names each duplicate: (its file and row, file and row of the other).
    """
    if len(pairs) > max_fraction * num_rows:
        examples = "; ".join(f"{row} = {other}" for row, other in pairs[:3])
        raise DataError(
            f"{len(pairs)} of {num_rows} {split} rows ({len(pairs) / num_rows:.1%}) have the same "
            f"pixels as a row of another split; at most {max_fraction:.1%} may, or {split} "
            f"measures memory. Remove them from one side. The first: {examples}"
        )
