"""What training a version again comes to: the same bits, equal within noise, or different."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

IDENTICAL = "identical"
WITHIN_NOISE = "equal within noise"
DIFFERS = "differs"
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """How far two trainings may lie apart by chance, in validation accuracy."""

    standard_error: float
    """Binomial, of the recorded accuracy on that many validation images."""
    seeds: int
    """Recorded trials of the same configuration, each with a seed of its own."""
    seed_deviation: float | None
    """Standard deviation over these; None if there is one only."""

    @property
    def limit(self) -> float:
        """Two standard errors, or two deviations over seeds where these are wider."""
        return _STANDARD_ERRORS * max(self.standard_error, self.seed_deviation or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Recorded and retrained weights side by side."""

    tensors: int
    differing: tuple[str, ...]
    """Names of those that are not the same bit by bit."""
    max_difference: float
    """Over all numbers; infinite where shapes differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduced:
    """The verdict, and all that it rests on."""

    verdict: str
    name: str
    version: int
    run_id: str
    data_digest: str
    code: str
    epoch: int
    weights: Weights
    recorded_val_accuracy: float
    val_accuracy: float
    noise: Noise
    environment: Mapping[str, str]
    """What differs, as `recorded → here`."""
    seconds: float

    def describe(self) -> str:
        """Return the verdict for people, with what differs."""
        found = f"{self.name} version {self.version}: {self.verdict}"
        if self.verdict == IDENTICAL:
            return f"{found}; all {self.weights.tensors} tensors of epoch {self.epoch}, bit by bit"
        changes = [f"{name} {change}" for name, change in self.environment.items()]
        return (
            f"{found}; {len(self.weights.differing)} of {self.weights.tensors} tensors by up to "
            f"{self.weights.max_difference:.3g}; validation accuracy "
            f"{self.recorded_val_accuracy:.4f} → {self.val_accuracy:.4f}, noise "
            f"±{self.noise.limit:.4f}; trained with {self.code}; environment: "
            f"{', '.join(changes) or 'nothing that was recorded differs'}"
        )

    def summary(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        largest = self.weights.max_difference
        return {
            **asdict(self),
            "weights": {
                **asdict(self.weights),
                "max_difference": largest if math.isfinite(largest) else None,
            },
            "noise": {**asdict(self.noise), "limit": self.noise.limit},
        }


def judge(weights: Weights, accuracy_difference: float, noise: Noise) -> str:
    """Return the verdict."""
    if not weights.differing:
        return IDENTICAL
    return WITHIN_NOISE if accuracy_difference <= noise.limit else DIFFERS


def compare(recorded: Mapping[str, Tensor], retrained: Mapping[str, Tensor]) -> Weights:
    """Compare two nets bit by bit."""
    differing, largest = [], 0.0
    for name in sorted(recorded.keys() | retrained.keys()):
        one, other = recorded.get(name), retrained.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            differing.append(name)
            largest = math.inf
        # By bytes: as numbers, 0.0 equals -0.0, and NaN not even itself.
        elif one.contiguous().numpy().tobytes() != other.contiguous().numpy().tobytes():
            differing.append(name)
            largest = max(largest, float((one.double() - other.double()).abs().max()))
    return Weights(
        tensors=len(recorded.keys() | retrained.keys()),
        differing=tuple(differing),
        max_difference=largest,
    )
