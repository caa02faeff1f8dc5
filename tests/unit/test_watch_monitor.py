"""The monitor over a log in memory and files: what it sees, what it keeps, what it starts."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.data.manifest import Manifest
from lib.storage import Storage
from lib.watch import memory, predictions
from lib.watch.display import show, summary
from lib.watch.monitor import Monitor
from lib.watch.segments import Segments, by_span
from lib.watch.sequence import BLOCK
from lib.watch.triggers import Rules
from lib.watch.windows import Cutting
from tests.watch_parts import (
    NOW,
    FakeInterrupted,
    FakeLog,
    FakeRetrains,
    Line,
    blurred,
    digits,
    inverted,
    predict,
    prepare,
    serve,
    usual,
    write_set,
    write_version,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, dict[int, str]]:
    root = tmp_path_factory.mktemp("watch")
    return root, *prepare(root)


@pytest.fixture
def line(prepared: tuple[Path, Manifest, dict[int, str]], tmp_path: Path) -> Line:
    root, manifest, bundles = prepared
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    storage = Storage(str(tmp_path))
    serve(storage, bundles, champion=1)
    made = Line(storage, manifest, bundles, FakeLog(), FakeRetrains(clock=lambda: made.now_s))
    return made


def test_no_policy_pauses(tmp_path: Path) -> None:
    monitor = Monitor(
        storage=Storage(str(tmp_path)),
        model="digits",
        log=FakeLog(),
        retrains=FakeRetrains(clock=time.time),
        interrupted=FakeInterrupted(),
    )
    assert "jobs.deploy" in monitor.look()["paused"]["all"]


def test_an_empty_log_is_said_and_goes_on(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = line.monitor()
    state = monitor.look()
    show(state)
    assert "no request for digits was logged" in capsys.readouterr().out
    assert "drift" not in state
    line.ask(usual(0, 300))
    line.later()
    assert monitor.look()["paused"] == {}


def test_usual_traffic_is_no_drift_and_strange_traffic_is(line: Line) -> None:
    monitor = line.monitor()
    line.ask(usual(0, 600))
    line.later()
    state = monitor.look()
    assert state == json.loads(line.storage.read(memory.state_path("digits")))
    assert state["champion"] == 1
    assert (state["drift"]["alarm"], state["drift"]["evidence"]["windows"]) == (False, 2)
    assert not state["trigger"]["retrain"]
    line.ask(inverted(usual(1, 500)))
    line.later()
    state = monitor.look()
    assert state["drift"]["alarm"]
    assert state["drift"]["window_alarm"]
    assert np.shape(state["drift"]["heat_map"]) == (7, 7)
    assert state["trigger"]["triggers"] == ["drift"]
    assert state["trigger"]["retrain"]
    assert line.retrains.entries == [], "it was not told to act"
    assert [point["drift"]["alarm"] for point in state["history"] if "drift" in point]
    show(state)
    assert json.loads(json.dumps(summary(state)))["drift"]["alarm"]


def test_no_request_is_tested_twice_and_none_is_left_out(line: Line) -> None:
    monitor = line.monitor()
    for seed in range(5):
        line.ask(usual(seed, 190))
        line.later()
        monitor.look()
    looks = [line.storage.read_json(path) for path in line.history()]
    windows = [window for look in looks for window in look["windows"]]
    assert [window["rows"] for window in windows] == [250, 250, 250]
    for earlier, later in zip(windows, windows[1:], strict=False):
        assert earlier["end"] < later["start"]
    assert line.monitor().look()["drift"]["evidence"]["windows"] == 3


def test_a_window_waits_for_rows_but_not_for_ever(line: Line) -> None:
    monitor = line.monitor()
    line.ask(usual(0, 100))
    line.later()
    assert "drift" not in monitor.look()
    line.later(1000)
    assert monitor.look()["drift"]["rows"] == 100


def test_of_much_traffic_a_sample_is_tested(line: Line) -> None:
    line.ask(usual(0, 5000), step_s=0.001)
    line.later()
    state = line.monitor(cutting=Cutting(rows=250, most_windows=4)).look()
    assert state["drift"]["evidence"]["windows"] == 4
    assert state["drift"]["end"] == pytest.approx(NOW + 4.999)


def test_blocks_of_windows_are_tested_as_one(line: Line) -> None:
    line.ask(usual(0, 250 * BLOCK + 10))
    line.later()
    drift = line.monitor().look()["drift"]
    assert drift["block"]["rows"] == 250 * BLOCK
    assert not drift["block"]["alarm"]


def test_a_new_champion_on_other_data_starts_new_evidence(line: Line) -> None:
    monitor = line.monitor()
    line.ask(inverted(usual(0, 300)))
    line.later()
    assert monitor.look()["drift"]["alarm"]
    other = write_set(line.storage, {"train": slice(20_000, 23_000), "val": slice(23_000, 24_000)})
    bundles = {**line.bundles, 3: write_version(line.storage, other, 3)}
    serve(line.storage, bundles, champion=3)
    line.later()
    state = monitor.look()
    assert "drift" not in state
    assert not state["trigger"]["retrain"]
    line.ask(usual(1, 260), version=3)
    line.later()
    drift = monitor.look()["drift"]
    assert (drift["alarm"], drift["evidence"]["windows"]) == (False, 1)


def test_accuracy_comes_from_labels_and_its_fall_is_a_trigger(line: Line) -> None:
    images, labels = digits("test")
    ids = line.ask(images[:400])
    line.log.labels = {name: int(label) for name, label in zip(ids[:200], labels, strict=False)}
    line.later()
    monitor = line.monitor()
    version = monitor.look()["versions"]["1"]
    right = predict(images[:200]).argmax(axis=1) == labels[:200]
    assert (version["labels"], version["accuracy"]) == (200, right.mean())
    assert version["low"] < version["accuracy"] < version["high"]
    line.log.labels = {
        name: (int(label) + 1) % 10 for name, label in zip(ids, labels, strict=False)
    }
    state = monitor.look()
    assert "quality" in state["trigger"]["triggers"]
    assert "400 labelled" in state["trigger"]["reason"]


def test_shadows_are_compared_and_do_not_count_as_traffic(line: Line) -> None:
    images = usual(0, 300)
    ids = line.ask(images)
    line.ask(inverted(images), version=2, shadow=True, ids=ids)
    line.later()
    state = line.monitor().look()
    assert state["versions"]["2"]["shadow"]
    assert state["versions"]["2"]["disagreement"] > 0.3
    assert state["drift"]["rows"] == 250
    assert not state["drift"]["window_alarm"]


def test_labels_that_are_away_pause_quality_but_not_drift(line: Line) -> None:
    line.ask(inverted(usual(0, 300)))
    line.log.labels_are_away = True
    line.later()
    state = line.monitor(rules=Rules(new_labels=1)).look()
    assert state["paused"] == {"quality": "the labels are away"}
    assert state["trigger"]["triggers"] == ["drift"]


def test_a_log_that_is_away_pauses_and_comes_back(line: Line) -> None:
    monitor = line.monitor(acts=True)
    line.ask(inverted(usual(0, 300)))
    line.later()
    line.log.is_away = True
    state = monitor.look()
    assert set(state["paused"]) == {"drift", "quality"}
    assert not state["trigger"]["retrain"]
    line.log.is_away = False
    assert monitor.look()["drift"]["alarm"]
    assert len(line.retrains.entries) == 1


def test_acting_starts_one_retrain_and_then_cools_down(line: Line) -> None:
    monitor = line.monitor(acts=True, rules=Rules(cool_down_s=600))
    line.ask(blurred(usual(0, 300)))
    line.later()
    state = monitor.look()
    assert state["trigger"]["started"] == "retrain-1"
    for _ in range(5):
        line.later()
        state = monitor.look()
    assert len(line.retrains.entries) == 1
    assert "cool-down" in state["trigger"]["reason"]
    line.later(600)
    line.monitor(acts=True, rules=Rules(cool_down_s=600)).look()
    assert len(line.retrains.entries) == 2


def test_a_retrain_that_does_not_start_is_said(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str) -> str:
        raise OSError("Ray is away")

    monkeypatch.setattr(line.retrains, "start", refuse)
    line.ask(blurred(usual(0, 300)))
    line.later()
    assert line.monitor(acts=True).look()["trigger"]["not_started"] == "Ray is away"


def test_what_was_killed_goes_on_at_the_next_look_of_one_that_acts(
    line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    line.interrupted.names = ["retrain 7"]
    assert "went_on" not in line.monitor().look()
    assert line.interrupted.asked == 0, "it was not told to act"
    monitor = line.monitor(acts=True)
    assert monitor.look()["went_on"] == "retrain 7"
    assert "retrain 7 was killed and goes on" in capsys.readouterr().out
    assert monitor.look()["went_on"] is None


def test_what_can_not_go_on_is_said_and_stops_no_look(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str | None:
        raise OSError("Ray is away")

    monkeypatch.setattr(line.interrupted, "go_on", refuse)
    line.ask(blurred(usual(0, 300)))
    line.later()
    state = line.monitor(acts=True).look()
    assert state["went_on"] is None
    assert "does not go on – Ray is away" in capsys.readouterr().out
    assert state["trigger"]["started"] == "retrain-1"


def test_new_labels_are_a_trigger(line: Line) -> None:
    line.log.labels = {f"x{number}": 1 for number in range(30)}
    rules = Rules(new_labels=30)
    assert line.monitor(rules=rules).look()["trigger"]["triggers"] == ["labels"]


def test_two_monitors_do_not_count_a_window_twice(line: Line) -> None:
    line.ask(usual(0, 300))
    line.later()
    one, other = line.monitor(), line.monitor()
    assert one.look()["drift"]["evidence"]["windows"] == 1
    assert other.look()["drift"]["evidence"]["windows"] == 1
    assert len(line.history()) == 1


def test_what_a_disk_did_to_the_newest_file_is_survived(line: Line) -> None:
    monitor = line.monitor()
    for seed in (0, 1):
        line.ask(usual(seed, 260))
        line.later()
        monitor.look()
    Path(line.storage.path(line.history()[-1])).write_bytes(b'{"half": ')
    Path(line.storage.path(memory.state_path("digits"))).unlink()
    assert line.monitor().look()["drift"]["evidence"]["windows"] == 1


def write_log(line: Line, run_id: str) -> None:
    """Write what was asked as gateways do, answered by versions of this run."""
    fill = {"caller": "anyone", "latency_ms": 2.0, "status": 200, "image": None, "run_id": run_id}
    rows = [{**row, **fill} for row in line.log.rows.to_pylist()]
    table = pa.Table.from_pylist(rows, predictions.SCHEMA)
    root = predictions.predictions_root("digits")
    segments = Segments(line.storage, root, max_rows=10_000, dictionary=["caller"])
    for part in by_span(table):
        segments.append(part)


def test_a_model_that_was_made_again_is_not_judged_by_answers_of_the_one_before(
    line: Line,
) -> None:
    line.ask(inverted(usual(0, 300)))
    write_log(line, "f" * 32)
    line.later()
    monitor = line.monitor()
    monitor.log = predictions
    state = monitor.look()
    assert (state["rows"], state["versions"], state.get("drift")) == (0, {}, None)
    assert state["bundles"] == {str(version): path for version, path in line.bundles.items()}
    line.log.rows = line.log.rows.slice(0, 0)
    line.ask(usual(1, 300))
    write_log(line, f"{1:08x}")
    line.later()
    state = monitor.look()
    assert (state["rows"], state["drift"]["alarm"]) == (300, False)


def test_it_reads_the_log_that_gateways_write(line: Line) -> None:
    line.ask(inverted(usual(0, 300)))
    write_log(line, f"{1:08x}")
    line.later()
    monitor = line.monitor()
    monitor.log = predictions
    state = monitor.look()
    assert state["paused"] == {}
    assert (state["rows"], state["versions"]["1"]["labels"]) == (300, 0)
    assert state["drift"]["alarm"]


def test_killed_at_any_point_it_goes_on_where_it_was(line: Line) -> None:
    line.ask(digits("test")[0][:1200])
    line.later()
    read = line.log.read

    def a_window(*given: Any, columns: Any = None, **more: Any) -> Any:
        """One window a look, so that there is much to be killed in."""
        rows = read(*given, columns=columns, **more)
        return rows.slice(0, 50) if columns and "features" in columns else rows

    line.log.read = a_window  # type: ignore[method-assign]
    monitor = line.monitor(cutting=Cutting(rows=50))

    def look_on() -> None:
        while monitor.look()["drift"]["evidence"]["windows"] < 24:
            pass

    rng = random.Random(0)
    fork = multiprocessing.get_context("fork")
    deadline, kills, before = time.monotonic() + 200, 0, 0
    while True:
        process = fork.Process(target=look_on)
        process.start()
        # Killed anywhere in a look, once some are done.
        wanted = before + rng.randint(1, 3)
        while process.is_alive() and len(line.history()) < wanted:
            process.join(0.005)
            assert time.monotonic() < deadline
        process.join(rng.random() * 0.02)
        process.kill()
        process.join()
        if line.storage.exists(memory.state_path("digits")):
            assert line.storage.read_json(memory.state_path("digits"))["model"] == "digits"
        before = len(line.history())
        if before == 24:
            break
        kills += 1
    # How many fit in depends on how quickly the machine looks.
    assert kills >= 3
    looks = [line.storage.read_json(path) for path in line.history()]
    windows = [window for look in looks for window in look["windows"]]
    assert len(windows) == 24
    assert sum(window["rows"] for window in windows) == 1200
    for earlier, later in zip(windows, windows[1:], strict=False):
        assert earlier["end"] < later["start"]
    assert looks[-1]["memory"]["evidence"]["windows"] == 24
