"""What a search costs beside its trials: sampler, journal, progress, reports, leases."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from lib.leases.ledger import Ask, Leases
from lib.storage import Storage
from lib.train.experiment import (
    DOUBLE,
    LOG_UNIFORM,
    MAXIMIZE,
    MINIMIZE,
    Experiment,
    Named,
    Objective,
    Parameter,
)
from lib.train.gauges import SweepGauges
from lib.train.journal import Journal
from lib.train.progress import ENDED, FINISHED, REPORTED, SESSION, Progress, pareto_front
from lib.train.samplers import Study
from lib.train.searcher import StudySearcher
from lib.watch.gauges import Gauges
from tests.bench.scale_cost import MS, US, Cost, seconds

TRIALS = (10, 100, 1_000)
_EPOCHS = 3
_METRICS = {"train_loss": 0.1, "val_loss": 0.1, "lr": 0.01, "images_per_s": 9_000.0}
_TWO = (
    Objective(metric="score", goal=MAXIMIZE),
    Objective(metric="cost", goal=MINIMIZE),
)


class _Gauges:
    """Takes values and does nothing with them."""

    def update(self, values: Mapping[Any, float]) -> None:
        """Take values."""


class _Slots:
    """Two trials at a time."""

    limit, is_shared, is_settled = 2, False, True

    def update(self, *, running: int, pending: int, left: int) -> None:
        """Take note."""

    def pause(self) -> None:
        """Wait."""


def _experiment(num_trials: int, sampler: str) -> Experiment:
    return Experiment(
        name="scale",
        objectives=_TWO[:1],
        parameters=tuple(
            Parameter(name=f"p{n}", kind=DOUBLE, low=1e-3, high=1.0, distribution=LOG_UNIFORM)
            for n in range(5)
        ),
        algorithm=Named(sampler.partition("-")[0]),
        num_trials=num_trials,
    )


class _Sweep:
    """A sweep as a driver has it, but for Tune and MLflow."""

    def __init__(self, storage: Storage, num_trials: int, sampler: str) -> None:
        self.experiment = _experiment(num_trials, sampler)
        self.journal = Journal(storage, f"{sampler}-{num_trials}")
        self.progress = Progress(self.journal, self.experiment)
        self.progress.add(SESSION)
        self.study = Study(self.experiment)
        self.searcher = StudySearcher(self.study, self.progress, _Slots())
        gauges = cast(Gauges, _Gauges())
        reported = SweepGauges(gauges, "s", self.experiment.objective, self.progress)
        self.progress.listeners.append(reported.noted)
        self.trials: list[Any] = []

    def run(self) -> float:
        """Run all trials, one after the other; return the seconds."""
        start_s = time.perf_counter()
        while len(self.trials) < self.experiment.num_trials:
            self.searcher.begin_step(self.trials)
            config = self.searcher.suggest(f"t{len(self.trials)}")
            self.searcher.end_step()
            tune = SimpleNamespace(status="RUNNING")
            self.trials.append(tune)
            state = self.progress.trials[len(self.trials) - 1]
            score = sum(config.values())
            for epoch in range(1, _EPOCHS + 1):
                self.searcher.begin_step(self.trials)
                metrics = {**_METRICS, "score": score * epoch, "cost": score}
                self.progress.add(REPORTED, trial=state.number, report=epoch, epoch=epoch,
                                  rung=epoch, metrics=metrics)  # fmt: skip
                self.searcher.end_step()
            tune.status = "TERMINATED"
            self.progress.add(ENDED, trial=state.number, how=FINISHED, why="trained to the end")
            self.study.tell(state)
        return time.perf_counter() - start_s


def costs(folder: Path) -> list[Cost]:
    """Measure a sweep's own costs."""
    storage = Storage(str(folder))
    random_s, tpe_s, resumed_s, journal_kb, memory_kb, front_s = ([] for _ in range(6))
    for num in TRIALS:
        taken_s = []
        for turn in range(3):
            sweep = _Sweep(storage, num, f"random-{turn}")
            taken_s.append(sweep.run())
            sweep.journal.close()
        random_s.append(min(taken_s))
        path = f"{folder}/random-0-{num}/journal.jsonl"
        journal_kb.append(Path(path).stat().st_size / 1e3 / num)
        resumed_s.append(_resume_s(storage, num))
        tpe_s.append(_tpe_s(sweep.progress, num))
        for number, trial in enumerate(sweep.progress.trials.values()):
            # No trial beats another one: the most there is to compare.
            trial.best = {"score": float(number), "cost": float(number)}
        ranked = sweep.progress.ranked()
        front_s.append(seconds(lambda r=ranked: pareto_front(_TWO, r)))
        tracemalloc.start()
        traced = _Sweep(storage, num, "random-memory")
        traced.run()
        memory_kb.append(tracemalloc.get_traced_memory()[0] / 1e3 / num)
        tracemalloc.stop()
        traced.journal.close()
    return [
        Cost(what="a whole sweep's search, journal, reports", by="trials", unit="ms per trial",
             sizes=TRIALS, values=[MS * s / n for s, n in zip(random_s, TRIALS, strict=True)],
             bound=500, then="several sweeps: what one has learned can seed the next"),
        Cost(what="the next trial of TPE", by="trials", unit="ms", sizes=TRIALS,
             values=[MS * s for s in tpe_s], bound=2_000,
             then="sobol or random for the bulk: their next trial costs the same at any number"),
        Cost(what="memory of the driver", by="trials", unit="kB per trial", sizes=TRIALS,
             values=memory_kb, bound=1_000),
        Cost(what="journal", by="trials", unit="kB per trial", sizes=TRIALS,
             values=journal_kb, bound=100),
        Cost(what="resuming", by="trials", unit="ms", sizes=TRIALS,
             values=[MS * s for s in resumed_s], bound=60_000,
             then="nothing is lost by it; a sweep of so many trials is better cut in several"),
        Cost(what="Pareto front, all on it", by="trials", unit="ms", sizes=TRIALS,
             values=[MS * s for s in front_s], bound=10_000,
             then="once a sweep, at its end"),
        _leases(),
    ]  # fmt: skip


def _tpe_s(progress: Progress, num_trials: int) -> float:
    """Return the seconds of the next trial once so many have ended."""
    study = Study(_experiment(num_trials + 100, "tpe"))
    for number in sorted(progress.trials):
        study.restore(progress.trials[number])
    study.ask()
    return seconds(study.ask, rounds=5)


def _resume_s(storage: Storage, num_trials: int) -> float:
    experiment = _experiment(num_trials, "random")

    def resume() -> None:
        with Journal(storage, f"random-0-{num_trials}") as journal:
            progress, study = Progress(journal, experiment), Study(experiment)
            for number in sorted(progress.trials):
                study.restore(progress.trials[number])

    return seconds(resume)


def _leases() -> Cost:
    sizes = (5, 50, 500)
    values = []
    for num in sizes:
        leases = Leases(lease_s=1e9)
        room = {"CPU": 100.0}
        asks = [
            Ask(sweep=f"s{n}", owner=f"o{n % 10}", limit=20, wants=8, size={"CPU": 1.0},
                free=room, most=room)
            for n in range(num)
        ]  # fmt: skip
        for ask in asks:
            leases.renew(ask, 0.0)
        last = asks[-1]
        values.append(US * seconds(lambda book=leases, ask=last: book.renew(ask, 1.0), repeat=3))
    return Cost(what="a lease's renewal", by="sweeps at once", unit="µs", sizes=sizes,
                values=values, bound=100_000,
                then="renew less often (`BEAT_S`; every two seconds now)")  # fmt: skip
