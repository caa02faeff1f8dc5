"""The gateway's end of the prediction log: a request costs some appends, files are for a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from lib.serving.bundle import Card
from lib.serving.record import Increment
from lib.storage import Storage
from lib.watch.answers import Answers, Images, Probabilities, Shares, to_table
from lib.watch.metrics import LOGGED
from lib.watch.predictions import count_answers, predictions_root
from lib.watch.segments import SPAN_US, Segments, by_span

FLUSH_EVERY_S = 2.0
FLUSH_ROWS = 8192
"""Rows that are not left to wait for the time above. A gateway that is killed loses what came in
since the last flush: at most so many rows, and those of a quarter second and of the flush."""
MAX_ROWS = 65_536
"""Kept in memory while storage is slow, full or away; what comes in beyond is dropped."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Of images in memory; rows that come in beyond are kept without."""
FILE_ROWS = 4096
KEPT_IMAGES = 256
"""In one flush; under more load a smaller share of requests has its image kept. Of 28x28 pixels,
1 MiB of them cost 4 % of the requests/s beside versions in processes of their own."""
KEPT_IMAGE_BYTES = 2**20
"""Of images in one flush, the same for large ones."""
FEATURE_ROWS = 512
"""In one flush with features; under more load a smaller share, as with the images."""
_TICK_S = 0.25
_REPEATED = ["version", "caller", "status", "predicted", "index", "run_id"]
"""Columns that are written as dictionaries."""

_log = logging.getLogger(__name__)


