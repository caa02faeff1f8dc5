"""The scorecard follows the evidence: what is taken away costs its points, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.serving import policy
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import scorecard
from lib.watch.dossier import (
    DAY_S,
    Dossier,
    attest,
    ci_text,
    policies_of,
    project_files,
    requests_of,
    rollouts_of,
)
from lib.watch.scorecard import AUTOMATED, CHECKS, MANUAL, OPEN, SECTIONS, score
from tests.dossiers import NOW_S, facts, full_dossier

ROOT = Path(__file__).parents[2]
FULL = full_dossier()
BY_HAND_ALONE = {"data-requirements", "data-privacy", "model-inclusion"}
Change = Callable[[Dossier], dict[str, Any]]


def lost(changes: dict[str, Any]) -> set[str]:
    """Return the checks that do not hold any more."""
    before = {c.id for c in score(FULL).checked if c.how == AUTOMATED}
    after = {c.id for c in score(replace(FULL, **changes)).checked if c.how == AUTOMATED}
    assert after <= before
    return before - after


def other_facts(**changes: Any) -> dict[str, Any]:
    return {"facts": {**FULL.facts, **changes}}


def metrics(**changes: float | None) -> dict[str, Any]:
    return other_facts(metrics={**FULL.facts["metrics"], **changes})


def test_the_rubric_has_seven_checks_in_each_of_four_sections() -> None:
    assert len(CHECKS) == 28
    assert [sum(check.section == section for check in CHECKS) for section in SECTIONS] == [7] * 4
    assert len({check.id for check in CHECKS}) == 28
    assert {check.id for check in CHECKS if check.find is None} == BY_HAND_ALONE


def test_with_all_evidence_every_automated_check_counts() -> None:
    card = score(FULL)
    assert {c.id for c in card.checked if c.how == OPEN} == BY_HAND_ALONE
    assert card.sections == {"data": 5, "model": 6, "infrastructure": 7, "monitoring": 7}
    assert card.score == 5
    assert card.meaning.startswith("strong")
    json.dumps(card.to_json())


def test_without_evidence_there_is_nothing() -> None:
    card = score(Dossier(model="digits", version=1, now_s=NOW_S))
    assert card.score == 0
    assert all(checked.points == 0 and checked.todo for checked in card.checked)
    assert "research project" in card.meaning


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"manifests": ()}, {"data-schema", "data-beneficial", "infra-reproducible"}),
        ({"num_missing_shards": 1}, {"data-schema"}),
        ({"trials": ()}, {"model-tuned"}),
        ({"trials": FULL.trials[:1]}, {"model-tuned"}),
        ({"retrains": ()}, {"data-agility", "model-staleness"}),
        ({"evaluation": None}, {"model-slices"}),
        ({"policies": ()}, {"infra-canaried", "infra-rollback"}),
        ({"policies": FULL.policies[:1]}, {"infra-canaried", "infra-rollback"}),
        ({"policies": FULL.policies[3:]}, {"infra-canaried"}),
        (
            {"watch": {}},
            {"model-correlates", "monitor-inputs", "monitor-stale", "monitor-quality"},
        ),
        (
            {"requests": {}},
            {"infra-debuggable", "monitor-stable", "monitor-performance"},
        ),
        ({"requests": {**FULL.requests, "not_finite": 1}}, {"monitor-stable"}),
        ({"requests": {**FULL.requests, "p99_ms": 17.0}}, {"monitor-performance"}),
        (
            {"ci": ""},
            {"data-code", "infra-reproducible", "infra-unit", "infra-integration"},
        ),
        ({"files": FULL.files - {"tests/e2e/test_line.py"}}, {"infra-integration"}),
        ({"files": FULL.files - {".github/dependabot.yml"}}, {"monitor-dependencies"}),
        (other_facts(code={"commit": "c", "dirty": True}), {"model-reviewed"}),
        (other_facts(code={"commit": None}), {"model-reviewed", "infra-reproducible"}),
        (other_facts(gap={"value": 0.02, "holds": False}), {"infra-validated"}),
        (other_facts(created_ms=int((NOW_S - 40 * DAY_S) * 1000)), {"monitor-stale"}),
        (metrics(baseline_val_accuracy=0.99), {"model-simpler"}),
        (metrics(onnx_max_difference=0.2), {"monitor-skew"}),
        (other_facts(runtime={"serves": "onnxruntime", "images_per_s": {}}), {"data-cost"}),
    ],
)
def test_what_is_taken_away_costs_its_points(changes: dict[str, Any], expected: set[str]) -> None:
    assert lost(changes) == expected


def test_an_old_state_of_the_monitor_says_nothing_of_now() -> None:
    old = {**FULL.watch, "time": NOW_S - 2 * DAY_S}
    assert lost({"watch": old}) == {"monitor-stale", "monitor-quality"}
    drift = {**FULL.watch["drift"], "end": NOW_S - 2 * DAY_S}
    assert lost({"watch": {**FULL.watch, "drift": drift}}) == {"monitor-inputs"}


def test_live_accuracy_far_from_test_is_seen() -> None:
    seen = {"labels": 500, "accuracy": 0.8, "low": 0.76, "high": 0.83, "shadow": False}
    changed = {"watch": {**FULL.watch, "versions": {"4": seen}}}
    assert lost(changed) == {"model-correlates", "monitor-quality"}
    changed = {"watch": {**FULL.watch, "versions": {"3": seen}}}
    assert lost(changed) == {"model-correlates", "monitor-quality"}


def test_a_weak_class_is_named() -> None:
    evaluation = json.loads(json.dumps(FULL.evaluation))
    evaluation["per_class_accuracy"]["7"] = 0.7
    card = score(replace(FULL, evaluation=evaluation))
    (slices,) = (c for c in card.checked if c.id == "model-slices")
    assert slices.how == OPEN
    assert "worst class 7: 0.7000" in slices.found


def test_what_is_done_by_hand_counts_half_until_it_is_old(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    attest(storage, "digits", "data-privacy", who="ada", note="bucket is private")
    attested = {"data-privacy": storage.read_json("scorecard/digits/data-privacy.json")}
    attested["data-privacy"]["when_s"] = NOW_S - 3 * DAY_S
    card = score(replace(FULL, attested=attested))
    assert card.sections["data"] == 5.5
    (privacy,) = (c for c in card.checked if c.id == "data-privacy")
    assert (privacy.how, privacy.points, privacy.todo) == (MANUAL, 0.5, "")
    assert "ada, 3 days ago: bucket is private" in privacy.found
    attested["data-privacy"]["when_s"] = NOW_S - (scorecard.ATTESTED_DAYS + 1) * DAY_S
    assert score(replace(FULL, attested=attested)).sections["data"] == 5


def test_the_score_is_that_of_the_weakest_section() -> None:
    card = score(replace(FULL, watch={}, requests={}))
    assert card.score == card.sections["monitoring"] == 2
    assert facts(0.9)["version"] == 4


def test_the_projects_own_files_are_looked_at(tmp_path: Path) -> None:
    files = project_files(ROOT)
    assert {"requirements.txt", "tests/e2e/test_line.py"} <= files
    assert "make test" in ci_text(ROOT)
    assert project_files(tmp_path) == frozenset()
    assert ci_text(tmp_path) == ""
    card = score(replace(FULL, files=files, ci=ci_text(ROOT)))
    held = {checked.id for checked in card.checked if checked.how == AUTOMATED}
    assert {"data-code", "infra-unit", "infra-integration", "infra-reproducible"} <= held


def test_traffic_and_rollouts_of_another_version_of_the_same_number_are_left_out(
    tmp_path: Path,
) -> None:
    storage, made = Storage(str(tmp_path)), None
    for bundle in ("models/digits/4-before", "models/digits/4-now"):
        traffic = ModelTraffic(weights={4: 1}, bundles={4: bundle}, champion=4)
        made = policy.commit(
            storage, made, {"digits": traffic}, default_model="digits", who="ada", why=bundle
        )
    for number, bundles in enumerate(({"4": "models/digits/4-before"}, {"4": bundle}, None)):
        content = {"id": f"{number}", "candidate": 4}
        content |= {"bundles": bundles} if bundles else {}
        storage.write_json(f"rollouts/digits/history/{number}.json", content)
    assert [made["why"] for made in policies_of(storage, "digits", 4, bundle)] == [bundle]
    # Of older releases, the number is all there is.
    assert [made["id"] for made in rollouts_of(storage, "digits", 4, bundle)] == ["1", "2"]


def test_requests_of_a_version_are_summed_up() -> None:
    times = [int((NOW_S - age * DAY_S) * 1e6) for age in (3, 2, 0.5, 0.2, 0.1)]
    table = pa.table(
        {
            "time_us": pa.array(times, pa.int64()),
            "version": pa.array([4, 4, 4, 4, 3], pa.int32()),
            "shadow": [False, False, False, True, False],
            "latency_ms": pa.array([5.0, 7.0, 9.0, 99.0, 99.0], pa.float32()),
            "status": pa.array([200, 500, 200, 200, 200], pa.int32()),
            "probabilities": pa.array(
                [[0.5, 0.5], None, [float("nan"), 1.5], [0.1], [0.1]], pa.list_(pa.float32())
            ),
        }
    )
    found = requests_of(table, 4, NOW_S)
    assert (found["rows"], found["rows_of_a_day"], found["failed"]) == (3, 1, 1)
    assert (found["not_finite"], found["out_of_range"]) == (1, 1)
    assert found["p99_ms"] == 9.0
    assert found["p50_before_ms"] == 6.0
    assert requests_of(table, 9, NOW_S) == {}
    assert np.isfinite(found["p99_before_ms"])
