"""The durable record of each retrain: `retrains/MODEL/ID.json`, written before and after a step.

What triggers read for their budget and their cool-down, and what a killed retrain goes on from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lib.errors import RetrainError
from lib.storage import Storage

RUNNING, DONE, REFUSED, FAILED = "running", "done", "refused", "failed"
"""Of a retrain. Done: the candidate was handed to its rollout, and that ended. Refused: there was
too little to learn from, or a gate said no. Failed: an error; it can be resumed."""

_RETRAIN = ", retrain "
STARTING_S = 120.0
"""A process that was asked for may take this long until it takes its retrain up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step of one retrain."""

    name: str
    state: str = RUNNING
    """`running` or `done`."""
    started: float
    """UTC, in seconds since 1970, like all times here."""
    digest: str = ""
    """Of the step's inputs, by which its result is kept."""
    seconds: float = 0.0
    reused: bool = False
    """Whether an earlier retrain had done the same."""
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One retrain."""

    id: str
    """Ids sort by time."""
    model: str
    reason: str
    """What triggered it: drift, quality, schedule, new labels, person, or words of the caller."""
    who: str
    started: float
    ended: float | None = None
    state: str = RUNNING
    why: str = ""
    """Of what was refused or failed: one sentence."""
    asked: float | None = None
    """When a process was asked for to take it up; None once one has."""
    attempts: int = 0
    """Processes that took it up since a step of it was last done."""
    start_us: int
    """Requests from this time …"""
    end_us: int
    """… up to this one are learned from, however often it is resumed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else it was asked for, such as the preset."""
    champion: Mapping[str, Any] = field(default_factory=dict)
    """Version served when it began: its data set is extended, its parameters are tried first."""
    steps: tuple[StepRecord, ...] = ()

    @property
    def by(self) -> str:
        """Who acts where this retrain does, for histories."""
        return f"{self.who}{_RETRAIN}{self.id}"

    def step(self, name: str) -> StepRecord | None:
        """Return a step that has begun."""
        return next((step for step in self.steps if step.name == name), None)

    def begun(self, step: StepRecord) -> Record:
        """Return the record with a step begun; what an earlier attempt did after it is dropped."""
        names = [other.name for other in self.steps]
        kept = self.steps[: names.index(step.name)] if step.name in names else self.steps
        return replace(self, steps=(*kept, step))

    def finished(self, step: StepRecord) -> Record:
        """Return the record with the last step as it ended."""
        return replace(self, attempts=0, steps=(*self.steps[:-1], step))

    def taken_up(self) -> Record:
        """Return the record as the process writes it that now works on it."""
        attempts = self.attempts + 1
        return replace(self, state=RUNNING, why="", ended=None, asked=None, attempts=attempts)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {**asdict(self), "steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Rebuild a record from its JSON."""
        steps = tuple(StepRecord(**step) for step in content["steps"])
        return cls(**{**content, "steps": steps})


def is_of_a_retrain(who: str) -> bool:
    """Whether it was a retrain that acted, and not a person."""
    return _RETRAIN in who


def new(
    model: str, reason: str, *, who: str, start_us: int, options: Mapping[str, Any], now: float
) -> Record:
    """Return the record of a retrain that begins now."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%S")
    return Record(
        id=f"{stamp}-{uuid.uuid4().hex[:6]}",
        model=model,
        reason=reason,
        who=who,
        started=now,
        asked=now,
        start_us=start_us,
        end_us=int(now * 1e6),
        options=options,
    )


def write(storage: Storage, record: Record) -> None:
    """Write a record, whole or not at all."""
    storage.write_json(_path(record.model, record.id), record.to_json())


def read(storage: Storage, model: str, retrain_id: str) -> Record:
    """Read a record; raise RetrainError if there is none of that id."""
    path = _path(model, retrain_id)
    if not storage.exists(path):
        known = ", ".join(record.id for record in history(storage, model)[-5:]) or "none"
        raise RetrainError(f"{model} has no retrain {retrain_id!r}; the last ones: {known}")
    return Record.from_json(storage.read_json(path))


def history(storage: Storage, model: str) -> list[Record]:
    """Return all retrains of a model, oldest first."""
    paths = [path for path in storage.list(f"retrains/{model}") if path.endswith(".json")]
    found = [Record.from_json(storage.read_json(path)) for path in paths]
    # Names tell the second; two may begin in the same one.
    return sorted(found, key=lambda record: record.started)


def interrupted(storage: Storage, model: str) -> str | None:
    """Return the newest retrain that nobody works on and that has not ended: it was killed.

    On object stores there are no locks to tell, so none is found there.
    """
    running = [record for record in history(storage, model) if record.state == RUNNING]
    if not running or not storage.is_local or starting(storage, model):
        return None
    try:
        with only_one(storage, model):
            # It may have ended while we looked.
            record = read(storage, model, running[-1].id)
            return record.id if record.state == RUNNING else None
    except RetrainError:
        return None


def starting(storage: Storage, model: str) -> str | None:
    """Return a retrain that is on record and that its process has not taken up yet."""
    since = time.time() - STARTING_S
    for record in reversed(history(storage, model)):
        if record.state == RUNNING and record.asked is not None and record.asked > since:
            return record.id
    return None


@contextlib.contextmanager
def only_one(storage: Storage, model: str) -> Iterator[None]:
    """Hold the right to retrain a model; raise RetrainError if another process has it.

    On a local file system the kernel frees it with the process, however that ends. Object stores
    have no locks: there two retrains of one model are not kept apart.
    """
    if not storage.is_local:
        yield
        return
    path = storage.path(f"retrains/{model}/lock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RetrainError(
                f"a retrain of {model} is under way; wait until it ends, or end its job first"
            ) from error
        yield
    finally:
        os.close(descriptor)


def ended(record: Record, state: str, why: str = "") -> Record:
    """Return a record that ended now."""
    return replace(record, state=state, why=why, ended=time.time())


def _path(model: str, retrain_id: str) -> str:
    return f"retrains/{model}/{retrain_id}.json"
