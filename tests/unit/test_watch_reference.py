from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.data.extend import ExtendConfig, LabelledImages, extend
from lib.errors import DataError, RaylineError
from lib.storage import Storage
from lib.watch import reference
from lib.watch.features import features
from lib.watch.retrains import MIN_LABELS
from tests.watch_parts import digits, inverted, predict, write_set, write_version

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
    (known,) = found.populations
    np.testing.assert_array_equal(known.features_NF, np.sort(expected_NF, axis=0))
    np.testing.assert_array_equal(reference.ensure_features(storage, manifest), expected_NF)
    expected = predict(images[5000:6000])
    np.testing.assert_array_equal(known.answers[1].predicted_N, expected.argmax(axis=1))
    np.testing.assert_allclose(known.answers[1].confidence_N, expected.max(axis=1), atol=1e-4)
    assert found.grid == (7, 7)
    for path in storage.list("data/shards"):
        storage.delete(path)
    (again,) = reference.load_reference(storage, {1: bundle}, 1).populations
    np.testing.assert_array_equal(again.features_NF, known.features_NF)
    np.testing.assert_array_equal(again.answers[1].entropy_N, known.answers[1].entropy_N)


def test_a_sample_has_every_class_in_its_share(storage: Storage) -> None:
    manifest = write_set(storage, SPLITS, shard_rows=700)
    images, labels = reference.sample(storage, manifest, ["train"], 1000, live=False)
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
    (known,) = reference.load_reference(storage, bundles, 1).populations
    assert list(known.answers) == [1]


def test_live_requests_that_a_set_was_extended_with_are_a_population_of_their_own(
    storage: Storage,
) -> None:
    parent = write_set(storage, {**SPLITS, "test": slice(6000, 6500)})
    images, labels = digits("train")
    live = inverted(images[10_000:10_600])
    found = LabelledImages(images_NHWC=live, labels_N=labels[10_000:10_600])
    child = extend(storage, parent, found, ExtendConfig()).manifest
    # Listed several times, so that enough is learned of them.
    assert child.rows("train") > 5600
    bundles = {1: write_version(storage, parent, 1), 2: write_version(storage, child, 2)}
    ingested, lived = reference.load_reference(storage, bundles, 2).populations
    np.testing.assert_array_equal(ingested.features_NF, np.sort(features(images[:5000]), axis=0))
    np.testing.assert_array_equal(lived.features_NF, np.sort(features(live), axis=0))
    # Of the live ones those that it was not trained on; the older version knows none at all.
    assert {version: len(its) for version, its in ingested.answers.items()} == {1: 1000, 2: 1000}
    assert list(lived.answers) == [2]
    assert 200 < len(lived.answers[2]) < 300
    # As long as the older one is the champion, live requests are what they were.
    assert len(reference.load_reference(storage, bundles, 1).populations) == 1


@pytest.mark.parametrize(("num_live", "num_populations"), [(100, 1), (MIN_LABELS - 20, 2)])
def test_few_live_requests_are_no_population_but_those_of_the_first_retrain_are(
    storage: Storage, num_live: int, num_populations: int
) -> None:
    parent = write_set(storage, {**SPLITS, "test": slice(6000, 6500)})
    images, labels = digits("train")
    rows = slice(10_000, 10_000 + num_live)
    few = LabelledImages(images_NHWC=images[rows], labels_N=labels[rows])
    child = extend(storage, parent, few, ExtendConfig()).manifest
    bundles = {2: write_version(storage, child, 2)}
    found = reference.load_reference(storage, bundles, 2)
    assert len(found.populations) == num_populations


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
        reference.sample(storage, manifest, ["test"], 10, live=False)
