"""Label columns of Parquet files: read exactly, or refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.sources import find_source
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage

Labels = Sequence[Any]


def labels_of(
    tmp_path: Path,
    labels: Labels,
    kind: pa.DataType | None = None,
    *,
    classes: str | None = None,
    beside: pa.Array | None = None,
) -> tuple[tuple[str, ...], list[int]]:
    """Write images with these labels; return the names of the classes and the labels read."""
    root = tmp_path / "d"
    root.mkdir(parents=True)
    for name, column in (("0.parquet", pa.array(labels, kind)), ("1.parquet", beside)):
        if column is not None:
            images = pa.array([bytes(4)] * len(column), pa.binary(4))
            pq.write_table(pa.table({"image": images, "label": column}), root / name)
    if classes:
        (root / "classes.txt").write_text(classes)
    with Staging(Storage(str(tmp_path / "storage"))) as staging:
        opened = find_source(str(root)).open(staging)
    return opened.class_names, opened.splits[0].labels.tolist()


DICTIONARY = pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([1, 0, 2], pa.int8(), (("0", "1", "2"), [1, 0, 2])),
        ([1, 0, 2], pa.uint64(), (("0", "1", "2"), [1, 0, 2])),
        ([1.0, 0.0, 2.0], pa.float32(), (("0", "1", "2"), [1, 0, 2])),
        ([1.0, 0.0, -0.0], pa.float64(), (("0", "1"), [1, 0, 0])),
        ([True, False, True], pa.bool_(), (("0", "1"), [1, 0, 1])),
        ([Decimal(1), Decimal(0)], pa.decimal128(5, 2), (("0", "1"), [1, 0])),
        (["b", "a", "é"], pa.string(), (("a", "b", "é"), [1, 0, 2])),
        (["b", "a", "b"], pa.large_string(), (("a", "b"), [1, 0, 1])),
        (["b", "a", "b"], pa.string_view(), (("a", "b"), [1, 0, 1])),
        ([b"b", b"a", b"b"], pa.binary(), (("a", "b"), [1, 0, 1])),
        ([b"b", b"a", b"b"], pa.large_binary(), (("a", "b"), [1, 0, 1])),
        (["b", "a", "b"], DICTIONARY, (("a", "b"), [1, 0, 1])),
        ([9, 10, 9], pa.int64(), (("9", "10"), [0, 1, 0])),
        ([8412346, 8412345], pa.int64(), (("8412345", "8412346"), [1, 0])),
        ([4 * 10**9, 4 * 10**9 + 1], pa.int64(), (("4000000000", "4000000001"), [0, 1])),
        ([2**62, 5], pa.int64(), (("5", str(2**62)), [1, 0])),
    ],
)
def test_labels_of_a_type_are_read_exactly(
    tmp_path: Path, labels: Labels, kind: pa.DataType, expected: tuple[tuple[str, ...], list[int]]
) -> None:
    assert labels_of(tmp_path, labels, kind) == expected


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0.0, 0.5], pa.float64(), "row 1: label 0.5 is no whole number"),
        ([0.0, float("nan")], pa.float32(), "row 1: label nan is no whole number"),
        ([0.0, float("inf")], pa.float16(), "row 1: label inf is no whole number"),
        ([0.0, 1e300], pa.float64(), "can't be read as int64"),
        ([0, 2**64 - 1], pa.uint64(), "can't be read as int64.*18446744073709551615"),
        ([Decimal("0.5"), Decimal(1)], pa.decimal128(5, 2), "can't be read as int64"),
        ([b"a", b"\xff"], pa.binary(), "can't be read as string"),
        ([[0], [1]], pa.list_(pa.int64()), "labels of type list<.*one class a row"),
        ([{"x": 0}], pa.struct({"x": pa.int64()}), "labels of type struct<.*one class a row"),
        ([date(2020, 1, 1)], pa.date32(), "labels of type date32.*one class a row"),
        ([None, None], pa.null(), "row 0: no label"),
        ([0, 1, -1], pa.int64(), "row 2: label -1 is out of range"),
        (["a", ""], pa.string(), "an empty class name"),
    ],
)
def test_what_is_no_class_is_refused_with_the_reason(
    tmp_path: Path, labels: Labels, kind: pa.DataType, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, labels, kind)


def test_numbers_beyond_32_bits_do_not_wrap_into_the_range(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"row 0: label {2**32} is out of range"):
        labels_of(tmp_path, [2**32, 2**32 + 1], pa.int64(), classes="zero\none\n")


def test_numbers_in_one_file_and_names_in_another_need_a_list_of_classes(tmp_path: Path) -> None:
    beside = pa.array(["10", "2"])
    with pytest.raises(DataError, match=r"0.parquet has labels of type int64, 1.parquet of string"):
        labels_of(tmp_path, [0, 2], beside=beside)
    found = labels_of(tmp_path / "x", [0, 2], beside=beside, classes="2\n7\n10\n")
    assert found == (("2", "7", "10"), [0, 2, 2, 0])


def test_numbers_of_different_width_are_numbers(tmp_path: Path) -> None:
    found = labels_of(tmp_path, [0, 2], pa.int8(), beside=pa.array([1.0, 0.0]))
    assert found == (("0", "1", "2"), [0, 2, 1, 0])


def test_a_name_that_no_class_has_is_shown_with_some_of_them(tmp_path: Path) -> None:
    classes = "\n".join(f"c{number}" for number in range(500))
    with pytest.raises(DataError, match=r"row 1: no class 'x' among c0, .*c19, …$"):
        labels_of(tmp_path, ["c1", "x"], classes=classes)
