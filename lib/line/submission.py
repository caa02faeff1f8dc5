"""Submits a job to Ray with its provenance, shows its log live, and says how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
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
# What lies beside the code and is larger is data: no job reads it from its copy of the project.
_MAX_BESIDE_BYTES = 10 * 2**20
# Of what is sent; Ray takes 100 MiB, compressed.
_MAX_SENT_BYTES = 95 * 2**20
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
    excludes = [*_EXCLUDES, *_data_in_project(arguments), *_large_beside_code(PROJECT_ROOT)]
    _check_size(PROJECT_ROOT)
    recorded = provenance.collect(PROJECT_ROOT)
    progress("submit", provenance.describe(recorded))
    try:
        submission_id: str = _client(line).submit_job(
            entrypoint=shlex.join(["python", *arguments]),
            runtime_env={
                "working_dir": str(PROJECT_ROOT),
                "excludes": excludes,
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
            inside.append(_pattern(str(path.relative_to(PROJECT_ROOT))))
    return inside


def _pattern(name: str) -> str:
    """Return the pattern that excludes this file or folder, and nothing else."""
    return "/" + re.sub(r"([\\\[\]*?!# ])", r"\\\1", name)


def _large_beside_code(root: Path) -> list[str]:
    """Return patterns for what lies beside the code and is too large to be code; say what it is."""
    patterns = []
    for path in sorted(root.iterdir()):
        if f"{path.name}/" in provenance.CODE_FOLDERS or f"/{path.name}/" in _EXCLUDES:
            continue
        if _size(path, up_to=_MAX_BESIDE_BYTES) <= _MAX_BESIDE_BYTES:
            continue
        patterns.append(_pattern(path.name))
        if not path.name.startswith("."):
            limit = _MAX_BESIDE_BYTES >> 20
            progress("submit", f"{path.name} is not sent along: it is data, over {limit} MiB")
    return patterns


def _check_size(root: Path) -> None:
    """Raise LineError with the largest files of the code folders if Ray would not take them."""
    files = {
        path: path.stat().st_size
        for folder in provenance.CODE_FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    total = sum(files.values())
    if total <= _MAX_SENT_BYTES:
        return
    largest = sorted(files.items(), key=lambda item: item[1], reverse=True)[:3]
    named = ", ".join(f"{path.relative_to(root)} ({size >> 20} MiB)" for path, size in largest)
    raise LineError(
        f"a job gets a copy of {', '.join(provenance.CODE_FOLDERS)}, which hold {total >> 20} MiB; "
        f"Ray takes {_MAX_SENT_BYTES >> 20}. Move out of them what is not code; the largest: "
        f"{named}"
    )


def _size(path: Path, *, up_to: int) -> int:
    """Return the size of a file or folder; of a larger one, some size over the limit."""
    # Ray follows a link to a folder, and packs what is in it.
    if not path.is_dir():
        return path.lstat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            total += os.lstat(os.path.join(folder, name)).st_size
            if total > up_to:
                return total
    return total
