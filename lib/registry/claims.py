"""Keeps two registrations of one thing apart: a file below `claims/` that one of them holds.

A claim saves double work. It is no lock: where one was taken over from a registration that goes on
all the same, both make a version, and the later one is taken back.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lib.cli import progress
from lib.errors import StorageError
from lib.storage import Storage

CLAIMS = "claims"
CLAIM_S = 900.0
"""After which a claim counts as its owner's who died on another machine."""
_LOOK_S = 1.0


@contextmanager
def claimed(storage: Storage, model: str, name: str) -> Iterator[None]:
    """Hold the claim on a name; wait while another process holds it."""
    path = f"{CLAIMS}/{model}/{name}.json"
    claim = {"host": socket.gethostname(), "pid": os.getpid(), "since_s": time.time()}
    has_said = False
    while not storage.create_json(path, claim):
        if is_over(storage, path):
            storage.delete(path)
            continue
        if not has_said:
            has_said = True
            progress("register", f"waiting for another registration, which holds {path}")
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        if _read(storage, path) == claim:
            storage.delete(path)


def is_over(storage: Storage, path: str) -> bool:
    """Whether a claim's owner is dead, or so old that it must be."""
    claim = _read(storage, path)
    if claim is None:
        return True
    if claim["host"] == socket.gethostname():
        try:
            os.kill(int(claim["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # It is another user's, and alive.
    return time.time() - float(claim["since_s"]) > CLAIM_S


def _read(storage: Storage, path: str) -> dict[str, Any] | None:
    """Return a claim; None if it was given back, or is damaged."""
    try:
        content = storage.read_json(path)
    except StorageError:
        return None
    is_whole = isinstance(content, dict) and {"host", "pid", "since_s"} <= set(content)
    return content if is_whole else None
