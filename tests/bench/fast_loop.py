"""The short way to 99 % on MNIST: the line's own reader, net and loop in one process.

python -m tests.bench.fast_loop THREADS SEED   (prints seconds and accuracy as JSON)

What TRAINING and STAGE_WIDTH say was chosen on 6,000 training images held out; then all 60,000
are trained on. The test images are looked at once, when training has ended.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from lib.data.sources import SplitRows, find_source
from lib.data.staging import Staging
from lib.storage import Storage
from lib.train.augment import Augmentation
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig

STAGE_WIDTH = 16
TRAINING = TrainConfig(
    rungs=(2,),
    learning_rate=0.15,
    batch_size=64,
    label_smoothing=0.05,
    augmentation=Augmentation(strength=0.25),
)


def main(num_threads: int, seed: int) -> None:
    """Read, train, test; the clock runs from the first byte read, the imports are before it."""
    torch.set_num_threads(num_threads)
    start_s = time.perf_counter()
    splits = read_mnist()
    read_s = time.perf_counter() - start_s
    trainer = Trainer(
        model_config(splits["train"]), replace(TRAINING, seed=seed), train=splits["train"]
    )
    for _ in range(TRAINING.rungs[-1]):
        trainer.run_epoch()
    trained_s = time.perf_counter() - start_s
    accuracy = trainer.evaluate(splits["test"]).accuracy
    seconds = {"seconds": time.perf_counter() - start_s, "read_s": read_s, "trained_s": trained_s}
    print(json.dumps({**seconds, "accuracy": accuracy, "parameters": trainer.net.num_parameters()}))


def read_mnist() -> dict[str, Examples]:
    """Read the bundled files as an ingest does, digests and checks included."""
    with (
        tempfile.TemporaryDirectory(prefix="rlb-") as folder,
        Staging(Storage(folder)) as staging,
    ):
        opened = find_source("mnist").open(staging)
        return {rows.split: _examples(rows, opened.shape) for rows in opened.splits}


def model_config(train: Examples) -> ModelConfig:
    """Return the net for these images; a pixel statistic from every tenth one is close enough."""
    pixels = train.images_NHWC[::10].float() / 255
    _, height, width, channels = train.images_NHWC.shape
    return ModelConfig(
        height=height,
        width=width,
        channels=channels,
        num_classes=int(train.labels_N.max()) + 1,
        stage_width=STAGE_WIDTH,
        depth=1,
        pixel_mean=tuple(pixels.mean(dim=(0, 1, 2)).tolist()),
        pixel_std=tuple(pixels.std(dim=(0, 1, 2)).tolist()),
    )


def _examples(rows: SplitRows, shape: tuple[int, int, int]) -> Examples:
    # A copy: what the reader returns is mapped to the staged file and read-only.
    images = np.array(rows.reader.read(shape))
    return Examples(
        images_NHWC=torch.from_numpy(images),
        labels_N=torch.from_numpy(rows.labels.astype(np.int64)),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
