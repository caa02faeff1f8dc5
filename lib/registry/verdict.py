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
class Served:
    """The ONNX file that serves beside that of the retrained net, on all test images."""

    images: int
    differing_labels: int
    """Images to which the two give different labels."""
    test_accuracy: float
    """Of the file that serves, as measured now."""
    retrained_test_accuracy: float

    def limit(self, noise: Noise) -> float:
        """How far the two accuracies may lie apart by chance."""
        error = math.sqrt(self.test_accuracy * (1 - self.test_accuracy) / self.images)
        return _STANDARD_ERRORS * max(error, noise.seed_deviation or 0.0)


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
    served: Served
    recorded_val_accuracy: float
    val_accuracy: float
    noise: Noise
    environment: Mapping[str, str]
    """What differs, as `recorded → here`."""
    conditions: tuple[str, ...]
    """Under which the verdict holds: where something stood for what was recorded."""
    seconds: float

    def describe(self) -> str:
        """Return the verdict for people, with what differs."""
        served = self.served
        changes = [f"{name} {change}" for name, change in self.environment.items()]
        parts = [f"{self.name} version {self.version}: {self.verdict}"]
        if self.conditions:
            parts[0] += f" on condition: {'; '.join(self.conditions)}"
        if self.weights.differing:
            parts += [
                f"{len(self.weights.differing)} of {self.weights.tensors} tensors by up to "
                f"{self.weights.max_difference:.3g}",
                f"validation accuracy {self.recorded_val_accuracy:.4f} → {self.val_accuracy:.4f}, "
                f"noise ±{self.noise.limit:.4f}",
            ]
        else:
            parts += [f"all {self.weights.tensors} tensors of epoch {self.epoch}, bit by bit"]
        parts += [
            f"the ONNX file that serves gives other labels to {served.differing_labels} of "
            f"{served.images:,} test images than the retrained net's (accuracy "
            f"{served.test_accuracy:.4f} → {served.retrained_test_accuracy:.4f})",
            f"trained with {self.code}",
            f"environment: {', '.join(changes) or 'nothing that was recorded differs'}",
        ]
        return "; ".join(parts)

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


def judge(weights: Weights, accuracy_difference: float, noise: Noise, served: Served) -> str:
    """Return the verdict on the weights and on the file that serves.

    `accuracy_difference` is of the validation accuracies of the recorded and the retrained net.
    """
    if not weights.differing:
        # The same weights give the same labels: else another model serves.
        return DIFFERS if served.differing_labels else IDENTICAL
    test_difference = abs(served.test_accuracy - served.retrained_test_accuracy)
    is_noise = accuracy_difference <= noise.limit and test_difference <= served.limit(noise)
    return WITHIN_NOISE if is_noise else DIFFERS


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
