"""Logged requests once more, answered by a candidate in this process: no caller waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.serving.bundle import Card, read_card
from lib.serving.predictor import Predictor, load_predictor
from lib.storage import Storage
from lib.watch.gates import Limits, Outcome, Paired, Verdict, judge_replay
from lib.watch.rollout_world import Replayed

_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """What callers sent, and what the champion said to it."""

    images_NHWC: npt.NDArray[np.uint8]
    champion_N: npt.NDArray[np.int64]
    """Numbers of classes."""
    label_N: npt.NDArray[np.int64]
    """True ones; -1 where unknown."""
    num_recent_labels: int = 0
    """That came in lately, for whichever requests."""


def replay(
    storage: Storage,
    candidate: str,
    champion: str,
    read: Callable[[Card], Logged],
    limits: Limits,
) -> Replayed:
    """Load the candidate, let it answer what the champion answered, and judge.

    `candidate` and `champion` are bundles; `read` finds what the latter answered. A candidate that
    can't be loaded, raises, or gives numbers that are no probabilities is a breach, like a worse
    accuracy where there are labels, or else too many other labels than the champion's.
    """
    card, standing = read_card(storage, candidate), read_card(storage, champion)
    for what in ("shape", "class_names"):
        if getattr(card, what) != getattr(standing, what):
            return _refused(
                f"its {what} is {getattr(card, what)}, the champion's {getattr(standing, what)}"
            )
    try:
        predictor = load_predictor(storage, candidate, card)
    # Whatever a runtime raises over a model is the reason to refuse it.
    except Exception as error:
        return _refused(f"it can't be loaded: {_one_line(error)}")
    logged = read(standing)
    if not len(logged.images_NHWC):
        return Replayed(
            verdict=Verdict(
                outcome=Outcome.PASS,
                reason="nothing replayed: no images of the champion's requests are logged",
            )
        )
    return answer_again(predictor, logged, limits)


def answer_again(predictor: Predictor, logged: Logged, limits: Limits) -> Replayed:
    """Return the verdict on what a predictor makes of logged images."""
    answers: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(logged.images_NHWC), _BATCH):
        batch = logged.images_NHWC[start : start + _BATCH]
        try:
            probabilities_NK = predictor.predict(batch)
        except Exception as error:
            return _refused(f"it fails on logged images: {_one_line(error)}")
        if not np.isfinite(probabilities_NK).all():
            return _refused("it answers logged images with numbers that are no probabilities")
        answers.append(probabilities_NK.argmax(axis=1).astype(np.int64))
    ours_N, known = np.concatenate(answers), logged.label_N >= 0
    right, standing = ours_N == logged.label_N, logged.champion_N == logged.label_N
    differs = (ours_N != logged.champion_N).astype(np.float64)
    expects_labels = max(int(known.sum()), logged.num_recent_labels) >= limits.min_labels
    verdict = judge_replay(
        Paired(
            harm=standing[known].astype(np.float64) - right[known],
            candidate=_mean(right[known]),
            champion=_mean(standing[known]),
        ),
        Paired(harm=differs, candidate=_mean(differs), champion=0.0),
        limits,
        expects_labels=expects_labels,
    )
    return Replayed(verdict=verdict, expects_labels=expects_labels)


def _refused(reason: str) -> Replayed:
    return Replayed(verdict=Verdict(outcome=Outcome.BREACH, reason=reason))


def _mean(values: npt.NDArray[np.generic]) -> float | None:
    return float(values.astype(np.float64).mean()) if len(values) else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
