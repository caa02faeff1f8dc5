from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.errors import DataError, RaylineError
from lib.storage import Storage
from lib.watch import reference
from lib.watch.features import features
from tests.watch_parts import digits, predict, write_set, write_version

SPLITS = {"train": slice(0, 5000), "val": slice(5000, 6000)}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_small_splits_are_taken_whole_and_kept(storage: Storage) -> None:
    manifest = write_set(storage, SPLITS)
    bundle = write_version(storage, manifest, 1)
    found = reference.load_reference(storage, {1: bundle}, 1)
    images = digits("train")[0]
    expected_NF = features(images[:5000])
    np.testing.assert_array_equal(found.features_NF, np.sort(expected_NF, axis=0))
    np.testing.assert_array_equal(reference.ensure_features(storage, manifest), expected_NF)
    expected = predict(images[5000:6000])
    np.testing.assert_array_equal(found.answers[1].predicted_N, expected.argmax(axis=1))
    np.testing.assert_allclose(found.answers[1].confidence_N, expected.max(axis=1), atol=1e-4)
    assert found.grid == (7, 7)
    for path in storage.list("data/shards"):
        storage.delete(path)
    again = reference.load_reference(storage, {1: bundle}, 1)
    np.testing.assert_array_equal(again.features_NF, found.features_NF)
    np.testing.assert_array_equal(again.answers[1].entropy_N, found.answers[1].entropy_N)


def test_a_sample_has_every_class_in_its_share(storage: Storage) -> None:
    manifest = write_set(storage, SPLITS, shard_rows=700)
    images, labels = reference.sample_split(storage, manifest, "train", 1000)
    assert abs(len(images) - 1000) <= 10
    counts = np.bincount(labels, minlength=10)
    np.testing.assert_allclose(counts, np.array(manifest.counts["train"]) / 5, atol=1)
    # Each with its own image.
    known = {image.tobytes(): label for image, label in zip(*digits("train"), strict=True)}
    assert all(known[image.tobytes()] == label for image, label in zip(images, labels, strict=True))


def test_a_version_of_other_classes_is_left_out(storage: Storage) -> None:
    manifest = write_set(storage, SPLITS)
    bundles = {version: write_version(storage, manifest, version) for version in (1, 2)}
    card = storage.read_json(f"{bundles[2]}/card.json")
    storage.write_json(f"{bundles[2]}/card.json", {**card, "class_names": ["a", "b"]})
    assert list(reference.load_reference(storage, bundles, 1).answers) == [1]


def test_damaged_shards_are_named(storage: Storage) -> None:
    manifest = write_set(storage, SPLITS)
    path = manifest.shards[0].path
    whole = bytearray(storage.read(path))
    whole[200] ^= 1
    storage.write(path, bytes(whole))
    with pytest.raises(DataError, match="is damaged"):
        reference.ensure_features(storage, manifest)
    storage.delete(path)
    with pytest.raises((RaylineError, FileNotFoundError), match=path):
        reference.ensure_features(storage, manifest)
    with pytest.raises(DataError, match="no rows in test"):
        reference.sample_split(storage, manifest, "test", 10)
