"""Children of data sets: which live rows go where, once, and never across the gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.data.direct import check_data, read_split
from lib.data.extend import ExtendConfig, LabelledImages, extend
from lib.data.manifest import LIVE, Manifest, load_manifest
from lib.data.shards import row_ids
from lib.data.views import compare_sets
from lib.errors import DataError, TooFewError
from lib.storage import Storage
from tests.made_set import NAMES, SHAPE, images_of, made_set

CONFIG = ExtendConfig()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def parent(storage: Storage) -> Manifest:
    return made_set(storage)


def live(num_rows: int, *, seed: int = 7) -> LabelledImages:
    """Inverted images: nothing that the parent has."""
    labels = np.arange(num_rows, dtype=np.int32) % len(NAMES)
    return LabelledImages(images_NHWC=255 - images_of(labels, seed), labels_N=labels)


def names(images: Any) -> set[bytes]:
    return {row.tobytes() for row in row_ids(images)}


def test_a_child_has_the_parents_rows_and_the_live_ones(storage: Storage, parent: Manifest) -> None:
    parent = replace(parent, group="patient")
    made = extend(storage, parent, live(200), CONFIG)
    child = load_manifest(storage, made.manifest.digest)
    assert child.parent == parent.digest
    assert child.group == parent.group == "patient"
    assert child.digest != parent.digest
    assert sum(made.rows.values()) == 200
    assert check_data(storage, child) == sum(child.rows(split) for split in child.counts)
    assert child.counts["test"] == parent.counts["test"]
    for split in ("train", "val", LIVE):
        images, labels = read_split(storage, child, split)
        new = names(images) & names(live(200).images_NHWC)
        assert len(new) == made.rows[split]
        by_id = dict(zip(map(bytes, row_ids(images)), labels, strict=True))
        mine = live(200)
        for row, label in zip(row_ids(mine.images_NHWC), mine.labels_N, strict=True):
            assert by_id.get(bytes(row), label) == label
    assert names(read_split(storage, parent, "train")[0]) < names(
        read_split(storage, child, "train")[0]
    )


def test_nothing_held_out_is_ever_trained_on_in_any_generation(
    storage: Storage, parent: Manifest
) -> None:
    first = extend(storage, parent, live(200), CONFIG).manifest
    held_out = names(read_split(storage, first, LIVE)[0])
    both = LabelledImages(
        images_NHWC=np.concatenate([live(200).images_NHWC, live(200, seed=8).images_NHWC]),
        labels_N=np.concatenate([live(200).labels_N, live(200, seed=8).labels_N]),
    )
    second = extend(storage, first, both, CONFIG).manifest
    for child in (first, second):
        seen = names(read_split(storage, child, "train")[0])
        seen |= names(read_split(storage, child, "val")[0])
        assert not seen & held_out
        assert not seen & names(read_split(storage, child, LIVE)[0])
        assert not seen & names(read_split(storage, child, "test")[0])
    assert second.parent == first.digest
    assert held_out < names(read_split(storage, second, LIVE)[0])


def test_live_rows_are_a_share_of_train_however_many_generations(
    storage: Storage, parent: Manifest
) -> None:
    child = parent
    for seed in range(5):
        child = extend(storage, child, live(90, seed=10 + seed), CONFIG).manifest
        added = child.rows("train") - parent.rows("train")
        # Every row once at least, and not more often than its share asks for.
        assert 0.15 * parent.rows("train") < added
        assert added <= 2 * CONFIG.share * parent.rows("train") + 90 * (seed + 1)
        images, _ = read_split(storage, child, "train")
        # Exact for the first generation; later ones weigh older rows anew.
        assert child.pixel_mean[0] == pytest.approx(images.mean() / 255, abs=0.02)
        if seed == 0:
            assert child.pixel_mean[0] == pytest.approx(images.mean() / 255, abs=2e-3)
    assert child.source == "made+live"


def test_the_order_of_requests_changes_nothing(storage: Storage, parent: Manifest) -> None:
    rows = live(200)
    order = np.random.default_rng(0).permutation(200)
    shuffled = replace(rows, images_NHWC=rows.images_NHWC[order], labels_N=rows.labels_N[order])
    assert shuffled.digest == rows.digest
    one, other = (extend(storage, parent, found, CONFIG) for found in (rows, shuffled))
    assert one == other
    assert replace(rows, labels_N=np.roll(rows.labels_N, 1)).digest != rows.digest


def test_repeated_contradicting_and_known_images_are_counted_and_left_out(
    storage: Storage, parent: Manifest
) -> None:
    rows = live(120)
    old_images, old_labels = read_split(storage, parent, "test")
    images = np.concatenate([rows.images_NHWC, rows.images_NHWC[:10], old_images[:7]])
    again = rows.labels_N[:10].copy()
    again[:4] = (again[:4] + 1) % len(NAMES)  # Four are said to be something else now.
    labels = np.concatenate([rows.labels_N, again, old_labels[:7].astype(np.int32)])
    made = extend(storage, parent, LabelledImages(images_NHWC=images, labels_N=labels), CONFIG)
    assert made.num_contradicting == 8
    assert made.num_repeated == 6
    assert made.num_known == 7
    assert sum(made.rows.values()) == 116
    everywhere = set().union(
        *(names(read_split(storage, made.manifest, split)[0]) for split in ("train", "val", LIVE))
    )
    assert not everywhere & names(rows.images_NHWC[:4])
    assert not everywhere & names(old_images[:7])


@pytest.mark.parametrize("num_rows", [0, 3, 59])
def test_too_few_rows_are_refused_with_what_to_do(
    storage: Storage, parent: Manifest, num_rows: int
) -> None:
    with pytest.raises(TooFewError, match="at least 60 are needed.*POST /feedback"):
        extend(storage, parent, live(num_rows), CONFIG)
    assert len(storage.list("data/sets")) == 1


def test_rows_that_the_data_set_has_already_are_not_new(storage: Storage, parent: Manifest) -> None:
    images, labels = read_split(storage, parent, "test")
    found = LabelledImages(images_NHWC=images, labels_N=labels.astype(np.int32))
    with pytest.raises(TooFewError, match="80 are in the data set already"):
        extend(storage, parent, found, CONFIG)


def test_a_set_of_the_first_format_goes_on_with_its_kind_of_ids(
    storage: Storage, parent: Manifest
) -> None:
    # Made as an older Rayline made it.
    old = made_set(storage, format_version=1)
    known, _ = read_split(storage, old, "train")
    found = live(80)
    both = LabelledImages(
        images_NHWC=np.concatenate([known[:5], found.images_NHWC]),
        labels_N=np.concatenate([np.zeros(5, np.int32), found.labels_N]),
    )
    made = extend(storage, old, both, CONFIG)
    child = load_manifest(storage, made.manifest.digest)
    assert (child.format_version, made.num_known) == (1, 5)
    assert check_data(storage, child) == sum(child.rows(split) for split in child.counts)
    with pytest.raises(DataError, match=r"made by an older Rayline.*ingest with its source, made"):
        compare_sets(storage, old, made_set(storage), None)


def test_labels_and_shapes_that_do_not_fit_are_named(storage: Storage, parent: Manifest) -> None:
    rows = live(100)
    with pytest.raises(DataError, match="labels such as 5, .*3 classes"):
        extend(storage, parent, replace(rows, labels_N=rows.labels_N * 0 + 5), CONFIG)
    turned = replace(rows, images_NHWC=rows.images_NHWC.transpose(0, 2, 1, 3))
    with pytest.raises(DataError, match=r"live images are \(6, 8, 1\)"):
        extend(storage, parent, turned, CONFIG)
    assert SHAPE == (8, 6, 1)


def test_a_damaged_parent_is_not_extended(storage: Storage, parent: Manifest) -> None:
    path = parent.shards[0].path
    content = bytearray(storage.read(path))
    content[len(content) // 2] ^= 1
    storage.write(path, bytes(content))
    with pytest.raises(DataError, match="is damaged"):
        extend(storage, parent, live(100), CONFIG)
