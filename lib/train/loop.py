"""The only training loop: epochs over images, with a learning rate that comes to rest at rungs.

Shapes in names: N images, H height, W width, C colour channels, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lib.errors import SearchError
from lib.train.augment import Augmentation, augment
from lib.train.model import ConvNet, ModelConfig
from lib.train.optimizer import NesterovSGD

_EVALUATION_BATCH = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a net is trained. Kept in every checkpoint."""

    rungs: tuple[int, ...]
    """Epochs at which the learning rate has come down to zero; the last one ends training."""
    learning_rate: float = 0.1
    """Peak of the first cycle."""
    restart: float = 0.6
    """Peak of each further cycle, as a share of the one before."""
    warmup: float = 0.2
    """Share of a cycle in which the rate rises."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    batch_size: int = 128
    min_epoch_steps: int = 0
    """Steps of an epoch at least: one of fewer batches goes over the images again."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges; tuples may come as lists from a checkpoint."""
        object.__setattr__(self, "rungs", tuple(self.rungs))
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 1:
            raise ValueError(f"rungs={self.rungs} must be increasing epochs")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size} must be at least 2")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config from a checkpoint's `train_config`."""
        return cls(**{**content, "augmentation": Augmentation(**content["augmentation"])})

    def learning_rate_at(self, position: float) -> float:
        """Return the rate at a position in epochs: up, then down to zero at every rung."""
        start, peak = 0, self.learning_rate
        for end in self.rungs:
            if position < end:
                progress = (position - start) / (end - start)
                if progress < self.warmup:
                    return peak * (0.05 + 0.95 * progress / self.warmup)
                return peak * (1.0 - progress) / (1.0 - self.warmup)
            start, peak = end, peak * self.restart
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Images with their labels, as tensors; may be read-only memory shared by processes."""

    images_NHWC: Tensor
    """uint8."""
    labels_N: Tensor
    """int64."""

    @property
    def num_images(self) -> int:
        """Return how many images there are."""
        return len(self.labels_N)

    def batches(self, size: int, epoch: int = 0) -> Iterator[Examples]:
        """Yield all images in their order; the last batch may be smaller."""
        for start in range(0, self.num_images, size):
            yield Examples(
                images_NHWC=self.images_NHWC[start : start + size],
                labels_N=self.labels_N[start : start + size],
            )

    def to(self, device: torch.device) -> Examples:
        """Return the examples on a device."""
        return Examples(images_NHWC=self.images_NHWC.to(device), labels_N=self.labels_N.to(device))


class Stream(Protocol):
    """Examples that are read while they are needed: a set larger than memory."""

    @property
    def num_images(self) -> int:
        """Return how many images there are."""
        ...

    def batches(self, size: int, epoch: int = 0) -> Iterator[Examples]:
        """Yield every image once, shuffled by the epoch; the last batch may be smaller.

        The first time, epoch 0, also makes sure that the images are those of the data set.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a net does on a set of examples."""

    loss: float
    accuracy: float


def reduced_precision(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where the hardware computes in it, else None.

    On a processor without these instructions bfloat16 is emulated, and slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split("\n\n", 1)[0].split() if cpuinfo.exists() else []
    return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(flags) else None


class Trainer:
    """Trains one net. On a CPU, the same seed and threads give the same bits."""

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        *,
        train: Examples | Stream,
        val: Examples | Stream | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model_config = model_config
        self.train_config = train_config
        self.device = torch.device(device)
        self.epoch = 0
        self._train = train.to(self.device) if isinstance(train, Examples) else train
        self._val = val.to(self.device) if isinstance(val, Examples) else val
        self._precision = reduced_precision(self.device)
        self._generator = torch.Generator(self.device).manual_seed(train_config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train_config.seed)
            self.net = ConvNet(model_config)
        self.net.to(self.device)
        # Scales and shifts of the normalisation are few; decay would only pull them to zero.
        decayed = [parameter for parameter in self.net.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.net.parameters() if parameter.ndim <= 1]
        self._optimizer = NesterovSGD(
            [(decayed, train_config.weight_decay), (others, 0.0)], momentum=train_config.momentum
        )

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch and measure it, on validation images if there are any.

        Raises SearchError if the loss is not a number.
        """
        start_s = time.perf_counter()
        num_images, train_loss, learning_rate = self._train_epoch()
        self._synchronise()
        train_s = time.perf_counter() - start_s
        self.epoch += 1
        if not math.isfinite(train_loss):
            raise SearchError(
                f"the training loss became {train_loss} in epoch {self.epoch} at learning rate "
                f"{self.train_config.learning_rate:.3g}; a lower rate may train"
            )
        metrics: dict[str, float] = {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "lr": learning_rate,
            "images_per_s": num_images / train_s,
        }
        if self._val is not None:
            val = self.evaluate(self._val, self.epoch - 1)
            metrics |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "epoch": self.epoch,
            "model": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer of the same net; how it is trained is this config's."""
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())

    def checkpoint(self) -> dict[str, Any]:
        """Return what a model file holds: the net and how to build and train it again."""
        return {
            "model": {name: value.cpu() for name, value in self.net.state_dict().items()},
            "model_config": asdict(self.model_config),
            "train_config": asdict(self.train_config),
            "epoch": self.epoch,
        }

    def _train_epoch(self) -> tuple[int, float, float]:
        """Return the number of images trained on, the mean loss and the highest rate."""
        config = self.train_config
        pass_steps = max(1, self._train.num_images // config.batch_size)
        num_steps = max(pass_steps, config.min_epoch_steps)
        num_passes = math.ceil(num_steps / pass_steps)
        first_pass = self.epoch * num_passes
        batches = chain.from_iterable(
            islice(self._shuffled(first_pass + index), pass_steps) for index in range(num_passes)
        )
        total_loss = torch.zeros((), device=self.device)
        num_images, peak = 0, 0.0
        self.net.train()
        for step, given in enumerate(islice(batches, num_steps)):
            rate = config.learning_rate_at(self.epoch + step / num_steps)
            peak = max(peak, rate)
            images_NCHW = augment(
                self.net.normalise(given.images_NHWC), config.augmentation, self._generator
            )
            with self._autocast():
                logits_NK = self.net.classify(images_NCHW)
            loss = functional.cross_entropy(
                logits_NK.float(), given.labels_N, label_smoothing=config.label_smoothing
            )
            loss.backward()
            self._optimizer.step(rate)
            total_loss += loss.detach()
            num_images += given.num_images
        return num_images, float(total_loss) / num_steps, peak

    def _shuffled(self, number: int) -> Iterator[Examples]:
        """Yield the batches of a pass over the images, on the device."""
        size = self.train_config.batch_size
        if not isinstance(self._train, Examples):
            for batch in self._train.batches(size, number):
                yield batch.to(self.device)
            return
        order = torch.randperm(
            self._train.num_images, generator=self._generator, device=self.device
        )
        for index in order.split(size):
            yield Examples(
                images_NHWC=self._train.images_NHWC.index_select(0, index),
                labels_N=self._train.labels_N.index_select(0, index),
            )

    @torch.inference_mode()
    def evaluate(self, examples: Examples | Stream, epoch: int = 0) -> Evaluation:
        """Return loss (without label smoothing) and accuracy, in float32 as it will be served.

        A stream's shards are compared with the manifest in epoch 0 alone.
        """
        self.net.eval()
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in examples.batches(_EVALUATION_BATCH, epoch):
            given = batch.to(self.device)
            logits_NK = self.net(given.images_NHWC)
            loss += functional.cross_entropy(logits_NK, given.labels_N, reduction="sum")
            correct += (logits_NK.argmax(dim=1) == given.labels_N).sum()
        num_images = examples.num_images
        return Evaluation(loss=float(loss) / num_images, accuracy=int(correct) / num_images)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self._precision, enabled=self._precision is not None
        )

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
