"""All that a monitor reads and starts, as interfaces: a live line, or a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from lib.storage import Storage


class Log(Protocol):
    """The prediction log: `lib.watch.predictions`. Rows have start_us ≤ time_us < end_us."""

    def read(
        self,
        storage: Storage,
        model: str,
        *,
        start_us: int,
        end_us: int,
        columns: Sequence[str] | None = None,
        bundles: Mapping[int, str] | None = None,
    ) -> pa.Table:
        """Return what was answered, sorted by time."""
        ...

    def joined(
        self,
        storage: Storage,
        model: str,
        *,
        start_us: int,
        end_us: int,
        columns: Sequence[str] | None = None,
        bundles: Mapping[int, str] | None = None,
    ) -> pa.Table:
        """Return what was answered, with the labels that are known."""
        ...

    def read_labels(self, storage: Storage, model: str, *, start_us: int, end_us: int) -> pa.Table:
        """Return the labels that came."""
        ...


class Retrains(Protocol):
    """Retrains of the model: `lib.watch.retrain`."""

    def start(self, reason: str) -> Any:
        """Start one and return what names it."""
        ...

    def history(self) -> Sequence[Mapping[str, Any]]:
        """Return those that there were, oldest first, with the Unix time each `started`."""
        ...


class Interrupted(Protocol):
    """Retrains and rollouts whose process was killed: `lib.watch.interrupted`."""

    def go_on(self) -> str | None:
        """Let one go on and return what names it, None if there is none."""
        ...
