"""What of a source is used, what is ignored with a reason, and what is refused by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lib.data.sources import Opened, find_source, list_source, split_of
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage
from tests.object_store import object_store


def write(root: Path, paths: Sequence[str]) -> str:
    """Write 2×2 pictures, each of its own value, tables of one image, and empty other files."""
    for value, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((2, 2), value, np.uint8)
        if path.lower().endswith(".parquet"):
            table(file, [value], [pixels.tobytes()])
        elif path.lower().endswith((".png", ".jpg", ".jfif")):
            kind = "PNG" if path.lower().endswith("png") else "JPEG"
            Image.fromarray(pixels).save(file, kind)
        else:
            file.touch()
    return str(root)


def table(file: Path, labels: Sequence[Any], images: Sequence[bytes]) -> None:
    columns = {"image": pa.array(images, pa.binary(4)), "label": pa.array(labels)}
    pq.write_table(pa.table(columns), file)


def opened(root: str, tmp_path: Path) -> Opened:
    with Staging(Storage(str(tmp_path / "storage"))) as staging:
        return find_source(root).open(staging)


def ignored(root: str) -> dict[str, int]:
    return {entry.reason: entry.count for entry in find_source(root).ignored}


def rows_of(root: str) -> dict[str, int]:
    return {split: len(rows) for split, rows in find_source(root).files.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("trainset", "train"),
        ("val", "val"),
        ("valid", "val"),
        ("VALIDATION", "val"),
        ("dev", "val"),
        ("test1", "test"),
        ("Testing", "test"),
        ("test_data", "test"),
        ("test-00000-of-00002.parquet", "test"),
        ("mnist_test.parquet", "test"),
        ("train-test-split", None),
        ("latest", None),
        ("trainers", None),
        ("data", None),
        ("part-00000.snappy.parquet", None),
    ],
)
def test_names_of_splits_in_their_usual_spellings(name: str, split: str | None) -> None:
    found = split_of(name)
    assert (found and found[0]) == split


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Dev"])
@pytest.mark.parametrize("test", ["test", "Testing", "test1"])
def test_folders_of_splits_in_any_spelling(tmp_path: Path, val: str, test: str) -> None:
    names = [f"{split}/{label}/x.png" for split in ("Train", val, test) for label in "ab"]
    assert rows_of(write(tmp_path / "d", names)) == {"train": 2, "val": 2, "test": 2}


@pytest.mark.parametrize(
    "names",
    [
        ("Train.parquet", "Test.parquet", "Valid.parquet"),
        ("train.parquet/part-0.parquet", "test.parquet/part-0.parquet", "dev.parquet/p.parquet"),
        ("train-0.parquet", "testing-0.parquet", "valid-0.parquet"),
        ("data/mnist_train.parquet", "data/mnist_test1.parquet", "data/mnist_val.parquet"),
    ],
)
def test_parquet_files_of_splits_in_any_spelling(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert rows_of(write(tmp_path / "d", names)) == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.png", "train/b/1.png", "holdout/a/1.png"], "holdout.*which split"),
        (["train/a/1.png", "valid/a/1.png", "validation/a/1.png"], "valid.*validation.*both"),
        (["train/a/1.png", "test1/a/1.png", "test2/a/1.png"], "test1.*test2.*both"),
        (["train/a/1.png", "train/b/1.png", "eval/a/1.png"], "eval.*validation or test"),
        (["train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png"], "test holds 2 pictures"),
        (["train/1.png", "test/2.png"], "train holds 1 pictures"),
        (["test/a/1.png", "test/b/2.png"], "nothing is of train"),
        (["train.parquet", "t10k.parquet"], "t10k.parquet: of which split"),
        (["train.parquet", "valid.parquet", "validation.parquet"], "valid.*validation.*both"),
        (["train.parquet", "evaluation.parquet"], "evaluation.parquet.*validation or test"),
        (["test/train.parquet"], "test/train.parquet.*test and train"),
        (["test.parquet"], "nothing is of train"),
        (["a/train/1.png", "a/test/2.png", "b/train/1.png"], "folder (train|test) below its class"),
        (["day1/cat/1.png", "day1/dog/2.png", "day2/cat/3.png"], "day1/cat and day2/cat: which"),
        (["train/steam/1.png", "bus/2.png", "car/3.png"], "bus: of which split"),
        (["a/1.png", "b/2.png", "train.parquet"], "train.parquet.*pictures.*a/1.png"),
        (["a/1.png", "a/2.webp", "b/3.png", "b/4.webp", "b/5.tif"], "a/2.webp.*2 .webp, 1 .tif"),
    ],
)
def test_what_is_doubtful_is_refused_by_name(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_source(write(tmp_path / "d", names))


def test_a_split_that_is_empty_is_not_cut_from_train(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["train/a/1.png", "train/b/2.png"])
    (tmp_path / "d" / "test").mkdir()
    with pytest.raises(DataError, match="test holds 0 pictures"):
        find_source(root)


def test_train_is_a_class_beside_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["bus/1.png", "car/2.png", "train/3.png", "train/4.png"])
    found = opened(root, tmp_path)
    assert found.class_names == ("bus", "car", "train")
    assert np.bincount(found.splits[0].labels).tolist() == [1, 1, 2]


def test_pictures_below_a_class_are_of_the_class(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["a/1.png", "a/more/2.png", "a/more/yet/3.png", "b/more/4.png"])
    found = opened(root, tmp_path)
    (rows,) = found.splits
    values = rows.reader.read(found.shape)[:, 0, 0, 0]
    assert dict(zip(values.tolist(), rows.labels.tolist(), strict=True)) == {0: 0, 1: 0, 2: 0, 3: 1}
    digest = find_source(root).digests["a"]
    (tmp_path / "d/a/more").rename(tmp_path / "d/a/other")
    assert find_source(root).digests["a"] != digest


def test_every_spelling_of_jpeg_is_read(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["a/1.jfif", "a/2.JPG", "b/3.jpg", "b/4.PNG"])
    assert rows_of(root) == {"train": 4}


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    names = ["a/1.png", "b/2.png", "a/.DS_Store", "a/._1.png", "b/Thumbs.db", "desktop.ini"]
    names += [".ipynb_checkpoints/a/3.png", "a/notes.txt", "metadata.csv", "cover.png", "old.webp"]
    root = write(tmp_path / "d", names)
    (tmp_path / "d/b/gone.png").symlink_to("nowhere.png")
    (tmp_path / "d/b/again").symlink_to(tmp_path / "d")
    os.mkfifo(tmp_path / "d/b/pipe.png")
    assert rows_of(root) == {"train": 2}
    assert ignored(root) == {
        "hidden, or made by a file manager": 5,
        "a link to what is not there": 1,
        "a link to a folder that it lies in": 1,
        "neither a file nor a folder": 1,
        "no picture": 2,
        "a picture in no folder of a class": 2,
    }
    assert stat.S_ISFIFO(os.stat(tmp_path / "d/b/pipe.png").st_mode)


def test_folders_beside_the_splits_are_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["train/a/1.png", "train/b/2.png", "train/3.png", "doc/x.md"])
    assert ignored(root) == {"no picture": 1, "a picture in no folder of a class": 1}


def test_what_spark_writes_beside_its_parts_is_counted(tmp_path: Path) -> None:
    names = ["train.parquet/part-0.parquet", "train.parquet/_SUCCESS", "train.parquet/.part-0.crc"]
    names += ["train.parquet/_temporary/0/part-1.parquet"]
    root = write(tmp_path / "d", names)
    assert rows_of(root) == {"train": 1}
    assert sum(ignored(root).values()) == 3
    assert rows_of(f"{root}/train.parquet") == {"train": 1}


def test_one_file_is_of_train_whatever_it_is_called(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["test.parquet", "train.parquet"])
    assert rows_of(f"{root}/test.parquet") == {"train": 1}


@pytest.mark.parametrize("name", ["metadata.parquet", ".cache/x.parquet"])
def test_a_table_without_images_makes_pictures_no_parquet_source(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "d", ["a/1.png", "b/2.png", name])
    if name == "metadata.parquet":
        pq.write_table(pa.table({"file_name": ["a/1.png"], "label": [0]}), tmp_path / "d" / name)
    assert rows_of(root) == {"train": 2}
    assert sum(ignored(root).values()) == 1


def test_of_a_plain_and_a_packed_idx_file_the_packed_one_is_counted(tmp_path: Path) -> None:
    from tests.data_sources import idx_files, write_files

    root = tmp_path / "d"
    write_files(root, idx_files())
    write_files(root, idx_files(), gz=True)
    assert ignored(str(root)) == {"none of the four IDX files that are read": 4}


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_name_that_is_not_utf8_is_shown(tmp_path: Path, make: Callable[[Path], None]) -> None:
    root = write(tmp_path / "d", ["a/1.png", "b/2.png"])
    make(Path(os.fsdecode(os.fsencode(root) + b"/a/caf\xe9.png")))
    with pytest.raises(DataError, match=r"a/caf\\xe9.png: its name is not UTF-8"):
        find_source(root)


def test_a_hidden_name_that_is_not_utf8_is_ignored_and_can_be_printed(tmp_path: Path) -> None:
    root = write(tmp_path / "d", ["a/1.png", "b/2.png"])
    Path(os.fsdecode(os.fsencode(root) + b"/.caf\xe9")).touch()
    (hidden,) = find_source(root).ignored
    assert hidden.example == r".caf\xe9"


def test_folders_of_links_are_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", ["x/1.png", "y/2.png"])
    (tmp_path / "d").mkdir()
    for label in "xy":
        (tmp_path / "d" / label).symlink_to(tmp_path / "elsewhere" / label)
    assert rows_of(str(tmp_path / "d")) == {"train": 2}


def test_an_object_store_is_listed_as_a_folder_is(tmp_path: Path) -> None:
    names = ["a/1.png", "b/more/2.png", ".git/x/y", ".git/z", "a/._1.png", "a/n.txt"]
    local = write(tmp_path / "d", names)
    with object_store("bucket"):
        remote = Storage("s3://bucket/d")
        for name in names:
            remote.write(name, (tmp_path / "d" / name).read_bytes())
        assert list_source(remote) == list_source(Storage(local))
        assert rows_of("s3://bucket/d") == {"train": 2}
