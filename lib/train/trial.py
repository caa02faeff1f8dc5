"""One trial of a sweep: the Tune trainable around the training loop, an epoch a step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import tune

from lib.data.loader import Split
from lib.data.manifest import Manifest
from lib.train.augment import Augmentation
from lib.train.environment import describe
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig

MODEL_FILE = "model.pt"
"""Of a trial's checkpoint: the net alone, as it is recorded and registered."""
STATE_FILE = "state.pt"
"""Of a trial's checkpoint: what training goes on from."""


class Trial(tune.Trainable):
    """Trains one configuration; the same process then takes the next one."""

    def setup(
        self,
        config: dict[str, Any],
        manifest: Manifest | None = None,
        splits: Mapping[str, Split] | None = None,
        rungs: tuple[int, ...] = (1,),
        reduction_factor: int = 3,
        num_threads: int = 1,
        train_seed: int = 0,
    ) -> None:
        """Keep the data, which all trials share, and build the first trainer."""
        if manifest is None or splits is None:
            raise ValueError("a trial needs the manifest and the splits of its data set")
        self._manifest = manifest
        self._rungs = rungs
        self._reduction_factor = reduction_factor
        self._seed = train_seed
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(num_threads)
        # To the device once, not once a configuration.
        self._examples = {name: examples(split).to(self._device) for name, split in splits.items()}
        self._trainer = self._build(config)
        self._inherited = False

    def step(self) -> dict[str, Any]:
        """Train one epoch."""
        metrics = self._trainer.run_epoch()
        passed = sum(metrics["epoch"] >= rung for rung in self._rungs)
        return {
            **metrics,
            # 0 before the first rung, then 1, f, f² …: what ASHA counts in.
            "rung_count": self._reduction_factor ** (passed - 1) if passed else 0,
            "num_parameters": self._trainer.net.num_parameters(),
            "done": metrics["epoch"] >= self._rungs[-1],
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start over with another configuration in the same process."""
        self._trainer = self._build(new_config)
        self._inherited = False
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the net and the state of training."""
        content = {
            **self._trainer.checkpoint(),
            "environment": describe(self._device),
            "inherited": self._inherited,
        }
        torch.save(content, Path(checkpoint_dir) / MODEL_FILE)
        torch.save(self._trainer.state_dict(), Path(checkpoint_dir) / STATE_FILE)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Go on where `save_checkpoint` stopped."""
        model, state = (
            torch.load(Path(checkpoint_dir) / name, map_location=self._device, weights_only=True)
            for name in (MODEL_FILE, STATE_FILE)
        )
        self._trainer.load_state_dict(state)
        # Of another configuration in population-based training: this one alone, trained again,
        # does not lead to these weights.
        config = asdict(self._trainer.train_config)
        self._inherited = model.get("inherited", False) or model["train_config"] != config

    def _build(self, config: Mapping[str, Any]) -> Trainer:
        return Trainer(
            ModelConfig.from_manifest(
                self._manifest, stage_width=config["stage_width"], depth=config["depth"]
            ),
            train_config(config, rungs=self._rungs, seed=self._seed),
            train=self._examples["train"],
            val=self._examples["val"],
            device=self._device,
        )


def train_config(params: Mapping[str, Any], *, rungs: tuple[int, ...], seed: int) -> TrainConfig:
    """Return how a trial with these parameters of the search space is trained."""
    return TrainConfig(
        rungs=rungs,
        learning_rate=params["learning_rate"],
        weight_decay=params["weight_decay"],
        label_smoothing=params["label_smoothing"],
        augmentation=Augmentation(strength=params["augmentation"]),
        seed=seed,
    )


def examples(split: Split) -> Examples:
    """Return a split as tensors on the same memory."""
    with warnings.catch_warnings():
        # Arrays in the object store are read-only; nothing writes to the data.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Examples(
            images_NHWC=torch.from_numpy(split.images_NHWC),
            labels_N=torch.from_numpy(split.labels_N),
        )
