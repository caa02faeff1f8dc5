"""Shuffled batches of a split that need not fit in memory: training reads large sets by it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lib.data.direct import byte_rows, read_shard
from lib.data.manifest import Manifest, Shard
from lib.data.readers import Images
from lib.data.splits import row_hash
from lib.errors import DataError
from lib.storage import Storage

WINDOW_BYTES = 64 * 2**20
"""Pixels that are shuffled together; two windows are held, a third while a batch of it is."""
_MOST_FREE = 2
"""Windows' memory that waits to be used again."""
IN_MEMORY_BYTES = 2**30
"""Pixels of a split up to which trials hold it; a constant, since the order of training, and so
the bits of a model that is rebuilt, depend on it."""


def fits_in_memory(manifest: Manifest, split: str) -> bool:
    """Return whether a split is trained on from memory."""
    return manifest.rows(split) * int(np.prod(manifest.shape)) <= IN_MEMORY_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows of a split, in the order that they are trained in."""

    images_NHWC: Images
    labels_N: npt.NDArray[np.int64]


@dataclass(kw_only=True)
class EpochStream:
    """Yields every row of a split once an epoch.

    The shards are shuffled, then the rows of a window of shards among each other. The order
    depends on seed and epoch alone, so training starts again at any epoch.
    """

    storage: Storage
    manifest: Manifest
    split: str
    batch_size: int
    seed: int = 0
    window_bytes: int = WINDOW_BYTES
    num_threads: int = 2
    max_windows_held: int = field(default=0, init=False)
    """The most windows that were being read or given out at once."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; the last one may be smaller.

        In the first one, 0, shards are compared with the manifest, in the others with their own
        checksums. Raises DataError naming the shard if one is damaged, StorageError if one is
        missing.
        """
        shards = [shard for shard in self.manifest.shards if shard.split == self.split]
        if not shards:
            raise DataError(f"data set {self.manifest.digest[:12]} has no split {self.split!r}")
        order = np.argsort(row_hash(len(shards), self._seed_of(number)))
        windows = list(self._windows([shards[index] for index in order]))
        left: Batch | None = None
        buffers = _Buffers(self.window_bytes, int(np.prod(self.manifest.shape)))
        with ThreadPoolExecutor(self.num_threads) as decoders, ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._read, windows[0], number, buffers, decoders)
            for index in range(len(windows)):
                window = pending.result()
                if index + 1 < len(windows):
                    pending = ahead.submit(
                        self._read, windows[index + 1], number, buffers, decoders
                    )
                self.max_windows_held = max(
                    self.max_windows_held, 2 if index + 1 < len(windows) else 1
                )
                for batch in _cut(left, window, self.batch_size):
                    left = batch if len(batch.labels_N) < self.batch_size else None
                    if left is None:
                        yield batch
                del window
            if left is not None:
                yield left

    def _seed_of(self, epoch: int) -> int:
        # Seed and epoch each get a range of their own: (0, 1) and (1, 0) are other orders.
        return self.seed * 2**32 + epoch

    def _windows(self, shards: Sequence[Shard]) -> Iterator[list[Shard]]:
        row_bytes = int(np.prod(self.manifest.shape))
        window: list[Shard] = []
        for shard in shards:
            if window and sum(s.rows for s in [*window, shard]) * row_bytes > self.window_bytes:
                yield window
                window = []
            window.append(shard)
        yield window

    def _read(
        self,
        shards: Sequence[Shard],
        epoch: int,
        buffers: _Buffers,
        decoders: ThreadPoolExecutor,
    ) -> Batch:
        """Read a window; every row goes straight to its place in the shuffled window."""
        rows = sum(shard.rows for shard in shards)
        # Sorted while the first shards are decoded; the first task, so that none waits for ever.
        seed = self._seed_of(epoch) ^ int(shards[0].sha256[:8], 16)
        order = decoders.submit(_places, rows, seed)
        width = int(np.prod(self.manifest.shape))
        images = buffers.take(rows)
        labels = np.empty(rows, dtype=np.int64)
        starts = np.cumsum([0] + [shard.rows for shard in shards])

        def place(index: int) -> None:
            columns = ["image", "label"]
            table = read_shard(self.storage, shards[index], columns, exact=epoch == 0)
            there = order.result()[starts[index] : starts[index + 1]]
            images[there] = byte_rows(table.column("image"), width).view(images.dtype)[:, 0]
            labels[there] = table.column("label").to_numpy()

        list(decoders.map(place, range(len(shards))))
        pixels = images.view(np.uint8).reshape(rows, *self.manifest.shape)
        return Batch(images_NHWC=pixels, labels_N=labels)


def _places(num_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Return for each row its place in the shuffled window."""
    return np.argsort(row_hash(num_rows, seed))


class _Buffers:
    """Memory of windows, used again once no batch is in it: new pages cost a tenth of a read.

    Args:
        num_bytes: Of a window; one of a single shard may be larger.
        width: Bytes of an image.
    """

    def __init__(self, num_bytes: int, width: int) -> None:
        self._rows = num_bytes // width
        # An image as one value of many bytes: NumPy then places it by one copy.
        self._dtype = np.dtype(f"V{width}")
        self._free: list[npt.NDArray[np.void]] = []

    def take(self, rows: int) -> npt.NDArray[np.void]:
        """Return room for so many rows."""
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < rows:
            memory = np.empty(max(self._rows, rows), dtype=self._dtype)
        holder = _Holder(memory)
        weakref.finalize(holder, self._give_back, memory).atexit = False
        return np.asarray(holder)[:rows]

    def _give_back(self, memory: npt.NDArray[np.void]) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(memory)


class _Holder:
    """What all arrays in a window's memory refer to; it goes with the last of them."""

    def __init__(self, memory: npt.NDArray[np.void]) -> None:
        self.__array_interface__ = memory.__array_interface__


def _cut(left: Batch | None, window: Batch, size: int) -> Iterator[Batch]:
    """Cut a window into batches, the first one filled up from what the last window left."""
    start = 0
    if left is not None:
        start = min(size - len(left.labels_N), len(window.labels_N))
        yield Batch(
            images_NHWC=np.concatenate([left.images_NHWC, window.images_NHWC[:start]]),
            labels_N=np.concatenate([left.labels_N, window.labels_N[:start]]),
        )
    for first in range(start, len(window.labels_N), size):
        images = window.images_NHWC[first : first + size]
        # The rest is copied: a view would keep its whole window in memory.
        yield Batch(
            images_NHWC=images if len(images) == size else images.copy(),
            labels_N=window.labels_N[first : first + size],
        )
