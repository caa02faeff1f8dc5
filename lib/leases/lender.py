"""The actor that lends slots to all sweeps of a cluster, and how a driver reaches it.

It is found by name, belongs to no job, starts again where a node was lost, and ends itself with
the last sweep: so it never runs older code than the sweeps that it serves for long.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from lib import provenance
from lib.config import Settings
from lib.leases.ledger import Amounts, Ask, Grant, Leases
from lib.leases.owners import limit_of, read_limits
from lib.leases.share import BEAT_S, LenderAwayError, Share
from lib.train.resources import free_for_trials

NAME, NAMESPACE = "leases-1", "rayline"
"""The number changes with what is said between the actor and its callers."""
LEASE_S = 15.0
"""So long a sweep may be silent; its driver may be busy, or the network slow."""
_TIMEOUT_S = 10.0
_UNKNOWN = "unknown"


class Lender:
    """Keeps the leases by its own clock."""

    def __init__(
        self, *, recovers: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        until_s = clock() + LEASE_S if recovers else -1.0
        self._leases = Leases(lease_s=LEASE_S, recovers_until_s=until_s)

    def renew(self, ask: Ask) -> Grant:
        """Renew a sweep's lease."""
        return self._leases.renew(ask, self._clock())

    def release(self, sweep: str) -> bool:
        """Forget a sweep; return whether there is another one."""
        self._leases.release(sweep)
        self._leases.expire(self._clock())
        return bool(self._leases.leases)

    def view(self) -> dict[str, Any]:
        """Return who uses what, as JSON types."""
        now_s = self._clock()
        self._leases.expire(now_s)
        room = self._leases.room
        return {
            "room": dict(room) if room else None,
            "leases": [
                {
                    "sweep": sweep,
                    "owner": lease.ask.owner,
                    "limit": lease.ask.limit,
                    "slots": lease.held,
                    "running": lease.ask.placed,
                    "wants": lease.ask.wants,
                    "trial": dict(lease.ask.size),
                    "seconds": now_s - lease.came_s,
                }
                for sweep, lease in sorted(self._leases.leases.items())
            ],
        }


class LeaseActor(Lender):
    """The lender as an actor of Ray's."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Ray's own way to this calls what it has deprecated.
            warnings.simplefilter("ignore")
            recovers = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        super().__init__(recovers=recovers)

    def release(self, sweep: str) -> bool:
        """Forget a sweep; the actor ends with the last one."""
        if not super().release(sweep):
            ray.actor.exit_actor()
        return True


class RayLender:
    """The lease actor of the cluster that this process is connected to.

    Its process starts as soon as this is made, so that it is there when it is first asked.
    """

    def __init__(self) -> None:
        self._actor: Any = None
        self.is_new = not _is_there()
        with contextlib.suppress(LenderAwayError):
            self._connect()

    def renew(self, ask: Ask) -> Grant:
        """Renew a lease."""
        try:
            found: Grant = ray.get(self._connect().renew.remote(ask), timeout=_TIMEOUT_S)
        except RayError as error:
            # It may have ended with the last sweep just now: then another one is made.
            self._actor = None
            raise LenderAwayError(type(error).__name__) from error
        return found

    def release(self, sweep: str) -> None:
        """Give a lease back; if that fails it ends by itself."""
        with contextlib.suppress(LenderAwayError, RayError):
            ray.get(self._connect().release.remote(sweep), timeout=BEAT_S)

    def _connect(self) -> Any:
        if self._actor is None:
            try:
                self._actor = (
                    ray.remote(LeaseActor)
                    .options(
                        name=NAME,
                        namespace=NAMESPACE,
                        lifetime="detached",
                        get_if_exists=True,
                        # A cluster whose CPUs are all taken must have one too.
                        num_cpus=0,
                        max_restarts=-1,
                    )
                    .remote()
                )
            except (RayError, ValueError, RuntimeError) as error:
                raise LenderAwayError(str(error)) from error
        return self._actor


def share_of(settings: Settings, sweep: str, lender: RayLender) -> Share:
    """Return a sweep's part of the slots; its owner is who submitted this job."""
    owner = provenance.current().owner or _UNKNOWN
    limits = read_limits("RAYLINE_OWNER_LIMITS", settings.owner_limits)
    return Share(
        lender,
        sweep=sweep,
        owner=owner,
        limit=limit_of(limits, owner),
        measure=partial(_measure, settings),
    )


def look() -> dict[str, Any] | None:
    """Return who uses what, None if no sweep is there; Ray must be initialised."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        return dict(ray.get(actor.view.remote(), timeout=_TIMEOUT_S))
    except (ValueError, RayError):
        return None


def _is_there() -> bool:
    try:
        ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    except RayError:
        pass  # Nobody knows: to be asked is safe.
    return True


def _measure(settings: Settings) -> tuple[Amounts, Amounts]:
    try:
        return free_for_trials(settings)
    except (RayError, RuntimeError, OSError) as error:
        raise LenderAwayError(f"Ray does not say what is free: {error}") from error
