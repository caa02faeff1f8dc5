"""A retrain whose steps cost nothing and write down what they do, and a process of it to kill.

python -m tests.retrains STORAGE ID WRITE   (dies by SIGKILL right before its WRITE-th write)
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import TooFewError
from lib.steps import Step, run_step
from lib.storage import Storage
from lib.watch import retrain
from lib.watch.retrain_record import Record, read

STEPS = ("data", "tune", "register", "gate", "rollout")
MODEL = "digits"


class FakeSteps:
    """What a step makes depends on its inputs alone, as in earnest."""

    def __init__(self, storage: Storage, *, rows: str = "a", passes: bool = True) -> None:
        self.storage = storage
        self.rows = rows
        self.passes = passes
        self.gone: set[str] = set()
        self.error: Exception | None = None

    def champion(self) -> Mapping[str, Any]:
        return {"version": 1, "run_id": "r1", "data_digest": "d1", "params": {"depth": "1"}}

    def extend(self, champion: Mapping[str, Any], start_us: int, end_us: int) -> Step:
        if not self.rows:
            raise TooFewError("0 new labelled live images; send labels to POST /feedback")
        digest = f"{champion['data_digest']}+{self.rows}"
        return self._do("data", champion["data_digest"] + self.rows, {"digest": digest})

    def search(self, digest: str, params: Mapping[str, Any]) -> Step:
        return self._do("tune", digest, {"sweep_run_id": f"sweep of {digest}", "num_trials": 3})

    def register(self, digest: str, sweep_run_id: str, record: Record) -> Step:
        made = {"version": 2, "run_id": "r2", "test_accuracy": 0.99}
        return self._do("register", sweep_run_id, made)

    def judge(self, digest: str, candidate: Mapping[str, Any]) -> Step:
        return self._do("gate", digest, {"passed": self.passes, "why": "no better"})

    def withdraw(self, candidate: Mapping[str, Any], why: str) -> None:
        self._note("withdraw")

    def rollout(self, candidate: Mapping[str, Any], record: Record) -> Step:
        if self.error:
            raise self.error
        return self._do("rollout", str(candidate["version"]), {"status": "promoted"})

    def is_there(self, step: str, result: Mapping[str, Any]) -> bool:
        return step not in self.gone

    def _do(self, name: str, inputs: str, result: Mapping[str, Any]) -> Step:
        def work() -> Mapping[str, Any]:
            self._note(name)
            return result

        return run_step(
            self.storage, name, {"of": inputs}, work, lambda kept: name not in self.gone
        )

    def _note(self, name: str) -> None:
        with open(log_file(self.storage), "a") as log:
            log.write(name + "\n")


def log_file(storage: Storage) -> Path:
    return Path(storage.root).parent / "done.log"


def done(storage: Storage) -> Counter[str]:
    """Return how often each step was worked on, by whatever process."""
    return (
        Counter(log_file(storage).read_text().split()) if log_file(storage).exists() else Counter()
    )


def main() -> None:
    uri, retrain_id, fatal = sys.argv[1], sys.argv[2], int(sys.argv[3])
    write, writes = Storage.write, 0

    def deadly(self: Storage, relative: str, content: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, relative, content)

    Storage.write = deadly  # type: ignore[method-assign]
    storage = Storage(uri)
    retrain.run(storage, read(storage, MODEL, retrain_id), FakeSteps(storage))


if __name__ == "__main__":
    main()
