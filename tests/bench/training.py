"""Training: seconds to 99 % on MNIST beside the public PyTorch example; the loop's own cost."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.data.sources import BUNDLED_MNIST
from tests.bench.parts import ROOT
from tests.bench.report import BenchError, Options, Report, Table, figure, say, spread

TARGET = 0.99
MIN_SEEDS = 5
_MAX_EPOCHS = 14
_PROBE_BATCHES = 60
_THREADS = (1, 2)
_LOOP_WIDTHS = (16, 48)
_LOOP_AUGMENTATION = 0.5


def run(options: Options) -> Report:
    """Measure the example once, for it takes minutes, and ours with a seed a round."""
    folder = _unpacked(options.temp / "example")
    example_threads, speeds = _best_threads(folder)
    say(f"training: the example is fastest on {example_threads} threads; it trains to {TARGET:.0%}")
    example = _run("example_loop", folder, example_threads, _MAX_EPOCHS, TARGET)
    if example["accuracies"][-1] < TARGET:
        raise BenchError(f"the example ended below {TARGET:.0%}: {example['accuracies']}")
    say(f"training: the example took {example['seconds']:.1f} s")
    ours: dict[int, list[dict[str, float]]] = {threads: [] for threads in _THREADS}
    for seed in range(max(MIN_SEEDS, options.rounds)):
        for threads, found in ours.items():
            found.append(_run("fast_loop", threads, seed))
            say(f"training: seed {seed}, {threads} threads: {found[-1]['seconds']:.1f} s, "
                f"{found[-1]['accuracy']:.2%}")  # fmt: skip
    loops = [
        _run("fixed_batch", width, _LOOP_AUGMENTATION, options.rounds) for width in _LOOP_WIDTHS
    ]
    return _report(example_threads, speeds, example, ours, loops)


def _unpacked(folder: Path) -> Path:
    """Lay the files out as the example's reader wants them; not part of its time."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in BUNDLED_MNIST.glob("*-ubyte.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return folder


def _best_threads(folder: Path) -> tuple[int, dict[int, float]]:
    speeds = {
        threads: _run("example_loop", folder, threads, 0, 0.0, _PROBE_BATCHES)["images_per_s"]
        for threads in _THREADS
    }
    return max(speeds, key=lambda threads: speeds[threads]), speeds


def _run(module: str, *arguments: object) -> dict[str, Any]:
    """Run a program in a process of its own; return its JSON line."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def _report(
    example_threads: int,
    speeds: dict[int, float],
    example: dict[str, Any],
    ours: dict[int, list[dict[str, float]]],
    loops: Sequence[Mapping[str, Any]],
) -> Report:
    rows = [
        (
            f"pytorch/examples' settings, {example_threads} threads",
            figure(example["seconds"], 1),
            "1×",
            f"{example['accuracies'][-1]:.2%}",
            "1",
        )
    ]
    for threads, found in ours.items():
        seconds = [one["seconds"] for one in found]
        rows.append(
            (
                f"Rayline, {threads} {'thread' if threads == 1 else 'threads'}",
                spread(seconds, 1),
                f"{example['seconds'] / statistics.median(seconds):.1f}×",
                f"{min(_accuracies(found)):.2%}",
                str(len(found)),
            )
        )
    speed = ", ".join(f"{speeds[t]:,.0f} images/s on {t}" for t in speeds)
    seeds = "; ".join(f"{t} threads {_percent(_accuracies(found))}" for t, found in ours.items())
    all_accuracies = [accuracy for found in ours.values() for accuracy in _accuracies(found)]
    num_below = sum(accuracy < TARGET for accuracy in all_accuracies)
    notes = [
        "one process each, from the first byte read to the tested net, imports aside",
        f"the example after each epoch: {_percent(example['accuracies'])}; its threads "
        f"are the better of {speed}",
        f"Rayline by seed: {seeds}",
        "the loop's images/s count data, augmentation, optimizer and validation; one batch over "
        "and over is forward and backward alone, in turns in the same process, 1 thread",
        f"{num_below} of {len(all_accuracies)} runs of Rayline ended below {TARGET:.0%}",
    ]
    return Report(
        title="Training: time to 99 % on MNIST",
        tables=[
            Table(
                title="Seconds to 99 % of the test images",
                columns=("system", "seconds", "faster", "lowest accuracy", "runs"),
                rows=rows,
            ),
            _loop_table(loops),
        ],
        notes=notes,
        data={
            "example": {**example, "threads": example_threads, "images_per_s": speeds},
            "rayline": ours,
            "loops": list(loops),
        },
    )


def _loop_table(loops: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title="The loop beside its arithmetic",
        columns=(
            "first stage",
            "loop images/s",
            "one batch images/s",
            "share (least–most)",
            "rounds",
        ),
        rows=[
            (
                f"{loop['stage_width']} channels",
                figure(loop["loop_images_per_s"]),
                figure(loop["fixed_images_per_s"]),
                spread(loop["shares"], 2),
                str(len(loop["shares"])),
            )
            for loop in loops
        ],
    )


def _accuracies(found: Sequence[Mapping[str, float]]) -> list[float]:
    return [one["accuracy"] for one in found]


def _percent(accuracies: Sequence[float]) -> str:
    return ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
