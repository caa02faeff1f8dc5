"""Training on splits that are not held in memory, and what else reads them then."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.config import preset
from lib.data import stream
from lib.data.direct import read_some, read_split
from lib.data.loader import Split
from lib.data.manifest import Manifest
from lib.errors import DataError
from lib.registry.baseline import sampled_rows
from lib.storage import Storage
from lib.train import streamed, work
from lib.train.presets import preset_experiment
from lib.train.resources import TrialResources
from lib.train.retrain import retrain
from lib.train.trial import MODEL_FILE, Trial
from lib.train.work import image_work
from tests.made_set import ROWS, SHAPE, made_set

RUNGS = (3,)
PARAMS = {
    "stage_width": 8,
    "depth": 1,
    "growth": 2,
    "learning_rate": 0.05,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "augmentation": 0.0,
    "batch_size": 32,
}
HELD = Split(images_NHWC=np.zeros((2, *SHAPE), np.uint8), labels_N=np.zeros(2, np.int64))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, Manifest]:
    """A set of which every split is too large."""
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 1000)
    a_shard_each = partial(stream.EpochStream, window_bytes=6000)
    monkeypatch.setattr(streamed, "EpochStream", a_shard_each)
    storage = Storage(str(tmp_path))
    return storage, made_set(storage)


def test_a_trial_streams_what_does_not_fit_and_is_rebuilt_bit_by_bit(
    made: tuple[Storage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, manifest = made
    monkeypatch.setattr(work, "read_splits", lambda *_: pytest.fail("all of it was read"))
    experiment = preset_experiment(preset("smoke"))
    chosen = replace(preset("smoke"), rungs=RUNGS, num_views=3)
    found = image_work(storage, manifest, chosen, experiment)
    shared = found.shared(TrialResources(cpus=1.0, gpus=0.0, num_parallel=1))
    assert shared["splits"] == {}
    trial = Trial.__new__(Trial)
    trial.prepare(**shared)
    trial.begin(PARAMS)
    reports = [trial.advance() for _ in range(*RUNGS)]
    assert reports[-1]["val_accuracy"] > 0.9
    content = trial.artifacts(True)[MODEL_FILE]

    kept = torch.load(io.BytesIO(content), weights_only=True)
    assert kept["model_config"]["num_views"] == 3
    config: dict[str, Any] = {
        name: kept[name] for name in ("model_config", "train_config", "epoch")
    }
    config |= {"storage": storage.uri, "data_digest": manifest.digest}
    rebuilt = retrain({**config, "num_threads": 1, "device": "cpu"})
    for name, weights in kept["model"].items():
        assert torch.equal(weights, rebuilt["model"][name]), name

    assert found.confusion is not None
    counts = found.confusion(lambda _: content)
    assert counts is not None
    hits = sum(counts[label][label] for label in range(len(counts)))
    assert sum(map(sum, counts)) == ROWS["val"]
    assert hits / ROWS["val"] == pytest.approx(reports[-1]["val_accuracy"])


@pytest.mark.parametrize(("floor", "steps"), [(0, 0), (5, 5), (200, 200), (10_000, 7656)])
def test_an_epoch_over_few_images_takes_no_longer_than_one_over_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, floor: int, steps: int
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(
        work, "read_splits", lambda storage, manifest, names: dict.fromkeys(names, HELD)
    )
    chosen = replace(preset("quick"), min_epoch_steps=floor)
    found = image_work(storage, made_set(storage), chosen, preset_experiment(chosen))
    shared = found.shared(TrialResources(cpus=1.0, gpus=0.0, num_parallel=1))
    assert shared["min_epoch_steps"] == steps
    # Of 128 images each, of 8×6 pixels.
    assert found.images_per_epoch == max(400, steps * 128)
    trial = Trial.__new__(Trial)
    trial.prepare(**shared)
    assert trial._build(PARAMS).train_config.min_epoch_steps == steps


def test_a_split_that_fits_is_held(
    made: tuple[Storage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 80 * 48)
    assert [stream.fits_in_memory(made[1], name) for name in ("train", "val")] == [False, True]


def test_the_baseline_reads_only_rows_that_it_trains_on(made: tuple[Storage, Manifest]) -> None:
    storage, manifest = made
    images, labels = read_split(storage, manifest, "train")
    rows = np.array([0, 3, 199, 200, 399])
    found = read_some(storage, manifest, "train", rows)
    assert np.array_equal(found[0], images[rows])
    assert np.array_equal(found[1], labels[rows])
    sample = sampled_rows(7_000_000, (28, 28, 1), 10)
    assert (sample[0], sample[-1], len(sample)) == (0, 6_999_999, 16_000_000 // 784)
    assert len(sampled_rows(400, (8, 6, 1), 3)) == 400

    damaged = next(shard for shard in manifest.shards if shard.split == "train")
    storage.write(damaged.path, b"PAR1")
    assert len(read_some(storage, manifest, "train", np.array([250]))[1]) == 1
    with pytest.raises(DataError, match="is damaged"):
        read_some(storage, manifest, "train", np.array([10, 250]))
