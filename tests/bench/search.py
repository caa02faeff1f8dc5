"""Search: a sweep against bare training loops side by side; trials as classes and functions."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from lib.config import Settings, preset
from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import Manifest
from lib.storage import Storage
from lib.train.presets import preset_experiment
from lib.train.search import SweepResult, run_sweep
from lib.train.work import image_work
from tests.bench import trivial
from tests.bench.parts import MLFLOW_PORT, ROOT, local_ray, make_line, running
from tests.bench.report import (
    BenchError,
    Options,
    Report,
    Table,
    figure,
    ratio,
    say,
    spread,
    turns,
)

EPOCHS = 3
PRESET = replace(
    # The nets that `make up` searches among. With smaller ones the start of processes, some four
    # seconds, is what is measured.
    preset("quick"),
    name="bench",
    num_trials=16,
    # One rung: no trial is stopped early, so the loops can repeat the same work.
    rungs=(EPOCHS,),
    time_budget_s=1200,
    gpus_per_trial=0,
)
_PARALLEL = 2
MANY = 1000


def run(options: Options) -> Report:
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    line = make_line(options.temp / "mlflow", MLFLOW_PORT)
    with running(line, "mlflow"), local_ray(options.temp / "ray-s") as startup_s:
        say(f"search: Ray is up after {startup_s:.1f} s")
        trials = _trials(options, line.tracking_uri)
        many = _many(options, line.tracking_uri)
        storage = Storage(str(options.temp / "search"))
        settings = Settings(storage=storage.uri, mlflow_uri=line.tracking_uri, model="bench")
        manifest = ingest(storage, "mnist")
        sweeps, busy, loops = _sweeps(options, settings, storage, manifest)
    return _report(options, trials, many, sweeps, busy, loops)


def _trials(options: Options, mlflow_uri: str) -> dict[str, list[float]]:
    """Return the seconds of 16 trivial trials, by kind."""
    seconds: dict[str, list[float]] = {"sweep": [], "function": []}
    say(f"search: {trivial.NUM_TRIALS} trivial trials, {options.rounds} rounds of both kinds")
    storage = Storage(str(options.temp / "trivial"))
    settings = Settings(storage=storage.uri, mlflow_uri=mlflow_uri, model="trivial")
    for turn, kind in turns(list(seconds), options.rounds):
        if kind == "sweep":
            taken = trivial.sweep_seconds(settings, storage, trivial.NUM_TRIALS)["seconds"]
        else:
            taken = trivial.function_seconds(options.temp / "tune")
        seconds[kind].append(taken)
        say(f"search: round {turn + 1}: {kind} {taken:.1f} s")
    return seconds


def _many(options: Options, mlflow_uri: str) -> dict[str, float]:
    """Return the seconds of 1,000 trivial trials, and the driver's memory early and late."""
    say(f"search: {MANY} trivial trials in one sweep")
    command = [sys.executable, "-m", "tests.bench.trivial", str(options.temp / "many")]
    done = subprocess.run(
        [*command, mlflow_uri, str(MANY)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    taken = json.loads(done.stdout.splitlines()[-1])
    early = [mib for ended, mib in taken["ended_and_mib"] if MANY // 10 <= ended <= MANY // 5]
    late = [mib for ended, mib in taken["ended_and_mib"] if ended >= MANY - MANY // 10]
    return {
        "seconds": taken["seconds"],
        "mib_early": statistics.median(early),
        "mib_late": statistics.median(late),
    }


def _sweeps(
    options: Options, settings: Settings, storage: Storage, manifest: Manifest
) -> tuple[list[SweepResult], list[float], list[dict[str, float]]]:
    data = options.temp / "data.npz"
    splits = read_splits(storage, manifest, ("train", "val"))
    np.savez(
        data,
        **{f"{name}_images": split.images_NHWC for name, split in splits.items()},
        **{f"{name}_labels": split.labels_N for name, split in splits.items()},
    )
    del splits
    say(
        f"search: sweeps of {PRESET.num_trials} trials x {EPOCHS} epochs, and the same work in "
        f"{_PARALLEL} bare loops; {options.rounds} rounds of both"
    )
    sweeps: list[SweepResult] = []
    loops: list[dict[str, float]] = []
    busy: list[float] = []
    experiment = preset_experiment(PRESET, scheduler="none")
    for turn in range(options.rounds):
        work = image_work(storage, manifest, PRESET, experiment)
        sweep = run_sweep(settings, storage, experiment, work)
        if len(sweep.trials) != PRESET.num_trials:
            raise BenchError(f"{len(sweep.trials)} of {PRESET.num_trials} trials left a model")
        sweeps.append(sweep)
        busy.append(_busy_rate(storage, sweep.sweep_run_id, manifest.rows("train")))
        # The loops train what this sweep trained, so they come after it in every round.
        loops.append(_bare_loops(options, manifest, data, [t.params for t in sweep.trials]))
        say(
            f"search: round {turn + 1}: sweep {sweep.images_per_s:,.0f} images/s "
            f"({busy[-1]:,.0f} while all slots are busy), bare loops "
            f"{loops[-1]['images_per_s']:,.0f} images/s"
        )
    return sweeps, busy, loops


def _busy_rate(storage: Storage, sweep_run_id: str, images_per_epoch: int) -> float:
    """Return images/s from the sweep's start until a slot is idle for good.

    Reading the data and starting processes count; the epoch that the last trial is in does not.
    """
    events = trivial.events(storage, sweep_run_id)
    ends_ms = [event["time_ms"] for event in events if event["event"] == "ended"]
    idle_ms = sorted(ends_ms)[-_PARALLEL]
    epochs = sum(event["event"] == "reported" and event["time_ms"] <= idle_ms for event in events)
    return epochs * images_per_epoch / ((idle_ms - events[0]["time_ms"]) / 1000)


def _bare_loops(
    options: Options, manifest: Manifest, data: Path, params: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Train these configurations in processes side by side, one thread each."""
    # Augmentation costs time: sorted by it and dealt out in turns, the loops get equal shares.
    ordered = sorted((dict(p) for p in params), key=lambda p: float(p["augmentation"]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    try:
        for index in range(_PARALLEL):
            work = options.temp / f"work-{index}.json"
            share = {
                "manifest": manifest.to_json(),
                "epochs": EPOCHS,
                "trials": ordered[index::_PARALLEL],
            }
            work.write_text(json.dumps(share))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.bench.bare_loop", str(data), str(work)],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise BenchError("a bare training loop did not start; its error stands above")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    # Each loop's own rate: here too the tail, when one of them is done, is left apart.
    return {
        "seconds": max(result["seconds"] for result in results),
        "images_per_s": sum(result["images"] / result["seconds"] for result in results),
    }


def _report(
    options: Options,
    trials: dict[str, list[float]],
    many: dict[str, float],
    sweeps: list[SweepResult],
    busy: list[float],
    loops: list[dict[str, float]],
) -> Report:
    speed = {
        "sweep": [sweep.images_per_s for sweep in sweeps],
        "busy": busy,
        "loops": [loop["images_per_s"] for loop in loops],
    }
    per_trial = {kind: [s / trivial.NUM_TRIALS for s in taken] for kind, taken in trials.items()}
    rates = {kind: [60 / s for s in taken] for kind, taken in per_trial.items()}
    trials_per_min = [60 * len(sweep.trials) / sweep.seconds for sweep in sweeps]
    n = options.rounds
    return Report(
        title="Search",
        tables=[
            Table(
                title=f"{PRESET.num_trials} trials of {EPOCHS} epochs of MNIST (n = {n})",
                columns=("", "images/s: median (min–max)", "trials/min", "busy ÷ this"),
                rows=[
                    (
                        "rayline sweep, 2 trials at a time",
                        spread(speed["sweep"]),
                        figure(statistics.median(trials_per_min), 1),
                        ratio(speed["busy"], speed["sweep"]),
                    ),
                    (
                        "the same, until a slot is idle for good",
                        spread(speed["busy"]),
                        "",
                        ratio(speed["busy"], speed["busy"]),
                    ),
                    (
                        "2 bare training loops side by side",
                        spread(speed["loops"]),
                        figure(
                            statistics.median(
                                60 * PRESET.num_trials / loop["seconds"] for loop in loops
                            ),
                            1,
                        ),
                        ratio(speed["busy"], speed["loops"]),
                    ),
                ],
            ),
            Table(
                title=f"{trivial.NUM_TRIALS} trials that do nothing, 2 at a time (n = {n})",
                columns=("", "trials/min: median (min–max)", "s per trial", "rayline ÷ this"),
                rows=[
                    (
                        label,
                        spread(rates[kind]),
                        figure(statistics.median(per_trial[kind]), 2),
                        ratio(rates["sweep"], rates[kind]),
                    )
                    for kind, label in (
                        ("sweep", "rayline: a whole sweep, journal and MLflow counted"),
                        ("function", "function trainable (Ray Tune's default)"),
                    )
                ],
            ),
            Table(
                title=f"{MANY:,} trials that do nothing in one sweep (n = 1)",
                columns=("", "seconds", "driver, MiB at 10-20 %", "at 90-100 %"),
                rows=[
                    (
                        "rayline: a whole sweep, journal and MLflow counted",
                        figure(many["seconds"], 1),
                        figure(many["mib_early"], 0),
                        figure(many["mib_late"], 0),
                    )
                ],
            ),
        ],
        notes=[
            "The sweep's time is all of `run_sweep`: reading the data set through Ray Data, "
            "sampling, checkpoints, and every run, metric and model in MLflow. The loops train "
            "the same configurations for the same epochs from memory, one thread each; their "
            "start is not counted.",
            "Ratios are medians of the rounds' ratios.",
        ],
        data={
            "trivial_seconds": trials,
            "many": many,
            "busy_images_per_s": busy,
            "sweeps": [
                {
                    "seconds": sweep.seconds,
                    "images_per_s": sweep.images_per_s,
                    "params": [dict(trial.params) for trial in sweep.trials],
                }
                for sweep in sweeps
            ],
            "loops": loops,
        },
    )
