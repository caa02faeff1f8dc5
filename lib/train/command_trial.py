"""A trial that is a program: a process of its own, its metrics read from what it writes."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.device import granted_gpus
from lib.errors import SearchError
from lib.train.collector import LATEST, Collector
from lib.train.command import Command, CommandTemplate
from lib.train.process_group import ProcessGroup
from lib.train.trainable import SweepTrial

LOG_FILE = "output.log"
"""On the trial's run: the end of what its program wrote."""
RAW = "latest/"
"""Before a metric's name: its value as last written, where the strategy counts another one."""
_LOG_BYTES = 2**20
_LOG_EVERY_S = 10.0
_POLL_S = 0.05
_MEMORY_EVERY_S = 1.0


class CommandTrial(SweepTrial):
    """Runs a command template, a report for every new value of the objective.

    A report holds what counts so far by each metric's strategy, so the last one is the result. A
    trial fails if its program ends with an exit code other than 0 or never wrote the objective. A
    program can't be gone on with: an interrupted trial starts again.
    """

    def prepare(self, **shared: Any) -> None:
        """Keep what all trials run: the `template`, and the name of the `experiment`."""
        self._template: CommandTemplate = shared["template"]
        self._experiment: str = shared["experiment"]
        # Tune has changed into the trial's folder; paths in the command are meant from here.
        self._cwd = os.environ.get("TUNE_ORIG_WORKING_DIR") or os.getcwd()
        self._folder: Path | None = None
        self._group: ProcessGroup | None = None

    def begin(self, params: Mapping[str, Any]) -> None:
        """Start the program."""
        self._folder = Path(tempfile.mkdtemp(prefix="rayline-trial-"))
        self._log = self._folder / LOG_FILE
        trial_name = f"{self._experiment}-{self.trial_id}"
        command = self._template.render(params, trial_name, str(self._folder / "files"))
        self._collector = Collector(config=self._template.collector)
        self._reports: deque[dict[str, Any]] = deque()
        self._last: dict[str, Any] = {}
        self._logged_s = -math.inf
        self._memory_s = 0.0
        self._done = False
        self._tail = _Tail(Path(command.metrics_file) if command.metrics_file else self._log)
        self._group = self._start(command)

    def advance(self) -> dict[str, Any]:
        """Wait for the next value of the objective, or for the program's end."""
        try:
            return self._advance()
        except SearchError:
            self._done = True
            raise

    def _advance(self) -> dict[str, Any]:
        assert self._group is not None
        while not self._reports:
            # The end first: what was written before it is then read below.
            exit_code = self._group.wait(_POLL_S)
            for line in self._tail.lines(whole=exit_code is not None):
                if self._collector.read(line):
                    self._reports.append(self._report())
            self._check_memory(self._group)
            if exit_code is not None and not self._reports:
                self._done = True
                return self._finish(exit_code)
        self._last = self._reports.popleft()
        return self._last

    def artifacts(self, is_best: bool) -> dict[str, bytes]:
        """Return the log: with the first report, now and then, and at the end."""
        now_s = time.monotonic()
        if self._folder is None or not (self._done or now_s - self._logged_s > _LOG_EVERY_S):
            return {}
        self._logged_s = now_s
        return {LOG_FILE: _last_bytes(self._log, _LOG_BYTES)}

    def end(self) -> None:
        """End the program and all that it started; remove its files."""
        if self._group is not None:
            self._group.end()
            self._group = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self, command: Command) -> ProcessGroup:
        if command.metrics_file:
            Path(command.metrics_file).parent.mkdir(parents=True, exist_ok=True)
        # `python` is the one that runs here, and what it prints is seen while it runs.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        env = {"PYTHONUNBUFFERED": "1", **os.environ, "PATH": path, **command.env}
        if granted_gpus() == []:
            env["CUDA_VISIBLE_DEVICES"] = ""
        with self._log.open("wb") as output:
            try:
                return ProcessGroup(
                    command.arguments,
                    env=env,
                    cwd=command.working_dir or self._cwd,
                    output=output,
                )
            except OSError as error:
                raise SearchError(
                    f"the command {command.arguments[0]!r} can't be started: {error}; give one "
                    "that is on this machine, with its whole path"
                ) from error

    def _report(self) -> dict[str, Any]:
        collector = self._collector
        raw = {
            f"{RAW}{name}": value
            for name, value in collector.latest.items()
            if collector.config.strategies[name] != LATEST
        }
        return {**collector.counted, **raw}

    def _finish(self, exit_code: int) -> dict[str, Any]:
        if exit_code != 0:
            how = f"exit code {exit_code}" if exit_code > 0 else f"signal {-exit_code}"
            raise SearchError(f"the command ended with {how}; it wrote last: {self._last_words()}")
        objective = self._collector.config.objective
        if objective not in self._collector.counted:
            where = self._collector.config.file or "the output"
            raise SearchError(
                f"the objective {objective!r} was never seen in {where}; the command wrote last: "
                f"{self._last_words()}"
            )
        report = self._report()
        # Metrics that were written after the objective's last value.
        return {**(report if report != self._last else {}), "done": True}

    def _check_memory(self, group: ProcessGroup) -> None:
        limit = self._template.memory_bytes
        if limit is None or time.monotonic() - self._memory_s < _MEMORY_EVERY_S:
            return
        self._memory_s = time.monotonic()
        held = group.memory_bytes()
        if held > limit:
            group.end()
            raise SearchError(
                f"the trial held {held:,} bytes of memory, more than its limit of {limit:,}"
            )

    def _last_words(self) -> str:
        text = _last_bytes(self._log, 400).decode(errors="replace").strip()
        return " | ".join(text.splitlines()[-3:]) or "nothing"


class _Tail:
    """The lines of a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._rest = b""

    def lines(self, *, whole: bool) -> list[str]:
        """Return the lines that are new; with `whole`, also a last one without its end."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            content = stream.read()
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        if whole and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in lines]


def _last_bytes(path: Path, count: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - count))
        return stream.read()
