"""What a sweep runs: the contract of a trainable, and what every trainable gets for it."""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ray import tune

from lib.errors import DeviceError, MissingError, SearchError, StorageError
from lib.storage import Storage
from lib.train.experiment import Objective, rank_key, varying

FAILED = "rayline_failed"
"""In a report: why the trial failed. It has no metrics then."""
NO_PLACE = "rayline_no_place"
"""In a report: why what must be kept could not be written. It has no metrics then."""
NO_DEVICE = "rayline_no_device"
"""In a report: why the GPU that the trial was granted can't be used. It has no metrics then."""
REPORT = "rayline_report"
"""In a report: its number. One that is repeated after an interruption has the number it had."""
ENDS = "rayline_ends"
"""In a report: whether the trial ended by itself; Tune's `done` is also set by schedulers."""
RUNG_COUNT = "rung_count"
"""In a report: the time that schedulers count in."""
AT_RUNG = "at_rung"
"""In a report: whether a scheduler may compare the trial now."""
RESUME = "rayline_resume"
"""In a configuration: the ids of earlier attempts, the newest first. The trial goes on from the
first of them that left a state: one that was killed while it waited, or soon, has left none."""
_STATE = "state"


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """Where the trials of one sweep leave what must outlive their process, and when to compare."""

    storage: Storage
    folder: str
    """Relative to the storage root; a trial has a folder of its own below it."""
    objectives: tuple[Objective, ...]
    """What every report must hold; the first one that training changes tells the best report."""
    rungs: tuple[int, ...] = ()
    """Epochs at which trials are comparable; none: at every report."""
    rung_counts: tuple[int, ...] = ()
    """Of each rung: the time it counts as for the scheduler."""

    def file(self, attempt: str, name: str) -> str:
        """Return the path of a trial's file, relative to the storage root."""
        return f"{self.folder}/{attempt}/{name}"

    def measured_once(self, name: str, measure: Callable[[], float]) -> float:
        """Return what the first trial that asked for it measured, whichever machine it was on."""
        # Beside the folder of the trials, which goes with the end of the sweep.
        path = posixpath.join(posixpath.dirname(self.folder), f"{name}.json")
        if not self.storage.exists(path):
            self.storage.create_json(path, measure())
        return float(self.storage.read_json(path))


@dataclass(kw_only=True, slots=True)
class _Standing:
    """How the trial of a process stands. In one place, for subclasses have names of their own."""

    failure: str | None = None
    kept: dict[str, Any] | None = None
    """A report that is to be given again: it may never have reached the sweep."""
    num_reports: int = 0
    epoch: int = 0
    best: tuple[float, ...] | None = None
    """Rank key of the best report, or of the last one if that counts."""


