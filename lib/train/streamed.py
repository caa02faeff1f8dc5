"""A split that does not fit in memory, as the training loop reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lib.data.manifest import Manifest
from lib.data.stream import EpochStream
from lib.storage import Storage
from lib.train.loop import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedExamples:
    """Reads a split from its shards in every epoch anew; see `lib.train.loop.Stream`."""

    storage: Storage
    manifest: Manifest
    split: str
    seed: int = 0

    @property
    def num_images(self) -> int:
        """Return how many images the split has."""
        return self.manifest.rows(self.split)

    def batches(self, size: int, epoch: int = 0) -> Iterator[Examples]:
        """Yield every image once, shuffled by seed and epoch; the last batch may be smaller."""
        stream = EpochStream(
            storage=self.storage,
            manifest=self.manifest,
            split=self.split,
            batch_size=size,
            seed=self.seed,
        )
        for batch in stream.epoch(epoch):
            yield Examples(
                images_NHWC=torch.from_numpy(batch.images_NHWC),
                labels_N=torch.from_numpy(batch.labels_N),
            )
