"""The gates of a rollout: what was seen in, verdict out. Pure; the statistics are in `betting`.

Each gate asks two questions at every look, both with sequential tests, so that looking often does
no harm. Is the candidate worse than the champion by more than a margin? Then it is a breach. Is it
shown not to be worse by as much as a limit? Then the gate passes. Until one of them is answered, it
waits: few answers, or none, never let a candidate through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from lib.watch.betting import Blocks, Floats, mean_above, mean_below, rate_above, rate_below

ERRORS, LATENCY, ACCURACY = "error_rate", "p99_latency", "accuracy"
DISAGREEMENT, CONFIDENCE = "disagreement", "confidence"
_SHARE_OF_ALPHA = {
    ERRORS: 1 / 4,
    LATENCY: 1 / 4,
    ACCURACY: 1 / 4,
    DISAGREEMENT: 1 / 8,
    CONFIDENCE: 1 / 8,
}
_PER_STAGE = (ERRORS, LATENCY)
"""What may depend on the load is shown anew in every stage; what a model knows does not change."""


class Outcome(StrEnum):
    """What a gate, or all of them, say."""

    PASS = "pass"
    BREACH = "breach"
    WAIT = "wait"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much worse than the champion a candidate may be, and how sure one must be."""

    max_disagreement: float
    """Share of the labels. Two models that are right as often as on their test sets disagree on at
    most the sum of their errors; more means that one of them no longer is."""
    error_margin: float = 0.001
    error_limit: float = 0.02
    latency_factor: float = 1.25
    """Times the champion's p99: how slow counts as too slow."""
    latency_floor_ms: float = 1.0
    """At least so much above the champion's p99, for what takes microseconds."""
    latency_margin: float = 0.01
    """Share of answers that may be too slow, beyond the champion's own: a p99 is a share of 1 %."""
    latency_limit: float = 0.05
    accuracy_margin: float = 0.005
    accuracy_limit: float = 0.03
    disagreement_slack: float = 0.05
    confidence_margin: float = 0.05
    confidence_limit: float = 0.15
    alpha: float = 0.05
    """Chance of stopping a candidate that is not worse, in a whole rollout."""
    beta: float = 0.05
    """Chance, for each gate, of passing what is worse by the limit."""
    min_labels: int = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Both versions on the same images, as a harm in −1…1 for each."""

    harm: Floats
    """Positive where the candidate is worse."""
    candidate: float | None
    """Mean of the candidate, for people."""
    champion: float | None


NOTHING = Paired(harm=np.zeros(0), candidate=None, champion=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What was seen of the candidate and of the champion at the same time."""

    requests: int
    """That the candidate answered in this stage, each once, however many images it had."""
    champion_requests: int
    errors: Blocks
    """In this stage, like the latency."""
    latency: Blocks | None
    """Hits are answers slower than the champion's p99 with the factor; None where the champion
    answers nobody."""
    candidate_p99_ms: float | None = None
    champion_p99_ms: float | None = None
    accuracy: Paired = NOTHING
    """Over the whole rollout, like the two below."""
    disagreement: Paired = NOTHING
    confidence: Paired = NOTHING
    newest_us: int | None = None
    """When the candidate answered last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one gate says, and why."""

    name: str
    verdict: Outcome
    value: float | None
    """Of the candidate."""
    champion: float | None
    limit: float
    """A candidate that is worse than the champion by more than this is stopped."""
    samples: int
    worse: float
    """Evidence that it is, from 0 for none to 1 for enough, on the scale of the logarithm."""
    not_worse: float
    """Evidence for passing, on the same scale."""

    def describe(self) -> str:
        """Return the finding for people."""
        value, champion = (_number(self.name, number) for number in (self.value, self.champion))
        than = "" if self.name == DISAGREEMENT else f" (champion {champion})"
        return f"{self.name} {self.verdict}: {value}{than}, {self.samples} samples"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What all gates say together."""

    outcome: Outcome
    reason: str
    findings: tuple[Finding, ...] = field(default=())

    def to_json(self) -> list[dict[str, Any]]:
        """Return the findings as JSON types."""
        return [
            {
                "name": found.name,
                "verdict": found.verdict.value,
                "value": found.value,
                "champion": found.champion,
                "limit": found.limit,
                "samples": found.samples,
                "worse": round(found.worse, 3),
                "not_worse": round(found.not_worse, 3),
            }
            for found in self.findings
        ]


def judge(
    evidence: Evidence,
    limits: Limits,
    *,
    min_requests: int,
    num_stages: int,
    expects_labels: bool = False,
) -> Verdict:
    """Return the verdict on a stage.

    Args:
        evidence: What was seen.
        limits: What is allowed.
        min_requests: Answers of the candidate before it can pass.
        num_stages: Stages with live evidence in the rollout, over which `alpha` is shared.
        expects_labels: Whether true labels come in, so that accuracy decides, however late they
            come. Else accuracy decides as soon as there are enough labels, and until then
            disagreement and confidence do: a model trained for changed data must disagree.
    """
    findings = [_errors(evidence, limits, num_stages)]
    if evidence.latency is not None:
        findings.append(_latency(evidence, evidence.latency, limits, num_stages))
    if expects_labels or len(evidence.accuracy.harm) >= limits.min_labels:
        findings.append(_accuracy(evidence.accuracy, limits))
    else:
        findings.append(_disagreement(evidence.disagreement, limits))
        findings.append(_confidence(evidence.confidence, limits))
    return _together(findings, evidence.requests, min_requests)


def judge_replay(
    accuracy: Paired, disagreement: Paired, limits: Limits, *, expects_labels: bool = False
) -> Verdict:
    """Return the verdict on logged requests: only a breach stops, there is nothing to wait for.

    Where labels are expected, and these requests have too few of them yet, nothing is said.
    """
    if len(accuracy.harm) >= limits.min_labels:
        found = _accuracy(accuracy, limits)
    elif expects_labels:
        reason = f"{len(disagreement.harm)} requests answered; their labels are yet to come"
        return Verdict(outcome=Outcome.PASS, reason=reason)
    else:
        found = _disagreement(disagreement, limits)
    if found.verdict is Outcome.BREACH:
        return _together([found], 0, 0)
    # It may well wait for more, which only live requests can give.
    reason = f"{found.name}: nothing against it in {found.samples} logged requests"
    return Verdict(outcome=Outcome.PASS, reason=reason, findings=(found,))


def _together(findings: list[Finding], requests: int, min_requests: int) -> Verdict:
    breached = [found for found in findings if found.verdict is Outcome.BREACH]
    waiting = [found for found in findings if found.verdict is Outcome.WAIT]
    if breached:
        outcome, reason = Outcome.BREACH, "; ".join(found.describe() for found in breached)
    elif requests < min_requests:
        outcome, reason = Outcome.WAIT, f"{requests} of {min_requests} answers"
    elif waiting:
        outcome, reason = Outcome.WAIT, "; ".join(found.describe() for found in waiting)
    else:
        outcome, reason = Outcome.PASS, f"all gates passed after {requests} answers"
    return Verdict(outcome=outcome, reason=reason, findings=tuple(findings))


def _errors(evidence: Evidence, limits: Limits, num_stages: int) -> Finding:
    arms = evidence.errors
    return _finding(
        ERRORS,
        limits,
        num_stages,
        value=_rate(arms.candidate_hits, arms.candidate),
        champion=_rate(arms.champion_hits, arms.champion),
        limit=limits.error_margin,
        samples=int(arms.candidate.sum()),
        worse=rate_above(arms, margin=limits.error_margin),
        not_worse=rate_below(arms, limit=limits.error_limit),
    )


def _latency(evidence: Evidence, arms: Blocks, limits: Limits, num_stages: int) -> Finding:
    return _finding(
        LATENCY,
        limits,
        num_stages,
        value=evidence.candidate_p99_ms,
        champion=evidence.champion_p99_ms,
        limit=limits.latency_factor,
        samples=int(arms.candidate.sum()),
        worse=rate_above(arms, margin=limits.latency_margin),
        not_worse=rate_below(arms, limit=limits.latency_limit),
    )


def _accuracy(pairs: Paired, limits: Limits) -> Finding:
    margin, limit = limits.accuracy_margin, limits.accuracy_limit
    return _paired(ACCURACY, pairs, limits, margin, limit, lowest=-1.0)


def _disagreement(pairs: Paired, limits: Limits) -> Finding:
    margin = min(limits.max_disagreement, 0.9)
    limit = min(margin + limits.disagreement_slack, 0.95)
    return _paired(DISAGREEMENT, pairs, limits, margin, limit, lowest=0.0)


def _confidence(pairs: Paired, limits: Limits) -> Finding:
    margin, limit = limits.confidence_margin, limits.confidence_limit
    return _paired(CONFIDENCE, pairs, limits, margin, limit, lowest=-1.0)


def _paired(
    name: str, pairs: Paired, limits: Limits, margin: float, limit: float, *, lowest: float
) -> Finding:
    return _finding(
        name,
        limits,
        1,
        value=pairs.candidate,
        champion=pairs.champion,
        limit=margin,
        samples=len(pairs.harm),
        worse=mean_above(pairs.harm, margin=margin, lowest=lowest),
        not_worse=mean_below(pairs.harm, limit=limit, highest=1.0),
    )


def enough(name: str, limits: Limits, num_stages: int) -> float:
    """Return the logarithm of the e-value at which a gate stops the candidate."""
    share = _SHARE_OF_ALPHA[name] / (num_stages if name in _PER_STAGE else 1)
    return math.log(1 / (limits.alpha * share))


def _finding(
    name: str,
    limits: Limits,
    num_stages: int,
    *,
    worse: Floats,
    not_worse: Floats,
    **seen: Any,
) -> Finding:
    # The newest of each: what was seen in an order that later labels change counts as a whole.
    worse_now, not_worse_now = _last(worse), _last(not_worse)
    enough_to_stop, enough_to_pass = enough(name, limits, num_stages), math.log(1 / limits.beta)
    verdict = Outcome.WAIT
    if worse_now >= enough_to_stop:
        verdict = Outcome.BREACH
    elif not_worse_now >= enough_to_pass:
        verdict = Outcome.PASS
    return Finding(
        name=name,
        verdict=verdict,
        worse=min(1.0, max(0.0, worse_now / enough_to_stop)),
        not_worse=min(1.0, max(0.0, not_worse_now / enough_to_pass)),
        **seen,
    )


def _last(path: Floats) -> float:
    return float(path[-1]) if len(path) else 0.0


def _rate(hits: Any, answers: Any) -> float | None:
    total = int(answers.sum())
    return float(hits.sum()) / total if total else None


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "nothing yet"
    return f"{value:.2f} ms" if name == LATENCY else f"{100 * value:.2f} %"
