from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data.assemble import content_digest
from lib.data.loader import Split
from lib.data.manifest import SPLITS, Ignored, Manifest, Preprocess
from lib.storage import Storage
from tests.unit.data_sets import write_set


def _manifest(tmp_path: Path) -> Manifest:
    images = np.zeros((6, 4, 4, 1), np.uint8)
    labels = np.array([0, 1] * 3)
    split = Split(images_NHWC=images, labels_N=labels)
    return write_set(Storage(str(tmp_path)), dict.fromkeys(SPLITS, split), ("a", "b"))


def test_a_manifest_of_an_older_rayline_still_reads(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    content = manifest.to_json()
    del content["ignored"], content["group"], content["preprocess"]["grey_range"]
    assert Manifest.from_json(json.loads(json.dumps(content))) == manifest


def test_what_was_ignored_and_the_grey_range_survive_json(tmp_path: Path) -> None:
    manifest = replace(
        _manifest(tmp_path),
        ignored=(Ignored(reason="hidden", count=2, example="a/.DS_Store"),),
        preprocess=Preprocess(mode="L", fill=(0,), grey_range=(3, 4095)),
    )
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_digest_knows_the_range_that_pictures_are_scaled_by(tmp_path: Path) -> None:
    digests = {"train": "a", "val": "b", "test": "c"}
    found = {
        content_digest((4, 4, 1), ("a", "b"), digests, 2, grey_range)
        for grey_range in (None, (0, 4095), (0, 65535))
    }
    assert len(found) == 3
