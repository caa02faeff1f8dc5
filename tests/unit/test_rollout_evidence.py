"""From a table like the prediction log's to evidence, and candidates on logged images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.serving.bundle import Card, write_bundle
from lib.storage import Storage
from lib.watch.evidence import COLUMNS, Stage, gather
from lib.watch.gates import ERRORS, LATENCY, Limits, Outcome, judge
from lib.watch.replay import Logged, answer_again, replay
from tests.unit.serving_parts import card

LIMITS = Limits(max_disagreement=0.04)
CHAMPION, CANDIDATE = 3, 4
CANARY = Stage(candidate=CANDIDATE, champion=CHAMPION, started_us=0, is_shadow=False)
SHADOW = Stage(candidate=CANDIDATE, champion=CHAMPION, started_us=0, is_shadow=True)
SCHEMA = {
    "time_us": pa.int64(),
    "request_id": pa.string(),
    "index": pa.int32(),
    "version": pa.int32(),
    "shadow": pa.bool_(),
    "latency_ms": pa.float32(),
    "predicted": pa.int32(),
    "probabilities": pa.list_(pa.float32()),
    "status": pa.int32(),
    "label": pa.int32(),
}


class Log:
    """Rows as `lib.watch.predictions.joined` gives them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, version: int, request_id: str = "", *, predicted: int = 0, **other: Any) -> None:
        time_us = len(self.rows)
        sure = [0.1, 0.1, 0.1]
        sure[max(predicted, 0)] = 0.8
        row = {
            "time_us": time_us,
            "request_id": request_id or f"r{time_us}",
            "index": 0,
            "version": version,
            "shadow": False,
            "latency_ms": 5.0,
            "predicted": predicted,
            "probabilities": None if predicted < 0 else sure,
            "status": 200 if predicted >= 0 else 500,
            "label": None,
        }
        self.rows.append({**row, **other})

    @property
    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self.rows, pa.schema(list(SCHEMA.items())))


def test_the_fake_has_the_columns_that_are_asked_for() -> None:
    assert {*COLUMNS, "label"} == set(SCHEMA)


def test_an_empty_log_is_no_evidence() -> None:
    seen = gather(Log().table, CANARY, LIMITS)
    assert (seen.requests, seen.champion_requests, seen.newest_us) == (0, 0, None)
    assert len(seen.accuracy.harm) == len(seen.errors.candidate) == 0


def test_requests_and_errors_are_counted_per_version_since_the_stage_began() -> None:
    log = Log()
    for number in range(40):
        log.add(CANDIDATE, predicted=-1 if number % 4 == 0 else 0)
        log.add(CHAMPION)
        log.add(9, predicted=-1)
        # The caller's own mistake.
        log.add(CANDIDATE, predicted=-1, status=422)
    stage = Stage(candidate=CANDIDATE, champion=CHAMPION, started_us=80, is_shadow=False)
    seen = gather(log.table, stage, LIMITS)
    assert (seen.requests, seen.champion_requests) == (20, 20)
    assert (seen.errors.candidate.sum(), seen.errors.candidate_hits.sum()) == (20, 5)
    assert (seen.errors.champion.sum(), seen.errors.champion_hits.sum()) == (20, 0)
    assert seen.newest_us == log.rows[-4]["time_us"]


def test_pairs_are_images_that_both_answered_one_as_a_shadow() -> None:
    log = Log()
    for number in range(10):
        label = 1 if number < 6 else None
        log.add(CHAMPION, f"q{number}", predicted=1, label=label)
        log.add(CANDIDATE, f"q{number}", predicted=1 if number else 2, shadow=True, label=label)
    log.add(CHAMPION, "failed", predicted=1)
    log.add(CANDIDATE, "failed", predicted=-1, shadow=True)
    log.add(CHAMPION, "alone", predicted=1, label=1)
    for _ in range(2):
        log.add(CHAMPION, "twice", predicted=1, label=1)
        log.add(CANDIDATE, "twice", predicted=2, shadow=True, label=1)
    # Another image of a request with several.
    log.add(CHAMPION, "q0", predicted=0, index=1)
    log.add(CANDIDATE, "q0", predicted=0, index=1, shadow=True)
    seen = gather(log.table, SHADOW, LIMITS)
    assert seen.disagreement.candidate == pytest.approx(1 / 11)
    assert sorted(seen.accuracy.harm) == [0, 0, 0, 0, 0, 1]
    assert (seen.accuracy.candidate, seen.accuracy.champion) == (pytest.approx(5 / 6), 1.0)
    assert len(seen.confidence.harm) == 11
    assert seen.latency is None
    assert seen.requests == 13


