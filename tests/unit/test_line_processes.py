from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import psutil
import pytest

from lib.line.processes import LINE_VARIABLE, PART_VARIABLE, end, find

SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('ready', flush=True); time.sleep(600)"
)
PARENT = (
    "import os, subprocess, sys, time;"
    f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}});"
    "print(child.pid, flush=True); time.sleep(600)"
)


@pytest.fixture
def line_id() -> Iterator[str]:
    mark = uuid.uuid4().hex[:10]
    yield mark
    end(mark, "/nowhere")


def start(line_id: str, code: str, part: str = "ray") -> subprocess.Popen[str]:
    env = {**os.environ, LINE_VARIABLE: line_id, PART_VARIABLE: part}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_marked_processes_end_and_others_live(line_id: str) -> None:
    ours = [start(line_id, SLEEP), start(line_id, SLEEP)]
    other = start(f"{line_id}x", SLEEP)
    try:
        assert end(line_id, "/nowhere") == 2
        assert not any(is_alive(process.pid) for process in ours)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(5)


def test_children_that_lost_the_mark_end_too(line_id: str) -> None:
    parent = start(line_id, PARENT)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert end(line_id, "/nowhere") == 2
    assert not is_alive(child_pid)


def test_a_process_that_ignores_the_request_is_killed(line_id: str) -> None:
    process = start(line_id, STUBBORN)
    assert process.stdout is not None
    process.stdout.readline()
    assert end(line_id, "/nowhere") == 1
    assert not is_alive(process.pid)


def test_one_part_ends_alone(line_id: str) -> None:
    ray = start(line_id, SLEEP, part="ray")
    mlflow = start(line_id, SLEEP, part="mlflow")
    assert end(line_id, "/nowhere", "ray") == 1
    assert not is_alive(ray.pid)
    assert [process.pid for process in find(line_id, "/nowhere")] == [mlflow.pid]


def test_a_line_that_is_not_running_ends_at_once(line_id: str) -> None:
    assert end(line_id, "/nowhere") == 0
