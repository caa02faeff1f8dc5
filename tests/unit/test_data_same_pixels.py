"""A file has the same pixels when it is trained on, when it is scored and when it is served."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from lib.data.manifest import Preprocess
from lib.data.sources import Opened, find_source
from lib.data.staging import Staging
from lib.errors import DataError
from lib.serving.payload import decode_picture
from lib.storage import Storage
from tests.unit.serving_parts import card

SHAPE = (6, 6)


def turned(seed: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1 + seed % 8
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), np.uint8)
    Image.fromarray(values).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def twelve_bit(seed: int) -> bytes:
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(100, 4000, SHAPE).astype(np.uint16)
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def folder_of(root: Path, make: Callable[[int], bytes]) -> list[bytes]:
    bodies = [make(seed) for seed in range(16)]
    for seed, body in enumerate(bodies):
        (root / "ab"[seed % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[seed % 2] / f"{seed:02}.png").write_bytes(body)
    return bodies


def table_of(root: Path, make: Callable[[int], bytes], group_rows: int) -> list[bytes]:
    bodies = [make(seed) for seed in range(16)]
    root.mkdir()
    columns = {"image": pa.array(bodies), "label": pa.array([0, 1] * 8)}
    pq.write_table(pa.table(columns), root / "x.parquet", row_group_size=group_rows)
    return bodies


def trained_on(root: Path, tmp_path: Path) -> tuple[Opened, dict[str, np.ndarray]]:
    with Staging(Storage(str(tmp_path / "storage"))) as staging:
        opened = find_source(str(root)).open(staging)
        (rows,) = opened.splits
        images = rows.reader.read(opened.shape)
    return opened, {rows.reader.where(row): image for row, image in enumerate(images)}


def served(opened: Opened, body: bytes) -> np.ndarray:
    mode = "L" if opened.shape[2] == 1 else "RGB"
    preprocess = Preprocess(mode=mode, fill=(0,), grey_range=opened.grey_range)
    height, width, channels = opened.shape
    answered = replace(card(channels=channels), height=height, width=width, preprocess=preprocess)
    return decode_picture(body, answered)


@pytest.mark.parametrize("make", [turned, twelve_bit])
def test_of_a_folder(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    bodies = folder_of(tmp_path / "d", make)
    opened, images = trained_on(tmp_path / "d", tmp_path)
    for seed, body in enumerate(bodies):
        image = images[f"{'ab'[seed % 2]}/{seed:02}.png"]
        np.testing.assert_array_equal(image, served(opened, body))


@pytest.mark.parametrize("make", [turned, twelve_bit])
@pytest.mark.parametrize("group_rows", [5, 16])
def test_of_a_table(tmp_path: Path, make: Callable[[int], bytes], group_rows: int) -> None:
    bodies = table_of(tmp_path / "d", make, group_rows)
    opened, images = trained_on(tmp_path / "d", tmp_path)
    for row, body in enumerate(bodies):
        np.testing.assert_array_equal(images[f"x.parquet row {row}"], served(opened, body))


def test_twelve_bits_keep_their_contrast(tmp_path: Path) -> None:
    folder_of(tmp_path / "d", twelve_bit)
    opened, images = trained_on(tmp_path / "d", tmp_path)
    values = np.stack([*images.values()])
    assert opened.grey_range is not None
    low, high = opened.grey_range
    assert 100 <= low < 120
    assert 3980 < high < 4000
    assert (values.min(), values.max()) == (0, 255)
    assert len(np.unique(values)) > 200


@pytest.mark.parametrize("first_is", [8, 16])
def test_eight_bits_beside_sixteen_are_refused(tmp_path: Path, first_is: int) -> None:
    folder_of(tmp_path / "d", twelve_bit)
    opened, _ = trained_on(tmp_path / "d", tmp_path)
    first = Path(opened.splits[0].reader.where(0))
    for file in (tmp_path / "d").rglob("*.png"):
        if (file == tmp_path / "d" / first) == (first_is == 8):
            Image.fromarray(np.zeros(SHAPE, np.uint8)).save(file)
    with pytest.raises(DataError, match=r"mixed colour modes.*16-bit grey"):
        trained_on(tmp_path / "d", tmp_path)


def test_a_range_of_one_value_is_no_division_by_zero(tmp_path: Path) -> None:
    def flat(_: int) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.full(SHAPE, 700, np.uint16)).save(stream, "PNG")
        return stream.getvalue()

    folder_of(tmp_path / "d", flat)
    opened, images = trained_on(tmp_path / "d", tmp_path)
    assert opened.grey_range == (700, 701)
    assert not np.stack([*images.values()]).any()
