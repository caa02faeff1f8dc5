"""The generalisation guard: is a model worse on test than its validation promised?

A gap is validation accuracy minus test accuracy. Both are counts of hits, so by chance alone it
varies with the standard error of a difference of two proportions; Agresti and Caffo's ("Simple and
effective confidence intervals for proportions and differences of proportions result from adding
two successes and two failures", The American Statistician 54, 2000) is taken, which holds for
accuracies near 1 too. The two splits may differ in difficulty, and choosing by validation shifts
every gap upwards; both show in the gaps of the versions before, so a gap is compared with their
median. It is out of line if it is larger by more than z standard errors, the median's own error
counted in (variance π/2n of that of one gap). Once there are `MIN_HISTORY` versions, their robust
scatter (1.4826 · median absolute deviation) replaces the standard error where it is larger: rows
that are not independent, such as several pictures of one thing, scatter more than counts do.

A model on a data set without any version has nothing to be in line with: its gap is then said,
not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

FALSE_ALARM_RATE = 1e-4
"""Chance that an honest candidate is refused; for the best of n trials by validation at most n
times this."""
MIN_HISTORY = 5
"""Versions from which the scatter of their gaps is estimated."""
CHALLENGER_MARGIN = 0.005
"""How much test accuracy a challenger may lose against the champion, beyond chance."""
CHALLENGER_FALSE_ALARM_RATE = 0.05
"""Chance that a version that is worse by exactly the margin is kept from challenging."""

_Z = NormalDist().inv_cdf(1 - FALSE_ALARM_RATE)
_CHALLENGER_Z = NormalDist().inv_cdf(1 - CHALLENGER_FALSE_ALARM_RATE)
_MAD_TO_SIGMA = 1.4826
"""Of normally distributed values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How a version did on the two splits."""

    val_accuracy: float
    test_accuracy: float

    @property
    def gap(self) -> float:
        """Validation minus test: positive if the validation promised too much."""
        return self.val_accuracy - self.test_accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a gap is in line, and with what."""

    gap: float
    usual: float
    """The gap to be expected: the median of the versions before, 0 without any."""
    limit: float
    """The largest gap that is in line."""
    num_before: int

    @property
    def holds(self) -> bool:
        """Whether the gap is in line."""
        return self.gap <= self.limit

    def explain(self) -> str:
        """Return the verdict with its numbers, in points."""
        before = (
            f"the {self.num_before} version{'s' * (self.num_before > 1)} before on this data"
            if self.num_before
            else "chance alone, there being no version on this data"
        )
        return (
            f"validation promised {100 * self.gap:+.2f} points more than test holds; by {before} "
            f"{100 * self.usual:+.2f} are usual and at most {100 * self.limit:+.2f} in line"
        )


def judge(candidate: Scores, before: Sequence[Scores], *, val_rows: int, test_rows: int) -> Verdict:
    """Compare a candidate's gap with those of the versions before it on the same data."""
    gaps = [scores.gap for scores in before]
    usual = median(gaps) if gaps else 0.0
    scale = difference_error(candidate.val_accuracy, val_rows, candidate.test_accuracy, test_rows)
    if len(gaps) >= MIN_HISTORY:
        scatter = _MAD_TO_SIGMA * median(abs(gap - usual) for gap in gaps)
        scale = max(scale, scatter)
    inflation = math.sqrt(1 + math.pi / (2 * len(gaps))) if gaps else 1.0
    return Verdict(
        gap=candidate.gap,
        usual=usual,
        limit=usual + _Z * scale * inflation,
        num_before=len(gaps),
    )


def judge_all(
    history: Mapping[int, Scores], *, val_rows: int, test_rows: int
) -> dict[int, Verdict]:
    """Return each version's verdict given those with lower numbers."""
    numbers = sorted(history)
    return {
        number: judge(
            history[number],
            [history[earlier] for earlier in numbers[:index]],
            val_rows=val_rows,
            test_rows=test_rows,
        )
        for index, number in enumerate(numbers)
    }


def last_that_held(verdicts: Mapping[int, Verdict]) -> int | None:
    """Return the newest version whose gap was in line."""
    return max((number for number, verdict in verdicts.items() if verdict.holds), default=None)


def too_weak_to_challenge(candidate: float, champion: float, test_rows: int) -> str | None:
    """Return why a version should not challenge the champion, by test accuracy; None if it may.

    Both were measured on the same test rows, so their errors go together and the standard error
    of independent samples is more than there is: the gate errs towards letting a version try.
    """
    allowed = CHALLENGER_MARGIN + _CHALLENGER_Z * difference_error(
        champion, test_rows, candidate, test_rows
    )
    if champion - candidate <= allowed:
        return None
    return (
        f"its test accuracy {candidate:.4f} is {100 * (champion - candidate):.2f} points below "
        f"the champion's {champion:.4f} on the same rows (allowed: {100 * allowed:.2f})"
    )


def difference_error(accuracy_a: float, rows_a: int, accuracy_b: float, rows_b: int) -> float:
    """Return the standard error of the difference of two accuracies (Agresti and Caffo)."""
    return math.sqrt(_variance(accuracy_a, rows_a) + _variance(accuracy_b, rows_b))


def _variance(accuracy: float, rows: int) -> float:
    adjusted = (accuracy * rows + 1) / (rows + 2)
    return adjusted * (1 - adjusted) / (rows + 2)


def way_back(
    verdicts: Mapping[int, Verdict], champion: int | None, previous_champion: int | None
) -> str:
    """Return, as the end of a sentence, which version's gap held and how to have it back.

    Args:
        verdicts: By version.
        champion: What serves now.
        previous_champion: What `jobs.deploy rollback` would go back to.
    """
    held = last_that_held(verdicts)
    if held is None:
        return "no version's gap held so far: look at how validation and test were split"
    if champion is not None and champion in verdicts and verdicts[champion].holds:
        which = "" if champion == held else f"; the last version whose gap held is {held}"
        return f"version {champion}, the champion, whose gap held, serves on{which}"
    verb = "rollback" if held == previous_champion else f"promote {held}"
    return f"the last version whose gap held is {held}: `python -m jobs.deploy {verb}` restores it"
