from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from lib.data import staging as staging_module
from lib.data.sources import find_source
from lib.data.staging import Staging, check_free_space
from lib.errors import DataError, StorageError
from lib.storage import Storage
from tests.data_sources import IDX_FILES, idx_files, mnist, write_files, write_pictures


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_bundled_mnist_is_whole(storage: Storage) -> None:
    source = find_source("mnist")
    assert source.ignored == ()
    with Staging(storage) as staging:
        opened = source.open(staging)
        assert opened.shape == (28, 28, 1)
        assert opened.class_names == tuple("0123456789")
        for rows in opened.splits:
            images, labels = mnist(rows.split)
            assert np.array_equal(rows.labels, labels)
            part = rows.reader.part(7_000, 7_100).read(opened.shape)
            assert np.array_equal(part[..., 0], images[7_000:7_100])
    assert storage.list("data/staging", recursive=True) == []


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("gz", [True, False])
def test_idx_files_of_each_spelling(
    tmp_path: Path, storage: Storage, separator: str, gz: bool
) -> None:
    files = {name.replace("-idx", f"{separator}idx"): body for name, body in idx_files().items()}
    folder = write_files(tmp_path / "a folder, with commas", files, gz=gz)
    with Staging(storage) as staging:
        opened = find_source(str(folder)).open(staging)
        train = opened.splits[0].reader.part(10, 20).read(opened.shape)
    assert np.array_equal(train[..., 0], mnist("train")[0][10:20])


def test_classes_file_names_the_classes(tmp_path: Path, storage: Storage) -> None:
    folder = write_files(tmp_path / "idx", idx_files())
    names = [f"digit {label}" for label in range(10)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    source = find_source(str(folder))
    assert "classes.txt" in source.digests
    with Staging(storage) as staging:
        assert source.open(staging).class_names == tuple(names)


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_missing_idx_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "idx", idx_files())
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} .*is missing"):
        find_source(str(folder))


def test_files_must_match_the_sums_beside_them(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "idx", idx_files())
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {IDX_FILES[2]}\n")
    with pytest.raises(DataError, match=rf"{IDX_FILES[2]}.*SHA256SUMS"):
        find_source(str(folder))


def test_folders_are_shuffled_the_same_way_each_time(tmp_path: Path, storage: Storage) -> None:
    folder = write_pictures(tmp_path / "p", "train", 40, {"one": 1, "seven": 7})
    first, second = find_source(str(folder)), find_source(str(folder))
    with Staging(storage) as staging:
        rows = first.open(staging).splits[0]
        assert np.array_equal(rows.labels, second.open(staging).splits[0].labels)
    assert 10 < rows.labels[:40].sum() < 30  # Neither class comes first.
    images = rows.reader.part(0, 5).read((28, 28, 1))
    for row, image in enumerate(images):
        name, number = Path(rows.reader.where(row)).parts
        digit = {"one": 1, "seven": 7}[name]
        pixels, labels = mnist("train")
        expected = pixels[np.flatnonzero(labels == digit)[int(number[:4])]]
        assert np.array_equal(image[..., 0], expected)
        assert rows.labels[row] == ("one", "seven").index(name)


def test_classes_file_orders_the_folders(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", "train", 3, {"one": 1, "seven": 7})
    (folder / "classes.txt").write_text("seven\none\n")
    assert find_source(str(folder)).class_names == ("seven", "one")  # type: ignore[attr-defined]


def test_a_folder_that_no_class_has_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path / "p" / "train", "train", 3, {"one": 1, "seven": 7})
    folder = write_pictures(tmp_path / "p" / "test", "test", 3, {"one": 1, "nine": 9}).parent
    with pytest.raises(DataError, match="test/nine"):
        find_source(str(folder))


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "nosuch://bucket/x"])
def test_a_source_that_is_not_there_says_what_can_be_given(spec: str) -> None:
    with pytest.raises(DataError, match="nowhere|nosuch"):
        find_source(spec)


def test_an_unknown_torchvision_set_lists_the_known() -> None:
    with pytest.raises(DataError, match="FashionMNIST"):
        find_source("torchvision:ImageNet")


def test_staging_removes_what_a_killed_ingest_left(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Staging(storage)
    old = left.add("old", [b"1"], 1)
    os.utime(storage.path(old), (0, 0))
    os.utime(Path(storage.path(old)).parent, (0, 0))
    running = Staging(storage).add("new", [b"1"], 1)
    with Staging(storage):
        assert storage.list("data/staging", recursive=True) == [running]


def test_staging_is_removed_when_the_block_fails(storage: Storage) -> None:
    with pytest.raises(KeyError), Staging(storage) as staging:  # noqa: PT012
        staging.add("x", [b"1"], 1)
        raise KeyError
    assert storage.list("data/staging", recursive=True) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(storage: Storage) -> None:
    with pytest.raises(StorageError, match="no space left"):
        check_free_space(storage, 2**60)
    with Staging(storage) as staging, pytest.raises(StorageError, match="no space left"):
        staging.add("x", [b"1"], 2**60)
    assert staging_module.STAGING == "data/staging"
    assert not Path(storage.root).exists()


def test_a_gzip_file_that_ends_early_is_truncated(tmp_path: Path, storage: Storage) -> None:
    folder = write_files(tmp_path / "idx", idx_files(), gz=True)
    file = folder / f"{IDX_FILES[0]}.gz"
    file.write_bytes(file.read_bytes()[:-4_000])
    with Staging(storage) as staging, pytest.raises(DataError, match=f"{IDX_FILES[0]}.*truncated"):
        find_source(str(folder)).open(staging)


def test_a_gzip_file_with_a_wrong_checksum_is_damaged(tmp_path: Path, storage: Storage) -> None:
    folder = write_files(tmp_path / "idx", idx_files(), gz=True)
    content = bytearray(gzip.compress(idx_files()[IDX_FILES[0]]))
    content[-8] ^= 1
    (folder / f"{IDX_FILES[0]}.gz").write_bytes(content)
    with Staging(storage) as staging, pytest.raises(DataError, match="damaged gzip"):
        find_source(str(folder)).open(staging)
