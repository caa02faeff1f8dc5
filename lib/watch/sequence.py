"""How evidence of drift adds up from window to window, and how seldom that cries wolf.

A window's own alarm is false in `drift.LEVEL` of the windows, which is often where there are
hundreds a day. What sets a retrain off is therefore an e-detector (Shin, Ramdas, Rinaldo,
"E-detectors", 2023), a CUSUM of bets: a window with p-value p multiplies the evidence by 0.5 / √p,
whose mean is at most 1 without drift, and evidence below 1 starts again at 1. One window with gross
drift passes the threshold at once, some with a little drift do so together.

Drift too slow for a window is looked for in blocks of windows, tested as one, with evidence of
their own. By Doob's inequality the chance that either passes its threshold within t windows without
drift is at most t times `LONG_RUN_LEVEL`, however often one looks. (All windows are compared with
one sample of the training data; its error is part of what `drift` tolerates.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

LONG_RUN_LEVEL = 0.001
"""Bound on the false alarms a window, in the long run."""
BLOCK = 8
"""Windows that are also tested together."""
THRESHOLD = 2 / LONG_RUN_LEVEL
"""Of either evidence: each may spend half of the level."""
_MOST = 16 * THRESHOLD
"""So that an alarm ends some windows after the drift does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Evidence of drift up to now: 1 is none."""

    windows: int = 0
    """Tested since the reference is what it is."""
    alarms: int = 0
    """Of the windows, at their own level."""
    sudden: float = 1.0
    slow: float = 1.0

    @property
    def alarm(self) -> bool:
        """Whether it is drift, looked at as often as one likes."""
        return max(self.sudden, self.slow) >= THRESHOLD

    @property
    def ends_block(self) -> bool:
        """Whether the newest window completes a block."""
        return self.windows > 0 and self.windows % BLOCK == 0

    def after_window(self, p_value: float, *, alarm: bool) -> Evidence:
        """Return the evidence after one more window."""
        return replace(
            self,
            windows=self.windows + 1,
            alarms=self.alarms + alarm,
            sudden=_grown(self.sudden, p_value),
        )

    def after_block(self, p_value: float) -> Evidence:
        """Return the evidence after one more block of windows."""
        return replace(self, slow=_grown(self.slow, p_value))

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as JSON types, with what follows from it."""
        return {**asdict(self), "threshold": THRESHOLD, "alarm": self.alarm}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evidence:
        """Rebuild the evidence from its JSON."""
        return cls(**{name: content[name] for name in ("windows", "alarms", "sudden", "slow")})


def bet(p_value: float) -> float:
    """Return an e-value: its mean is at most 1 if p-values are not too often small."""
    return 0.5 / math.sqrt(max(p_value, 1e-30))


def _grown(evidence: float, p_value: float) -> float:
    return min(max(evidence, 1.0) * bet(p_value), _MOST)
