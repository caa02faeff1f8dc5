"""The rollout drill: real processes, real requests, and candidates that turn out worse on the way.

One candidate was trained on wrong labels. The others answer as the champion does until they meet
marked images (see `tests.candidates`), which callers begin to send when the candidate is a canary:
what replay and shadow can't know yet.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from lib.data.direct import read_split
from lib.data.manifest import load_manifest
from lib.registry.evaluate import predict_all
from lib.registry.notes import EVIDENCE_TAG, REASON_TAG, ROLLOUT_TAG
from lib.serving.predictor import OnnxPredictor
from lib.serving.traffic import ModelTraffic
from tests.candidates import (
    ERRS_AT,
    RAISES_AT,
    erring,
    marked,
    raising,
    slow,
    trained_on_noise,
)
from tests.data_sources import mnist
from tests.e2e.callers import calling
from tests.e2e.clients import until
from tests.e2e.conftest import LiveLine
from tests.e2e.drills import ROLLOUT_S, Drill, left_as_it_was

pytestmark = pytest.mark.long

STEPS = ("--steps", "10,50,100", "--min-requests", "100", "--step-timeout", "300")
ERRS_NHW = marked(mnist("test")[0], ERRS_AT)
RAISES_NHW = marked(mnist("test")[0], RAISES_AT)


@pytest.fixture(scope="module")
def drill(line: LiveLine) -> Iterator[Drill]:
    with left_as_it_was(line) as made:
        yield made


def roll_out(drill: Drill, *arguments: str) -> subprocess.Popen[str]:
    return drill.start("jobs.rollout", *arguments)


def ended(process: subprocess.Popen[str]) -> tuple[int, Any]:
    """Return the exit code and the JSON of the last line."""
    output, _ = process.communicate(timeout=ROLLOUT_S)
    print(output)
    return process.returncode, json.loads(output.strip().splitlines()[-1])


def assert_taken_back(drill: Drill, version: int, before: ModelTraffic, gate: str) -> None:
    """The champion has everything again, and the version says why."""
    traffic = drill.traffic()
    assert traffic.champion == before.champion
    assert not traffic.weights.get(version)
    assert version not in traffic.bundles
    tags = drill.client.get_model_version(drill.line.model, str(version)).tags
    assert tags[ROLLOUT_TAG] == "rolled_back"
    assert gate in tags[REASON_TAG]
    evidence = json.loads(tags[EVIDENCE_TAG])
    assert [g["name"] for g in evidence["gates"] if g["verdict"] == "breach"] == [gate]
    champion = drill.client.get_model_version_by_alias(drill.line.model, "champion")
    assert int(champion.version) == before.champion


def test_an_equal_candidate_is_promoted_though_its_rollout_is_killed_on_the_way(
    drill: Drill,
) -> None:
    before = drill.traffic()
    version = drill.register(lambda model: model)
    with calling(drill.line, ERRS_NHW) as callers:
        process = roll_out(drill, str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert drill.traffic().weights[version] == 10
        code, result = ended(roll_out(drill, "--resume"))
        assert code == 0, result
    assert callers.failures == []
    assert (result["status"], result["champion"]) == ("promoted", version)
    traffic = drill.traffic()
    assert (traffic.champion, traffic.previous_champion) == (version, before.champion)
    assert traffic.shadows == {}
    name = drill.line.model
    assert int(drill.client.get_model_version_by_alias(name, "champion").version) == version
    assert drill.client.get_model_version(name, str(version)).tags[ROLLOUT_TAG] == "promoted"


@pytest.mark.parametrize(
    ("change", "share", "gate"),
    [(erring, 0.2, "accuracy"), (slow, 0.0, "p99_latency")],
    ids=["errs", "slow"],
)
def test_a_worse_candidate_is_taken_back_and_no_caller_sees_an_error(
    drill: Drill, change: Callable[[ModelProto], ModelProto], share: float, gate: str
) -> None:
    before = drill.traffic()
    version = drill.register(change)
    with calling(drill.line, ERRS_NHW) as callers:
        process = roll_out(drill, str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        callers.changed_share = share
        code, result = ended(process)
    assert callers.failures == []
    assert (code, result["error"], result["status"]) == (1, "RolloutError", "rolled_back")
    assert result["stage"].startswith("canary-")
    assert_taken_back(drill, version, before, gate)


def test_one_trained_on_noisy_labels_is_taken_back_on_its_accuracy(
    drill: Drill, tmp_path: Path
) -> None:
    before, card = drill.traffic(), drill.champion_card()
    manifest = load_manifest(drill.storage, card.data_digest)
    exported = trained_on_noise(drill.storage, manifest, tmp_path, share=0.2)
    images_NHWC, label_N = read_split(drill.storage, manifest, "test")
    answers_NK = predict_all(OnnxPredictor(exported.onnx_file), images_NHWC)
    accuracy = float(np.mean(answers_NK.argmax(axis=1) == label_N))
    print(f"test accuracy: {accuracy:.4f}, the champion's {card.test_accuracy:.4f}")
    assert accuracy < card.test_accuracy - 0.05
    version = drill.add(
        exported.onnx_file.read_bytes(), exported.pt2_file.read_bytes(), test_accuracy=accuracy
    )
    with calling(drill.line, ERRS_NHW) as callers:
        # Replay, too, goes by what callers sent and labelled.
        until(lambda: callers.answered > 300, what="300 answers")
        code, result = ended(roll_out(drill, str(version), *STEPS))
        answered = callers.answered
        until(lambda: callers.answered > answered + 200, what="200 answers after it")
    assert callers.failures == []
    assert (code, result["status"]) == (1, "rolled_back")
    assert_taken_back(drill, version, before, "accuracy")


def test_one_that_raises_on_two_percent_costs_its_canary_share_and_no_more(drill: Drill) -> None:
    before = drill.traffic()
    version = drill.register(raising)
    with calling(drill.line, RAISES_NHW, num_callers=6) as callers:
        process = roll_out(drill, str(version), *STEPS)
        drill.wait_for(version, "canary-10")
        callers.changed_share = 0.02
        code, result = ended(process)
        failed = len(callers.failures)
        answered = callers.answered
        until(lambda: callers.answered > answered + 200, what="200 answers after it")
        # Marked images still come, and the champion answers them.
        assert len(callers.failures) == failed
    assert (code, result["status"]) == (1, "rolled_back")
    assert_taken_back(drill, version, before, "error_rate")
    assert failed > 0
    assert all(share > 0 and text.startswith("500") for share, text in callers.failures)
    # Two percent of a canary's share, and those that were in one batch with them.
    assert failed < 0.05 * (callers.answered + failed)


def test_without_callers_a_rollout_is_held_and_the_candidate_gets_nothing(drill: Drill) -> None:
    before = drill.traffic()
    version = drill.register(lambda model: model)
    code, result = ended(roll_out(drill, str(version), "--step-timeout", "20"))
    assert (code, result["status"], result["stage"]) == (1, "held", "shadow")
    traffic = drill.traffic()
    assert traffic.champion == before.champion
    assert not traffic.weights.get(version)
    code, result = ended(roll_out(drill, "--abort"))
    assert (code, result["status"]) == (0, "aborted")
