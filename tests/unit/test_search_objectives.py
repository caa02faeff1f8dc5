"""A sweep's objectives in every order: what a trial keeps, what stops early, what is best."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.config import PRESETS
from lib.storage import Storage
from lib.train.experiment import LATENCY_MS, MAXIMIZE, NUM_PARAMETERS, Experiment
from lib.train.journal import Journal
from lib.train.presets import GOALS, preset_experiment
from lib.train.progress import (
    ASKED,
    ENDED,
    FINISHED,
    REPORTED,
    SESSION,
    STARTED,
    Progress,
    pareto_front,
)
from lib.train.report import measured
from lib.train.schedulers import build_scheduler
from lib.train.trainable import AT_RUNG, RUNG_COUNT, Desk, SweepTrial

VARYING = ("val_accuracy", "val_loss")
ORDERS = [
    order
    for length in range(1, len(GOALS) + 1)
    for order in itertools.permutations(GOALS, length)
    if set(order) & set(VARYING)
]


class Curve(SweepTrial):
    """Reports a given curve; it keeps the number of its best epoch."""

    def begin(self, params: Mapping[str, Any]) -> None:
        self._curve, self._epoch = params["curve"], 0

    def advance(self) -> Mapping[str, Any]:
        self._epoch += 1
        return {**self._curve[self._epoch - 1], "done": self._epoch == len(self._curve)}

    def artifacts(self, is_best: bool) -> Mapping[str, bytes]:
        return {"best": str(self._epoch).encode()} if is_best else {}


def curves(num_trials: int, epochs: int = 6) -> list[list[dict[str, float]]]:
    rng = random.Random(0)
    return [
        [
            # Of few values, so that some are equal.
            {"val_accuracy": rng.randint(50, 70) / 100, "val_loss": rng.randint(1, 40) / 10}
            | {NUM_PARAMETERS: size, LATENCY_MS: size / 1000}
            for _ in range(epochs)
        ]
        for size in (float(rng.choice((9000, 50000, 493000))) for _ in range(num_trials))
    ]


def search(folder: Path, order: Sequence[str]) -> tuple[Experiment, Progress, Storage]:
    storage = Storage(str(folder))
    experiment = preset_experiment(PRESETS["smoke"], sampler="random", objectives=order)
    progress = Progress(Journal(storage, "sweep"), experiment)
    progress.add(SESSION)
    desk = Desk(storage=storage, folder="trials", objectives=experiment.objectives)
    for number, curve in enumerate(curves(12)):
        trial = object.__new__(Curve)
        trial._trial_info = SimpleNamespace(trial_id=str(number))
        trial.setup({"curve": curve}, desk=desk, shared={})
        progress.add(ASKED, trial=number, params={}, sampled={})
        progress.add(STARTED, trial=number, attempt=str(number))
        for _ in curve:
            report = trial.step()
            progress.add(REPORTED, trial=number, report=report["epoch"], epoch=report["epoch"],
                         rung=None, metrics=measured(report))  # fmt: skip
        progress.add(ENDED, trial=number, how=FINISHED, why="")
    return experiment, progress, storage


def signed(metrics: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    """The metrics so that less is better."""
    return tuple(-metrics[n] if GOALS[n] == MAXIMIZE else metrics[n] for n in names)


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_a_trial_keeps_its_best_epoch_and_the_front_has_no_loser(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    experiment, progress, storage = search(tmp_path, order)
    told_by = next(name for name in order if name in VARYING)
    points = {}
    for number, curve in enumerate(curves(12)):
        best = min(range(len(curve)), key=lambda epoch: signed(curve[epoch], [told_by, "val_loss"]))
        trial = progress.trials[number]
        assert (trial.best_epoch, trial.best) == (best + 1, curve[best])
        assert storage.read(f"trials/{number}/best") == str(best + 1).encode()
        points[number] = signed(curve[best], order)
    ranked = progress.ranked()
    # Best by what training changes, then by the loss; a small net is not the best because it is
    # small.
    constant = [name for name in order if name not in VARYING]
    by = [*(name for name in order if name in VARYING), "val_loss", *constant]
    keys = {number: (signed(progress.trials[number].best, by), number) for number in points}
    assert [t.number for t in ranked] == sorted(points, key=lambda number: keys[number])
    assert progress.best is ranked[0]
    front = {
        number
        for number, mine in points.items()
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in points.values()
        )
    }
    assert {t.number for t in pareto_front(experiment.objectives, ranked)} == front


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_early_stopping_compares_what_training_changes(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    experiment = preset_experiment(
        PRESETS["smoke"], sampler="random", scheduler="asha", objectives=order
    )
    progress = Progress(Journal(Storage(str(tmp_path)), "sweep"), experiment)
    judge = build_scheduler(experiment, progress, num_rungs=3, fixed=frozenset())
    controller: Any = SimpleNamespace(get_live_trials=lambda: [])
    decisions = []
    # The better a net, the larger it is, and the worse nets come last.
    for number, accuracy in enumerate([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.95]):
        trial: Any = SimpleNamespace(trial_id=str(number), status="RUNNING")
        judge.on_trial_add(controller, trial)
        result = {
            "val_accuracy": accuracy,
            "val_loss": 1 - accuracy,
            NUM_PARAMETERS: accuracy * 1e6,
            LATENCY_MS: accuracy,
            AT_RUNG: True,
            RUNG_COUNT: 1,
        }
        decisions.append(judge.on_trial_result(controller, trial, result))
    assert decisions[-2:] == ["STOP", "CONTINUE"], "the best net goes on, however large it is"
