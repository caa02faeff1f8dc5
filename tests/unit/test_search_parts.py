"""A search's parts without Ray: names, spaces, the journal, what a resumed sampler draws."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.search.search_generator import SearchGenerator

from lib.config import PRESETS
from lib.errors import ConfigError, SearchError, StorageError
from lib.storage import Storage
from lib.train.experiment import (
    CATEGORICAL,
    DISCRETE,
    DOUBLE,
    INT,
    LOG_NORMAL,
    LOG_UNIFORM,
    MAXIMIZE,
    MINIMIZE,
    NORMAL,
    NUM_PARAMETERS,
    Experiment,
    Named,
    Objective,
    Parameter,
)
from lib.train.journal import Journal
from lib.train.presets import preset_experiment
from lib.train.progress import (
    ASKED,
    CLOSED,
    ENDED,
    FAILED,
    FINISHED,
    RECORDED,
    REOPENED,
    REPORTED,
    SESSION,
    STARTED,
    STOPPED,
    Progress,
    pareto_front,
    traded_off,
)
from lib.train.report import Limits
from lib.train.samplers import SAMPLERS, Study
from lib.train.schedulers import SCHEDULERS, build_scheduler, rung_counts, scheduler_of
from lib.train.searcher import StudySearcher
from lib.train.space import Space

EXPERIMENT = Experiment(
    name="parts",
    objectives=(Objective(metric="score", goal=MAXIMIZE),),
    parameters=(
        Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0, step=0.25),
        Parameter(name="width", kind=DISCRETE, values=(8, 16, 48)),
        Parameter(name="kind", kind=CATEGORICAL, values=("a", "b")),
    ),
    algorithm=Named("random"),
    num_trials=12,
)
SMOOTH = replace(
    EXPERIMENT,
    parameters=(
        Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),
        Parameter(name="y", kind=DOUBLE, low=1e-3, high=1.0, distribution=LOG_UNIFORM),
    ),
)


def progress_of(storage: Storage, experiment: Experiment) -> tuple[Journal, Progress, Study]:
    """Open a sweep as a driver does, whatever is in its journal."""
    journal = Journal(storage, "sweep")
    progress, study = Progress(journal, experiment), Study(experiment)
    for number in sorted(progress.trials):
        study.restore(progress.trials[number])
    progress.add(SESSION)
    return journal, progress, study


def score(params: dict[str, Any]) -> float:
    return -abs(float(params["x"]) - 0.3)


def run(progress: Progress, study: Study, num_trials: int) -> None:
    """Run trials as a driver does that has two slots: the next is asked for before one ends."""
    waiting = list(progress.interrupted())
    while len(progress.trials) < num_trials or waiting:
        while len(waiting) < 2 and len(progress.trials) < num_trials:
            number, params, sampled = study.ask()
            progress.add(ASKED, trial=number, params=params, sampled=sampled)
            waiting.append(progress.trials[number])
        trial = waiting.pop(0)
        progress.add(STARTED, trial=trial.number, attempt=f"{trial.number}-{len(trial.attempts)}")
        metrics = {"score": score(trial.params)}
        progress.add(REPORTED, trial=trial.number, report=1, epoch=1, rung=1, metrics=metrics)
        progress.add(ENDED, trial=trial.number, how=FINISHED, why="")
        study.tell(trial)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_sampler_draws_what_the_interrupted_one_would_have(
    storage: Storage, tmp_path: Path, sampler: str
) -> None:
    space = EXPERIMENT if sampler == "grid" else SMOOTH
    experiment = replace(space, algorithm=Named(sampler), num_trials=10)
    _, whole, study = progress_of(Storage(str(tmp_path / "whole")), experiment)
    run(whole, study, 10)

    journal, part, study = progress_of(storage, experiment)
    run(part, study, 4)
    number, params, sampled = study.ask()  # It is under way when the driver dies.
    part.add(ASKED, trial=number, params=params, sampled=sampled)
    part.add(STARTED, trial=number, attempt="x")
    journal.close()

    _, resumed, study = progress_of(storage, experiment)
    assert [trial.number for trial in resumed.interrupted()] == [4]
    assert study.num_observations == 4
    run(resumed, study, 10)
    assert study.num_observations == 10
    drawn = [resumed.trials[number].params for number in range(10)]
    if sampler in ("random", "grid", "sobol"):
        assert drawn == [whole.trials[number].params for number in range(10)]
    # The others see one result less or more at the seam, but start alike.
    assert drawn[:4] == [whole.trials[number].params for number in range(4)]


def test_a_grid_comes_to_every_point_once(storage: Storage) -> None:
    experiment = replace(EXPERIMENT, algorithm=Named("grid"), num_trials=100)
    _, progress, study = progress_of(storage, experiment)
    assert study.num_trials == 5 * 3 * 2
    run(progress, study, study.num_trials)
    points = {tuple(trial.params.values()) for trial in progress.trials.values()}
    assert len(points) == 30


def test_a_grid_needs_steps() -> None:
    with pytest.raises(ConfigError, match="parameter x: a grid needs a step"):
        Study(replace(SMOOTH, algorithm=Named("grid")))


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("tpe", {"n_ei_candidates": "12", "random_state": "7"}),
        ("multivariate-tpe", {"n_startup_trials": "4"}),
        ("bayesianoptimization", {"n_initial_points": "4"}),
        ("cmaes", {"sigma": "0.2"}),
        ("hyperband", {"r_l": "9", "eta": "3"}),
        ("pbt", {"truncation_threshold": "0.3"}),
    ],
)
def test_katibs_names_and_settings_are_known(algorithm: str, settings: dict[str, str]) -> None:
    study = Study(replace(SMOOTH, algorithm=Named(algorithm, settings)))
    assert set(study.ask()[1]) == {"x", "y"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": Named("nas")}, "unknown sampler 'nas'"),
        ({"algorithm": Named("tpe", {"gamma": 1})}, "algorithm tpe has no setting 'gamma'"),
        ({"algorithm": Named("cmaes"), "objectives": (
            Objective(metric="a", goal=MAXIMIZE), Objective(metric="b", goal=MINIMIZE),
        )}, "cmaes searches by one objective"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(replace(SMOOTH, **change))


def test_tpe_learns_and_compares_stopped_trials_with_their_like(storage: Storage) -> None:
    experiment = replace(SMOOTH, algorithm=Named("tpe"), num_trials=60)
    _, progress, study = progress_of(storage, experiment)
    run(progress, study, 60)
    late = [score(progress.trials[number].params) for number in range(40, 60)]
    assert sum(late) / 20 > -0.15, "uniform draws come to -0.29 on average"
    number, params, sampled = study.ask()
    progress.add(ASKED, trial=number, params=params, sampled=sampled)
    progress.add(REPORTED, trial=number, report=1, epoch=1, rung=1, metrics={"score": 0.5})
    progress.add(ENDED, trial=number, how=STOPPED, why="")
    study.tell(progress.trials[number])
    assert study.num_observations == 61


@pytest.mark.parametrize(
    "parameter",
    [
        Parameter(name="p", kind=DOUBLE, low=-1, high=3),
        Parameter(name="p", kind=DOUBLE, low=0.1, high=0.5, step=0.1),
        Parameter(name="p", kind=DOUBLE, low=1e-4, high=1, distribution=LOG_UNIFORM),
        Parameter(name="p", kind=DOUBLE, low=0, high=6, distribution=NORMAL),
        Parameter(name="p", kind=DOUBLE, low=1, high=100, distribution=LOG_NORMAL, step=0.5),
        Parameter(name="p", kind=INT, low=2, high=9),
        Parameter(name="p", kind=INT, low=2, high=10, step=4),
        Parameter(name="p", kind=INT, low=1, high=1000, distribution=LOG_UNIFORM),
        Parameter(name="p", kind=DISCRETE, values=(0.5, 0.1, 4)),
        Parameter(name="p", kind=CATEGORICAL, values=("sgd", "adam")),
    ],
)
def test_every_kind_of_parameter_is_drawn_in_its_range_and_found_back(parameter: Parameter) -> None:
    experiment = replace(EXPERIMENT, parameters=(parameter,), num_trials=300)
    study = Study(experiment)
    values = [study.ask()[1]["p"] for _ in range(300)]
    if parameter.values:
        assert set(values) == set(parameter.values)
        return
    low, high = float(parameter.low or 0), float(parameter.high or 0)
    numbers = [float(value) for value in values]
    assert all(low <= number <= high for number in numbers)
    if parameter.step:
        steps = [(number - low) / parameter.step for number in numbers]
        assert all(abs(step - round(step)) < 1e-6 for step in steps)
    if parameter.kind == INT:
        assert all(isinstance(value, int) for value in values)
    mean = sum(numbers) / len(numbers)
    if parameter.distribution == NORMAL:
        near = sum(abs(number - 3) <= 1 for number in numbers) / 300
        assert 0.58 < near < 0.78, "two thirds of a normal distribution lie within a sigma"
    if parameter.distribution in (LOG_UNIFORM, LOG_NORMAL):
        assert mean < (low + high) / 2
    space = Space((parameter,))
    for value in values[:20]:
        assert space.params(space.drawn({"p": value}))["p"] == pytest.approx(value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_built_by_name(storage: Storage, name: str) -> None:
    experiment = preset_experiment(PRESETS["full"], sampler="random", scheduler=name)
    _, progress, study = progress_of(storage, experiment)
    built = build_scheduler(experiment, progress, num_rungs=3, fixed=frozenset({"depth"}))
    # A trial comes from our searcher, as Tune wraps it.
    controller = SimpleNamespace(
        search_alg=SearchGenerator(StudySearcher(study, progress, 1)), get_trials=lambda: []
    )
    trial = Trial("nothing", config=dict(study.ask()[1]), stub=True)
    built.on_trial_add(controller, trial)


@pytest.mark.parametrize("name", ["asha", "hyperband", "pbt"])
def test_a_scheduler_that_starts_over_in_a_resumed_sweep_says_so(
    storage: Storage, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = preset_experiment(PRESETS["full"], sampler="random", scheduler=name)
    _, progress, _ = progress_of(storage, experiment)
    build_scheduler(experiment, progress, num_rungs=3, fixed=frozenset())
    assert "ended before" not in capsys.readouterr().out
    progress.add(ASKED, trial=0, params={}, sampled={})
    progress.add(ENDED, trial=0, how=FINISHED, why="")
    build_scheduler(experiment, progress, num_rungs=3, fixed=frozenset())
    assert ("not with the 1 that ended before" in capsys.readouterr().out) == (name != "asha")


def test_rungs_are_those_of_the_scheduler() -> None:
    assert rung_counts(Named("asha"), (2, 6, 18)) == (1, 3, 9)
    assert rung_counts(Named("hyperband"), (2, 6, 18)) == (1, 4, 9)
    assert rung_counts(Named("medianstopping"), (2, 6, 18)) == (2, 6, 18)
    assert rung_counts(Named("pbt"), (2, 6, 18)) == (1, 2, 3)
    assert scheduler_of(replace(SMOOTH, early_stopping=Named("medianstop"))).name == (
        "medianstopping"
    )
    assert scheduler_of(replace(SMOOTH, algorithm=Named("hyperband"))).name == "hyperband"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (Named("lucky"), "unknown scheduler 'lucky'"),
        (Named("asha", {"brackets": 2}), "asha has no setting 'brackets'"),
        (Named("pbt"), "tpe would learn wrong things; choose random/pbt"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_by_name(
    storage: Storage, named: Named, message: str
) -> None:
    experiment = replace(SMOOTH, algorithm=Named("tpe"), early_stopping=named)
    _, progress, _ = progress_of(storage, experiment)
    with pytest.raises(ConfigError, match=message):
        build_scheduler(experiment, progress, num_rungs=3, fixed=frozenset())


def test_an_experiment_survives_json() -> None:
    for name in PRESETS:
        experiment = preset_experiment(PRESETS[name])
        assert Experiment.from_dict(json.loads(json.dumps(asdict(experiment)))) == experiment
    assert Experiment.from_dict(json.loads(json.dumps(asdict(SMOOTH)))) == SMOOTH


def test_the_pareto_front_has_no_loser(storage: Storage) -> None:
    objectives = (
        Objective(metric="score", goal=MAXIMIZE), Objective(metric="size", goal=MINIMIZE),
    )  # fmt: skip
    experiment = replace(SMOOTH, objectives=objectives, algorithm=Named("tpe"))
    _, progress, study = progress_of(storage, experiment)
    for score_, size in ((0.9, 10), (0.8, 10), (0.95, 20), (0.7, 5), (0.7, 6), (0.95, 20)):
        number, params, sampled = study.ask()
        progress.add(ASKED, trial=number, params=params, sampled=sampled)
        metrics = {"score": score_, "size": size}
        progress.add(REPORTED, trial=number, report=1, epoch=1, rung=1, metrics=metrics)
        progress.add(ENDED, trial=number, how=FINISHED, why="")
        study.tell(progress.trials[number])
    front = pareto_front(objectives, progress.ranked())
    assert {trial.number for trial in front} == {0, 2, 3, 5}
    # With one objective, a front is of it and the size of the net, where trials tell that.
    alone = replace(experiment, objectives=objectives[:1])
    assert traded_off(alone, progress.ranked()) == objectives[:1]
    for trial in progress.ranked():
        trial.best[NUM_PARAMETERS] = trial.best["size"]
    both = traded_off(alone, progress.ranked())
    assert [(o.metric, o.goal) for o in both] == [("score", MAXIMIZE), (NUM_PARAMETERS, MINIMIZE)]
    assert {trial.number for trial in pareto_front(both, progress.ranked())} == {0, 2, 3, 5}
    assert traded_off(experiment, progress.ranked()) == objectives


def reports(progress: Progress, number: int, *values: float) -> None:
    progress.add(ASKED, trial=number, params={}, sampled={"drawn": {}, "trial": {}, "study": {}})
    for epoch, value in enumerate(values, start=1):
        progress.add(REPORTED, trial=number, report=epoch, epoch=epoch, rung=epoch,
                     metrics={"score": value})  # fmt: skip


@pytest.mark.parametrize(("by_last", "value", "epoch"), [(False, 0.9, 2), (True, 0.7, 3)])
def test_the_best_report_of_a_trial_counts_or_its_last_one(
    storage: Storage, by_last: bool, value: float, epoch: int
) -> None:
    objective = Objective(
        metric="score", goal=MAXIMIZE, target=0.8, by_last=by_last, settles=not by_last
    )
    experiment = replace(SMOOTH, objectives=(objective,))
    _, progress, study = progress_of(storage, experiment)
    limits = Limits(progress, experiment, SimpleNamespace(error=None, begun_s=None))
    reports(progress, 0, 0.5, 0.9, 0.7)
    trial = progress.trials[0]
    assert (trial.best["score"], trial.best_epoch) == (value, epoch)
    assert trial.curve == [(1, 0.5), (2, 0.9), (3, 0.7)]
    assert limits("t", {"score": 0.9}) == (not by_last), "no report before the end is the result"
    assert limits.stop_all() == (not by_last)
    progress.add(ENDED, trial=0, how=FINISHED, why="")
    assert limits.stop_all() == (not by_last)


def test_a_last_report_at_the_target_ends_the_sweep(storage: Storage) -> None:
    objective = Objective(metric="score", goal=MAXIMIZE, target=0.8, by_last=True, settles=False)
    experiment = replace(SMOOTH, objectives=(objective,))
    _, progress, _ = progress_of(storage, experiment)
    limits = Limits(progress, experiment, SimpleNamespace(error=None, begun_s=None))
    reports(progress, 0, 0.85)
    assert not limits.stop_all()
    progress.add(ENDED, trial=0, how=FINISHED, why="")
    assert limits.why == "the target of 0.8 was reached"


def test_the_time_budget_begins_with_the_first_trial(storage: Storage) -> None:
    _, progress, _ = progress_of(storage, SMOOTH)
    report = SimpleNamespace(error=None, begun_s=None)
    limits = Limits(progress, SMOOTH, report, budget_s=60)
    assert not limits.stop_all()
    report.begun_s = time.monotonic() - 50
    assert not limits.stop_all()
    report.begun_s -= 11
    assert limits.stop_all()
    assert "time budget" in (limits.why or "")


def test_a_sweep_that_has_ended_can_be_reopened(storage: Storage) -> None:
    journal, progress, _ = progress_of(storage, SMOOTH)
    progress.add(CLOSED)
    assert progress.closed
    progress.add(REOPENED)
    assert not progress.closed
    journal.close()
    _, again, _ = progress_of(storage, SMOOTH)
    assert not again.closed


def test_median_stopping_never_pauses(storage: Storage) -> None:
    experiment = replace(SMOOTH, early_stopping=Named("medianstop", {"start_step": 4}))
    _, progress, _ = progress_of(storage, experiment)
    scheduler: Any = build_scheduler(experiment, progress, num_rungs=0, fixed=frozenset())
    waiting = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    inner = scheduler._inner
    assert inner._on_insufficient_samples(waiting, "a trial", 9) == "CONTINUE"
    assert inner._grace_period == 4


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_a_journal_loses_its_torn_last_line_and_nothing_else(storage: Storage) -> None:
    with Journal(storage, "sweep") as journal:
        journal.append({"event": "a"})
        journal.append({"event": "b"}, durable=True)
    path = Path(storage.path("sweep/journal.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"event": "c", "tri')
    with Journal(storage, "sweep") as journal:
        assert [event["event"] for event in journal.events] == ["a", "b"]
        journal.append({"event": "d"})
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["a", "b", "d"]


def test_one_process_at_a_time_has_a_journal(storage: Storage) -> None:
    with Journal(storage, "sweep"), pytest.raises(SearchError, match="another process runs"):
        Journal(storage, "sweep")
    Journal(storage, "sweep").close()


def test_a_damaged_journal_is_said(storage: Storage) -> None:
    storage.write("sweep/journal.jsonl", b'{"event": "a"}\nnonsense\n')
    with pytest.raises(StorageError, match="is damaged"):
        Journal(storage, "sweep")


def test_a_sweeps_time_is_that_of_its_drivers(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("lib.train.progress.time.time", clock)
    journal, progress, _ = progress_of(storage, SMOOTH)
    clock.now_s += 5
    progress.add(ASKED, trial=0, params={}, sampled={"drawn": {"x": 0.5, "y": 0.1},
                 "trial": {}, "study": {}})  # fmt: skip
    journal.close()
    clock.now_s += 1000  # Nobody drives.
    _, progress, _ = progress_of(storage, SMOOTH)
    clock.now_s += 2
    progress.add(ENDED, trial=0, how=FAILED, why="")
    clock.now_s += 3
    progress.add(RECORDED, trial=0)
    assert progress.spent_s == pytest.approx(7), "waiting for MLflow is no part of the search"
    assert progress.num_failed == 1


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s
