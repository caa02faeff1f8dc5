"""Shadows: versions that get copies of requests, and whose answers are compared, never returned."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from lib.serving.batcher import QueueFull
from lib.serving.record import Increment
from lib.storage import Storage
from lib.watch.metrics import SHADOWED

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

MAX_UNWRITTEN = 50_000
"""Comparisons kept in memory while storage is away; older ones are given up first."""
FLUSH_EVERY_S = 5.0


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
    """Sends copies, compares, and keeps what it found under `shadow/` of the storage root.

    Nothing here is awaited by a request. A shadow has a queue of its own, which drops when it is
    full, so its slowness or failure stays here.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._counts: dict[tuple[str, int], Count] = {}
        self._reported: Counter[tuple[str, str, str]] = Counter()
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=MAX_UNWRITTEN)
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
        *,
        request_id: str,
        answered_by: int,
        answer_NK: Probabilities,
        run: Callable[[Any, Images], Any],
    ) -> None:
        """Copy a request to a shadow `Version`; `run` gives its probabilities."""
        key = (shadow.card.name, shadow.card.version)
        count = self._counts.setdefault(key, Count())

        async def compare() -> None:
            try:
                probabilities_NK = await run(shadow, images_NHWC)
            except QueueFull:
                count.dropped += 1
                return
            except Exception:
                count.failed += 1
                return
            names = shadow.card.class_names
            for row, (ours, theirs) in enumerate(zip(probabilities_NK, answer_NK, strict=True)):
                label, answered = int(ours.argmax()), int(theirs.argmax())
                count.compared += 1
                count.agreed += label == answered
                self._rows.append(
                    {
                        "request_id": request_id,
                        "row": row,
                        "model": key[0],
                        "version": answered_by,
                        "label": names[answered],
                        "shadow_version": key[1],
                        "shadow_label": names[label],
                        "shadow_probability": round(float(ours[label]), 6),
                    }
                )

        task = asyncio.get_running_loop().create_task(compare())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def flush(self) -> None:
        """Write what was compared since the last call; call it in a thread."""
        rows = []
        while self._rows:
            rows.append(self._rows.popleft())
        if not rows:
            return
        now = datetime.now(UTC)
        path = f"shadow/{now:%Y-%m-%d}/{now:%H%M%S%f}-{uuid.uuid4().hex[:8]}.jsonl"
        try:
            self._storage.write(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))
        except Exception:
            self._rows.extendleft(reversed(rows))
            raise
