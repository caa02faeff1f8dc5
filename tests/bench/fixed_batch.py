"""What the loop adds to its arithmetic: its images/s beside those of one batch, over and over.

python -m tests.bench.fixed_batch STAGE_WIDTH AUGMENTATION ROUNDS   (prints JSON)

Both take turns on the same net in one process and one thread, so that a busy machine slows both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch.nn import functional

from lib.train.augment import Augmentation
from lib.train.loop import Examples, TrainConfig, Trainer
from tests.bench import fast_loop

_NUM_IMAGES = 6400
_NUM_VAL = 711
"""A tenth of all, as in an ingest."""


def main(stage_width: int, strength: float, rounds: int) -> None:
    """Train a round of each in turns; print the medians."""
    torch.set_num_threads(1)
    whole = fast_loop.read_mnist()["train"]
    train, val = _rows(whole, 0, _NUM_IMAGES), _rows(whole, _NUM_IMAGES, _NUM_IMAGES + _NUM_VAL)
    config = TrainConfig(rungs=(rounds + 1,), augmentation=Augmentation(strength=strength))
    model = replace(fast_loop.model_config(train), stage_width=stage_width)
    trainer = Trainer(model, config, train=train, val=val)
    trainer.run_epoch()
    loop, fixed = [], []
    for _ in range(rounds):
        start_s = time.perf_counter()
        trainer.run_epoch()
        loop.append(_NUM_IMAGES / (time.perf_counter() - start_s))
        fixed.append(_fixed_images_per_s(trainer, train))
    shares = [one / other for one, other in zip(loop, fixed, strict=True)]
    print(
        json.dumps(
            {
                "stage_width": stage_width,
                "loop_images_per_s": statistics.median(loop),
                "fixed_images_per_s": statistics.median(fixed),
                "share": statistics.median(shares),
                "shares": shares,
            }
        )
    )


def _fixed_images_per_s(trainer: Trainer, train: Examples) -> float:
    """Return the images/s of forward and backward alone: no data, optimizer or evaluation."""
    net, batch_size = trainer.net.train(), trainer.train_config.batch_size
    images_NCHW = net.normalise(train.images_NHWC[:batch_size])
    labels_N = train.labels_N[:batch_size]
    num_batches = _NUM_IMAGES // batch_size
    start_s = time.perf_counter()
    for _ in range(num_batches):
        functional.cross_entropy(net.classify(images_NCHW), labels_N).backward()
        net.zero_grad(set_to_none=True)
    return num_batches * batch_size / (time.perf_counter() - start_s)


def _rows(examples: Examples, start: int, stop: int) -> Examples:
    return Examples(
        images_NHWC=examples.images_NHWC[start:stop], labels_N=examples.labels_N[start:stop]
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