def test_a_canarys_pairs_come_from_the_champions_copies() -> None:
    log = Log()
    for number in range(5):
        log.add(CANDIDATE, f"q{number}", predicted=2, label=1)
        log.add(CHAMPION, f"q{number}", predicted=1, shadow=True, label=1)
    seen = gather(log.table, CANARY, LIMITS)
    assert seen.accuracy.harm.tolist() == [1.0] * 5


def test_slow_is_what_is_beyond_the_champions_p99_of_the_answers_before() -> None:
    rng = np.random.default_rng(0)
    log = Log()
    for _ in range(1500):
        log.add(CHAMPION, latency_ms=float(rng.uniform(4, 6)))
    began = len(log.rows)
    for number in range(300):
        log.add(CHAMPION, latency_ms=float(rng.uniform(4, 6)))
        log.add(CANDIDATE, latency_ms=9.0 if number % 3 == 0 else 7.0)
        # A shadow's time is another thing.
        log.add(CHAMPION, latency_ms=90.0, shadow=True)
    stage = Stage(candidate=CANDIDATE, champion=CHAMPION, started_us=began, is_shadow=False)
    seen = gather(log.table, stage, LIMITS)
    assert seen.latency is not None
    assert (seen.latency.candidate.sum(), seen.latency.candidate_hits.sum()) == (300, 100)
    assert seen.latency.champion_hits.sum() == 0
    assert (seen.candidate_p99_ms, seen.champion_p99_ms) == (
        pytest.approx(9.0),
        pytest.approx(6.0, abs=0.1),
    )
    # Without answers before there is nothing to compare with yet.
    early = Stage(candidate=CANDIDATE, champion=CHAMPION, started_us=0, is_shadow=False)
    few = gather(log.table.slice(began - 50, 100), early, LIMITS)
    assert few.latency is not None
    assert few.latency.candidate.sum() == 0


def batches(failing: Any, *, size: int = 32, **columns: Any) -> pa.Table:
    """As many requests of `size` images as there are flags, the versions by turns."""
    num = len(failing)
    request, index = np.repeat(np.arange(num), size), np.tile(np.arange(size), num)
    failed = np.asarray(failing)[request]
    given = {
        "time_us": request,
        "request_id": [f"r{number}" for number in request],
        "index": index,
        "version": np.where(request % 2, CANDIDATE, CHAMPION),
        "shadow": np.zeros(len(request), bool),
        "latency_ms": np.full(len(request), 5.0),
        "predicted": np.where(failed, -1, 0),
        "probabilities": [None if one else [0.8, 0.1, 0.1] for one in failed],
        "status": np.where(failed, 500, 200),
        "label": [None] * len(request),
    }
    schema = pa.schema(list(SCHEMA.items()))
    return pa.table({**given, **columns}, schema=schema)


def outcomes(table: pa.Table) -> dict[str, Outcome]:
    verdict = judge(gather(table, CANARY, LIMITS), LIMITS, min_requests=200, num_stages=6)
    return {found.name: found.verdict for found in verdict.findings}


def test_a_failed_batch_is_one_failed_request() -> None:
    failing = np.zeros(1200, bool)
    # One of 200 for either version, the candidate first.
    failing[101::400] = failing[300::400] = True
    table = batches(failing)
    assert failing[1::2].sum() == failing[::2].sum() == 3
    seen = gather(table, CANARY, LIMITS)
    assert (seen.requests, seen.champion_requests) == (600, 600)
    assert (seen.errors.candidate_hits.sum(), seen.errors.champion_hits.sum()) == (3, 3)
    for num_requests in range(100, 1201, 100):
        assert outcomes(table.slice(0, 32 * num_requests))[ERRORS] is not Outcome.BREACH


