"""The parts of a line: how each is started, and how it is seen to be alive."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import psutil

from lib.cli import progress
from lib.errors import LineError
from lib.line.layout import Line
from lib.line.ports import RAY_PORTS, check_free
from lib.line.processes import end, find
from lib.secrets import UMASK
from lib.serving.channel import channel_folder
from lib.watch.alerts import rules

_START_S = 180.0
_RECOVER_S = 5.0
_SAY_EVERY_S = 10.0
_MAX_LOG_BYTES = 8 * 2**20
"""A part's log that is larger is put aside at the part's next start; one of these is kept."""
_REVISION = re.compile(r"^(revision|down_revision) *= *['\"](\w+)['\"]", re.MULTILINE)
_TOO_SLOW = re.compile(r"timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the line."""

    name: str
    title: str
    command: tuple[str, ...]
    """Program to start; `ray start` returns, the others stay."""
    health_urls: tuple[str, ...]
    """All answer 200 when the part is alive."""
    ports: tuple[str, ...]


def parts(line: Line) -> list[Part]:
    """Return the parts that this line runs itself."""
    wanted = []
    if line.ray_url is None:
        wanted.append(_ray(line))
    if line.mlflow_url is None:
        wanted.append(_mlflow(line))
    if line.starts_prometheus:
        wanted.append(_prometheus(line))
    return wanted


@dataclass(frozen=True, slots=True)
class _Start:
    """A part that was started just now."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    """Where in the log this start begins."""

    def output(self) -> str:
        """Return what the part has printed since this start."""
        with open(self.log, "rb") as log:
            log.seek(self.offset)
            return log.read().decode(errors="replace")


def bring_up(line: Line) -> list[str]:
    """Start the parts that are missing or dead, and wait for them; return which those were.

    Raises:
        LineError: A port is taken, or a part does not come up.
    """
    with _exclusive(line):
        line.prepare()
        _warn_of_open_storage(line)
        missing = [part for part in parts(line) if not _is_up(line, part)]
        # Before anything is ended: a port that was never this line's must be free already.
        recorded = set(line.recorded_ports().values())
        for part in missing:
            new = [name for name in part.ports if line.ports[name] not in recorded]
            check_free(line.ports, new)
        for part in missing:
            if num_ended := end(line.line_id, line.private_dir, part.name):
                progress("up", f"{part.title} was not answering: ended its {num_ended} processes")
        for part in missing:
            check_free(line.ports, part.ports)
        line.write_settings()
        if any(part.name == "ray" for part in missing):
            _tidy_ray(line)
        if missing:
            progress("up", f"starting {', '.join(part.title for part in missing)}")
        if any(part.name == "mlflow" for part in missing):
            _upgrade_database(line)
        for start in [_start(line, part) for part in missing]:
            if not _comes_up(start):
                raise _failure(start)
        return [part.name for part in missing]


def take_down(line: Line) -> int:
    """End everything that the line started; return how many processes that were."""
    with _exclusive(line) if line.home.exists() else contextlib.nullcontext():
        ended = end(line.line_id, line.private_dir)
    if line.ray_url is None:
        cluster = f"{line.node_ip}:{line.ports['ray']}"
        for folder in (channel_folder(cluster), channel_folder(cluster, line.private_dir)):
            shutil.rmtree(folder, ignore_errors=True)
    return ended


def _warn_of_open_storage(line: Line) -> None:
    """Say how to close a storage root that others may read: its mode is its owner's choice."""
    root = Path((line.storage_uri or "").removeprefix("file://"))
    if line.storage_uri and root.is_dir() and root.stat().st_mode & UMASK:
        progress(
            "up",
            f"other users of this machine may enter {root}, which has callers' images and labels: "
            f"`chmod 700 {shlex.quote(str(root))}` keeps them out",
        )


@contextlib.contextmanager
def _exclusive(line: Line) -> Iterator[None]:
    """Hold the line's lock: of those that start or end its parts, one works at a time."""
    line.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(line.home / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # One that has just taken the lock has not written yet who it is.
            _wait(lambda: bool(_text(lock)), 1.0)
            holder = _text(lock) or "another process"
            progress("line", f"{holder} starts or ends parts of this line: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} ({' '.join(sys.orig_argv[1:])})")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a URL answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException, ValueError):
        # Not always a server: a connection to a port of this machine that clients get, too, may be
        # made with itself, and answers with its own request.
        return False


