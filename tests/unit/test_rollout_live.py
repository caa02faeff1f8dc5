"""A rollout over the real policy, log, bundles and lock; only Serve and MLflow are left out."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lib.config import Settings
from lib.errors import RolloutError, StorageError, WatchError
from lib.registry import notes
from lib.serving import deploy, policy
from lib.serving.bundle import bundle_path, write_bundle
from lib.serving.traffic import ModelTraffic, choose, is_shadowed
from lib.storage import Storage
from lib.watch import live, logged, rollout
from lib.watch import rollout_state as states
from lib.watch.counts import Sample
from lib.watch.prometheus import PROMETHEUS_VARIABLE, RayEndpoints, ray_targets
from lib.watch.recorder import Recorder
from lib.watch.rollout_state import Options
from lib.watch.rollout_traffic import with_candidate
from tests.unit.serving_parts import card

MODEL, CHAMPION, CANDIDATE = "shapes", 1, 2
NOWHERE = "http://127.0.0.1:9"
CARDS = {number: card(number) for number in (CHAMPION, CANDIDATE)}
OPTIONS = Options(steps=(20, 50, 100), who="ada")
Images = Any


def graph(scale: float) -> bytes:
    """Classes by three pixels; a scale below 0 makes it see everything the other way."""
    weights = np.zeros((24, 3), np.float32)
    weights[:3] = scale * np.eye(3)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"]),
    ]
    made = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 4, 6, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


class Line(live.Live):
    """Callers who ask while the rollout rests, answered by the policy in force."""

    def __init__(self, storage: Storage, answer: Callable[[int, Images], Any]) -> None:
        settings = Settings(storage=storage.uri, mlflow_uri=NOWHERE, model=MODEL)
        super().__init__(settings, storage, "ada")
        self.settings, self.storage, self.answer = settings, storage, answer
        self.clock_s = 1_800_014_400.0
        self.rng = np.random.default_rng(0)
        self.noted: list[str] = []
        self.asked = 0

    def now_us(self) -> int:
        return int(self.clock_s * 1e6)

    def rest(self) -> None:
        self.ask(1000)
        self.clock_s += 6

    def bundle(self, version: int) -> str:
        made = CARDS[version]
        return bundle_path(made.name, version, made.run_id)

    def change(self, desired: ModelTraffic, why: str) -> None:
        base = policy.current(self.storage)
        policy.commit(self.storage, base, {MODEL: desired}, default_model=MODEL, who="ada", why=why)

    withdraw = crown = change

    def note(self, state: states.State) -> None:
        self.noted.append(state.status)

    def ask(self, count: int) -> None:
        """Answer, and log as a gateway does."""
        traffic = self.traffic()
        recorder = Recorder(self.storage, clock=lambda: self.clock_s)
        images = self.rng.integers(0, 200, (count, 1, 4, 6, 1)).astype(np.uint8)
        for image in images:
            self.asked += 1
            self.clock_s += 0.002
            request_id = f"r{self.asked}"
            version = choose(traffic.weights, request_id)
            answered = self.log(recorder, version, image, request_id, is_shadow=False)
            for shadow, percent in traffic.shadows.items():
                if answered and shadow != version and is_shadowed(percent, shadow, request_id):
                    self.log(recorder, shadow, image, request_id, is_shadow=True)
        recorder.close()

    def log(
        self, recorder: Recorder, version: int, image: Images, request_id: str, *, is_shadow: bool
    ) -> bool:
        answer = self.answer(version, image)
        recorder.add(
            CARDS[version],
            image,
            answer,
            request_id=request_id,
            caller="day",
            latency_s=float(self.rng.lognormal(-5, 0.2)),
            status=500 if answer is None else 200,
            is_shadow=is_shadow,
        )
        return answer is not None


def honest(version: int, image: Images) -> Any:
    return np.eye(3, dtype=np.float32)[[image[0, 0, :3, 0].argmax()]]


def raising(version: int, image: Images) -> Any:
    return None if version == CANDIDATE and image[0, 3, 5, 0] > 190 else honest(version, image)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    made = Storage(str(tmp_path))
    bundles = {number: write_bundle(made, CARDS[number], graph(1.0), None) for number in CARDS}
    traffic = ModelTraffic(weights={CHAMPION: 100.0}, bundles=bundles, champion=CHAMPION)
    policy.commit(made, None, {MODEL: traffic}, default_model=MODEL, who="ada", why="start")
    return made


def roll_out(line: Line) -> states.State:
    most = live.max_disagreement(line.storage, line, CANDIDATE)
    rollout.begin(line, MODEL, CANDIDATE, OPTIONS, max_disagreement=min(most, 0.05))
    return rollout.run(line)


def test_an_equal_candidate_is_replayed_shadowed_served_and_promoted(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All in one flush, and every image is there to be replayed.
    monkeypatch.setattr("lib.watch.recorder.KEPT_IMAGES", 1000)
    line = Line(storage, honest)
    line.ask(501)
    ended = roll_out(line)
    assert ended.status == states.PROMOTED
    assert line.traffic().champion == CANDIDATE
    replayed = next(e for e in ended.history if (e["stage"], e["status"]) == ("replay", "passed"))
    assert "in 500 logged requests" in replayed["reason"]
    assert line.noted == ["promoted"]
    assert states.past(storage, MODEL) == [states.load(storage, MODEL)]


def test_one_that_sees_logged_images_differently_is_stopped_before_any_live_one(
    storage: Storage,
) -> None:
    write_bundle(storage, CARDS[CANDIDATE], graph(-1.0), None)
    line = Line(storage, honest)
    line.ask(500)
    ended = roll_out(line)
    assert (ended.status, ended.stage) == (states.ROLLED_BACK, "replay")
    assert len(policy.history(storage)) == 2
    assert CANDIDATE not in line.traffic().bundles


def test_one_that_raises_is_stopped_by_its_shadow_answers(storage: Storage) -> None:
    line = Line(storage, raising)
    ended = roll_out(line)
    assert (ended.status, ended.stage) == (states.ROLLED_BACK, "shadow")
    assert "error_rate" in ended.reason
    assert line.traffic().weights == {CHAMPION: 100.0}


def test_a_log_that_cannot_be_read_pauses(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, honest)

    def broken(*args: object, **options: object) -> None:
        raise OSError("the disk is away")

    monkeypatch.setattr(logged.predictions, "joined", broken)
    monkeypatch.setattr(line, "rest", lambda: setattr(line, "clock_s", line.clock_s + 60))
    ended = roll_out(line)
    assert (ended.status, ended.stage) == (states.HELD, "replay")
    assert "the prediction log can't be read: the disk is away" in ended.reason
    with pytest.raises(StorageError):
        logged.read_answers(storage, MODEL, {}, start_us=0, end_us=1)


def test_answers_of_versions_that_had_the_numbers_before_are_no_evidence(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, honest)
    begun = rollout.begin(line, MODEL, CANDIDATE, OPTIONS, max_disagreement=0.05)
    state = begun.entering(states.SHADOW, line.now_us())
    line.change(with_candidate(line.traffic(), state, line.bundle(CANDIDATE)), "shadow")
    for run_id, count in (("f" * 32, 300), (None, 200)):
        with monkeypatch.context() as patch:
            if run_id:
                for number, made in CARDS.items():
                    patch.setitem(CARDS, number, replace(made, run_id=run_id))
            line.ask(count)
    line.clock_s += 10
    evidence = line.evidence(state)
    assert evidence.champion_requests == 200
    assert 0 < evidence.requests < 100


class Flaky:
    """Metrics that can't be read for some looks."""

    name = "a metrics source"

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def samples(self, names: Iterable[str]) -> list[Sample]:
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise WatchError("the metrics are away")
        return []


