"""A source that is sorted by class trains as well from its shards as from memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.config import preset
from lib.data import shards, stream
from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import Manifest
from lib.storage import Storage
from lib.train import streamed
from lib.train.presets import preset_experiment
from lib.train.resources import TrialResources
from lib.train.trial import MODEL_FILE, Trial, confusion, examples
from lib.train.work import image_work
from tests.data_sources import mnist

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("local_ray")]
ROWS, EPOCHS, SEEDS = 30_000, 3, (0, 1)
SMALLER = 5
"""How many times smaller than usual shards, slices and windows are: as many as a larger set has."""
PARAMS = {
    "stage_width": 8,
    "depth": 1,
    "growth": 4,
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "label_smoothing": 0.0,
    "augmentation": 0.0,
    "batch_size": 64,
}


def _write_sorted(folder: Path) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        images, labels = (rows[:ROWS] for rows in mnist(split))
        order = np.argsort(labels, kind="stable")
        pixels = pa.array([image.tobytes() for image in images[order]], pa.binary(784))
        table = pa.table({"image": pixels, "label": labels[order].astype(np.int64)})
        pq.write_table(table, folder / f"{split}.parquet")
    return str(folder)


def _accuracy(storage: Storage, manifest: Manifest, seed: int) -> float:
    """Train one trial; return its accuracy on the test split."""
    chosen = replace(preset("smoke"), rungs=(EPOCHS,), num_views=1, min_epoch_steps=0)
    experiment = replace(preset_experiment(chosen), seed=seed)
    work = image_work(storage, manifest, chosen, experiment)
    trial = Trial.__new__(Trial)
    trial.prepare(**work.shared(TrialResources(cpus=2.0, gpus=0.0, num_parallel=1)))
    trial.begin(PARAMS)
    for _ in range(EPOCHS):
        trial.advance()
    test = examples(read_splits(storage, manifest, ["test"])["test"])
    counts = np.array(confusion(trial.artifacts(True)[MODEL_FILE], test))
    return float(np.trace(counts) / counts.sum())


def test_a_source_sorted_by_class_trains_as_well_streamed_as_in_memory(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHUNK_BYTES", "SLICE_BYTES"):
        monkeypatch.setattr(shards, name, getattr(shards, name) // SMALLER)
    manifest = ingest(storage, _write_sorted(tmp_path / "sorted"))
    in_memory = [_accuracy(storage, manifest, seed) for seed in SEEDS]
    # One shard is shuffled at a time.
    one_shard = partial(stream.EpochStream, window_bytes=shards.CHUNK_BYTES)
    monkeypatch.setattr(streamed, "EpochStream", one_shard)
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", shards.CHUNK_BYTES)
    assert not stream.fits_in_memory(manifest, "train")
    from_shards = [_accuracy(storage, manifest, seed) for seed in SEEDS]
    print(f"in memory {in_memory}, streamed {from_shards}")
    assert np.mean(in_memory) > 0.97
    assert np.mean(from_shards) == pytest.approx(np.mean(in_memory), abs=0.003)