def _ray(line: Line) -> Part:
    command = [
        *_module("ray.scripts.scripts"),
        "start",
        "--head",
        "--disable-usage-stats",
        "--log-color=false",
        "--dashboard-host=127.0.0.1",
        f"--node-ip-address={line.node_ip}",
        f"--temp-dir={line.ray_temp_dir}",
        f"--port={line.ports['ray']}",
        f"--dashboard-port={line.ports['dashboard']}",
        f"--dashboard-agent-listen-port={line.ports['agent']}",
        f"--metrics-export-port={line.ports['ray_metrics']}",
        f"--ray-client-server-port={line.ports['ray_client']}",
        # Zero: the system chooses. Ray's own range, 10002–19999, takes ports that others are given.
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    for option, name in (
        ("--num-cpus", "RAYLINE_NUM_CPUS"),
        ("--num-gpus", "RAYLINE_NUM_GPUS"),
        ("--object-store-memory", "RAYLINE_OBJECT_STORE_BYTES"),
    ):
        if os.environ.get(name):
            command.append(f"{option}={os.environ[name]}")
    return Part(
        name="ray",
        title="Ray",
        command=tuple(command),
        health_urls=(
            f"http://127.0.0.1:{line.ports['dashboard']}/api/gcs_healthz",
            f"http://127.0.0.1:{line.ports['agent']}/api/local_raylet_healthz",
        ),
        ports=RAY_PORTS,
    )


def _mlflow(line: Line) -> Part:
    port = line.ports["mlflow"]
    return Part(
        name="mlflow",
        title="MLflow",
        command=(
            *_module("mlflow"),
            "server",
            "--host=127.0.0.1",
            f"--port={port}",
            "--workers=1",
            f"--backend-store-uri=sqlite:///{_database(line)}",
            f"--artifacts-destination={line.home / 'artifacts'}",
        ),
        health_urls=(f"http://127.0.0.1:{port}/health",),
        ports=("mlflow",),
    )


def _prometheus(line: Line) -> Part:
    port = line.ports["prometheus"]
    return Part(
        name="prometheus",
        title="Prometheus",
        command=(
            "prometheus",
            f"--config.file={line.home / 'prometheus.json'}",
            f"--storage.tsdb.path={line.home / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ),
        health_urls=(f"http://127.0.0.1:{port}/-/ready",),
        ports=("prometheus",),
    )


def _module(name: str) -> list[str]:
    """Return the command of a program of this virtual environment.

    Not by its script in bin: that names the interpreter by a path that is wrong once the checkout
    has moved.
    """
    return [sys.executable, "-P", "-m", name]


def _database(line: Line) -> Path:
    return line.home / "mlflow.db"


def _write_prometheus_config(line: Line) -> None:
    # Ray's own config names one session's folder; its list of targets is also kept beside the
    # sessions, where it outlives a restart of Ray. JSON is YAML.
    config = {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": [str(line.home / "alerts.yml")],
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [
                    {
                        "files": [f"{line.ray_temp_dir}/prom_metrics_service_discovery.json"],
                        # Prometheus watches only a folder that is there, and Ray may make it later;
                        # without this it looks again after five minutes.
                        "refresh_interval": "10s",
                    }
                ],
            },
            {
                "job_name": "haproxy",
                "static_configs": [{"targets": [f"127.0.0.1:{line.ports['haproxy_metrics']}"]}],
            },
        ],
    }
    (line.home / "prometheus.json").write_text(json.dumps(config, indent=2) + "\n")
    (line.home / "alerts.yml").write_text(rules())


def _is_up(line: Line, part: Part) -> bool:
    """Whether the part runs and answers; one that is starting gets the time that a start has."""
    processes = find(line.line_id, line.private_dir, part.name)
    if not processes:
        return False
    if _wait(lambda: _is_healthy(part), _RECOVER_S):
        return True
    if not _is_starting(part, processes):
        return False
    progress("up", f"{part.title} is being started already: waiting for it")
    _wait(lambda: _is_healthy(part) or not _is_starting(part, processes), _START_S)
    return _wait(lambda: _is_healthy(part), _RECOVER_S)


def _is_starting(part: Part, processes: Iterable[psutil.Process]) -> bool:
    """Whether the part's own command runs since less than a start may take."""
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cmdline() == [*part.command]:
                return time.time() - process.create_time() < _START_S
        except psutil.Error:
            continue
    return False


def _is_healthy(part: Part) -> bool:
    return all(answers(url) for url in part.health_urls)


