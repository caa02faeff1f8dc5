"""Another account on this machine, and what it can do with files and sockets of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

UID = 65534
# Not at once by its command: the interpreter may lie where only this user may go.
_BECOME = f"""
import os, socket, sys
os.setgroups([])
os.setgid({UID})
os.setuid({UID})
"""
_TRY = """
def attempt(what, path, action):
    try:
        action()
        print(what, path)
    except OSError:
        pass
def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
for path in sys.argv[1:]:
    attempt("lists", path, lambda: os.listdir(path))
    attempt("reads", path, lambda: open(path, "rb").close())
    attempt("writes", path, lambda: open(path, "ab").close())
    attempt("adds to", path, lambda: os.rmdir(os.mkdir(f"{path}/x") or f"{path}/x"))
    attempt("renames", path, lambda: os.rename(path, path + "-x") or os.rename(path + "-x", path))
    attempt("connects to", path, lambda: connect(path))
"""


def run_as_stranger(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python script as another user; skip the test where this one may not do that."""
    command = [sys.executable, "-I", "-c", _BECOME + script, *arguments]
    if os.geteuid() != 0:
        if not _may_use_sudo():
            pytest.skip("acting as another user here needs root, or sudo without a password")
        command = ["sudo", "-n", *command]
    return subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _may_use_sudo() -> bool:
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0


def reached_by_stranger(paths: Iterable[Path]) -> list[str]:
    """Return what another user can do with these files, folders and sockets, a line each."""
    process = run_as_stranger(_TRY, *map(str, paths))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.splitlines()
