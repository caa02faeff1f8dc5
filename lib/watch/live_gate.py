"""Is a retrained candidate better than the champion on held-out labelled live requests?

Both answer the same rows, so only those count on which one is right and the other wrong. If they
were equally good, each would win such a row with probability one half (McNemar's test, "Note on the
sampling error of the difference between correlated proportions or percentages", Psychometrika 12,
1947), which is computed exactly. Equal is not better: then the champion stays.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FALSE_PASS_RATE = 0.05
"""Chance that a candidate that is no better passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveVerdict:
    """How candidate and champion did on the same rows."""

    rows: int
    candidate_accuracy: float
    champion_accuracy: float
    num_fixed: int
    """Rows that only the candidate gets right."""
    num_broken: int
    """Rows that only the champion gets right."""
    p_value: float
    """Chance of so many fixed rows, or more, if the two were equally good."""
    passed: bool

    def explain(self) -> str:
        """Return the verdict in a sentence."""
        verdict = "better" if self.passed else "not shown to be better"
        return (
            f"the candidate is {verdict} than the champion on {self.rows} held-out live requests: "
            f"accuracy {self.candidate_accuracy:.4f} to {self.champion_accuracy:.4f}, "
            f"{self.num_fixed} rows fixed, {self.num_broken} broken, p = {self.p_value:.2g} (at "
            f"most {FALSE_PASS_RATE:g} passes)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return asdict(self)


def judge(
    labels_N: npt.NDArray[np.int64],
    candidate_N: npt.NDArray[np.int64],
    champion_N: npt.NDArray[np.int64],
) -> LiveVerdict:
    """Compare two versions' answers, class numbers, to the same labelled rows."""
    if not len(labels_N):
        raise ValueError("no held-out rows: nothing can be judged")
    candidate, champion = candidate_N == labels_N, champion_N == labels_N
    fixed, broken = int((candidate & ~champion).sum()), int((champion & ~candidate).sum())
    differing = fixed + broken
    tail = sum(math.comb(differing, wins) for wins in range(fixed, differing + 1))
    p_value = tail / 2**differing
    return LiveVerdict(
        rows=len(labels_N),
        candidate_accuracy=float(candidate.mean()),
        champion_accuracy=float(champion.mean()),
        num_fixed=fixed,
        num_broken=broken,
        p_value=p_value,
        passed=p_value <= FALSE_PASS_RATE,
    )
