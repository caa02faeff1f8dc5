from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lib.data.direct import read_shard
from lib.data.ingest import IngestConfig, ingest, ingest_source
from lib.data.loader import read_splits
from lib.data.manifest import Ignored, Manifest, load_manifest
from lib.errors import ConfigError, DataError, StorageError
from lib.storage import Storage
from tests.data_sources import (
    IDX_FILES,
    idx_files,
    idx_images,
    idx_labels,
    mnist,
    write_files,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("local_ray")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX_FILES
SPLITS = ("train", "val", "test")
CLASSES = {"one": 1, "seven": 7}


@pytest.fixture(scope="module")
def bundled(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    storage = Storage(str(tmp_path_factory.mktemp("bundled")))
    return storage, ingest(storage, "mnist")


def _files(storage: Storage) -> list[str]:
    return storage.list("", recursive=True)


# What a data set holds


def test_bundled_mnist_comes_back_whole(bundled: tuple[Storage, Manifest]) -> None:
    storage, manifest = bundled
    splits = read_splits(storage, manifest, SPLITS)
    images, labels = mnist("test")
    assert np.array_equal(splits["test"].images_NHWC[..., 0], images)
    assert np.array_equal(splits["test"].labels_N, labels)
    assert splits["train"].images_NHWC.dtype == np.uint8
    assert splits["train"].labels_N.dtype == np.int64
    # Together, train and val are the source's train: every row once, with its label.
    images, labels = mnist("train")
    found = [
        image.tobytes() + bytes([label])
        for split in ("train", "val")
        for image, label in zip(splits[split].images_NHWC, splits[split].labels_N, strict=True)
    ]
    assert sorted(found) == sorted(
        image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)
    )


def test_validation_is_a_tenth_of_every_class(bundled: tuple[Storage, Manifest]) -> None:
    _, manifest = bundled
    source = np.bincount(mnist("train")[1])
    assert manifest.counts["val"] == tuple(np.rint(source * 0.1).astype(int))
    assert manifest.counts["train"] == tuple(source - np.rint(source * 0.1).astype(int))
    assert manifest.counts["test"] == tuple(np.bincount(mnist("test")[1]))


def test_statistics_are_those_of_train(bundled: tuple[Storage, Manifest]) -> None:
    storage, manifest = bundled
    train = read_splits(storage, manifest, ["train"])["train"].images_NHWC / 255.0
    assert manifest.pixel_mean == pytest.approx((train.mean(),))
    assert manifest.pixel_std == pytest.approx((train.std(),))
    assert manifest.preprocess.mode == "L"
    assert manifest.preprocess.fill == (0,)


def test_the_manifest_is_found_again_by_a_prefix(bundled: tuple[Storage, Manifest]) -> None:
    storage, manifest = bundled
    assert load_manifest(storage, manifest.digest[:6]) == manifest


def test_ingesting_again_returns_what_is_there(bundled: tuple[Storage, Manifest]) -> None:
    storage, manifest = bundled
    before = {path: os.stat(storage.path(path)).st_mtime_ns for path in _files(storage)}
    again = ingest_source(storage, "mnist", IngestConfig())
    assert again.reused
    assert again.manifest == manifest
    assert {path: os.stat(storage.path(path)).st_mtime_ns for path in _files(storage)} == before


def test_plain_gzip_and_torchvision_are_the_same_data_set(
    tmp_path: Path, storage: Storage, capfd: pytest.CaptureFixture[str]
) -> None:
    files = idx_files(num_train=1_500)
    plain = ingest(storage, str(write_files(tmp_path / "plain", files)))
    before = _files(storage)
    packed = ingest_source(
        storage, str(write_files(tmp_path / "gz", files, gz=True)), IngestConfig()
    )
    assert packed.reused
    assert packed.manifest == plain
    assert set(_files(storage)) - set(before) == {
        path for path in _files(storage) if path.startswith("data/sources/") and path not in before
    }
    # torchvision doesn't download what lies in its raw folder already.
    cache = tmp_path / "cache"
    write_files(cache / "MNIST" / "raw", files)
    downloaded = ingest_source(storage, "torchvision:MNIST", IngestConfig(), cache_dir=cache)
    assert downloaded.manifest.class_names[7] == "7 - seven"
    assert downloaded.manifest.split_digests == plain.split_digests
    assert {shard.path for shard in downloaded.manifest.shards} == {
        shard.path for shard in plain.shards
    }
    assert "1,700 of 1,700 images" in capfd.readouterr().out


def test_another_seed_is_another_data_set_with_the_same_test(
    tmp_path: Path, storage: Storage
) -> None:
    folder = str(write_files(tmp_path / "idx", idx_files()))
    first, second = ingest(storage, folder, seed=0), ingest(storage, folder, seed=1)
    assert first.digest != second.digest
    assert first.split_digests["test"] == second.split_digests["test"]
    assert first.split_digests["val"] != second.split_digests["val"]
    assert first.counts == second.counts


def test_colour_pictures_in_folders(tmp_path: Path, storage: Storage) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "Dog é"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
            pixels[[0, -1]] = pixels[:, [0, -1]] = (200, 100, 50)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{number}.PNG", "PNG")
    (tmp_path / "p" / "cat" / "notes.txt").write_text("no picture")
    ingested = ingest_source(storage, str(tmp_path / "p"), IngestConfig())
    manifest = ingested.manifest
    assert manifest.ignored == (Ignored(reason="no picture", count=1, example="cat/notes.txt"),)
    assert load_manifest(storage, manifest.digest).ignored == ingested.ignored == manifest.ignored
    assert manifest.shape == (9, 7, 3)
    assert manifest.class_names == ("Dog é", "cat")
    assert manifest.counts == {"train": (24, 24), "val": (3, 3), "test": (3, 3)}
    assert manifest.preprocess.mode == "RGB"
    assert manifest.preprocess.fill == (200, 100, 50)
    splits = read_splits(storage, manifest, SPLITS)
    first = np.asarray(Image.open(tmp_path / "p" / "cat" / "0.PNG"))
    assert any((split.images_NHWC == first).all(axis=(1, 2, 3)).any() for split in splits.values())


def test_folders_with_their_own_splits_are_kept(tmp_path: Path, storage: Storage) -> None:
    write_pictures(tmp_path / "p" / "train", "train", 20, CLASSES, suffix="jpg")
    write_pictures(tmp_path / "p" / "val", "train", 4, CLASSES, suffix="jpg", skip=20)
    write_pictures(tmp_path / "p" / "test", "test", 10, CLASSES, suffix="jpg")
    manifest = ingest(storage, str(tmp_path / "p"))
    assert manifest.class_names == ("one", "seven")
    assert manifest.counts == {"train": (20, 20), "val": (4, 4), "test": (10, 10)}


def test_the_range_of_sixteen_bit_pictures_is_kept_with_the_data_set(
    tmp_path: Path, storage: Storage
) -> None:
    for name in "ab":
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(20):
            random = np.random.default_rng([number, ord(name)])
            pixels = random.integers(0, 900, (8, 8)).astype(np.uint16)
            pixels[0, 0], pixels[0, 1] = (100, 915) if name == "a" else (101, 914)
            Image.fromarray(np.maximum(pixels, 100)).save(tmp_path / "p" / name / f"{number}.png")
    manifest = ingest(storage, str(tmp_path / "p"))
    assert (manifest.shape, manifest.preprocess.mode) == ((8, 8, 1), "L")
    assert manifest.preprocess.grey_range == (100, 915)
    train = read_splits(storage, manifest, ["train"])["train"].images_NHWC
    assert (train.min(), train.max()) == (0, 255)


def test_storage_given_as_a_uri(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/by-uri")
    manifest = ingest(storage, str(write_files(tmp_path / "idx", idx_files(), gz=True)))
    assert read_splits(storage, manifest, ["test"])["test"].images_NHWC.shape == (200, 28, 28, 1)


# What stops an ingest: (how the files are broken, what the message names)


def _wrong_magic(files: dict[str, bytes]) -> None:
    files[TEST_IMAGES] = b"\0\0\x08\x01" + files[TEST_IMAGES][4:]


def _wrong_labels_magic(files: dict[str, bytes]) -> None:
    files[TRAIN_LABELS] = b"\x1f\x8b\0\0" + files[TRAIN_LABELS][4:]


def _truncated(files: dict[str, bytes]) -> None:
    files[TRAIN_IMAGES] = files[TRAIN_IMAGES][: 16 + 784 * 123 + 5]


def _truncated_labels(files: dict[str, bytes]) -> None:
    files[TEST_LABELS] = files[TEST_LABELS][:-1]


def _counts_differ(files: dict[str, bytes]) -> None:
    files[TRAIN_LABELS] = idx_labels(mnist("train")[1][:399])


def _label_out_of_range(files: dict[str, bytes]) -> None:
    labels = mnist("test")[1][:200].copy()
    labels[77] = 10
    files[TEST_LABELS] = idx_labels(labels)


def _label_beyond_the_named_classes(files: dict[str, bytes]) -> None:
    files["classes.txt"] = b"\n".join(b"c%d" % label for label in range(9))


def _mixed_sizes(files: dict[str, bytes]) -> None:
    files[TEST_IMAGES] = idx_images(mnist("test")[0][:200, 2:])


def _empty_class(files: dict[str, bytes]) -> None:
    files[TRAIN_LABELS] = idx_labels(np.where(mnist("train")[1] == 4, 5, mnist("train")[1])[:400])


def _empty_class_in_test(files: dict[str, bytes]) -> None:
    files[TEST_LABELS] = idx_labels(np.where(mnist("test")[1] == 4, 5, mnist("test")[1])[:200])


def _duplicates(files: dict[str, bytes]) -> None:
    images = mnist("test")[0][:200].copy()
    images[[20, 30, 40]] = mnist("train")[0][[7, 8, 9]]
    files[TEST_IMAGES] = idx_images(images)


BAD_IDX = {
    _wrong_magic: rf"{TEST_IMAGES}: wrong magic number 0x00000801 before row 0",
    _wrong_labels_magic: rf"{TRAIN_LABELS}: wrong magic number 0x1f8b0000",
    _truncated: rf"{TRAIN_IMAGES}: truncated: .*400 rows.* row 123 ",
    _truncated_labels: rf"{TEST_LABELS}: truncated: .*200 rows.* row 199 ",
    _counts_differ: rf"{TRAIN_IMAGES} has 400 images, {TRAIN_LABELS} has 399 labels: row 399",
    _label_out_of_range: rf"{TEST_LABELS}: row 77: label 10 is out of range; {TRAIN_LABELS}",
    _label_beyond_the_named_classes: rf"{TRAIN_LABELS}: row 4: label 9 .*classes.txt gives 9",
    _mixed_sizes: rf"mixed image sizes: {TEST_IMAGES} row 0 is 26×28 .*{TRAIN_IMAGES}",
    _empty_class: rf"{TRAIN_LABELS}: class '4' \(label 4\) is empty in train",
    _empty_class_in_test: rf"{TEST_LABELS}: class '4' \(label 4\) is empty in test",
    _duplicates: rf"3 of 200 test rows .*{TEST_IMAGES} row 20 = {TRAIN_IMAGES} row 7",
}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("break_files", BAD_IDX, ids=lambda case: case.__name__.strip("_"))
def test_bad_idx_files_stop_the_ingest(
    tmp_path: Path, storage: Storage, break_files: Callable[[dict[str, bytes]], None], gz: bool
) -> None:
    files = idx_files()
    break_files(files)
    classes = files.pop("classes.txt", None)
    folder = write_files(tmp_path / "idx", files, gz=gz)
    if classes is not None:
        (folder / "classes.txt").write_bytes(classes)
    message = BAD_IDX[break_files]
    if gz:
        for name in IDX_FILES:
            message = message.replace(name, f"{name}.gz")
    with pytest.raises(DataError, match=message):
        ingest(storage, str(folder))
    _assert_nothing_half_done(storage)


def _other_size(folder: Path) -> str:
    Image.new("L", (28, 30)).save(folder / "seven" / "0003.png")
    return r"mixed image sizes: .*is (30|28)×28"


def _other_mode(folder: Path) -> str:
    Image.new("RGB", (28, 28)).save(folder / "seven" / "0003.png")
    return r"mixed colour modes: .*colour"


def _cut_off(folder: Path) -> str:
    file = folder / "one" / "0002.png"
    file.write_bytes(file.read_bytes()[:-60])
    return r"one/0002.png.*unreadable picture"


def _no_picture(folder: Path) -> str:
    (folder / "one" / "0002.png").write_text("hello")
    return r"one/0002.png.*unreadable picture"


def _empty_folder(folder: Path) -> str:
    (folder / "two").mkdir()
    return r"class 'two' \(label 2\) is empty in train"


def _one_picture_only(folder: Path) -> str:
    (folder / "two").mkdir()
    Image.new("L", (28, 28)).save(folder / "two" / "a.png")
    return r"class 'two' \(label 2\) has 1 row\(s\) in train.* 3 are needed"


def _copies(folder: Path) -> str:
    body = (folder / "one" / "0002.png").read_bytes()
    for file in (folder / "one").iterdir():
        file.write_bytes(body)
    return r"class 'one' would have no row in \w+: rows with the same pixels stay on one side"


@pytest.mark.parametrize(
    "break_folder",
    [_other_size, _other_mode, _cut_off, _no_picture, _empty_folder, _one_picture_only, _copies],
    ids=lambda case: case.__name__.strip("_"),
)
def test_bad_pictures_stop_the_ingest(
    tmp_path: Path, storage: Storage, break_folder: Callable[[Path], str]
) -> None:
    folder = write_pictures(tmp_path / "p", "train", 20, CLASSES)
    message = break_folder(folder)
    with pytest.raises(DataError, match=message):
        ingest(storage, str(folder))
    _assert_nothing_half_done(storage)


def test_copies_of_a_picture_are_in_one_split(tmp_path: Path, storage: Storage) -> None:
    folder = write_pictures(tmp_path / "p", "train", 20, CLASSES)
    for file in list((folder / "one").iterdir()):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    manifest = ingest(storage, str(folder))
    assert manifest.counts == {"train": (32, 16), "val": (4, 2), "test": (4, 2)}
    splits = read_splits(storage, manifest, SPLITS)
    seen = [{image.tobytes() for image in split.images_NHWC} for split in splits.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_validation_that_is_in_train_stops_the_ingest(tmp_path: Path, storage: Storage) -> None:
    write_pictures(tmp_path / "p" / "train", "train", 20, CLASSES)
    write_pictures(tmp_path / "p" / "val", "train", 4, CLASSES, skip=19)
    write_pictures(tmp_path / "p" / "test", "test", 10, CLASSES)
    message = r"2 of 8 val rows .*val/one/0000.png = train/one/0019.png"
    with pytest.raises(DataError, match=message):
        ingest(storage, str(tmp_path / "p"))
    _assert_nothing_half_done(storage)


def _write_groups(path: Path, splits: dict[str, list[str]]) -> Path:
    """Parquet files of 20 rows of one digit and 20 of another per patient."""
    path.mkdir()
    images, labels = mnist("train")
    kinds = [np.flatnonzero(labels == digit) for digit in (1, 7)]
    taken = 0
    for split, patients in splits.items():
        rows = np.concatenate([kind[taken : taken + 20 * len(patients)] for kind in kinds])
        taken += 20 * len(patients)
        pixels = [image.tobytes() for image in images[rows]]
        columns = {
            "image": pa.array(pixels, pa.binary(784)),
            "label": pa.array(labels[rows] // 7, pa.int64()),
            "patient": np.tile(np.repeat(patients, 20), 2),
        }
        pq.write_table(pa.table(columns), path / f"{split}.parquet")
    return path


def test_rows_of_a_group_are_in_one_split(tmp_path: Path, storage: Storage) -> None:
    names = [f"p{number}" for number in range(20)]
    folder = _write_groups(tmp_path / "scans", {"train": names})
    config = IngestConfig(group="patient", val_fraction=0.2, test_fraction=0.1)
    manifest = ingest_source(storage, str(folder), config).manifest
    assert manifest.counts == {"train": (280, 280), "val": (80, 80), "test": (40, 40)}
    assert load_manifest(storage, manifest.digest).group == "patient"
    again = ingest_source(storage, str(folder), config)
    assert (again.reused, again.manifest) == (True, manifest)
    source = pq.read_table(folder / "train.parquet")
    patient_of = dict(zip(source["image"].to_pylist(), source["patient"].to_pylist(), strict=True))
    splits = read_splits(storage, manifest, SPLITS)
    patients = [{patient_of[row.tobytes()] for row in s.images_NHWC} for s in splits.values()]
    assert list(map(len, patients)) == [14, 4, 2]
    assert len(set.union(*patients)) == 20
    # Without the column, patients are on several sides.
    alone = read_splits(storage, ingest(storage, str(folder)), ["val"])["val"]
    assert len({patient_of[row.tobytes()] for row in alone.images_NHWC}) > 10


def test_a_group_in_two_splits_of_the_source_and_a_missing_column_are_refused(
    tmp_path: Path, storage: Storage
) -> None:
    given = {"train": ["a", "b", "c"], "test": ["d", "b"]}
    folder = str(_write_groups(tmp_path / "scans", given))
    with pytest.raises(DataError, match=r"1 groups of 'patient' .*test.parquet row 20 in test"):
        ingest_source(storage, folder, IngestConfig(group="patient"))
    with pytest.raises(DataError, match=r"no column 'camera'; it has image, label, patient"):
        ingest_source(storage, folder, IngestConfig(group="camera"))
    pictures = write_pictures(tmp_path / "p", "train", 20, CLASSES)
    with pytest.raises(ConfigError, match="'patient': rows can be grouped in Parquet files only"):
        ingest_source(storage, str(pictures), IngestConfig(group="patient"))
    _assert_nothing_half_done(storage)


def test_rows_of_a_sorted_source_are_shuffled_over_its_shards(
    tmp_path: Path, storage: Storage
) -> None:
    images, labels = mnist("train")
    order = np.argsort(labels, kind="stable")
    files = idx_files()
    files[TRAIN_IMAGES], files[TRAIN_LABELS] = idx_images(images[order]), idx_labels(labels[order])
    manifest = ingest(storage, str(write_files(tmp_path / "idx", files)))
    shards = [shard for shard in manifest.shards if shard.split == "train" and shard.rows > 5000]
    assert len(shards) == 6
    shares = np.bincount(labels) / labels.size
    for shard in shards:
        found = np.bincount(read_shard(storage, shard)["label"].to_numpy(), minlength=10)
        # A shard of consecutive rows has two classes.
        assert np.all(np.abs(found / shard.rows - shares) < 0.08), found


def test_duplicates_below_the_threshold_pass(tmp_path: Path, storage: Storage) -> None:
    files = idx_files()
    images = mnist("test")[0][:200].copy()
    images[[20, 30]] = mnist("train")[0][[7, 8]]
    folder = write_files(tmp_path / "idx", files | {TEST_IMAGES: idx_images(images)})
    assert ingest(storage, str(folder)).rows("test") == 200
    # An accepted data set doesn't get past a stricter threshold.
    with pytest.raises(DataError, match="2 of 200 test rows"):
        ingest_source(storage, str(folder), IngestConfig(max_duplicate_fraction=0.005))


def test_damaged_torchvision_files_name_their_folder(tmp_path: Path, storage: Storage) -> None:
    files = idx_files()
    files[TRAIN_IMAGES] = files[TRAIN_IMAGES][:1_000]
    write_files(tmp_path / "cache" / "MNIST" / "raw", files)
    with pytest.raises(DataError, match=r"torchvision:MNIST train.*cache.*delete"):
        ingest_source(storage, "torchvision:MNIST", IngestConfig(), cache_dir=tmp_path / "cache")


def _assert_nothing_half_done(storage: Storage) -> None:
    left = _files(storage)
    assert [path for path in left if not path.startswith("data/shards/")] == []
    assert not [path for path in left if ".tmp-" in path]


# A full disk, an ingest cut off, and shards that go bad


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "rayline-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root: run the tests as root, or `sudo make test`")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "staged"])
def test_full_disk(tmp_path: Path, small_disk: Path, gz: bool) -> None:
    storage = Storage(str(small_disk / "storage"))
    folder = str(write_files(tmp_path / "idx", idx_files(20_000, 2_000), gz=gz))
    with pytest.raises(StorageError, match=r"no space left at .*RAYLINE_STORAGE"):
        ingest(storage, folder)
    _assert_nothing_half_done(storage)
    left = sum(file.stat().st_size for file in small_disk.rglob("*") if file.is_file())
    assert left == sum(
        Path(storage.path(path)).stat().st_size for path in _files(storage)
    )  # No temporary file either.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    manifest = ingest(storage, folder)
    assert read_splits(storage, manifest, ["train"])["train"].labels_N.size == manifest.rows(
        "train"
    )


def test_shards_of_an_interrupted_ingest_are_used(tmp_path: Path, storage: Storage) -> None:
    folder = str(write_files(tmp_path / "idx", idx_files()))
    manifest = ingest(storage, folder)
    for path in _files(storage):
        if not path.startswith("data/shards/"):
            storage.delete(path)
    storage.delete(manifest.shards[0].path)
    kept = {path: os.stat(storage.path(path)).st_mtime_ns for path in _files(storage)}
    assert len(kept) == 2
    assert ingest(storage, folder) == manifest
    assert (
        kept.items()
        <= {path: os.stat(storage.path(path)).st_mtime_ns for path in _files(storage)}.items()
    )


@pytest.mark.parametrize("damage", ["missing", "cut off", "one byte"])
def test_a_shard_gone_bad_is_named_and_ingest_repairs_it(
    tmp_path: Path, storage: Storage, damage: str
) -> None:
    folder = str(write_files(tmp_path / "idx", idx_files()))
    manifest = ingest(storage, folder)
    shard = manifest.shards[1]
    content = bytearray(storage.read(shard.path))
    if damage == "cut off":
        storage.write(shard.path, bytes(content[:-100]))
    elif damage == "one byte":
        content[200] ^= 1
        storage.write(shard.path, bytes(content))
    else:
        storage.delete(shard.path)
    with pytest.raises(DataError, match=rf"{shard.path} .*ingest again"):
        read_splits(storage, manifest, SPLITS)
    storage.delete(shard.path)
    assert ingest(storage, folder) == manifest
    assert set(read_splits(storage, manifest, SPLITS)) == set(SPLITS)


def test_rows_must_be_those_of_the_manifest(tmp_path: Path, storage: Storage) -> None:
    manifest = ingest(storage, str(write_files(tmp_path / "idx", idx_files())))
    swapped = replace(manifest, split_digests={**manifest.split_digests, "test": "0" * 32})
    with pytest.raises(DataError, match="rows of test are not those"):
        read_splits(storage, swapped, SPLITS)
    with pytest.raises(DataError, match="no split 'dev'"):
        read_splits(storage, manifest, ["dev"])
