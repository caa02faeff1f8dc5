"""Finds and ends the processes of one line by a mark in their environment, and no others.

A mark needs no file of process ids: it is still right after a reboot, after a crash in the middle
of a start, and when an id has been given to another process since.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import psutil

from lib.errors import LineError

LINE_VARIABLE = "RAYLINE_LINE"
"""Which line a process belongs to; inherited by all that it starts, HAProxy too."""
PART_VARIABLE = "RAYLINE_PART"
_TERMINATE_S = 5.0
_SETTLE_S = 0.5
_END_S = 30.0


def find(line_id: str, folder: str, part: str | None = None) -> list[psutil.Process]:
    """Return the processes of a line, or of one part of it, with all their descendants.

    Args:
        line_id: Mark of the line.
        folder: The line's private folder, in which Ray's processes have their files.
        part: Name of a part; None for all.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if not _belongs(process, line_id, folder, part):
                continue
            found[process.pid] = process
            found.update({child.pid: child for child in process.children(recursive=True)})
        except psutil.Error:
            continue
    for process in (psutil.Process(), *psutil.Process().parents()):
        found.pop(process.pid, None)
    return [process for process in found.values() if _is_alive(process)]


def end(line_id: str, folder: str, part: str | None = None) -> int:
    """End a line, or one part of it; return how many processes that were.

    Ray restarts what dies while it is ending, so this looks again until nothing is left.

    Raises:
        LineError: Some process is still there after half a minute.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + _END_S
    while True:
        processes = find(line_id, folder, part)
        if not processes and ended:
            # One that was just being started has no environment to read for a moment.
            time.sleep(_SETTLE_S)
            processes = find(line_id, folder, part)
        if not processes:
            return len(ended)
        if time.monotonic() > deadline:
            names = ", ".join(f"{process.pid} ({process.name()})" for process in processes)
            raise LineError(f"these processes do not end: {names}; end them with kill -9")
        ended.update(process.pid for process in processes)
        _signal(processes, kill=False)
        _, alive = psutil.wait_procs(processes, timeout=_TERMINATE_S)
        _signal(alive, kill=True)
        psutil.wait_procs(alive, timeout=_TERMINATE_S)


def _belongs(process: psutil.Process, line_id: str, folder: str, part: str | None) -> bool:
    environ = process.environ()
    if environ.get(LINE_VARIABLE) == line_id:
        return part is None or environ.get(PART_VARIABLE) == part
    if environ or part not in {None, "ray"}:
        return False
    # Ray's agents write their title over their environment. They are children of marked
    # processes, unless those died: then their log files tell whose they are.
    if not " ".join(process.cmdline()).startswith(("ray::", "ray-dashboard-")):
        return False
    return any(file.path.startswith(f"{folder}/") for file in process.open_files())


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(processes: Iterable[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        try:
            if kill:
                process.kill()
            else:
                process.terminate()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied as error:
            raise LineError(
                f"process {process.pid} belongs to another user (you are {os.getuid()}): end the "
                "line as the user who started it"
            ) from error
