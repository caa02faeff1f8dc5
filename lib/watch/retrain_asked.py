"""What a retrain can be asked for: by a person, or by the monitor for those that it starts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lib.config import PRESETS
from lib.errors import RetrainError
from lib.watch import rollout_state

_ROLLOUT = rollout_state.Options()
_FEW_PER_S = 10 / 3
"""Requests a second with which a rollout that nobody watches still comes through: with the usual
steps and answers its first share takes 6,000 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a retrain goes; kept on its record."""

    preset: str = "quick"
    days: float = 7.0
    """Of how many days labelled requests are learned from."""
    steps: tuple[float, ...] = _ROLLOUT.steps
    """Of its rollout, like the next one."""
    min_requests: int = _ROLLOUT.min_requests
    step_timeout_s: float | None = None
    """Of each stage; None: as long as the first share takes with few requests, or longer."""

    def __post_init__(self) -> None:
        """Refuse a window without an extent, and what makes no rollout."""
        if not self.days > 0:
            raise RetrainError(f"days={self.days} must be positive")
        self.rollout("")

    def rollout(self, who: str) -> rollout_state.Options:
        """Return how the version is to be rolled out."""
        how = rollout_state.Options(steps=self.steps, min_requests=self.min_requests, who=who)
        timeout_s = self.step_timeout_s
        if timeout_s is None:
            first_s = how.min_requests / (how.steps[0] / 100) / _FEW_PER_S
            timeout_s = max(how.stage_timeout_s, first_s)
        return replace(how, stage_timeout_s=timeout_s)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON types."""
        return {**asdict(self), "steps": list(self.steps)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Options:
        """Rebuild the options; what an older record lacks is as usual."""
        return cls(**{**content, "steps": tuple(content.get("steps", _ROLLOUT.steps))})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a job be asked for them."""
    usual = Options()
    group = parser.add_argument_group("of a retrain")
    group.add_argument("--preset", default=usual.preset, choices=sorted(PRESETS))
    group.add_argument("--days", type=float, default=usual.days, help="of live requests")
    group.add_argument(
        "--steps", default=rollout_state.USUAL_STEPS, help="of its rollout, as in jobs.rollout"
    )
    group.add_argument("--min-requests", type=int, default=usual.min_requests, help="likewise")
    group.add_argument(
        "--step-timeout",
        type=float,
        help="seconds for a step of it; then it is held (what --min-requests take in the first "
        f"step at {_FEW_PER_S:.1f} requests a second, {_ROLLOUT.stage_timeout_s:g} at least; "
        f"{usual.rollout('').stage_timeout_s:g} with the usual steps)",
    )


def asked(arguments: argparse.Namespace) -> Options:
    """Return what was asked for."""
    return Options(
        preset=arguments.preset,
        days=arguments.days,
        steps=rollout_state.read_steps(arguments.steps),
        min_requests=arguments.min_requests,
        step_timeout_s=arguments.step_timeout,
    )
