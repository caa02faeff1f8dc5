"""Shadows: versions that get copies of requests, and whose answers are compared, never returned."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.serving.batcher import QueueFull
from lib.serving.record import Increment
from lib.watch.metrics import SHADOWED
from lib.watch.recorder import Recorder

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Count:
    """What a gateway saw of one shadow since it started."""

    compared: int = 0
    agreed: int = 0
    """Of the compared: the same label as the version that answered."""
    dropped: int = 0
    """Copies that the shadow was too slow for."""
    failed: int = 0

    def results(self) -> dict[str, int]:
        """Return the counts by what became of a copy."""
        return {
            "agreed": self.agreed,
            "disagreed": self.compared - self.agreed,
            "dropped": self.dropped,
            "failed": self.failed,
        }


class Shadows:
    """Sends copies, compares, and hands what shadows said to the prediction log.

    Nothing here is awaited by a request. A shadow has a queue of its own, which drops when it is
    full, so its slowness or failure stays here.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._counts: dict[tuple[str, int], Count] = {}
        self._reported: Counter[tuple[str, str, str]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the counts by `model/version`."""
        return {f"{name}/{number}": asdict(count) for (name, number), count in self._counts.items()}

    def increments(self) -> Iterator[Increment]:
        """Yield what each counter has grown by since the last call."""
        for (name, number), count in self._counts.items():
            for result, total in count.results().items():
                labels = (name, str(number), result)
                yield SHADOWED, labels, total - self._reported[labels]
                self._reported[labels] = total

    def send(
        self,
        shadow: Any,
        images_NHWC: Images,
        answer_NK: Probabilities,
        *,
        request_id: str,
        caller: str,
        run: Callable[[Any, Images], Any],
    ) -> None:
        """Copy a request to a shadow `Version`; `run` gives its probabilities."""
        key = (shadow.card.name, shadow.card.version)
        count = self._counts.setdefault(key, Count())

        async def compare() -> None:
            start_s = time.perf_counter()
            probabilities_NK: Probabilities | None = None
            try:
                probabilities_NK = await run(shadow, images_NHWC)
            except QueueFull:
                count.dropped += 1
                return
            except Exception as error:
                if not count.failed:
                    _log.warning("shadow %s/%d failed; counted from here on: %r", *key, error)
                count.failed += 1
            self._recorder.add(
                shadow.card,
                images_NHWC,
                probabilities_NK,
                request_id=request_id,
                caller=caller,
                latency_s=time.perf_counter() - start_s,
                status=500 if probabilities_NK is None else 200,
                is_shadow=True,
            )
            if probabilities_NK is not None:
                count.compared += len(probabilities_NK)
                same = probabilities_NK.argmax(axis=1) == answer_NK.argmax(axis=1)
                count.agreed += int(same.sum())

        task = asyncio.get_running_loop().create_task(compare())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
