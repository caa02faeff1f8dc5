"""Trains one recorded configuration again, without Ray: what `jobs.reproduce` runs in a commit.

python -m lib.train.retrain --config config.json --out model.pt

Code of one commit starts that of another here, so these two flags and the fields of the config
stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib.data.direct import read_split
from lib.data.manifest import Manifest, load_manifest
from lib.data.stream import fits_in_memory
from lib.storage import Storage
from lib.train.environment import describe
from lib.train.loop import Examples, Stream, TrainConfig, Trainer
from lib.train.model import ModelConfig
from lib.train.streamed import StreamedExamples


def main() -> None:
    """Read the config, train up to its epoch, write the model file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="JSON: what to train")
    parser.add_argument("--out", type=Path, required=True, help="where the model file goes")
    arguments = parser.parse_args()
    torch.save(retrain(json.loads(arguments.config.read_text())), arguments.out)


def retrain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the last epoch's metrics and the environment beside it.

    Args:
        config: `storage`, `data_digest`, `model_config`, `train_config`, `epoch`, `num_threads`
            and `device`.
    """
    torch.set_num_threads(config["num_threads"])
    storage = Storage(config["storage"])
    manifest = load_manifest(storage, config["data_digest"])
    train_config = TrainConfig.from_dict(config["train_config"])
    trainer = Trainer(
        ModelConfig.from_dict(config["model_config"]),
        train_config,
        train=_source(storage, manifest, "train", train_config.seed),
        val=_source(storage, manifest, "val", train_config.seed),
        device=config["device"],
    )
    metrics: dict[str, float] = {}
    while trainer.epoch < config["epoch"]:
        metrics = trainer.run_epoch()
        print(
            f"epoch {trainer.epoch} of {config['epoch']}: validation accuracy "
            f"{metrics['val_accuracy']:.4f}, {metrics['images_per_s']:,.0f} images/s",
            flush=True,
        )
    return {
        **trainer.checkpoint(),
        "metrics": metrics,
        "environment": describe(trainer.device),
    }


def _source(storage: Storage, manifest: Manifest, split: str, seed: int) -> Examples | Stream:
    if not fits_in_memory(manifest, split):
        return StreamedExamples(storage=storage, manifest=manifest, split=split, seed=seed)
    images_NHWC, labels_N = read_split(storage, manifest, split)
    return Examples(images_NHWC=torch.from_numpy(images_NHWC), labels_N=torch.from_numpy(labels_N))


if __name__ == "__main__":
    main()
