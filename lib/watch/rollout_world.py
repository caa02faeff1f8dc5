"""All that a rollout sees and does, as an interface: a live line, or a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lib.serving.traffic import ModelTraffic
from lib.watch.gates import Evidence, Verdict
from lib.watch.rollout_state import State


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a candidate made of logged requests."""

    verdict: Verdict
    expects_labels: bool = False
    """Whether these requests got true labels."""


class World(Protocol):
    """All that a rollout sees and does."""

    def now_us(self) -> int:
        """Return the time, UTC, in microseconds since 1970."""
        ...

    def rest(self) -> None:
        """Wait until the next look."""
        ...

    def say(self, text: str) -> None:
        """Tell people."""
        ...

    def load(self) -> State | None:
        """Return the newest state that was saved."""
        ...

    def save(self, state: State) -> None:
        """Keep the state, durably."""
        ...

    def is_aborted(self, state: State) -> bool:
        """Whether a person asked for this rollout to end."""
        ...

    def traffic(self) -> ModelTraffic:
        """Return the traffic in force."""
        ...

    def bundle(self, version: int) -> str:
        """Return a version's bundle, published if need be."""
        ...

    def change(self, desired: ModelTraffic, why: str) -> None:
        """Change the traffic; a version that does not start changes nothing (StartError)."""
        ...

    def withdraw(self, desired: ModelTraffic, why: str) -> None:
        """Change the traffic at once, whatever else is down."""
        ...

    def crown(self, desired: ModelTraffic, why: str) -> None:
        """Change the traffic and the registry's champion."""
        ...

    def replay(self, state: State) -> Replayed:
        """Let the candidate answer logged requests, with no caller waiting."""
        ...

    def check_metrics(self) -> None:
        """Raise WatchError if the line's metrics can't be read."""
        ...

    def evidence(self, state: State) -> Evidence:
        """Return what was logged since the rollout began."""
        ...

    def note(self, state: State) -> None:
        """Tell the registry how it ended."""
        ...
