"""Reading a data set and training on it again, both without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.data.direct import check_data, read_split
from lib.data.loader import Split
from lib.data.manifest import SPLITS, Manifest
from lib.errors import DataError
from lib.registry.verdict import compare
from lib.storage import Storage
from lib.train.loop import TrainConfig
from lib.train.model import ModelConfig
from lib.train.retrain import retrain
from tests.unit.data_sets import write_set

SHAPE = (8, 6, 1)
NAMES = ("dark", "bright", "noisy")
RANDOM = np.random.default_rng(0)
ROWS = {"train": 160, "val": 40, "test": 40}
LABELS = {split: np.arange(rows, dtype=np.int64) % 3 for split, rows in ROWS.items()}
IMAGES = {
    split: (
        RANDOM.integers(0, 80, (rows, *SHAPE)) + 80 * LABELS[split][:, None, None, None]
    ).astype(np.uint8)
    for split, rows in ROWS.items()
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def manifest(storage: Storage) -> Manifest:
    splits = {split: Split(images_NHWC=IMAGES[split], labels_N=LABELS[split]) for split in SPLITS}
    return write_set(storage, splits, NAMES)


def test_splits_are_read_in_order_and_checked(storage: Storage, manifest: Manifest) -> None:
    for split in SPLITS:
        images, labels = read_split(storage, manifest, split)
        assert np.array_equal(images, IMAGES[split])
        assert np.array_equal(labels, LABELS[split])
    assert check_data(storage, manifest) == sum(ROWS.values())


def test_damage_and_other_rows_are_named(storage: Storage, manifest: Manifest) -> None:
    shard = next(shard for shard in manifest.shards if shard.split == "test")
    kept = [other for other in manifest.shards if other != shard]
    with pytest.raises(DataError, match="rows of test are not those"):
        check_data(storage, replace(manifest, shards=tuple(kept)))
    with pytest.raises(DataError, match="rows of train are not those"):
        check_data(storage, replace(manifest, shards=tuple(reversed(manifest.shards))))
    content = bytearray(storage.read(shard.path))
    content[len(content) // 2] ^= 1
    storage.write(shard.path, bytes(content))
    with pytest.raises(DataError, match=f"{shard.path} at .* is damaged"):
        check_data(storage, manifest)
    read_split(storage, manifest, "train")


def test_the_same_config_gives_the_same_bits_and_another_seed_does_not(
    storage: Storage, manifest: Manifest, tmp_path: Path
) -> None:
    config = {
        "storage": storage.uri,
        "data_digest": manifest.digest,
        "model_config": asdict(ModelConfig.from_manifest(manifest, stage_width=4, depth=1)),
        "train_config": asdict(TrainConfig(rungs=(3,), batch_size=16)),
        "epoch": 2,
        "num_threads": 1,
        "device": "cpu",
    }
    file, out = tmp_path / "config.json", tmp_path / "model.pt"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "lib.train.retrain", "--config", file, "--out", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "epoch 2 of 2: validation accuracy" in done.stdout
    one = torch.load(out, weights_only=True)
    num_threads = torch.get_num_threads()
    try:
        same = retrain(config)
        other = retrain({**config, "train_config": {**config["train_config"], "seed": 1}})
    finally:
        torch.set_num_threads(num_threads)

    assert one["epoch"] == 2
    assert one["metrics"] | {"images_per_s": 0} == same["metrics"] | {"images_per_s": 0}
    assert one["environment"] == same["environment"]
    assert one["environment"]["num_threads"] == 1
    assert compare(one["model"], same["model"]).differing == ()
    assert "head.weight" in compare(one["model"], other["model"]).differing
