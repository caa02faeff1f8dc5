"""A sweep: parallel trials with Ray Tune, a sampler of Optuna's, early stopping at rungs.

What it does is in a journal under the storage root first. A sweep whose driver died is resumed
from that alone: the sampler is told all results again, MLflow gets what it missed, and trials that
were under way go on from what they kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from lib.cli import progress as say
from lib.config import Settings
from lib.errors import ConfigError, SearchError
from lib.leases.lender import RayLender, share_of
from lib.provenance import training_code_digest
from lib.registry.sweep_runs import SweepRun, reopen_sweep, start_sweep
from lib.registry.tracking import SweepRecord
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.feed import Feed
from lib.train.gauges import SweepGauges
from lib.train.journal import Journal
from lib.train.progress import ASKED, CLOSED, RECORDED, REOPENED, SESSION, Progress
from lib.train.result import SweepResult
from lib.train.samplers import Study, sampler_name
from lib.train.schedulers import rung_counts, scheduler_of
from lib.train.session import Session
from lib.train.trainable import Desk
from lib.train.work import Work, work_of
from lib.watch.gauges import Gauges

_NEVER = "Never"
_LIMITS = ("num_trials", "num_parallel", "max_failed_trials")
"""What a sweep that is resumed may be given more of."""


def run_sweep(
    settings: Settings,
    storage: Storage,
    experiment: Experiment,
    work: Work,
    *,
    draw: bool = True,
) -> SweepResult:
    """Search as the experiment asks.

    With `draw`, pictures of the sweep are left on its run when it has ended.

    Ray must be initialised. Raises SearchError if no trial left a result, RegistryError if MLflow
    is away at the start, or at the end with something still to be sent, and StorageError if there
    is no place for the sweep's state; after the last two the sweep can be resumed.
    """
    # What can't be searched is said before anything starts.
    scheduler = scheduler_of(experiment)
    Study(experiment)
    lender = RayLender()
    sweep = start_sweep(
        settings,
        storage,
        name=experiment.name,
        manifest=work.manifest,
        tags={
            **work.tags,
            "rayline.seed": str(experiment.seed),
            "rayline.num_threads": "1",
            "rayline.objectives": json.dumps(
                [
                    {"metric": o.metric, "goal": o.goal, "constant": o.constant}
                    for o in experiment.objectives
                ]
            ),
        },
        facts={
            "sampler": sampler_name(experiment.algorithm.name),
            "scheduler": scheduler.name,
            "objectives": ", ".join(f"{o.goal} {o.metric}" for o in experiment.objectives),
            "num_trials": experiment.num_trials,
            "time_budget_s": experiment.time_budget_s,
            **work.facts,
        },
        experiment=asdict(experiment),
    )
    storage.write(_spec_path(sweep.run_id), json.dumps(sweep_spec(experiment, work)).encode())
    return _run(settings, storage, lender, sweep, experiment, work, draw=draw)


def sweep_spec(experiment: Experiment, work: Work) -> dict[str, Any]:
    """Return what tells a sweep from others, and what it is resumed from."""
    return {
        "experiment": asdict(experiment),
        "kind": work.kind,
        "work": work.spec,
        "code": training_code_digest(),
    }


def resume_sweep(
    settings: Settings,
    storage: Storage,
    sweep_run_id: str,
    work_of: Callable[[Storage, Experiment, str, Mapping[str, Any]], Work] = work_of,
    *,
    asked: tuple[Experiment, Mapping[str, Any]] | None = None,
    draw: bool = True,
) -> SweepResult:
    """Go on with a sweep whose driver ended before it did, or whose record is incomplete.

    `work_of` makes the work from its kind and spec. With `asked`, an experiment and the parts of
    its work's spec that must not have changed, the sweep goes on under that experiment's limits:
    an ended one runs the trials that it now has more of.

    Raises what `run_sweep` raises, and SearchError if there is no such sweep, it is running, or it
    has ended and was asked never to be resumed then.
    """
    path = _spec_path(sweep_run_id)
    if not storage.exists(path):
        raise SearchError(
            f"there is no state of a sweep {sweep_run_id!r} at {storage.uri}; give the "
            "sweep_run_id that jobs.tune printed, and the RAYLINE_STORAGE it ran with"
        )
    spec = storage.read_json(path)
    experiment = Experiment.from_dict(spec["experiment"])
    # As in Katib, that policy is about a search that came to its end, not one that was killed.
    if experiment.resume_policy == _NEVER and _is_over(storage, sweep_run_id):
        raise SearchError(
            f"sweep {sweep_run_id} has ended, and was asked for with resumePolicy Never; start a "
            "new one"
        )
    more = False
    if asked is not None:
        before, experiment = experiment, _with_limits(experiment, asked[0], spec["work"], asked[1])
        more = experiment != before
    work = work_of(storage, experiment, spec["kind"], spec["work"])
    lender = RayLender()
    sweep = reopen_sweep(settings, sweep_run_id)
    if more:
        spec["experiment"] = asdict(experiment)
        storage.write(_spec_path(sweep_run_id), json.dumps(spec).encode())
    return _run(settings, storage, lender, sweep, experiment, work, draw=draw, reopen=more)


def _note_other_code(storage: Storage, sweep_run_id: str) -> None:
    """Say that a sweep goes on with other code, and let no job take it for the sweep of one."""
    spec = storage.read_json(_spec_path(sweep_run_id))
    if spec.get("code") == training_code_digest():
        return
    say("tune", f"WARNING: sweep {sweep_run_id} was started with other code for training: trials "
        "from here on may differ from those before. For results of one code, check out the "
        "commit that its run in MLflow names, or start a new sweep")  # fmt: skip
    storage.write(_spec_path(sweep_run_id), json.dumps({**spec, "code": "mixed"}).encode())


def _is_over(storage: Storage, sweep_run_id: str) -> bool:
    """Whether a sweep has ended and all of its trials are in MLflow."""
    with Journal(storage, _folder(sweep_run_id)) as journal:
        kinds = {kind: {e.get("trial") for e in journal.events if e["event"] == kind}
                 for kind in (ASKED, RECORDED, CLOSED)}  # fmt: skip
    return bool(kinds[CLOSED]) and kinds[ASKED] <= kinds[RECORDED]


def _with_limits(
    experiment: Experiment, asked: Experiment, spec: Mapping[str, Any], same: Mapping[str, Any]
) -> Experiment:
    """Return the experiment with the limits of another one that is the same in all else."""
    before, after = asdict(experiment), asdict(asked)
    changed = [name for name in before if before[name] != after[name] and name not in _LIMITS]
    same = json.loads(json.dumps(same))
    changed += [name for name in same if same[name] != spec.get(name)]
    if changed:
        raise ConfigError(
            f"a sweep that is resumed can change its trial counts alone, and {', '.join(changed)} "
            "would change; start a new one"
        )
    return replace(experiment, **{name: after[name] for name in _LIMITS})


def _run(
    settings: Settings,
    storage: Storage,
    lender: RayLender,
    sweep: SweepRun,
    experiment: Experiment,
    work: Work,
    *,
    draw: bool,
    reopen: bool = False,
) -> SweepResult:
    folder = _folder(sweep.run_id)
    with Journal(storage, folder) as journal, Gauges() as gauges:
        resumed = bool(journal.events)
        progress = Progress(journal, experiment)
        study = Study(experiment)
        for number in sorted(progress.trials):
            study.restore(progress.trials[number])
        spent_s = progress.spent_s
        progress.add(SESSION)
        if reopen:
            progress.add(REOPENED)
        scheduler = scheduler_of(experiment)
        desk = Desk(
            storage=storage,
            folder=f"{folder}/trials",
            objectives=experiment.objectives,
            rungs=work.rungs,
            rung_counts=rung_counts(scheduler, work.rungs),
        )
        feed = Feed(progress, desk, work.artifacts)
        record = SweepRecord(
            settings,
            sweep,
            run_ids={t.number: t.run_id for t in progress.trials.values() if t.run_id},
            noted=feed.noted,
            look_up=resumed,
        )
        feed.start(record, journal.events)
        reported = SweepGauges(gauges, sweep.run_id, experiment.objectives[0], progress)
        progress.listeners.append(reported.noted)
        journal.events = []
        if resumed:
            ended = len(progress.trials) - len(progress.interrupted())
            say("tune", f"resuming sweep {sweep.run_id}: {ended} trials have ended, "
                f"{len(progress.interrupted())} go on")  # fmt: skip
        else:
            say("tune", f"sweep {sweep.run_id}: {study.num_trials} trials")
        session = Session(settings, storage, folder, experiment, work, progress, study, desk, feed)
        if not progress.closed:
            _note_other_code(storage, sweep.run_id)
            try:
                with share_of(settings, sweep.run_id, lender) as share:
                    session.run(experiment.time_budget_s - spent_s, share)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"`python -m jobs.submit tune --resume {sweep.run_id}` goes on with the sweep"
                ) from None
            progress.add(CLOSED, durable=True)
        return session.result(sweep, record, draw=draw)


def _folder(sweep_run_id: str) -> str:
    return f"sweeps/{sweep_run_id}"


def _spec_path(sweep_run_id: str) -> str:
    return f"{_folder(sweep_run_id)}/sweep.json"
