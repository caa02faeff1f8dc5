"""Ray heads and MLflow servers of the bench's own, started and ended as the line's parts are."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from lib.line.layout import Line
from lib.line.parts import answers, parts, take_down
from lib.line.ports import PORTS, RANGE_SIZE, check_free
from tests.bench.report import BenchError, say

ROOT = Path(__file__).parents[2]

# Below the ports that Linux gives to outgoing connections (32768 and up).
OURS_PORT = 18000
SERVE_PEER_PORT = 22000
MLFLOW_PORT = 26000
PEERS_PORT = 29000

_START_S = 120.0


def make_line(home: Path, first_port: int) -> Line:
    """Return a line with ports, folders and processes of its own."""
    names = list(PORTS)
    ports = {name: first_port + index for index, name in enumerate(names)}
    ports["replicas"] = first_port + 1000
    ports["replicas_grpc"] = first_port + 1000 + RANGE_SIZE + 1
    home.mkdir()
    # One token for all of the bench: its clients read it once.
    shutil.copy(os.environ["RAY_AUTH_TOKEN_PATH"], home / "auth_token")
    return Line(
        home=home,
        ports=ports,
        host="127.0.0.1",
        ray_url=None,
        mlflow_url=None,
        storage_uri=None,
    )


@contextmanager
def running(
    line: Line, name: str, change_env: Callable[[dict[str, str]], dict[str, str]] = dict
) -> Iterator[None]:
    """Run one part of a line; end it with all that it started, whatever happens."""
    part = next(part for part in parts(line) if part.name == name)
    check_free(line.ports, part.ports)
    line.prepare()
    log = line.logs / f"{name}.log"
    started = time.monotonic()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                part.command,
                cwd=line.home,
                env=change_env(line.part_env(name)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the bench, which ends this in its own order.
                start_new_session=True,
            )
        wait_until(
            lambda: all(answers(url) for url in part.health_urls),
            failed=lambda: process.poll() not in {None, 0},
            what=part.title,
            log=log,
        )
        say(f"{part.title} is up after {time.monotonic() - started:.0f} s")
        yield
    finally:
        with _uninterrupted():
            take_down(line)
            shutil.rmtree(line.private_dir, ignore_errors=True)


@contextmanager
def command(
    arguments: list[str], *, env: Mapping[str, str], url: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that answers at a URL; end it whatever happens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: answers(url),
            failed=lambda: process.poll() is not None,
            what=arguments[2],
            log=log,
        )
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in in_session(process.pid):
            with contextlib.suppress(psutil.Error):
                left.kill()


def in_session(session: int) -> list[psutil.Process]:
    """Return the processes of a session, which has the number of its first process.

    With all that they started, also in sessions of its own.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session:
                found |= {process, *process.children(recursive=True)}
    return sorted(found, key=lambda process: process.pid)


@contextmanager
def local_ray(temp: Path) -> Iterator[float]:
    """Run a bounded Ray in this process; yield the seconds that its start took."""
    started = time.perf_counter()
    try:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=500 * 2**20,
            include_dashboard=False,
            _temp_dir=str(temp),
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        yield time.perf_counter() - started
    finally:
        with _uninterrupted():
            ray.shutdown()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait until everything is ended."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def wait_until(
    condition: Callable[[], bool], *, failed: Callable[[], bool], what: str, log: Path
) -> None:
    """Wait for a condition; raise BenchError with the end of the log if it doesn't come."""
    deadline = time.monotonic() + _START_S
    while not condition():
        if failed() or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise BenchError(f"{what} did not start:\n{tail}")
        time.sleep(0.2)
