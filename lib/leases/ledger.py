"""Slots of one cluster, lent to sweeps: who may run how many trials now. Pure data, no clock.

A sweep says at every renewal what it runs and would run, and is told how many trials it may run.
What it says is enough to build all of this again, so nothing here has to be kept durably. A sweep
that is silent for too long has lost its slots.

A slot that comes free goes to the owner who holds fewest, of his sweeps to the one that holds
fewest, and among equals to the one that was served longest ago. No trial is ended for another one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

Amounts = Mapping[str, float]
"""Ray's name of a resource → how much of it."""
_NUM_SAMPLES = 9
"""Of the room, of which the second largest counts. A trial that is just starting or ending makes
it look smaller, often while trials are short; larger only a process that died just now does."""
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a sweep says of itself at a renewal."""

    sweep: str
    owner: str
    limit: int | None = None
    """Trials that the owner may have running, in all of his sweeps; None: any number."""
    wants: int = 0
    """Trials that it would run side by side."""
    uses: int = 0
    """Trials that run or wait for their process."""
    placed: int = 0
    """Of these, trials that have their process, and with it their part of the cluster."""
    slots: int = 0
    """What it was told last."""
    size: Amounts = field(default_factory=dict)
    """What one trial takes."""
    free: Amounts | None = None
    """What is free now for trials; None if it was not measured, or a process is just starting."""
    most: Amounts = field(default_factory=dict)
    """What trials may take of the cluster at most, however little else runs there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What a sweep is told."""

    slots: int
    """Trials that it may run."""
    alone: bool
    """Whether there is no other sweep: it need not ask before it uses a slot again."""
    room: Amounts | None = None
    """What all sweeps together have to share; None if that isn't known yet."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Owner of other sweeps → slots that these hold."""


@dataclass(kw_only=True, slots=True)
class Lease:
    """What is known of one sweep."""

    ask: Ask
    slots: int
    came_s: float
    seen_s: float
    served_s: float
    """When it got or gave back a slot last; at first, when it came."""

    @property
    def held(self) -> int:
        """Slots that nobody else can have: lent, or in use all the same."""
        return max(self.slots, self.ask.uses)