def test_metrics_that_cannot_be_read_pause_and_never_promote(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, honest)
    monkeypatch.setattr(line, "_source", RayEndpoints(lambda: ray_targets(NOWHERE)))
    ended = roll_out(line)
    assert (ended.status, ended.stage) == (states.HELD, "shadow")
    assert "WatchError: Ray's dashboard does not say" in ended.reason
    assert line.traffic().weights == {CHAMPION: 100.0}


def test_a_breach_is_acted_on_while_metrics_cannot_be_read(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, raising)
    monkeypatch.setattr(line, "_source", Flaky(10**9))
    ended = roll_out(line)
    assert ended.status == states.ROLLED_BACK
    assert line.traffic().weights == {CHAMPION: 100.0}


def test_metrics_that_are_back_let_it_go_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, honest)
    seen: list[Any] = []

    def make(*given: Any) -> Line:
        seen.append(given[-1])
        return line

    monkeypatch.delenv(PROMETHEUS_VARIABLE, raising=False)
    monkeypatch.setattr(live, "Live", make)
    monkeypatch.setattr(line, "_source", Flaky(3))
    assert live.roll_out(line.settings, storage, CANDIDATE, OPTIONS)["status"] == "promoted"
    state = line.load()
    assert state is not None
    assert "WatchError: the metrics are away" in [event["reason"] for event in state.history]
    # What every rollout is given, of the cluster that serves.
    assert seen[0].name == "Ray's metrics endpoints"


