"""A sweep: parallel trials with Ray Tune, a sampler of Optuna's, early stopping at rungs.

What it does is in a journal under the storage root first. A sweep whose driver died is resumed
from that alone: the sampler is told all results again, MLflow gets what it missed, and trials that
were under way go on from what they kept.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.fs as fs
from ray import tune

from lib.cli import progress as say
from lib.config import Settings
from lib.errors import SearchError
from lib.registry.tracking import SweepRecord, SweepRun, reopen_sweep, start_sweep
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.feed import Feed
from lib.train.gauges import SweepGauges
from lib.train.journal import Journal
from lib.train.progress import CLOSED, SESSION, Progress, TrialState, pareto_front
from lib.train.report import Limits, SweepReport
from lib.train.resources import TrialResources, trial_resources
from lib.train.samplers import Study, sampler_name
from lib.train.schedulers import build_scheduler, rung_counts, scheduler_of
from lib.train.searcher import StudySearcher
from lib.train.trainable import Desk
from lib.train.work import Work, work_of
from lib.watch.gauges import Gauges

_MAX_PROCESS_FAILURES = 3
"""A trial whose process died this often in a row is given up."""
_NEVER = "Never"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """A trial that left a result."""

    number: int
    run_id: str
    value: float
    """Of the first objective, at the best report; what the trial kept is of that report."""
    metrics: Mapping[str, float]
    """All that this report held."""
    epoch: int
    params: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the trial as a job prints it."""
        return {
            "run_id": self.run_id,
            **self.metrics,
            "epoch": self.epoch,
            "params": dict(self.params),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep found; all of it is in MLflow too."""

    sweep_run_id: str
    data_digest: str | None
    trials: tuple[TrialResult, ...]
    """Best first."""
    pareto: tuple[TrialResult, ...]
    """Those that no other trial beats in one objective without losing in another."""
    num_failed: int
    num_observations: int
    """Results that the sampler holds."""
    images_per_s: float
    """Images trained on by all trials, per second of the sweep."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return the result as a job prints it."""
        return {
            "sweep_run_id": self.sweep_run_id,
            "data_digest": self.data_digest,
            "trials": len(self.trials),
            "failed_trials": self.num_failed,
            "best": self.trials[0].summary(),
            "pareto": [trial.summary() for trial in self.pareto],
            "seconds": round(self.seconds, 1),
            "images_per_s": round(self.images_per_s),
        }


def run_sweep(
    settings: Settings, storage: Storage, experiment: Experiment, work: Work
) -> SweepResult:
    """Search as the experiment asks.

    Ray must be initialised. Raises SearchError if no trial left a result, RegistryError if MLflow
    is away at the start, or at the end with something still to be sent, and StorageError if there
    is no place for the sweep's state; after the last two the sweep can be resumed.
    """
    # What can't be searched is said before anything starts.
    scheduler = scheduler_of(experiment)
    Study(experiment)
    sweep = start_sweep(
        settings,
        storage,
        name=experiment.name,
        manifest=work.manifest,
        tags={**work.tags, "rayline.seed": str(experiment.seed), "rayline.num_threads": "1"},
        facts={
            "sampler": sampler_name(experiment.algorithm.name),
            "scheduler": scheduler.name,
            "objectives": ", ".join(f"{o.goal} {o.metric}" for o in experiment.objectives),
            "num_trials": experiment.num_trials,
            "time_budget_s": experiment.time_budget_s,
        },
        experiment=asdict(experiment),
    )
    spec = {"experiment": asdict(experiment), "kind": work.kind, "work": work.spec}
    storage.write(_spec_path(sweep.run_id), json.dumps(spec).encode())
    return _run(settings, storage, sweep, experiment, work)


def resume_sweep(
    settings: Settings,
    storage: Storage,
    sweep_run_id: str,
    work_of: Callable[[Storage, Experiment, str, Mapping[str, Any]], Work] = work_of,
) -> SweepResult:
    """Go on with a sweep whose driver ended before it did, or whose record is incomplete.

    `work_of` makes the work from its kind and spec.

    Raises what `run_sweep` raises, and SearchError if there is no such sweep, it is running, or it
    was asked never to be resumed.
    """
    path = _spec_path(sweep_run_id)
    if not storage.exists(path):
        raise SearchError(
            f"there is no state of a sweep {sweep_run_id!r} at {storage.uri}; give the "
            "sweep_run_id that jobs.tune printed, and the RAYLINE_STORAGE it ran with"
        )
    spec = storage.read_json(path)
    experiment = Experiment.from_dict(spec["experiment"])
    if experiment.resume_policy == _NEVER:
        raise SearchError(
            f"sweep {sweep_run_id} was asked for with resumePolicy Never; start a new one"
        )
    work = work_of(storage, experiment, spec["kind"], spec["work"])
    sweep = reopen_sweep(settings, sweep_run_id)
    return _run(settings, storage, sweep, experiment, work)


def _run(
    settings: Settings, storage: Storage, sweep: SweepRun, experiment: Experiment, work: Work
) -> SweepResult:
    folder = f"sweeps/{sweep.run_id}"
    with Journal(storage, folder) as journal, Gauges() as gauges:
        resumed = bool(journal.events)
        progress = Progress(journal, experiment)
        study = Study(experiment)
        for number in sorted(progress.trials):
            study.restore(progress.trials[number])
        spent_s = progress.spent_s
        progress.add(SESSION)
        scheduler = scheduler_of(experiment)
        desk = Desk(
            storage=storage,
            folder=f"{folder}/trials",
            objectives=experiment.objectives,
            rungs=work.rungs,
            rung_counts=rung_counts(scheduler, len(work.rungs)),
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
        reported = SweepGauges(gauges, sweep.run_id, experiment.objective, progress)
        progress.listeners.append(reported.noted)
        journal.events = []
        if resumed:
            ended = len(progress.trials) - len(progress.interrupted())
            say("tune", f"resuming sweep {sweep.run_id}: {ended} trials have ended, "
                f"{len(progress.interrupted())} go on")  # fmt: skip
        else:
            say("tune", f"sweep {sweep.run_id}: {study.num_trials} trials")
        session = _Session(storage, folder, experiment, work, progress, study, desk)
        if not progress.closed:
            session.run(experiment.time_budget_s - spent_s)
            progress.add(CLOSED, durable=True)
        return session.result(sweep, record)


class _Session:
    """One driver's part of a sweep."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        experiment: Experiment,
        work: Work,
        progress: Progress,
        study: Study,
        desk: Desk,
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._experiment = experiment
        self._work = work
        self._progress = progress
        self._study = study
        self._desk = desk

    def run(self, budget_s: float) -> None:
        """Run trials until all have ended or a limit is met."""
        experiment, work, progress = self._experiment, self._work, self._progress
        start_s = time.monotonic()
        resources = trial_resources(work.gpus_per_trial)
        say("tune", resources.describe())
        shared = work.shared(resources)
        # One more than there is room for, where resources keep it waiting: no slot is ever idle.
        limit = resources.num_parallel + bool(resources.cpus or resources.gpus)
        limit = min(limit, experiment.num_parallel or limit)
        searcher = StudySearcher(self._study, progress, limit)
        report = SweepReport(progress, self._study, searcher, experiment)
        limits = Limits(progress, experiment, report)
        left_s = budget_s - (time.monotonic() - start_s)
        why = limits.why
        if searcher.num_left and not why:
            try:
                self._fit(searcher, report, limits, resources, shared, left_s)
            except Exception:
                if report.error is None:
                    raise
            if report.error is not None:
                raise report.error
            why = limits.why
        report.cut_off(why or f"the time budget of {experiment.time_budget_s:.0f} s was spent")

    def _fit(
        self,
        searcher: StudySearcher,
        report: SweepReport,
        limits: Limits,
        resources: TrialResources,
        shared: Mapping[str, Any],
        left_s: float,
    ) -> None:
        _quiet_tune()
        # Else Tune starts the first processes one after the other.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(resources.num_parallel)
        work, storage = self._work, self._storage
        trainable = tune.with_parameters(work.trainable, desk=self._desk, shared=dict(shared))
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources.request()),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=build_scheduler(
                    self._experiment,
                    self._progress,
                    num_rungs=len(work.rungs),
                    fixed=work.trainable.FIXED,
                ),
                num_samples=searcher.num_left,
                time_budget_s=max(0.01, left_s) if math.isfinite(left_s) else None,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                # Tune's own state of this driver; that of one before is of no use.
                name=f"tune-{int(time.time() * 1000)}",
                storage_path=storage.path(self._folder),
                storage_filesystem=storage.filesystem,
                callbacks=[report],
                stop=limits,
                failure_config=tune.FailureConfig(max_failures=_MAX_PROCESS_FAILURES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()

    def result(self, sweep: SweepRun, record: SweepRecord) -> SweepResult:
        """Close the record, tidy up, and return what was found."""
        progress, experiment = self._progress, self._experiment
        ranked = progress.ranked()
        front = pareto_front(experiment.objectives, ranked)
        seconds = progress.spent_s
        epochs = sum(trial.epoch for trial in progress.trials.values())
        images_per_s = epochs * self._work.images_per_epoch / max(seconds, 1e-9)
        metrics = {
            "trials": float(len(progress.trials)),
            "failed_trials": float(progress.num_failed),
            "images_per_s": images_per_s,
            "seconds": seconds,
            "pareto_trials": float(len(front)),
            **(
                {o.metric: ranked[0].best[o.metric] for o in experiment.objectives}
                if ranked
                else {}
            ),
        }
        table = [{"trial": t.number, "params": t.params, **t.best} for t in front]
        record.close(metrics, failed=not ranked, files={"pareto.json": json.dumps(table, indent=2)})
        record.check()
        self._tidy()
        if not ranked:
            raise SearchError(
                f"none of {len(progress.trials)} trials left a model ({progress.num_failed} "
                "failed, the others were cut off by the time budget of "
                f"{experiment.time_budget_s:.0f} s); the reasons are on the runs below sweep "
                f"{sweep.run_id} in MLflow"
            )
        by_number = {trial.number: _result(experiment, trial) for trial in ranked}
        return SweepResult(
            sweep_run_id=sweep.run_id,
            data_digest=self._work.manifest.digest if self._work.manifest else None,
            trials=tuple(by_number.values()),
            pareto=tuple(by_number[trial.number] for trial in front),
            num_failed=progress.num_failed,
            num_observations=self._study.num_observations,
            images_per_s=images_per_s,
            seconds=seconds,
        )

    def _tidy(self) -> None:
        """Delete what is in MLflow now; the journal stays."""
        filesystem = self._storage.filesystem
        selector = fs.FileSelector(self._storage.path(self._folder), allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            if info.type == fs.FileType.Directory and info.base_name != "journal":
                filesystem.delete_dir(info.path)


def _result(experiment: Experiment, trial: TrialState) -> TrialResult:
    return TrialResult(
        number=trial.number,
        run_id=trial.run_id or "",
        value=trial.best[experiment.objective.metric],
        metrics=trial.best,
        epoch=trial.best_epoch,
        params=trial.params,
    )


def _spec_path(sweep_run_id: str) -> str:
    return f"sweeps/{sweep_run_id}/sweep.json"


def _quiet_tune() -> None:
    """Turn off what Tune writes and prints by itself: the journal, MLflow and our lines have it."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # A failed trial's report has no metrics.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