class Leases:
    """All leases of a cluster.

    Args:
        lease_s: How long a sweep may be silent.
        recovers_until_s: Until then sweeps are only told what they had: after a restart it takes
            as long until all of them have been heard.
    """

    def __init__(self, *, lease_s: float, recovers_until_s: float = -math.inf) -> None:
        self._lease_s = lease_s
        self._recovers_until_s = recovers_until_s
        self._leases: dict[str, Lease] = {}
        self._samples: deque[Amounts] = deque(maxlen=_NUM_SAMPLES)

    @property
    def leases(self) -> Mapping[str, Lease]:
        """The leases by sweep."""
        return self._leases

    @property
    def room(self) -> Amounts | None:
        """What all sweeps together have to share: what is free and what their trials take."""
        if not self._samples:
            return None
        kinds = {kind for sample in self._samples for kind in sample}
        return {kind: _second([s[kind] for s in self._samples if kind in s]) for kind in kinds}

    def renew(self, ask: Ask, now_s: float) -> Grant:
        """Take in what a sweep says, the first time or again, and return what it may run."""
        self.expire(now_s)
        lease = self._leases.get(ask.sweep)
        if lease is None:
            lease = Lease(ask=ask, slots=ask.slots, came_s=now_s, seen_s=now_s, served_s=now_s)
            self._leases[ask.sweep] = lease
        if ask.uses < lease.ask.uses:
            lease.served_s = now_s
        lease.ask, lease.seen_s = ask, now_s
        self._measure(ask)
        alone = len(self._leases) == 1
        if now_s < self._recovers_until_s:
            slots, alone = max(ask.slots, ask.uses), False
        elif alone:
            slots = max(ask.uses, min(ask.wants, ask.wants if ask.limit is None else ask.limit))
        else:
            slots = self._deal(lease)
        if slots > lease.slots:
            lease.served_s = now_s
        lease.slots = slots
        others: dict[str, int] = {}
        for other in self._leases.values():
            if other is not lease:
                others[other.ask.owner] = others.get(other.ask.owner, 0) + other.held
        return Grant(slots=slots, alone=alone, room=self.room, others=others)

    def release(self, sweep: str) -> None:
        """Forget a sweep that has ended."""
        self._leases.pop(sweep, None)
        self._forget_room()

    def expire(self, now_s: float) -> list[str]:
        """Forget the sweeps that have been silent for too long; return them."""
        gone = [
            sweep for sweep, lease in self._leases.items() if now_s - lease.seen_s > self._lease_s
        ]
        for sweep in gone:
            del self._leases[sweep]
        self._forget_room()
        return gone

    def _forget_room(self) -> None:
        if not self._leases:
            self._samples.clear()

    def _measure(self, ask: Ask) -> None:
        # What a process takes that is being started is neither free nor placed.
        others = (lease.ask for lease in self._leases.values() if lease.ask.sweep != ask.sweep)
        starts = any(other.placed < min(other.uses, other.wants) for other in others)
        if not ask.free or (starts and self._samples):
            return
        taken: dict[str, float] = {}
        for lease in self._leases.values():
            for kind, amount in lease.ask.size.items():
                taken[kind] = taken.get(kind, 0.0) + amount * lease.ask.placed
        self._samples.append(
            {
                kind: min(free + taken.get(kind, 0.0), ask.most.get(kind, math.inf))
                for kind, free in ask.free.items()
            }
        )

    def _deal(self, asker: Lease) -> int:
        """Return what a sweep holds once all slots that are free now are dealt out.

        The others get theirs in the same order when they ask; until then it is kept for them.
        """
        room = self.room or {}
        held = {name: lease.held for name, lease in self._leases.items()}
        # What it does not use it has given back, and it stands in line for it like all others.
        held[asker.ask.sweep] = asker.ask.uses
        left, limits = self._left(room, held), self._limits()
        of_owner = self._by_owner(held)

        def rank(name: str) -> tuple[int, int, float, str]:
            lease = self._leases[name]
            return of_owner[lease.ask.owner], held[name], lease.served_s, name

        waiting = [rank(name) for name in held if held[name] < self._leases[name].ask.wants]
        heapq.heapify(waiting)
        num_held = sum(held.values())
        while waiting and held[asker.ask.sweep] < asker.ask.wants:
            told = heapq.heappop(waiting)
            name = told[-1]
            if (now := rank(name)) != told:
                heapq.heappush(waiting, now)  # Its owner has got a slot since.
                continue
            ask = self._leases[name].ask
            limit = limits.get(ask.owner)
            may = limit is None or of_owner[ask.owner] < limit
            # Whatever was measured, one trial can always be tried.
            fits = may and (_fits(ask.size, left) or not num_held)
            if fits:
                held[name] += 1
                of_owner[ask.owner] += 1
                num_held += 1
            if fits or (may and _fits(ask.size, room)):
                # Who does not fit yet waits for more to come free, and nobody behind takes it.
                for kind in left:
                    left[kind] -= ask.size.get(kind, 0.0)
            if fits and held[name] < ask.wants:
                heapq.heappush(waiting, rank(name))
            elif name == asker.ask.sweep:
                break
        return held[asker.ask.sweep]

    def _left(self, room: Amounts, held: Mapping[str, int]) -> dict[str, float]:
        left = dict(room)
        for name, lease in self._leases.items():
            # One that is larger than the room may wait for ever; the others must not wait for it.
            num = held[name] if _fits(lease.ask.size, room) else lease.ask.placed
            for kind in left:
                left[kind] -= lease.ask.size.get(kind, 0.0) * num
        return left

    def _by_owner(self, held: Mapping[str, int]) -> dict[str, int]:
        totals: dict[str, int] = {}
        for name, lease in self._leases.items():
            totals[lease.ask.owner] = totals.get(lease.ask.owner, 0) + held[name]
        return totals

    def _limits(self) -> dict[str, int]:
        """Return the owners' limits: the lowest, if somebody's sweeps were started with several."""
        limits: dict[str, int] = {}
        for lease in self._leases.values():
            if lease.ask.limit is not None:
                known = limits.get(lease.ask.owner, lease.ask.limit)
                limits[lease.ask.owner] = min(known, lease.ask.limit)
        return limits


def _second(values: list[float]) -> float:
    return sorted(values)[-2 if len(values) > 2 else -1]


def _fits(size: Amounts, left: Amounts) -> bool:
    needed = ((kind, amount) for kind, amount in size.items() if amount)
    return all(amount <= left.get(kind, math.inf) + _EPSILON for kind, amount in needed)
