from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data import parquet_reader
from lib.data.parquet_reader import ParquetReader, Piece
from lib.storage import Storage

GROUPS = {"x.parquet": (3, 0, 5, 1), "y.parquet": (4, 4, 0)}
NUM_ROWS = 17


@pytest.fixture
def reader(tmp_path: Path) -> ParquetReader:
    """Rows 0 … 16, each an image of its number, in files with empty row groups between."""
    value, pieces = 0, []
    schema = pa.schema({"image": pa.binary(4)})
    for path, groups in GROUPS.items():
        file_row = 0
        with pq.ParquetWriter(tmp_path / path, schema) as writer:
            for group, rows in enumerate(groups):
                images = [bytes([value + row] * 4) for row in range(rows)]
                writer.write_table(pa.table({"image": images}, schema))
                pieces.append(Piece(path=path, group=group, file_row=file_row, start=0, stop=rows))
                value, file_row = value + rows, file_row + rows
    return ParquetReader(root=Storage(str(tmp_path)), pieces=tuple(pieces), mode="L")


def test_any_range_of_rows_is_read_and_named(reader: ParquetReader) -> None:
    for start in range(NUM_ROWS):
        for stop in range(start + 1, NUM_ROWS + 1):
            part = reader.part(start, stop)
            assert part.read((2, 2, 1))[:, 0, 0, 0].tolist() == list(range(start, stop))
            inner = part.part(0, 1)
            assert inner.read((2, 2, 1))[:, 0, 0, 0].tolist() == [start]
            assert part.where(0) == reader.where(start)
    assert [reader.where(row) for row in (0, 2, 3, 8, 9, 16)] == [
        "x.parquet row 0", "x.parquet row 2", "x.parquet row 3", "x.parquet row 8",
        "y.parquet row 0", "y.parquet row 7",
    ]  # fmt: skip


def test_a_file_is_opened_once_for_all_its_row_groups(
    reader: ParquetReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        parquet_reader,
        "opened",
        lambda root, path, real=parquet_reader.opened: opened.append(path) or real(root, path),
    )
    assert len(reader.read((2, 2, 1))) == NUM_ROWS
    assert opened == ["x.parquet", "y.parquet"]
