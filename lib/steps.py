"""Steps of a job that are kept: what was done once for the same inputs is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.cli import progress
from lib.storage import Storage

_FORMAT = 1
"""Part of every step's digest: raise it when a step's result changes its meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step's outcome, as it is kept under the storage root."""

    name: str
    digest: str
    """Of the inputs."""
    result: Mapping[str, Any]
    seconds: float
    reused: bool


def run_step(
    storage: Storage,
    name: str,
    inputs: Mapping[str, Any],
    work: Callable[[], Mapping[str, Any]],
    is_true: Callable[[Mapping[str, Any]], bool],
) -> Step:
    """Return the kept result of a step if it is still true, else work and keep that.

    Args:
        storage: Where results are kept, at `steps/<name>/<digest of the inputs>.json`.
        name: Name of the step.
        inputs: All that the result depends on, as JSON types.
        work: Does the step.
        is_true: Whether what a kept result names still exists.
    """
    content = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    path = f"steps/{name}/{digest}.json"
    if storage.exists(path):
        kept = storage.read_json(path)
        if is_true(kept["result"]):
            progress(name, f"was done before, in {kept['seconds']:.0f} s: nothing to do")
            return Step(name=name, digest=digest, result=kept["result"], seconds=0.0, reused=True)
    start = time.monotonic()
    result = work()
    seconds = time.monotonic() - start
    storage.write_json(path, {"inputs": inputs, "result": result, "seconds": seconds})
    return Step(name=name, digest=digest, result=result, seconds=seconds, reused=False)
