"""One driver's part of a sweep: trials run by Ray Tune until all have ended, then the result."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ray import tune

from lib.cli import progress as say
from lib.config import Settings
from lib.errors import SearchError
from lib.leases.share import Share
from lib.registry.sweep_runs import SweepRun
from lib.registry.tracking import SweepRecord
from lib.storage import Storage
from lib.train import album
from lib.train.experiment import Experiment
from lib.train.feed import Feed
from lib.train.progress import CUT, SESSION, Progress, TrialState, pareto_front, traded_off
from lib.train.report import Limits, SweepReport
from lib.train.resources import TrialResources
from lib.train.result import SweepResult, trial_result
from lib.train.samplers import Study
from lib.train.schedulers import build_scheduler, scheduler_of
from lib.train.searcher import StudySearcher, TrialSource
from lib.train.trainable import Desk
from lib.train.work import Work

_BRIEF_S = 2.0
"""A wait for the first slot that is longer than this is no part of the sweep's time."""
_STARTING_S = 900
"""In which the first trial must start: a cluster may have to add a node for it."""
_MAX_PROCESS_FAILURES = 3
"""A trial whose process died this often in a row is given up."""


class Session:
    """One driver's part of a sweep."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        folder: str,
        experiment: Experiment,
        work: Work,
        progress: Progress,
        study: Study,
        desk: Desk,
        feed: Feed,
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._folder = folder
        self._experiment = experiment
        self._work = work
        self._progress = progress
        self._study = study
        self._desk = desk
        self._feed = feed

    def run(self, budget_s: float, share: Share) -> None:
        """Run trials until all have ended or a limit is met.

        The budget is that of searching: it begins with the first trial. On a slow or busy machine
        reading the data and starting processes could spend a short one whole.
        """
        experiment, work, progress = self._experiment, self._work, self._progress
        resources = work.resources(self._settings, share.room)
        say("tune", resources.describe())
        shared = work.shared(resources)
        # One more than there is room for, where resources keep it waiting: no slot is ever idle.
        limit = resources.num_parallel + bool(resources.cpus or resources.gpus)
        limit = min(limit, experiment.num_parallel or limit)
        searcher = StudySearcher(self._study, progress, share)
        report = SweepReport(progress, self._study, searcher, experiment)
        limits = Limits(progress, experiment, report, budget_s)
        why = limits.why
        if searcher.num_left and not why:
            self._wait(share, resources, limit)
            try:
                self._fit(searcher, report, limits, resources, shared, budget_s + _STARTING_S)
            except Exception:
                if report.error is None:
                    raise
            if report.error is not None:
                raise report.error
            why = limits.why
        report.cut_off(why or f"no trial could start within {_STARTING_S} s")

    def _wait(self, share: Share, resources: TrialResources, most: int) -> None:
        """Wait for the first slot."""
        waited_s = share.ask(
            size=resources.size(),
            parallel=resources.num_parallel,
            most=most,
            free=resources.free,
            free_most=resources.most,
        )
        if waited_s > _BRIEF_S:
            self._progress.add(SESSION)

    def _fit(
        self,
        searcher: StudySearcher,
        report: SweepReport,
        limits: Limits,
        resources: TrialResources,
        shared: Mapping[str, Any],
        most_s: float,
    ) -> None:
        _quiet_tune()
        # At 1, Tune's default, the first processes start one after the other. At the number of
        # trials under way, the process of one that has ended goes to any that waits, also to one
        # whose own is starting (see `AtRungs.choose_trial_to_run`); so it is above that.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(resources.num_parallel + 2)
        work, storage = self._work, self._storage
        # Population-based training may still copy one that its trial has gone on from.
        kept = 4 if scheduler_of(self._experiment).name == "pbt" else 1
        trainable = tune.with_parameters(work.trainable, desk=self._desk, shared=dict(shared))
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources.request()),
            tune_config=tune.TuneConfig(
                search_alg=TrialSource(searcher),
                scheduler=build_scheduler(
                    self._experiment,
                    self._progress,
                    num_rungs=len(work.rungs),
                    fixed=work.trainable.FIXED,
                    may_resume=searcher.may_resume,
                ),
                num_samples=searcher.num_left,
                time_budget_s=max(0.01, most_s) if math.isfinite(most_s) else None,
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
                checkpoint_config=tune.CheckpointConfig(num_to_keep=kept, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()

    def result(self, sweep: SweepRun, record: SweepRecord, *, draw: bool) -> SweepResult:
        """Close the record, draw, tidy up, and return what was found.

        Raises SearchError if no trial left a result, or more failed than the experiment allows.
        """
        progress, experiment = self._progress, self._experiment
        ranked = progress.ranked()
        front = pareto_front(traded_off(experiment, ranked), ranked)
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
        failure = self._failure(ranked)
        files = {"pareto.json": json.dumps(table, indent=2)}
        record.close(metrics, failed=failure is not None, files=files)
        record.check()
        if draw and (pictures := self._pictures(ranked, front)):
            record.attach(pictures)
        self._tidy()
        if failure is not None:
            raise SearchError(
                f"{failure}; the reasons are on the runs below sweep {sweep.run_id} in MLflow"
            )
        by_number = {trial.number: trial_result(experiment, trial) for trial in ranked}
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

    def _failure(self, ranked: Sequence[TrialState]) -> str | None:
        """Return why the sweep as a whole has failed, if it has."""
        progress, limit = self._progress, self._experiment.max_failed_trials
        if not ranked:
            cut = next((t.why for t in progress.trials.values() if t.ended == CUT), None)
            if not progress.trials:
                cut = f"none could start within {_STARTING_S} s"
            return (
                f"none of {len(progress.trials)} trials left a model ({progress.num_failed} failed"
                + (f", the others were cut off: {cut})" if cut else ")")
            )
        if limit is not None and progress.num_failed > limit:
            return (
                f"{progress.num_failed} of {len(progress.trials)} trials failed, more than the "
                f"{limit} that the experiment allows; the best of the others is run "
                f"{ranked[0].run_id}"
            )
        return None

    def _pictures(
        self, ranked: Sequence[TrialState], front: Sequence[TrialState]
    ) -> dict[str, bytes]:
        work = self._work

        def confusion() -> tuple[list[list[int]], Sequence[str]] | None:
            if work.confusion is None or work.manifest is None:
                return None
            counts = work.confusion(partial(self._feed.kept, ranked[0]))
            return None if counts is None else (counts, work.manifest.class_names)

        trials = list(self._progress.trials.values())
        return album.draw(
            self._experiment, trials, front, by_epochs=bool(work.rungs), confusion=confusion
        )

    def _tidy(self) -> None:
        """Delete what is in MLflow now; the journal stays."""
        for folder in self._storage.folders(self._folder):
            if not folder.endswith("/journal"):
                self._storage.delete_folder(folder)


def _quiet_tune() -> None:
    """Turn off what Tune writes and prints by itself: the journal, MLflow and our lines have it."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # A failed trial's report has no metrics.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)
    # With its own handler `fit` returns on Ctrl-C as if all trials had ended, and the sweep would
    # be closed with the trials under way cut off. KeyboardInterrupt leaves it open to be resumed.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
