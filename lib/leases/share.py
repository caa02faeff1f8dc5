"""One sweep's part of the slots that all sweeps of a cluster share, as its driver sees it.

A thread of the driver renews the lease; the search only reads what was granted last. While a sweep
is alone nothing is asked for a trial. Beside others a slot whose trial has ended is given back and
asked for again, so that whose turn it is gets it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from lib.cli import progress as say
from lib.leases.ledger import Amounts, Ask, Grant

BEAT_S = 2.0
"""Between renewals."""
_WAITING_BEAT_S = 0.3
"""Between renewals of a sweep that waits for a slot."""
_ANSWER_S = 20.0
"""How long an answer may take: at first a process starts for it, later one may be restarted."""
_LISTEN_S = 0.05
_TELL_S = 60.0
"""How often a sweep that waits says so."""
Measure = Callable[[], tuple[Amounts, Amounts]]
"""Returns what is free for trials now, and what they may take at most."""


class LenderAwayError(Exception):
    """Whoever lends the slots did not answer; another renewal may reach him."""


class Remote(Protocol):
    """Who lends the slots: `lib.leases.lender`."""

    @property
    def is_new(self) -> bool:
        """Whether nobody had asked for slots before: then there is no other sweep yet."""
        ...

    def renew(self, ask: Ask) -> Grant:
        """Renew a lease; raises LenderAwayError."""
        ...

    def release(self, sweep: str) -> None:
        """Give a lease back; never raises."""
        ...


class Share:
    """Keeps the lease of one sweep, from the `with` statement's start to its end.

    Args:
        remote: Who lends the slots.
        sweep: The sweep's run id.
        owner: Who submitted it.
        limit: Trials that the owner may have running, None for any number.
        measure: Measures what is free; called in the thread.
    """

    def __init__(
        self, remote: Remote, *, sweep: str, owner: str, limit: int | None, measure: Measure
    ) -> None:
        self._remote = remote
        self._measure = measure
        self._ask = Ask(sweep=sweep, owner=owner, limit=limit)
        self._grant: Grant | None = None
        self._parallel = 0
        """Trials that there is room for if there is no other sweep."""
        self._most = 0
        """Trials that run or wait for their process at most, if there is no other sweep."""
        self._changed = False
        """Whether the lender does not know yet what the sweep uses now."""
        self._unasked = remote.is_new
        """Whether the sweep can begin before the lender, whose process starts, says so."""
        self._lost = False
        self._heard_s = time.monotonic()
        self._lock = threading.Lock()
        self._wake, self._news, self._over = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="share", daemon=True)

    def __enter__(self) -> Share:
        """Begin to renew the lease."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give all slots back."""
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=BEAT_S)
        self._remote.release(self._ask.sweep)

    @property
    def is_shared(self) -> bool:
        """Whether there are other sweeps."""
        return self._grant is not None and not self._grant.alone and not self._lost

    @property
    def is_settled(self) -> bool:
        """Whether what was granted last is the answer to what the sweep uses now."""
        return not self._changed

    @property
    def limit(self) -> int:
        """Trials that may run or wait for their process now."""
        with self._lock:
            if self.is_shared:
                assert self._grant is not None
                return self._grant.slots
            limit = self._ask.limit
            # One that waits would run beside the others wherever there is room for it.
            return self._most if limit is None or limit > self._parallel else min(self._most, limit)

    def room(self) -> Amounts | None:
        """Return what all sweeps together have to share; None if there is no other sweep.

        Waits for the lender's first answer, unless the lender is new.
        """
        deadline_s = time.monotonic() + _ANSWER_S
        while self._grant is None and not (self._lost or self._unasked):
            if time.monotonic() > deadline_s:
                self._give_up("it did not answer in time")
                break
            self._listen(_LISTEN_S)
        return self._grant.room if self._grant is not None and self.is_shared else None

    def ask(
        self, *, size: Amounts, parallel: int, most: int, free: Amounts, free_most: Amounts
    ) -> float:
        """Ask for slots, wait until there is one, and return the seconds that it took.

        Args:
            size: What one trial takes.
            parallel: Trials that there is room for if there is no other sweep.
            most: Trials that run or wait for their process at most.
            free: What was found free before the sweep started anything.
            free_most: What trials may take at most.
        """
        start_s = time.monotonic()
        with self._lock:
            self._parallel, self._most = parallel, most
            self._ask = replace(
                self._ask, size=size, wants=min(parallel, most), free=free, most=free_most
            )
            self._changed = True
        self._wake.set()
        told_s = start_s - _TELL_S
        while not (self._lost or self._unasked) and (self._changed or not self.limit):
            now_s = time.monotonic()
            if now_s - start_s > 2 * _WAITING_BEAT_S and now_s - told_s > _TELL_S:
                told_s = now_s
                say("tune", f"waiting for a slot: {self._holders()}")
            self._listen(_LISTEN_S)
        return time.monotonic() - start_s

    def update(self, *, running: int, pending: int, left: int) -> None:
        """Take note of the sweep's trials; costs nothing unless they have changed.

        Args:
            running: Trials that have their process.
            pending: Trials that wait for one.
            left: Trials that are still to be started or resumed.
        """
        uses = running + pending
        wants = min(self._parallel, self._most, uses + left)
        with self._lock:
            before = self._ask
            if (before.uses, before.placed, before.wants) == (uses, running, wants):
                return
            # What was free before anything was started is not free any more.
            free = None if running else before.free
            self._ask = replace(before, uses=uses, placed=running, wants=wants, free=free)
            if not self.is_shared:
                return  # The next renewal tells it.
            assert self._grant is not None
            if uses < before.uses:
                self._grant = replace(self._grant, slots=min(self._grant.slots, uses))
            self._changed = True
        self._wake.set()

    def pause(self) -> None:
        """Wait a little for a slot."""
        self._listen(_WAITING_BEAT_S)

    def _listen(self, timeout_s: float) -> None:
        self._news.clear()
        self._news.wait(timeout_s)

    def _run(self) -> None:
        while not self._over.is_set():
            self._beat()
            self._news.set()
            self._wake.wait(self._pause_s())
            self._wake.clear()

    def _pause_s(self) -> float:
        waits = self._grant is None or (self.is_shared and self._grant.slots < self._ask.wants)
        return _WAITING_BEAT_S if waits and not self._lost else BEAT_S

    def _beat(self) -> None:
        with self._lock:
            ask = self._ask
            slots = self._grant.slots if self._grant is not None else 0
        try:
            grant = self._remote.renew(self._with_measure(replace(ask, slots=slots)))
        except LenderAwayError as error:
            # Until then it may be starting; what was granted last holds.
            if time.monotonic() - self._heard_s > _ANSWER_S:
                self._give_up(str(error))
            return
        with self._lock:
            self._heard_s = time.monotonic()
            # What was free before the sweep started is true once.
            if self._ask.free is ask.free:
                self._ask = replace(self._ask, free=None)
            self._changed = (ask.uses, ask.wants) != (self._ask.uses, self._ask.wants)
            if self._changed and not grant.alone:
                # A trial has ended meanwhile; its slot must be asked for before it is used again.
                grant = replace(grant, slots=min(grant.slots, self._ask.uses))
                self._wake.set()
            self._grant, self._lost, self._unasked = grant, False, False

    def _with_measure(self, ask: Ask) -> Ask:
        # While a process starts, what it takes is no longer free and not yet known as its own. One
        # whose trial has ended is kept until it is known who gets its slot, and for its next trial.
        starts = ask.placed < min(ask.uses, self._parallel)
        is_kept = self._changed or (self.is_shared and ask.uses < ask.slots)
        if ask.free is not None or starts or is_kept or not ask.wants:
            return ask
        free, most = self._measure()
        return replace(ask, free=free, most=most)

    def _give_up(self, why: str) -> None:
        """Go on as if there were no other sweep, until the lender is heard again."""
        if not self._lost:
            say("tune", f"nobody lends slots to sweeps now ({why}); this one runs what it can")
        self._lost = True

    def _holders(self) -> str:
        others = self._grant.others if self._grant is not None else {}
        held = ", ".join(f"{owner} holds {num}" for owner, num in sorted(others.items()) if num)
        limit = self._ask.limit
        mine = f"; {self._ask.owner} may hold {limit}" if limit is not None else ""
        return (held or "another sweep was first") + mine