def test_a_slow_batch_is_one_slow_request() -> None:
    latency_ms = np.full(800, 5.0)
    latency_ms[501::200] = latency_ms[600::200] = 50.0
    table = batches(np.zeros(800, bool), latency_ms=np.repeat(latency_ms, 32))
    seen = gather(table, CANARY, LIMITS)
    assert seen.latency is not None
    assert seen.latency.candidate_hits.sum() == 2
    assert outcomes(table)[LATENCY] is not Outcome.BREACH


def test_few_batches_are_few_requests() -> None:
    few = gather(batches(np.zeros(14, bool)), CANARY, LIMITS)
    assert (few.requests, few.newest_us) == (7, 13)
    verdict = judge(few, LIMITS, min_requests=200, num_stages=6)
    assert (verdict.outcome, verdict.reason) == (Outcome.WAIT, "7 of 200 answers")


class Predictor:
    """Says what it is told to; raises on images that begin with 255."""

    def __init__(self, answers: np.ndarray[Any, Any]) -> None:
        self._answers = list(answers)

    def predict(self, images_NHWC: Any) -> Any:
        if (images_NHWC[:, 0, 0, 0] == 255).any():
            raise RuntimeError("index out of\nbounds")
        mine = [self._answers.pop(0) for _ in images_NHWC]
        return np.eye(3, dtype=np.float32)[mine]


def logged(champion: Any, label: Any = None, *, first_pixel: int = 0) -> Logged:
    images = np.zeros((len(champion), 4, 6, 1), np.uint8)
    images[-1, 0, 0, 0] = first_pixel
    unknown = np.full(len(champion), -1)
    return Logged(
        images_NHWC=images,
        champion_N=np.asarray(champion),
        label_N=unknown if label is None else np.asarray(label),
    )


def test_logged_images_stop_what_raises_or_says_something_else() -> None:
    said = np.arange(500) % 3
    same = answer_again(Predictor(said), logged(said), LIMITS)
    assert (same.verdict.outcome, same.expects_labels) == (Outcome.PASS, False)
    raised = answer_again(Predictor(said), logged(said, first_pixel=255), LIMITS)
    assert raised.verdict.outcome is Outcome.BREACH
    assert "RuntimeError: index out of bounds" in raised.verdict.reason
    other = np.where(np.arange(500) % 5 == 0, (said + 1) % 3, said)
    found = answer_again(Predictor(other), logged(said), LIMITS)
    assert found.verdict.outcome is Outcome.BREACH
    assert found.verdict.findings[0].value == pytest.approx(0.2)
    # By the labels the candidate is the better one, and the champion the worse.
    right = answer_again(Predictor(other), logged(said, other), LIMITS)
    assert (right.verdict.outcome, right.expects_labels) == (Outcome.PASS, True)
    wrong = answer_again(Predictor(other), logged(said, said), LIMITS)
    assert wrong.verdict.outcome is Outcome.BREACH


def test_a_candidate_that_cannot_be_loaded_or_is_for_other_images_is_stopped(
    tmp_path: Path,
) -> None:
    storage = Storage(str(tmp_path))
    champion = write_bundle(storage, card(CHAMPION), b"x", None)

    def read(standing: Card) -> Logged:
        raise AssertionError("nothing to read for")

    broken = write_bundle(storage, card(CANDIDATE), b"broken", None)
    found = replay(storage, broken, champion, read, LIMITS)
    assert found.verdict.outcome is Outcome.BREACH
    assert "can't be loaded" in found.verdict.reason
    coloured = write_bundle(storage, card(5, channels=3), b"x", None)
    found = replay(storage, coloured, champion, read, LIMITS)
    assert "its shape is (4, 6, 3), the champion's (4, 6, 1)" in found.verdict.reason
