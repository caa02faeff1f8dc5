"""What drift is looked for between: images and answers that are known, and a window of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a version answered: one value a row in each."""

    predicted_N: npt.NDArray[np.int32]
    confidence_N: npt.NDArray[np.float32]
    """Probability of the predicted class."""
    entropy_N: npt.NDArray[np.float32]
    """Of the probabilities, in nats."""

    @classmethod
    def of(cls, probabilities_NK: npt.NDArray[np.float32]) -> Answers:
        """Return what is tested of an answer's probabilities."""
        safe = np.maximum(probabilities_NK, np.float32(1e-30))
        return cls(
            predicted_N=probabilities_NK.argmax(axis=1).astype(np.int32),
            confidence_N=probabilities_NK.max(axis=1).astype(np.float32),
            entropy_N=-(probabilities_NK * np.log(safe)).sum(axis=1, dtype=np.float32),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.predicted_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """A sample of images that the champion was trained for."""

    features_NF: npt.NDArray[np.float32]
    """Every column by itself in ascending order."""
    answers: Mapping[int, Answers] = field(default_factory=dict)
    """Version → its answers to held-out images; on those it was trained with it is too sure."""

    def __post_init__(self) -> None:
        """Sort the columns: all that is compared are their distributions."""
        object.__setattr__(self, "features_NF", np.sort(self.features_NF, axis=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What requests are compared with."""

    populations: tuple[Population, ...]
    """One or two: images that were ingested, and live requests."""
    feature_names: tuple[str, ...]
    grid: tuple[int, int]
    """The first rows·columns features are the cells of this grid."""
    class_names: tuple[str, ...]

    def answers(self, version: int) -> list[Answers]:
        """Return a version's answers to each population; it may know the first one alone."""
        return [known.answers[version] for known in self.populations if version in known.answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Requests of one stretch of time."""

    features_NF: npt.NDArray[np.float32]
    """No rows if the log holds none: then only answers are tested."""
    answers: Mapping[int, Answers] = field(default_factory=dict)
