from __future__ import annotations

import numpy as np
import pytest

from lib.data import checks
from lib.errors import DataError


def test_duplicates_are_found_by_the_whole_id_and_named_by_row() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (50, 16), dtype=np.uint8)
    test = rng.integers(0, 256, (20, 16), dtype=np.uint8)
    test[3], test[7] = train[40], train[11]
    test[5, :8] = train[20, :8]  # Half an id in common is no duplicate.
    is_test = np.arange(70) < 20
    assert checks.find_duplicates(np.concatenate([test, train]), is_test) == [(3, 60), (7, 31)]


def test_the_first_of_several_equal_train_rows_is_named() -> None:
    ids = np.zeros((6, 16), np.uint8)
    ids[:2] = 9
    assert checks.find_duplicates(ids, np.arange(6) == 5) == [(5, 2)]


def test_duplicates_up_to_the_threshold_pass() -> None:
    pairs = [("test row 1", "train row 2")]
    checks.check_duplicates("val", pairs, 100, 0.01)
    with pytest.raises(DataError, match=r"1 of 99 val rows .* test row 1 = train row 2"):
        checks.check_duplicates("val", pairs, 99, 0.01)


def test_a_header_cut_off_is_called_truncated() -> None:
    with pytest.raises(DataError, match="f: truncated: it ends before row 0"):
        checks.parse_idx_header("f", b"\0\0\x08\x03\0\0", images=True)
    with pytest.raises(DataError, match="f: truncated"):
        checks.parse_idx_header("f", b"", images=True)


def test_too_many_bytes_are_no_idx_file() -> None:
    header = checks.IdxHeader(rows=2, row_shape=(2, 2), header_bytes=16)
    checks.check_idx_size("f", header, 24)
    with pytest.raises(DataError, match="f: 1 bytes follow its last row, row 1"):
        checks.check_idx_size("f", header, 25)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_names_the_row(label: int) -> None:
    labels = np.array([0, 1, label, 2], np.int32)
    with pytest.raises(DataError, match=rf"f: row 2: label {label} .*classes.txt"):
        checks.check_labels("f", labels, 3, "classes.txt")


def test_class_names_must_be_distinct_and_given() -> None:
    with pytest.raises(DataError, match="row 2: class 'cat' stands in row 0"):
        checks.check_class_names("classes.txt", ["cat", "dog", "cat"])
    with pytest.raises(DataError, match="row 1: an empty class name"):
        checks.check_class_names("classes.txt", ["cat", ""])
    with pytest.raises(DataError, match="row 1.* stands in row 0 already"):
        checks.check_class_names("classes.txt", ["caf\u00e9", "cafe\u0301"])
    with pytest.raises(DataError, match="at least 2"):
        checks.check_class_names("classes.txt", ["cat"])


def test_a_class_with_too_few_rows_for_its_splits_is_named_with_its_row() -> None:
    labels = np.array([0, 0, 1, 0], np.int32)
    with pytest.raises(DataError, match=r"class 'dog' \(label 1\) has 1 row.*first in row 2; 2"):
        checks.check_rows_per_class("f", "train", labels, ["cat", "dog"], 2)
