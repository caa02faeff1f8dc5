"""Submits a job to Ray with its provenance, shows its log live, and says how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import provenance
from lib.cli import progress
from lib.errors import LineError
from lib.line.layout import PROJECT_ROOT, Line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# What no job needs; .git and what .gitignore names stay at home without being listed.
_EXCLUDES = ("/tests/", "/deploy/", "/.ci/", "/.github/")
_MAX_RESULT_CHARS = 1_000_000
# They tell of uploads and sockets, each at a level that it sets by itself.
_CHATTY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A job that has ended."""

    submission_id: str
    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    result: Mapping[str, Any]
    """The JSON object of its last line; empty if there was none."""


def submit_job(
    line: Line, arguments: Sequence[str], *, env: Mapping[str, str] | None = None
) -> str:
    """Send `python ARGUMENTS` to the cluster with the project as its folder.

    Returns:
        The submission id.

    Raises:
        LineError: The cluster does not answer, or refuses the job.
    """
    recorded = provenance.collect(PROJECT_ROOT)
    progress("submit", provenance.describe(recorded))
    try:
        submission_id: str = _client(line).submit_job(
            entrypoint=shlex.join(["python", *arguments]),
            runtime_env={
                "working_dir": str(PROJECT_ROOT),
                "excludes": [*_EXCLUDES, *_data_in_project(arguments)],
                "env_vars": {
                    **line.settings_env(),
                    provenance.VARIABLE: recorded.encode(),
                    **(env or {}),
                },
            },
            metadata={"rayline": shlex.join(arguments), "owner": recorded.owner or ""},
        )
    except (RuntimeError, OSError) as error:
        raise LineError(f"Ray at {line.dashboard_url} did not take the job: {error}") from error
    progress("submit", f"job {submission_id}: {shlex.join(arguments)}")
    return submission_id


def find_running(line: Line, module: str) -> tuple[str, list[str]] | None:
    """Return the id and arguments of a job of that module which has not ended yet."""
    for job in _client(line).list_jobs():
        arguments = (job.metadata or {}).get("rayline", "")
        if not job.submission_id or job.status.is_terminal():
            continue
        if (words := shlex.split(arguments))[:2] == ["-m", module]:
            return str(job.submission_id), words
    return None


def follow(line: Line, submission_id: str) -> Ended:
    """Print a job's log as it is written, until the job ends.

    Raises:
        LineError: Ray went away meanwhile.
    """
    client = _client(line)
    tail = _Tail()
    try:
        asyncio.run(_print_log(client, submission_id, tail))
        while not (status := client.get_job_status(submission_id)).is_terminal():
            time.sleep(0.2)
    except (RuntimeError, OSError) as error:
        raise LineError(
            f"lost Ray at {line.dashboard_url} while job {submission_id} was running ({error}); "
            f"its logs are under {line.logs}; `make up` starts again what is dead"
        ) from error
    return Ended(submission_id=submission_id, status=str(status.value), result=tail.result())


class _Tail:
    """Keeps the end of a log that comes in pieces."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, piece: str) -> None:
        self._text = (self._text + piece)[-_MAX_RESULT_CHARS:]

    def result(self) -> Mapping[str, Any]:
        # The last line, unless Ray still had something of a worker to print.
        for line in reversed(self._text.splitlines()):
            if line.startswith("{"):
                try:
                    return dict(json.loads(line))
                except ValueError:
                    break
        return {}


async def _print_log(client: JobSubmissionClient, submission_id: str, tail: _Tail) -> None:
    async for piece in client.tail_job_logs(submission_id):
        print(piece, end="", flush=True)
        tail.add(piece)


def _client(line: Line) -> JobSubmissionClient:
    # Imported late: it takes a second.
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray keeps the first token that a process has read, which may be another cluster's.
    headers = {"Authorization": f"Bearer {line.token}"} if line.token else None
    try:
        return JobSubmissionClient(line.dashboard_url, headers=headers)
    except (ConnectionError, RuntimeError) as error:
        raise LineError(
            f"Ray at {line.dashboard_url} does not answer ({error}); run `make up` first"
        ) from error


def _data_in_project(arguments: Sequence[str]) -> list[str]:
    """Return the folders among the arguments that lie in the project: data is not code."""
    inside = []
    for argument in arguments:
        path = Path(argument)
        if path.is_absolute() and path.is_relative_to(PROJECT_ROOT) and path != PROJECT_ROOT:
            inside.append(f"/{path.relative_to(PROJECT_ROOT)}")
    return inside
