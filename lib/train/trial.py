"""One trial of a sweep over Rayline's own nets: the trainable around the training loop."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lib.data.loader import Split
from lib.data.manifest import Manifest
from lib.device import granted_device
from lib.storage import Storage
from lib.train.augment import Augmentation
from lib.train.environment import describe
from lib.train.experiment import LATENCY_MS, NUM_PARAMETERS
from lib.train.exported import exported_latency_ms
from lib.train.loop import Examples, Stream, TrainConfig, Trainer
from lib.train.model import ConvNet, ModelConfig
from lib.train.streamed import StreamedExamples
from lib.train.trainable import SweepTrial

MODEL_FILE = "model.pt"
"""Of what a trial keeps: the net of its best epoch."""
_CONFUSION_BATCH = 500
_OF_CUDA = re.compile(r"\b(CUDA|cuDNN|CUBLAS|CUFFT|CUSOLVER)", re.IGNORECASE)
"""In errors of CUDA's libraries, which have no type of their own."""


class Trial(SweepTrial):
    """Trains one configuration of Rayline's own nets, an epoch a step."""

    FIXED = frozenset({"stage_width", "depth", "growth", "epochs"})

    def prepare(
        self,
        *,
        storage: Storage,
        manifest: Manifest,
        splits: Mapping[str, Split],
        rungs: tuple[int, ...],
        min_epoch_steps: int = 0,
        settings: Mapping[str, Any] | None = None,
        num_threads: int = 1,
        train_seed: int = 0,
        measure_latency: bool = False,
    ) -> None:
        """Take the splits, which all trials share, to the device that was granted, once.

        What is not among them is read from storage during each epoch. `settings` are those
        parameters that are the same in every trial.
        """
        self._data_storage = storage
        self._manifest = manifest
        self._rungs = rungs
        self._min_epoch_steps = min_epoch_steps
        self._settings = dict(settings or {})
        self._seed = train_seed
        self._measure_latency = measure_latency
        self._device = torch.device(granted_device())
        torch.set_num_threads(num_threads)
        self._examples = {name: examples(split).to(self._device) for name, split in splits.items()}

    def begin(self, params: Mapping[str, Any]) -> None:
        """Build the net."""
        self._trainer = self._build(params)
        self._inherited = False
        self._constants: dict[str, float] = {NUM_PARAMETERS: self._trainer.net.num_parameters()}
        if self._measure_latency:
            self._constants[LATENCY_MS] = self._latency_ms(self._trainer.model_config)

    def advance(self) -> Mapping[str, Any]:
        """Train one epoch."""
        metrics = self._trainer.run_epoch()
        done = metrics["epoch"] >= self._trainer.train_config.rungs[-1]
        return {**metrics, **self._constants, "done": done}

    def state(self) -> bytes:
        """Return the state of training."""
        return _saved(
            {
                "training": self._trainer.state_dict(),
                "train_config": asdict(self._trainer.train_config),
                "inherited": self._inherited,
            }
        )

    def load(self, state: bytes) -> None:
        """Go on from a state."""
        content = torch.load(io.BytesIO(state), map_location=self._device, weights_only=True)
        self._trainer.load_state_dict(content["training"])
        # Of another configuration in population-based training: this one alone, trained again,
        # does not lead to these weights.
        config = asdict(self._trainer.train_config)
        self._inherited = content["inherited"] or content["train_config"] != config

    def artifacts(self, is_best: bool) -> Mapping[str, bytes]:
        """Return the net of the best epoch, as it is recorded and registered."""
        if not is_best:
            return {}
        content = {
            **self._trainer.checkpoint(),
            "environment": describe(self._device),
            "inherited": self._inherited,
        }
        return {MODEL_FILE: _saved(content)}

    def ends_process(self, error: Exception) -> bool:
        """Whether CUDA may have no use of this process any more."""
        if self._device.type != "cuda":
            return False
        # A fault of the device stays: every later call in the process fails by it. What memory
        # lacks, a neighbour on the GPU or this process's own cache may hold; a new one begins
        # without that.
        if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return _OF_CUDA.search(str(error)) is not None

    def _build(self, params: Mapping[str, Any]) -> Trainer:
        config = {**self._settings, **params}
        return Trainer(
            ModelConfig.from_manifest(
                self._manifest,
                stage_width=config["stage_width"],
                depth=config["depth"],
                growth=config["growth"],
                num_views=config.get("num_views", 1),
            ),
            train_config(
                config,
                rungs=self._rungs,
                min_epoch_steps=self._min_epoch_steps,
                seed=self._seed,
            ),
            train=self._source("train"),
            val=self._source("val"),
            device=self._device,
        )

    def _latency_ms(self, config: ModelConfig) -> float:
        # Equal nets have one value, and exporting takes seconds.
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
        return self._desk.measured_once(
            f"latency-{digest[:16]}", lambda: exported_latency_ms(config)
        )

    def _source(self, split: str) -> Examples | Stream:
        return self._examples.get(split) or StreamedExamples(
            storage=self._data_storage, manifest=self._manifest, split=split, seed=self._seed
        )


def train_config(
    params: Mapping[str, Any], *, rungs: tuple[int, ...], min_epoch_steps: int = 0, seed: int
) -> TrainConfig:
    """Return how a trial with these parameters of the search space is trained.

    A trial of its own number of `epochs` shares the rungs before them with all others.
    """
    epochs = int(params.get("epochs", rungs[-1]))
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    optional = {name: params[name] for name in ("momentum", "batch_size") if name in params}
    return TrainConfig(
        rungs=(*(rung for rung in rungs if rung < epochs), epochs),
        learning_rate=params["learning_rate"],
        weight_decay=params["weight_decay"],
        label_smoothing=params["label_smoothing"],
        augmentation=Augmentation(strength=params["augmentation"]),
        min_epoch_steps=min_epoch_steps,
        seed=seed,
        **optional,
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


def confusion(model_file: bytes, given: Examples | Stream) -> list[list[int]]:
    """Return how many images of each true class a kept model takes for each class."""
    content = torch.load(io.BytesIO(model_file), map_location="cpu", weights_only=True)
    config = ModelConfig.from_dict(content["model_config"])
    net = ConvNet(config).eval()
    net.load_state_dict(content["model"])
    num_classes = config.num_classes
    counts = torch.zeros(num_classes**2, dtype=torch.int64)
    with torch.inference_mode():
        for batch in given.batches(_CONFUSION_BATCH):
            pairs = batch.labels_N * num_classes + net(batch.images_NHWC).argmax(dim=1)
            counts += torch.bincount(pairs, minlength=num_classes**2)
    return [list(map(int, row)) for row in counts.view(num_classes, num_classes)]


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
