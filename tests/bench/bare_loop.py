"""Peer of the search: the training loop in a process of its own, without Tune and MLflow.

python -m tests.bench.bare_loop DATA.npz WORK.json   (starts at the first line on standard input)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lib.data.loader import Split
from lib.data.manifest import Manifest
from lib.train.loop import Trainer
from lib.train.model import ModelConfig
from lib.train.trial import examples, train_config


def main(data_file: str, work_file: str) -> None:
    """Train the given configurations one after another; print images and seconds as JSON."""
    torch.set_num_threads(1)
    data = np.load(data_file)
    work = json.loads(Path(work_file).read_text())
    manifest = Manifest.from_json(work["manifest"])
    train, val = (
        examples(Split(images_NHWC=data[f"{name}_images"], labels_N=data[f"{name}_labels"]))
        for name in ("train", "val")
    )
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for params in work["trials"]:
        trainer = Trainer(
            ModelConfig.from_manifest(
                manifest,
                stage_width=params["stage_width"],
                depth=params["depth"],
                growth=params["growth"],
            ),
            train_config(params, rungs=(work["epochs"],), seed=0),
            train=train,
            val=val,
        )
        for _ in range(work["epochs"]):
            trainer.run_epoch()
    images = len(train.labels_N) * work["epochs"] * len(work["trials"])
    print(json.dumps({"images": images, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
