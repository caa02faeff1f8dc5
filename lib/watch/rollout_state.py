"""What is known of a rollout, durably: `rollouts/MODEL/state.json`, and one file per ended one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lib.errors import ConfigError

if TYPE_CHECKING:
    from lib.storage import Storage

RUNNING = "running"
PAUSED = "paused"
"""There is nothing to judge by; it goes on looking, until the stage's time is over."""
WITHDRAWING = "withdrawing"
"""On the way to one of the three below: the candidate gets no more requests."""
HELD, ROLLED_BACK, ABORTED = "held", "rolled_back", "aborted"
"""Held: a stage's time was over; it can be resumed. Rolled back: a gate was breached. Aborted: a
person ended it, or changed the traffic meanwhile."""
PROMOTING, PROMOTED = "promoting", "promoted"
ENDED = (HELD, ROLLED_BACK, ABORTED, PROMOTED)
FINAL = (ROLLED_BACK, ABORTED, PROMOTED)

REPLAY, SHADOW = "replay", "shadow"
_CANARY = "canary-"
MAX_EVENTS = 200
USUAL_STEPS = "1,5,25,50,100"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One rollout."""

    id: str
    """Ids sort by time."""
    model: str
    candidate: int
    champion: int
    who: str
    stages: tuple[str, ...]
    min_requests: int
    stage_timeout_s: float
    max_disagreement: float
    before_weights: Mapping[int, float]
    """Of the traffic when it began, the candidate's among them."""
    before_shadows: Mapping[int, float]
    set_weights: Mapping[int, float]
    """What the rollout set last, by which it sees that somebody else changed it."""
    set_shadows: Mapping[int, float]
    evidence_since_us: int
    """Answers before it don't count."""
    bundles: Mapping[int, str] = field(default_factory=dict)
    """Of candidate and champion: whose answers count, and which versions it is about. A model that
    is deleted and made again has others with the same numbers. Empty in states of before."""
    status: str = RUNNING
    then: str = ""
    """What follows on `withdrawing`."""
    stage: str = ""
    since_us: int = 0
    """When the stage began, for its time limit."""
    served_since_us: int | None = None
    """When the stage's traffic was in force; None before that."""
    expects_labels: bool = False
    reason: str = ""
    gates: Sequence[Mapping[str, Any]] = ()
    """Findings of the last look."""
    looked_us: int = 0
    history: Sequence[Mapping[str, Any]] = ()
    noted: bool = True
    """Whether the registry knows how it ended."""

    @property
    def weight(self) -> float:
        """Share of the candidate in the stage, in percent."""
        return share(self.stage)

    @property
    def next_stage(self) -> str | None:
        """The stage after this one, None after the last."""
        place = self.stages.index(self.stage) + 1
        return self.stages[place] if place < len(self.stages) else None

    @property
    def num_live_stages(self) -> int:
        """Stages with evidence from live requests."""
        return sum(stage != REPLAY for stage in self.stages)

    def entering(self, stage: str, now_us: int) -> State:
        """Return the state at the beginning of a stage."""
        return replace(
            self,
            status=RUNNING,
            stage=stage,
            since_us=now_us,
            served_since_us=None,
            reason="",
            gates=(),
        )

    def event(self, now_us: int, status: str, reason: str) -> State:
        """Return the state with one more line in its history."""
        line = {"time": iso(now_us), "stage": self.stage, "status": status, "reason": reason}
        return replace(self, history=(*self.history, line)[-MAX_EVENTS:])

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON types, with what only people and the console read."""
        weight = 0.0 if self.status in (HELD, ROLLED_BACK, ABORTED) else self.weight
        return {**asdict(self), "weight": weight, "since": iso(self.since_us)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> State:
        """Rebuild a state."""
        fields = {name: content[name] for name in content if name not in ("weight", "since")}
        for name in ("before_weights", "before_shadows", "set_weights", "set_shadows", "bundles"):
            fields[name] = {int(version): value for version, value in fields.get(name, {}).items()}
        return cls(**{**fields, "stages": tuple(fields["stages"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a rollout goes."""

    steps: tuple[float, ...] = tuple(float(step) for step in USUAL_STEPS.split(","))
    """Shares of the candidate, in percent."""
    min_requests: int = 200
    """Answers of the candidate in each stage, before it can pass."""
    stage_timeout_s: float = 600
    who: str = field(default="unknown")

    def __post_init__(self) -> None:
        """Refuse what makes no rollout."""
        rises = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not rises or self.steps[0] <= 0 or self.steps[-1] != 100:
            raise ConfigError(
                f"--steps {','.join(f'{step:g}' for step in self.steps)}: give rising percentages "
                "that end with 100, such as 1,5,25,50,100"
            )
        if self.min_requests < 1:
            raise ConfigError(f"--min-requests {self.min_requests} is not 1 or more")
        if not self.stage_timeout_s > 0:
            raise ConfigError(f"--step-timeout {self.stage_timeout_s:g} is not above 0 seconds")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages."""
        return (REPLAY, SHADOW, *(f"{_CANARY}{step:g}" for step in self.steps))


def read_steps(text: str) -> tuple[float, ...]:
    """Read shares as a command line gives them; raise ConfigError if they are no numbers."""
    try:
        return tuple(float(step) for step in text.split(","))
    except ValueError:
        raise ConfigError(f"--steps {text}: give percentages, such as 5,50,100") from None


def share(stage: str) -> float:
    """Return the candidate's share of the requests in a stage, in percent."""
    return float(stage.removeprefix(_CANARY)) if stage.startswith(_CANARY) else 0.0


def iso(time_us: int) -> str:
    """Return a time for people."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="milliseconds")


def state_path(model: str) -> str:
    """Return where the state is, relative to the storage root."""
    return f"rollouts/{model}/state.json"


def load(storage: Storage, model: str) -> State | None:
    """Return the newest rollout of a model, None if there was none."""
    path = state_path(model)
    return State.from_json(storage.read_json(path)) if storage.exists(path) else None


def save(storage: Storage, state: State) -> None:
    """Write the state, whole or not at all; one that ended is kept beside the next ones."""
    if state.status in FINAL:
        storage.write_json(f"rollouts/{state.model}/history/{state.id}.json", state.to_json())
    storage.write_json(state_path(state.model), state.to_json())


def past(storage: Storage, model: str) -> list[State]:
    """Return the rollouts of a model that ended, oldest first."""
    paths = storage.list(f"rollouts/{model}/history")
    return [State.from_json(storage.read_json(path)) for path in paths]