def _start(line: Line, part: Part) -> _Start:
    if part.name == "prometheus":
        _write_prometheus_config(line)
    path = line.logs / f"{part.name}.log"
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with open(path, "ab") as log:
        offset = log.tell()
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {part.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            part.command,
            cwd=line.home,
            env=line.part_env(part.name),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            umask=UMASK,
            # Ctrl-C in the terminal ends `make up`, not what is already running.
            start_new_session=True,
        )
    return _Start(part, process, path, offset)


def _comes_up(started: _Start) -> bool:
    """Wait until a part answers; return whether it did."""
    part, start = started.part, time.monotonic()
    last_message = start

    def settled() -> bool:
        nonlocal last_message
        if time.monotonic() - last_message > _SAY_EVERY_S:
            last_message = time.monotonic()
            progress("up", f"waiting for {part.title}")
        return _is_healthy(part) or started.process.poll() not in {None, 0}

    if not (_wait(settled, _START_S) and _is_healthy(part)):
        return False
    progress("up", f"{part.title} is up after {time.monotonic() - start:.0f} s")
    return True


def _failure(start: _Start) -> LineError:
    output = start.output()
    hint = ""
    if start.part.name == "ray" and _TOO_SLOW.search(output):
        hint = "; on a machine that is busy it may come up if you run `make up` again"
    tail = "\n".join(output.splitlines()[-15:])
    return LineError(
        f"{start.part.title} did not come up{hint}; the end of its log {start.log}:\n{tail}"
    )


def _upgrade_database(line: Line) -> None:
    """Bring the schema of MLflow's database to what this MLflow expects, after a copy.

    MLflow itself refuses an older schema, or, where tables are missing, upgrades without a copy.

    Raises:
        LineError: MLflow can't upgrade it.
    """
    database = _database(line)
    found, expected = _revision(database), _newest_revision()
    if found in {None, expected}:
        return
    copy = database.with_name(f"{database.name}.before-{expected}")
    if copy.exists():
        # Of an upgrade that failed, or of one that was gone back on: neither is overwritten.
        copy = copy.with_name(f"{copy.name}-{time.strftime('%Y%m%d%H%M%S')}")
    progress("up", f"MLflow's database has schema {found}: upgrading it to {expected}")
    partial = copy.with_name(f"{copy.name}.partial")
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(partial)) as target,
    ):
        source.backup(target)
    partial.replace(copy)
    done = subprocess.run(
        [*_module("mlflow"), "db", "upgrade", f"sqlite:///{database}"],
        cwd=line.home,
        env=line.part_env("mlflow"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
        raise LineError(
            f"MLflow can't upgrade {database} from schema {found} to {expected}. As it was before "
            f"it is kept in {copy}: to go back, `mv {shlex.quote(str(copy))} "
            f"{shlex.quote(str(database))}` and check out the commit that it worked with. The end "
            f"of MLflow's output:\n{tail}"
        )
    progress("up", f"MLflow's database is upgraded; {copy} is how it was before")


def _revision(database: Path) -> str | None:
    """Return the revision of an MLflow database's schema; None if it has none yet."""
    if not database.exists():
        return None
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            row = connection.execute("select version_num from alembic_version").fetchone()
        except sqlite3.Error:  # MLflow says what is wrong with it.
            return None
    return str(row[0]) if row else None


def _newest_revision() -> str:
    """Return the revision that this MLflow expects: the one that no other follows."""
    package = find_spec("mlflow")
    assert package is not None
    folder = (package.submodule_search_locations or [])[0]
    revisions: set[str] = set()
    followed: set[str] = set()
    # Read as text: Alembic would import MLflow for it, which takes 3 s.
    for file in (Path(folder) / "store" / "db_migrations" / "versions").glob("*.py"):
        for word, value in _REVISION.findall(file.read_text()):
            (revisions if word == "revision" else followed).add(value)
    (newest,) = revisions - followed
    return newest


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _tidy_ray(line: Line) -> None:
    """Drop the logs of earlier heads, except the last one's, and what HAProxy left behind."""
    root = Path(line.ray_temp_dir)
    # Directly in the private folder are those of lines that older code has started.
    old = [path for path in root.parent.glob("session_*") if not path.is_symlink()]
    sessions = sorted(path for path in root.glob("session_2*") if path.is_dir())
    for folder in (*old, *sessions[:-1], root.parent / "ha"):
        shutil.rmtree(folder, ignore_errors=True)
    links = {"ray-sessions": root, "serve": root / "session_latest" / "logs" / "rayline"}
    for name, target in links.items():
        link = line.logs / name
        if not link.is_symlink() or link.readlink() != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
