"""A program with all that it starts, which ends with the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

import psutil

_GRACE_S = 3.0
"""From the request to end to the end by force."""


class ProcessGroup:
    """Runs a program in a process group of its own, its output going to a file.

    The group's first process is a guard that waits on a pipe from this process. The kernel closes
    the pipe however this process ends, and the guard then kills the group with itself. While the
    guard is there, the group's number can't become that of another group.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None,
        output: IO[bytes],
    ) -> None:
        """Start the program; raise OSError if it can't be started."""
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", "trap '' TERM INT HUP; read _; kill -KILL 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            self._program = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                process_group=self._guard.pid,
            )
        except BaseException:
            self._kill()
            raise

    def exit_code(self) -> int | None:
        """Return the program's exit code, None while it runs; negative: the signal's number."""
        return self._program.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the program's end, no longer than this; return its exit code or None."""
        try:
            return self._program.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def memory_bytes(self) -> int:
        """Return the memory that the program and its children hold now."""
        with contextlib.suppress(psutil.Error):
            program = psutil.Process(self._program.pid)
            total = 0
            for process in (program, *program.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += int(process.memory_info().rss)
            return total
        return 0

    def end(self) -> None:
        """End the program, asking first, and with it all that it started. Can be called twice."""
        if self._program.poll() is None:
            self._program.terminate()
            self.wait(_GRACE_S)
        self._kill()
        self._program.wait()

    def _kill(self) -> None:
        if self._guard.returncode is None:
            os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
