"""Structured logs of gateways and versions: one file of JSON lines a process, in Ray's log folder.

What Serve does with a replica's standard error is no log to debug by: under
RAY_SERVE_THROUGHPUT_OPTIMIZED it is kept in memory until 1,000 lines or an error of Serve itself
write it. Here a thread writes each record at once. On one machine the files are in
`.rayline/logs/serve`, on a node of a cluster in `session_latest/logs/rayline` of Ray's folder.

Each line has `time` (UTC), `level`, `logger`, `message`, and where it applies `request_id`,
`status`, `error` (type and message) and `traceback`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

from lib.errors import ConfigError
from lib.serving.payload import PayloadError

ACCESS_LOG_VARIABLE = "RAYLINE_ACCESS_LOG"
MAX_FILE_BYTES = 8 * 2**20
"""A larger file is put aside as `….jsonl.1`; one of these is kept for each process."""
MAX_FILES = 64
"""In the folder; the oldest are deleted when a process starts. A living process that loses its file
so begins a new one."""
MAX_QUEUED = 10_000
"""Records that wait for a slow disk; what comes in beyond is dropped and counted."""
TRACEBACKS_PER_S = 5
_LOGGERS = ("lib", "serve_apps", "opentelemetry")
_FIELDS = "fields"
"""Attribute of a record: what its line holds beside the message."""

_log = logging.getLogger(__name__)
_access = logging.getLogger(f"{__name__}.access")


def session_folder() -> Path:
    """Return the folder of these logs in Ray's session; the process must be one of Ray's."""
    import ray

    # Ray tells its log folder by no public function; Serve takes it from here too.
    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) / "rayline"


def start_for_replica() -> ProcessLog:
    """Start the log of this process, which is a replica of Serve."""
    from ray import serve

    context = serve.get_replica_context()
    name = f"{context.app_name[:80]}-{context.replica_id.unique_id}"
    return ProcessLog(session_folder(), name).start()


def failed(request_id: str, status: int, error: BaseException) -> None:
    """Log why a request was answered with 5xx, under its id.

    A refusal (PayloadError) is a line with its text and cause. Any other error is a defect, and has
    its traceback too, unless there were too many of them within this second.

    Args:
        request_id: What the caller got as `request_id` or `X-Request-Id`.
        status: HTTP status of the answer.
        error: What was raised.
    """
    fields: dict[str, Any] = {"request_id": request_id, "status": status}
    if not isinstance(error, PayloadError):
        _log.error("request failed", exc_info=error, extra={_FIELDS: fields})
        return
    if cause := error.__cause__:
        fields["error"] = f"{type(cause).__name__}: {cause}"
    _log.warning("request refused: %s", error.message, extra={_FIELDS: fields})


def access_share(env: Mapping[str, str]) -> float:
    """Return the share of requests that RAYLINE_ACCESS_LOG has logged, 0 by default, to 1.

    Raises:
        ConfigError: It is not a number from 0 to 1.
    """
    value = env.get(ACCESS_LOG_VARIABLE) or "0"
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{ACCESS_LOG_VARIABLE}={value} is not a share of requests, from 0 to 1")
    return share


def access(share: float, **fields: Any) -> None:
    """Log a request with this chance. Callers check `share` first: at 0 this is not called.

    Args:
        share: Of the requests, 0 to 1.
        fields: Of the line: request_id, method, path, status, ms, caller, model, version, trace_id.
    """
    if random.random() < share:
        _access.info("request", extra={_FIELDS: fields})


class ProcessLog:
    """The log file of this process, from `start` until `close`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _delete_old(folder)
        self.path = folder / f"{name}.jsonl"
        file = _File(self.path, maxBytes=max_bytes, backupCount=1, delay=True)
        file.setFormatter(_JsonFormatter())
        self._handler = _Handler(clock)
        self._is_open = False
        self._listener = _Writer(self._handler.queue, file)

    def start(self) -> ProcessLog:
        """Write what the project's loggers say from now on, from INFO."""
        self._listener.start()
        self._is_open = True
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)
        return self

    def close(self) -> None:
        """Write what waits, and end; a second time does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        self._listener.stop()
        for handler in self._listener.handlers:
            handler.close()


class _Handler(QueueHandler):
    """Hands records to the thread that writes, so that a slow disk holds no request up."""

    queue: queue.Queue[Any]

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(queue.Queue(MAX_QUEUED))
        self._clock = clock
        self._second = 0
        self._in_second = 0
        self._num_suppressed = 0
        self._num_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return a record's copy that holds texts alone: arguments and frames may change."""
        fields: dict[str, Any] = dict(getattr(record, _FIELDS, {}))
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
            if self._may_trace():
                fields["traceback"] = logging.Formatter().formatException(record.exc_info)
            else:
                self._num_suppressed += 1
        copy = logging.makeLogRecord(
            {
                "name": record.name,
                "levelname": record.levelname,
                "levelno": record.levelno,
                "created": record.created,
                "msg": record.getMessage(),
            }
        )
        if not record.exc_info or "traceback" in fields:
            self._tell(fields)
        setattr(copy, _FIELDS, fields)
        return copy

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it if the disk does not keep up."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            fields = getattr(record, _FIELDS)
            self._num_suppressed += fields.get("tracebacks_suppressed", 0)
            self._num_dropped += 1 + fields.get("lines_dropped", 0)

    def _may_trace(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        return self._in_second <= TRACEBACKS_PER_S

    def _tell(self, fields: dict[str, Any]) -> None:
        """Add to a line how much was left out before it."""
        if self._num_suppressed:
            fields["tracebacks_suppressed"], self._num_suppressed = self._num_suppressed, 0
        if self._num_dropped:
            fields["lines_dropped"], self._num_dropped = self._num_dropped, 0


class _Writer(QueueListener):
    queue: queue.Queue[Any]

    def enqueue_sentinel(self) -> None:
        # Waits for a place in a full queue; the library's own raises there.
        self.queue.put(None)


class _File(RotatingFileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        # Another process may have deleted it: the file of one that says little is among the oldest.
        if self.stream and not os.path.exists(self.baseFilename):
            self.stream.close()
            self.stream = None
        super().emit(record)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        return json.dumps(content, default=str)


def _delete_old(folder: Path) -> None:
    """Delete the oldest files, so that the folder of replicas that come and go stays bounded."""
    found = []
    for path in folder.iterdir():
        try:
            found.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue  # Another process has just deleted or rotated it.
    for _, path in sorted(found)[: max(0, len(found) - MAX_FILES)]:
        path.unlink(missing_ok=True)
