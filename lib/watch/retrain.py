"""Retraining: labelled live requests → data set → sweep → version → gate → rollout.

What each step does is in `lib.watch.retrain_steps`; here is the order, the record, and how a
retrain that was killed goes on. A step that the record has as done is not done again; one that an
earlier retrain did with the same inputs is taken from there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lib import provenance
from lib.cli import progress
from lib.config import Settings
from lib.errors import RaylineError, RefusedError, RetrainError, TooFewError
from lib.steps import Step
from lib.storage import Storage
from lib.watch import retrain_record as records
from lib.watch.lineage import of_retrain, write_graph
from lib.watch.retrain_asked import Options
from lib.watch.retrain_record import DONE, FAILED, REFUSED, Record, StepRecord

MOST_ATTEMPTS = 5
"""Processes that may die in one step before a retrain does not go on by itself any more."""

Result = Mapping[str, Any]


class Steps(Protocol):
    """The work of a retrain. Each step can be done again, or resumed, after it was killed."""

    def champion(self) -> Result:
        """Return the served version: `version`, `run_id`, `data_digest`, `params`."""
        ...

    def extend(self, champion: Result, start_us: int, end_us: int) -> Step:
        """Make the data set; its result has `digest`. Raises TooFewError."""
        ...

    def search(self, digest: str, params: Result) -> Step:
        """Search on the data set, these parameters first; its result has `sweep_run_id`."""
        ...

    def register(self, digest: str, sweep_run_id: str, record: Record) -> Step:
        """Make the best trial a version; its result has `version` and `run_id`."""
        ...

    def judge(self, digest: str, candidate: Result) -> Step:
        """Compare with the champion on held-out live rows; has `passed` and `why`."""
        ...

    def withdraw(self, candidate: Result, why: str) -> None:
        """Take back what registration gave a candidate that was refused."""
        ...

    def rollout(self, candidate: Result, record: Record) -> Step:
        """Roll the version out; its result has `status`, and `reason` if it was not promoted."""
        ...

    def is_there(self, step: str, result: Result) -> bool:
        """Whether what a step of this record made still exists."""
        ...


def begin(
    storage: Storage, model: str, reason: str, *, who: str, options: Options | None = None
) -> Record:
    """Put a new retrain on record; nothing is done yet."""
    if not reason.strip():
        raise RetrainError("a retrain needs a reason, such as `person` or `drift`")
    options = options or Options()
    now = time.time()
    record = records.new(
        model,
        reason,
        who=who,
        start_us=int((now - options.days * 86400) * 1e6),
        options=options.to_json(),
        now=now,
    )
    records.write(storage, record)
    return record


def run(storage: Storage, record: Record, steps: Steps) -> Record:
    """Do what is left of a retrain and return its record; one that has ended stays as it is.

    Raises RetrainError if a retrain of the model is under way, and what the steps raise, after the
    record says so.
    """
    with records.only_one(storage, record.model):
        return _run(storage, records.read(storage, record.model, record.id), steps)


def run_new(
    storage: Storage,
    model: str,
    reason: str,
    steps: Steps,
    *,
    who: str,
    options: Options | None = None,
) -> Record:
    """Begin a retrain and run it, as `run` does.

    What is refused, because one of the model is under way or about to begin, is not on record: the
    record of a retrain that has not ended is taken up by itself once nobody works on it.
    """
    with _next_one(storage, model):
        return _run(storage, begin(storage, model, reason, who=who, options=options), steps)


@contextlib.contextmanager
def _next_one(storage: Storage, model: str) -> Iterator[None]:
    """Hold the right to begin a retrain; raise RetrainError if there is one to wait for."""
    with records.only_one(storage, model):
        if (starting := records.starting(storage, model)) is not None:
            raise RetrainError(f"retrain {starting} of {model} is about to begin")
        yield


def _run(storage: Storage, record: Record, steps: Steps) -> Record:
    if record.state in (DONE, REFUSED):
        return record
    record = record.taken_up()
    records.write(storage, record)
    work = _Run(storage, record, steps)
    try:
        return work.go()
    except (TooFewError, RefusedError) as error:
        work.end(REFUSED, str(error))
        raise
    except RaylineError as error:
        work.end(FAILED, str(error))
        raise
    except (KeyboardInterrupt, SystemExit):
        # Whoever ends its job does not want that it goes on by itself.
        work.end(FAILED, "its process was told to end")
        raise
    except Exception as error:
        work.end(FAILED, f"{type(error).__name__}: {error}")
        raise


def start(
    settings: Settings,
    storage: Storage,
    reason: str,
    *,
    who: str | None = None,
    options: Options | None = None,
    submit: Callable[[Settings, str], None] | None = None,
) -> str:
    """Start a retrain as a Ray job, or let one that was killed go on; return its id at once.

    Raises RetrainError if one of the model is under way, LineError if Ray does not take the job.
    """
    if (interrupted := go_on(settings, storage, submit=submit)) is not None:
        return interrupted
    with _next_one(storage, settings.model):
        owner = who or provenance.current().owner or "unknown"
        record = begin(storage, settings.model, reason, who=owner, options=options)
    try:
        (submit or _submit)(settings, record.id)
    except RaylineError as error:
        records.write(storage, records.ended(record, FAILED, str(error)))
        raise
    return record.id


def go_on(
    settings: Settings,
    storage: Storage,
    *,
    submit: Callable[[Settings, str], None] | None = None,
) -> str | None:
    """Let a retrain that was killed go on, as a Ray job; return its id, None if there is none.

    One whose process has died too often in the same step is given up.

    Raises RetrainError if another process takes it up, LineError if Ray does not take the job.
    """
    retrain_id = records.interrupted(storage, settings.model)
    if retrain_id is None:
        return None
    with records.only_one(storage, settings.model):
        record = records.read(storage, settings.model, retrain_id)
        if record.attempts >= MOST_ATTEMPTS:
            why = f"its process died {record.attempts} times in the same step"
            records.write(storage, records.ended(record, FAILED, why))
            progress("retrain", f"{retrain_id} is given up: {why}")
            return None
        records.write(storage, replace(record, asked=time.time()))
    try:
        (submit or _submit)(settings, retrain_id)
    except RaylineError:
        # It is as interrupted as before: the next call tries again.
        records.write(storage, record)
        raise
    return retrain_id


def _submit(settings: Settings, retrain_id: str) -> None:
    submit_for(settings, ["-m", "jobs.retrain", "--resume", retrain_id])


def submit_for(settings: Settings, arguments: Sequence[str]) -> None:
    """Send `python ARGUMENTS`, about the model of the settings, to Ray; raise LineError."""
    from lib.line.layout import Line
    from lib.line.submission import submit_job

    submit_job(
        Line.from_env(os.environ),
        arguments,
        # Inside a job there is no checkout to read the commit from: pass on what is known.
        env={
            "RAYLINE_MODEL": settings.model,
            provenance.VARIABLE: provenance.current().encode(),
        },
    )


class _Run:
    """One process's part of a retrain."""

    def __init__(self, storage: Storage, record: Record, steps: Steps) -> None:
        self._storage = storage
        self._record = record
        self._steps = steps

    def go(self) -> Record:
        """Do what is left, in order."""
        steps = self._steps
        if not self._record.champion:
            self._write(replace(self._record, champion=dict(steps.champion())))
        record, champion = self._record, self._record.champion
        progress("retrain", f"{record.id}, for {record.reason}: champion {champion['version']}")
        data = self._step("data", lambda: steps.extend(champion, record.start_us, record.end_us))
        digest = data["digest"]
        sweep = self._step("tune", lambda: steps.search(digest, champion["params"]))
        candidate = self._step(
            "register", lambda: steps.register(digest, sweep["sweep_run_id"], record)
        )
        verdict = self._step("gate", lambda: steps.judge(digest, candidate))
        if not verdict["passed"]:
            steps.withdraw(candidate, verdict["why"])
            return self.end(REFUSED, verdict["why"])
        rollout = self._step("rollout", lambda: steps.rollout(candidate, record))
        if rollout["status"] == "promoted":
            return self.end(DONE)
        return self.end(DONE, f"{rollout['status']}: {rollout.get('reason', '')}")

    def end(self, state: str, why: str = "") -> Record:
        """Put the end on record."""
        self._write(records.ended(self._record, state, why))
        self._draw()
        progress("retrain", f"{self._record.id}: {state}" + (f": {why}" if why else ""))
        return self._record

    def _step(self, name: str, work: Callable[[], Step]) -> Result:
        done = self._record.step(name)
        if done and done.state == DONE:
            if self._steps.is_there(name, done.result):
                return done.result
            progress("retrain", f"what step {name} made is gone: doing it again")
        started = time.time()
        self._write(self._record.begun(StepRecord(name=name, started=started)))
        step = work()
        self._write(
            self._record.finished(
                StepRecord(
                    name=name,
                    state=DONE,
                    started=started,
                    digest=step.digest,
                    seconds=round(time.time() - started, 3),
                    reused=step.reused,
                    result=dict(step.result),
                )
            )
        )
        self._draw()
        return step.result

    def _write(self, record: Record) -> None:
        records.write(self._storage, record)
        self._record = record

    def _draw(self) -> None:
        record = self._record
        graph = of_retrain(record.to_json())
        write_graph(self._storage, f"lineage/{record.model}/{record.id}", graph)