class SweepTrial(tune.Trainable):
    """Base of all that a sweep can run: one configuration after the other in the same process.

    A subclass defines `prepare`, `begin` and `advance`, and may define the rest:

    - `prepare(**shared)`: once a process. `shared` is that of the sweep's `Work`, put into the
      object store once for all trials.
    - `begin(params)`: start over with a configuration; whatever ran before has ended.
    - `advance()`: go on for one step and return its report: numbers by name, every objective of
      the experiment among them. `"epoch"` numbers the steps from 1 (counted if left out),
      `"done": True` ends the trial. Blocking is fine: nothing else waits for it. A trial that
      comes to its end with nothing new returns `{"done": True}`. An objective that is missing
      otherwise, or not finite, fails the trial.
    - `state()`: bytes from which `load` goes on after this report; None (the default): a trial
      that is interrupted starts again from the beginning.
    - `load(state)`: called after `begin` where there is such a state.
    - `artifacts(is_best)`: files, by name, that belong on the trial's run in MLflow and are to be
      kept with this report; a later file replaces one of the same name. `is_best` tells whether
      no earlier report of the trial was as good by the first objective that training changes; it
      is called once more, with False, when a trial fails or ends with nothing new. Where on the
      run each name goes is the `Work`'s to say.
    - `end()`: the trial is over, early or not; the last call before the next `begin`.

    - `ends_process(error)`: whether the process is of no use after an error of the trial.

    An exception from `begin`, `load` or `advance` fails this trial, with its text as the reason,
    and the process takes the next one. A process that dies is started again and goes on from the
    last state; so does one whose storage is away, or of which `ends_process` says so.
    """

    FIXED: ClassVar[frozenset[str]] = frozenset()
    """Parameters that can't change within a trial; population-based training leaves them alone."""

    def prepare(self, *args: Any, **shared: Any) -> None:
        """Get ready for the first configuration."""

    def begin(self, params: Mapping[str, Any]) -> None:
        """Start over with a configuration."""
        raise NotImplementedError

    def advance(self) -> Mapping[str, Any]:
        """Go on for one step and report."""
        raise NotImplementedError

    def state(self) -> bytes | None:
        """Return what `load` goes on from."""
        return None

    def load(self, state: bytes) -> None:
        """Go on from a state."""
        raise NotImplementedError

    def artifacts(self, is_best: bool) -> Mapping[str, bytes]:
        """Return the files for the run that go with the last report."""
        return {}

    def end(self) -> None:
        """Let go of what the trial holds."""

    def ends_process(self, error: Exception) -> bool:
        """Return whether neither this trial nor the next one can go on in this process."""
        return False

    # What follows is between this class and Tune.

    def setup(self, config: dict[str, Any], desk: Desk | None = None, shared: Any = None) -> None:
        """Prepare the process; the first step begins the configuration."""
        if desk is None:
            raise ValueError("a trial needs the desk of its sweep")
        self._desk = desk
        self._unusable: str | None = None
        try:
            self.prepare(**(shared or {}))
        except DeviceError as error:
            self._unusable = str(error)
        self._standing = _Standing()
        self._to_begin: Mapping[str, Any] | None = config

    def step(self) -> dict[str, Any]:
        """Return one report, kept durably before Tune sees it."""
        if self._unusable:
            return {NO_DEVICE: self._unusable, "done": True}
        self._begin_if_new()
        if self._standing.failure:
            return {FAILED: self._standing.failure, "done": True}
        if self._standing.kept:
            report, self._standing.kept = self._standing.kept, None
            return report
        try:
            report = self._complete(self.advance())
        # Whatever else a trial raises is the trial's; the process and the sweep go on.
        except Exception as error:
            if self._is_of_process(error):
                raise
            report = {FAILED: described(error), "done": True}
        try:
            self._keep(report)
        except StorageError as error:
            # A full disk stays full; an object store that is away comes back.
            if not self._desk.storage.is_local:
                raise
            return {NO_PLACE: str(error), "done": True}
        return report

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let the next step begin another configuration in this process."""
        self.end()
        self._to_begin = new_config
        return True

    def cleanup(self) -> None:
        """End the last trial of this process."""
        self.end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write what a scheduler needs that pauses trials or clones them."""
        content = self.state()
        if content is not None:
            (Path(checkpoint_dir) / _STATE).write_bytes(
                pack({"epoch": self._standing.epoch}, content)
            )

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Go on from what `save_checkpoint` wrote, of this trial or of another one."""
        file = Path(checkpoint_dir) / _STATE
        if not file.exists():
            return
        self._begin_if_new()
        head, content = unpack(file.read_bytes())
        self._standing.kept = None
        self._standing.epoch = int(head["epoch"])
        self._guarded(lambda: self.load(content))

    def _begin_if_new(self) -> None:
        # Not when Tune hands a configuration over: it asks a new process and, if one becomes free
        # meanwhile, gives the trial to that one. Then both would have begun it.
        if self._to_begin is not None:
            config, self._to_begin = self._to_begin, None
            self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._standing = _Standing()
        params = {name: value for name, value in config.items() if name != RESUME}
        self._guarded(lambda: self.begin(params))
        for attempt in (self.trial_id, *config.get(RESUME, ())):
            path = self._desk.file(str(attempt), _STATE)
            if not self._standing.failure and self._desk.storage.exists(path):
                head, content = unpack(self._desk.storage.read(path))
                best = head["best"]
                if not isinstance(best, list):  # Earlier states have the objective alone.
                    objective = varying(self._desk.objectives)
                    best = rank_key((objective,), {objective.metric: best})
                self._standing.kept, self._standing.best = head["report"], tuple(best)
                self._standing.num_reports, self._standing.epoch = (
                    head["report"][REPORT],
                    head["report"]["epoch"],
                )
                self._guarded(partial(self.load, content))
                return

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if self._is_of_process(error):
                raise
            self._standing.failure = described(error)

    def _is_of_process(self, error: Exception) -> bool:
        """Whether a new process, from the last state, may go on where this one can't."""
        if isinstance(error, StorageError | OSError):
            return not isinstance(error, MissingError)
        return self.ends_process(error)

    def _complete(self, advanced: Mapping[str, Any]) -> dict[str, Any]:
        done = bool(advanced.get("done", False))
        metrics = [objective.metric for objective in self._desk.objectives]
        missing = [name for name in metrics if name not in advanced]
        if missing and done and self._standing.num_reports:
            return {"done": True, ENDS: True, AT_RUNG: False}
        if missing:
            raise SearchError(f"the trial reported no {', '.join(missing)}")
        for name in metrics:
            if not math.isfinite(advanced[name]):
                raise SearchError(f"the trial reported {name} = {advanced[name]}")
        self._standing.num_reports += 1
        self._standing.epoch = int(advanced.get("epoch", self._standing.epoch + 1))
        rungs, counts = self._desk.rungs, self._desk.rung_counts
        passed = sum(self._standing.epoch >= rung for rung in rungs)
        return {
            **advanced,
            "epoch": self._standing.epoch,
            "done": done,
            ENDS: done,
            REPORT: self._standing.num_reports,
            AT_RUNG: self._standing.epoch in rungs if rungs else True,
            RUNG_COUNT: (counts[passed - 1] if passed else 0) if rungs else self._standing.epoch,
        }

    def _keep(self, report: Mapping[str, Any]) -> None:
        if REPORT not in report:
            self._keep_files(is_best=False)
            return
        objective = varying(self._desk.objectives)
        key, best = rank_key((objective,), report), self._standing.best
        is_best = best is None or objective.by_last or key < best
        if is_best:
            self._standing.best = key
        self._keep_files(is_best)
        state = None if report["done"] else self.state()
        if state is not None:
            head = {"report": dict(report), "best": self._standing.best}
            self._desk.storage.write(self._desk.file(self.trial_id, _STATE), pack(head, state))

    def _keep_files(self, is_best: bool) -> None:
        for name, content in self.artifacts(is_best).items():
            self._desk.storage.write(self._desk.file(self.trial_id, name), content)


def described(error: Exception) -> str:
    """Return an error as the reason why a trial failed."""
    return f"{type(error).__name__}: {error}"


def pack(head: Mapping[str, Any], state: bytes) -> bytes:
    """Return a report and the state after it as one file: they are kept both or neither."""
    return json.dumps(dict(head)).encode() + b"\n" + state


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Take apart what `pack` put together."""
    head, _, state = content.partition(b"\n")
    return json.loads(head), state
