"""Callers who send test images and, once these are answered, their true labels."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.data_sources import mnist
from tests.e2e.clients import RAW, connect, post
from tests.e2e.conftest import LiveLine

PAUSE_S = 0.01
"""Of each caller between two requests: what is measured is a line with room to breathe."""
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that a caller got."""

    time_s: float
    is_changed: bool
    version: int
    is_right: bool


@dataclass(slots=True)
class Callers:
    """What the callers send and see."""

    changed_share: float = 0.0
    """Of the images that are sent, those that are not as in the test set."""
    answers: list[Answer] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    """With the share of changed images at that time."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def answered(self) -> int:
        return len(self.answers)

    def right(
        self, *, version: int, is_changed: bool, since_s: float = 0.0
    ) -> npt.NDArray[np.bool_]:
        """Return for each such answer whether it was right."""
        with self.lock:
            found = list(self.answers)
        return np.array(
            [
                answer.is_right
                for answer in found
                if (answer.version, answer.is_changed) == (version, is_changed)
                and answer.time_s >= since_s
            ],
            np.bool_,
        )


@contextmanager
def calling(
    line: LiveLine,
    changed_NHW: npt.NDArray[np.uint8],
    *,
    num_callers: int = 4,
    labels: bool = True,
) -> Iterator[Callers]:
    """Send test images while the block runs; `changed_NHW` are the same ones, each changed."""
    callers, stop = Callers(), threading.Event()
    plain_NHW, label_N = mnist("test")

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        connection = connect(line.url)
        while not stop.wait(PAUSE_S):
            number, share = int(rng.integers(len(label_N))), callers.changed_share
            is_changed = bool(rng.random() < share)
            images_NHW = changed_NHW if is_changed else plain_NHW
            status, body = post(connection, images_NHW[number].tobytes(), RAW)
            if status != 200:
                with callers.lock:
                    callers.failures.append((share, f"{status}: {body[:300]!r}"))
                continue
            answer, label = json.loads(body), int(label_N[number])
            version, is_right = answer["model_version"], answer["digit"] == label
            with callers.lock:
                callers.answers.append(Answer(time.time(), is_changed, version, is_right))
            if labels:
                given = json.dumps({"request_id": answer["request_id"], "label": label}).encode()
                status, body = post(connection, given, _JSON, path="/feedback")
                if status != 200:
                    with callers.lock:
                        callers.failures.append((share, f"feedback {status}: {body[:300]!r}"))
        connection.close()

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(num_callers)]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        stop.set()
        for thread in threads:
            thread.join()