class Recorder:
    """Takes answers on the event loop and writes them from a thread.

    Args:
        storage: Where the log is.
        image_percent: Share of the requests whose images are kept; the id of a request decides.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        image_percent: float = 100.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage
        self._image_share = image_percent / 100
        self._clock = clock
        self._answers: dict[tuple[int, bool, bool], Answers] = {}
        self._storing: list[Answers] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        # Written by the event loop alone, and by the flush alone: no lock for a request.
        self._added = self._dropped = self._without_image = 0
        self._settled = self._written = self._failed = 0
        self._unwritten: dict[tuple[str, int], list[pa.Table]] = {}
        self._unwritten_bytes = 0
        self._segments: dict[str, Segments] = {}
        self._lock = threading.Lock()
        self._is_failing = False
        self._reported: dict[str, int] = {}

    def add(
        self,
        card: Card,
        images_NHWC: Images,
        probabilities_NK: Probabilities | None,
        *,
        request_id: str,
        caller: str,
        latency_s: float,
        status: int = 200,
        is_shadow: bool = False,
        trace_id: str | None = None,
    ) -> None:
        """Take an answer; `probabilities_NK` is None if the version failed. Never blocks or raises.

        The arrays are kept as they are until the next flush: nobody may write into them.
        """
        num_rows = len(images_NHWC)
        if self._added - self._settled + num_rows > MAX_ROWS:
            self._dropped += num_rows
            return
        self._added += num_rows
        self._pending_rows += num_rows
        key = (id(card), is_shadow, probabilities_NK is None)
        answers = self._answers.get(key)
        if answers is None:
            answers = self._answers[key] = Answers(card, is_shadow)
        kept: Images | None = None
        if not is_shadow:
            size = images_NHWC.nbytes
            if self._pending_bytes + self._unwritten_bytes + size > MAX_IMAGE_BYTES:
                self._without_image += num_rows
            else:
                self._pending_bytes += size
                kept = images_NHWC
        answers.times_s.append(self._clock())
        answers.request_ids.append(request_id)
        answers.callers.append(caller)
        answers.trace_ids.append(trace_id)
        answers.latencies_s.append(latency_s)
        answers.statuses.append(status)
        answers.num_images.append(num_rows)
        answers.images.append(kept)
        answers.probabilities.append(probabilities_NK)

    def num_answers(self, model: str, request_id: str, index: int) -> int:
        """Return how many answers for an image are taken and not in the log yet."""
        found = 0
        for answers in [*self._answers.values(), *self._storing]:
            if answers.card.name == model and not answers.is_shadow:
                found += sum(
                    given == request_id and index < size and probabilities is not None
                    for given, size, probabilities in zip(
                        answers.request_ids,
                        answers.num_images,
                        answers.probabilities,
                        strict=True,
                    )
                )
        for (name, _), tables in list(self._unwritten.items()):
            if name == model:
                rows = pa.concat_tables(list(tables))
                mine = rows.filter(pc.equal(rows["request_id"], request_id))
                found += count_answers(mine, index)
        return found

    async def run(self) -> None:
        """Flush in time, for ever."""
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while True:
            await asyncio.sleep(_TICK_S)
            is_time = loop.time() - last_s >= FLUSH_EVERY_S
            # Storage that failed is not asked more often because more is waiting for it.
            if is_time or (self._pending_rows >= FLUSH_ROWS and not self._is_failing):
                last_s = loop.time()
                await self.flush()

    async def flush(self) -> None:
        """Write what is there, in a thread; what can't be written is kept for the next time."""
        await asyncio.to_thread(self._store, self._take())

    def close(self) -> None:
        """Write what is there, at once: for the end of a gateway."""
        self._store(self._take())

    def increments(self) -> Iterator[Increment]:
        """Yield what each counter has grown by since the last call."""
        totals = {
            "accepted": self._added + self._dropped,
            "written": self._written,
            "dropped": self._dropped + self._failed,
            "without_image": self._without_image,
        }
        for result, total in totals.items():
            yield LOGGED, (result,), total - self._reported.get(result, 0)
        self._reported = totals

    def _take(self) -> list[Answers]:
        taken, self._answers = list(self._answers.values()), {}
        self._storing = taken
        self._pending_rows = self._pending_bytes = 0
        return taken

    def _store(self, taken: list[Answers]) -> None:
        with self._lock:
            self._convert(taken)
            try:
                self._write()
            except Exception as error:
                self._unwritten_bytes = sum(
                    table.nbytes for tables in self._unwritten.values() for table in tables
                )
                if not self._is_failing:
                    _log.warning("predictions can't be logged, they are kept for now: %s", error)
                self._is_failing = True
            else:
                self._unwritten_bytes = 0
                if self._is_failing:
                    _log.warning("predictions are logged again; %d were dropped", self._dropped)
                self._is_failing = False

    def _convert(self, taken: list[Answers]) -> None:
        shares = self._shares(taken)
        converted: list[tuple[str, pa.Table]] = []
        for answers in taken:
            try:
                parts = by_span(to_table(answers, shares))
            except Exception:
                _log.exception("%d predictions can't be logged", answers.num_rows)
                self._failed += answers.num_rows
                self._settled += answers.num_rows
                continue
            converted += [(answers.card.name, part) for part in parts]
        # In this order `num_answers` may miss an answer, which is in the log soon, but never counts
        # one twice.
        self._storing = []
        for model, part in converted:
            key = (model, part["time_us"][0].as_py() // SPAN_US)
            self._unwritten.setdefault(key, []).append(part)

    def _shares(self, taken: list[Answers]) -> Shares:
        given = [images for answers in taken for images in answers.images if images is not None]
        size = max(1, sum(images.nbytes for images in given))
        num_images = max(1, sum(len(images) for images in given))
        return Shares(
            images=min(self._image_share, KEPT_IMAGES / num_images, KEPT_IMAGE_BYTES / size),
            features=min(1.0, FEATURE_ROWS / num_images),
        )

    def _write(self) -> None:
        while self._unwritten:
            key = next(iter(self._unwritten))
            model = key[0]
            if model not in self._segments:
                self._segments[model] = Segments(
                    self._storage,
                    predictions_root(model),
                    max_rows=FILE_ROWS,
                    dictionary=_REPEATED,
                )
            rows = pa.concat_tables(self._unwritten[key])
            self._segments[model].append(rows)
            del self._unwritten[key]
            self._written += rows.num_rows
            self._settled += rows.num_rows