def test_a_locked_rollout_is_left_alone_and_an_abandoned_one_ended(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(storage, honest)
    monkeypatch.setattr(live, "Live", lambda *_: line)
    rollout.begin(line, MODEL, CANDIDATE, OPTIONS, max_disagreement=0.05)
    lock = Path(storage.path(f"rollouts/{MODEL}/.lock"))
    lock.touch()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RolloutError, match="another process runs"):
            live.roll_out(line.settings, storage, CANDIDATE, OPTIONS)
    # Whoever held the lock is gone.
    assert live.abort(line.settings, storage, who="ada")["status"] == "aborted"
    assert line.noted == ["aborted"]
    with pytest.raises(RolloutError, match="no rollout to end"):
        live.abort(line.settings, storage, who="ada")
    with pytest.raises(RolloutError, match="no rollout to go on with"):
        live.go_on(line.settings, storage, who="ada")
    # The next one is not ended by the wish for the one before.
    line.clock_s += 1
    assert live.roll_out(line.settings, storage, CANDIDATE, OPTIONS)["status"] == "promoted"


def test_a_held_rollout_can_be_ended_too(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(storage, honest)
    monkeypatch.setattr(live, "Live", lambda *_: line)
    monkeypatch.setattr(line, "rest", lambda: setattr(line, "clock_s", line.clock_s + 60))
    with pytest.raises(RolloutError, match="held at shadow") as caught:
        live.roll_out(line.settings, storage, CANDIDATE, OPTIONS)
    assert caught.value.details["status"] == "held"
    assert live.abort(line.settings, storage, who="ada")["status"] == "aborted"


def test_traffic_is_taken_back_though_serve_is_away(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(storage=storage.uri, mlflow_uri=NOWHERE, model=MODEL)
    line = live.Live(settings, storage, "ada")
    traffic = line.traffic()
    without = ModelTraffic(
        weights={CHAMPION: 100.0}, bundles={CHAMPION: traffic.bundles[CHAMPION]}, champion=CHAMPION
    )

    def away(*args: object, **options: object) -> None:
        raise deploy.ServingError("Ray does not answer")

    monkeypatch.setattr(deploy, "apply", away)
    line.withdraw(without, "breach")
    assert line.traffic() == without
    with pytest.raises(deploy.ServingError, match="Ray does not answer"):
        line.change(traffic, "step")


class FakeMlflow:
    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.aliases = {"champion": "1", "challenger": "2"}

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        assert (name, version) == (MODEL, "2")
        self.tags[key] = value

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(aliases=self.aliases)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        del self.aliases[alias]


@pytest.mark.parametrize("is_refused", [True, False])
def test_the_registry_keeps_the_reason_and_a_refused_version_challenges_no_more(
    is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeMlflow()
    monkeypatch.setattr(notes, "connect", lambda settings: client)
    settings = Settings(storage="/nowhere", mlflow_uri=NOWHERE, model=MODEL)
    notes.note_rollout(
        settings,
        MODEL,
        2,
        status="rolled_back",
        reason="error_rate breach",
        evidence={"gates": [], "history": ["x" * 60_000]},
        is_refused=is_refused,
    )
    assert client.tags[notes.ROLLOUT_TAG] == "rolled_back"
    assert client.tags[notes.REASON_TAG] == "error_rate breach"
    assert len(client.tags[notes.EVIDENCE_TAG]) < notes.MAX_EVIDENCE_CHARS
    assert ("challenger" in client.aliases) is not is_refused
