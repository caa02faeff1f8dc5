"""What of a live line another account on the machine can read, change or talk to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import requests

from lib.line.layout import Line
from tests.data_sources import mnist
from tests.e2e.clients import RAW, until
from tests.e2e.conftest import LiveLine
from tests.strangers import reached_by_stranger


def files(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def test_another_user_reads_writes_and_impersonates_nothing(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    private, storage = Path(state.private_dir), Path(line.storage)
    image = mnist("test")[0][0].tobytes()
    assert requests.post(f"{line.url}/predict", data=image, headers=RAW, timeout=30).ok
    log = storage / "predictions"
    until(lambda: any(path.is_file() for path in log.rglob("*")), what="the prediction log")
    inside = files(private)
    wanted = {
        "session": lambda path: path.name.startswith("session_2"),
        "code of replicas": lambda path: path.parent.name == "working_dir_files",
        "HAProxy's admin socket": lambda path: path.name == "admin.sock",
        "sockets of versions": lambda path: path.name.endswith(".v2.sock"),
    }
    for what, is_it in wanted.items():
        assert any(map(is_it, inside)), what
    assert reached_by_stranger([*inside, storage, state.logs, state.home]) == []
    # Not only by the folder above: a backup, or a volume that is mounted elsewhere, has none.
    for path in [*files(storage), *files(state.home)]:
        mode = path.lstat().st_mode
        assert stat.S_ISLNK(mode) or not mode & 0o077, path


def test_no_file_of_the_line_lies_open_elsewhere(line: LiveLine) -> None:
    allowed = (Line.from_env(line.env).private_dir, str(line.home))
    found = set()
    for process in line.processes():
        for file in process.open_files():
            folder = Path(file.path).parent
            if file.mode == "r" or file.path.startswith(allowed) or not os.path.exists(file.path):
                continue
            if os.stat(file.path).st_mode & 0o077 and os.stat(folder).st_mode & 0o005:
                found.add(file.path)
    assert found == set()
