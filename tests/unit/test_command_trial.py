"""Trials that are programs: what is read of them, how they end, what is left; without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.storage import Storage
from lib.train.collector import Collector, CollectorConfig
from lib.train.command import CommandTemplate
from lib.train.command_trial import LOG_FILE, CommandTrial
from lib.train.experiment import MINIMIZE, Objective
from lib.train.trainable import ENDS, FAILED, REPORT, Desk

STDOUT = CollectorConfig(objective="loss", strategies={"loss": "min", "accuracy": "max"})
_DEADLINE_S = 30


def script(text: str, **fields: Any) -> CommandTemplate:
    """Return a template that runs a shell script with the parameter `x` as its argument."""
    return CommandTemplate(
        arguments=("/bin/sh", "-c", text, "trial", "${trialParameters.x}"),
        references={"x": "x"},
        **{"collector": STDOUT, **fields},
    )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(
        storage=Storage(str(tmp_path / "storage")),
        folder="trials",
        objectives=(Objective(metric="loss", goal=MINIMIZE),),
    )


@pytest.fixture
def started(desk: Desk) -> Iterator[Callable[..., CommandTrial]]:
    trials = []

    def started(template: CommandTemplate, **params: Any) -> CommandTrial:
        trial = object.__new__(CommandTrial)
        trial._trial_info = SimpleNamespace(trial_id="t1")
        shared = {"template": template, "experiment": "shape"}
        trial.setup({"x": 0.5, **params}, desk=desk, shared=shared)
        trials.append(trial)
        return trial

    yield started
    for trial in trials:
        trial.cleanup()


def reports(trial: CommandTrial) -> list[dict[str, Any]]:
    found = [trial.step()]
    while not found[-1].get("done"):
        found.append(trial.step())
    return found


def wait_until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("granted", "seen"), [([], ""), (["3"], "3"), (None, "3")]
)  # fmt: skip
def test_a_command_sees_the_gpus_that_its_trial_was_granted(
    started: Callable[..., CommandTrial],
    monkeypatch: pytest.MonkeyPatch,
    granted: list[str] | None,
    seen: str,
) -> None:
    """Ray's grant is a stand-in; Ray itself sets the variable where it grants GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("lib.train.command_trial.granted_gpus", lambda: granted)
    text = 'test "$CUDA_VISIBLE_DEVICES" = "$SEEN" && echo loss=1'
    assert FAILED not in reports(started(script(text, env={"SEEN": seen})))[-1]


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


def test_a_report_for_every_value_of_the_objective(
    desk: Desk, started: Callable[..., CommandTrial]
) -> None:
    trial = started(
        script("echo loss=3 accuracy=.5; echo loss=$1; echo loss = 2; echo accuracy=.9")
    )
    first, second, third, last = reports(trial)
    assert [report[REPORT] for report in (first, second, third, last)] == [1, 2, 3, 4]
    assert (first["loss"], second["loss"], third["loss"]) == (3, 0.5, 0.5), "the least so far"
    assert third["latest/loss"] == 2
    assert last["accuracy"] == 0.9, "written after the last value of the objective"
    assert last[ENDS]
    assert b"accuracy=.9" in desk.storage.read(desk.file("t1", LOG_FILE))


def test_a_program_that_ends_with_its_objective_has_no_more_to_say(
    desk: Desk, started: Callable[..., CommandTrial]
) -> None:
    first, last = reports(started(script("echo loss=1; echo bye")))
    assert first["loss"] == 1.0
    assert REPORT not in last
    assert last[ENDS]
    assert b"bye" in desk.storage.read(desk.file("t1", LOG_FILE))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo loss=1; echo oh dear >&2; exit 3", "exit code 3; it wrote last: loss=1 | oh dear"),
        ("echo accuracy=1", "the objective 'loss' was never seen in the output"),
        ("echo loss=nan-ish; kill -9 $$", "ended with signal 9"),
    ],
)
def test_a_program_that_fails_is_a_failed_trial_with_its_log(
    desk: Desk, started: Callable[..., CommandTrial], text: str, reason: str
) -> None:
    last = reports(started(script(text)))[-1]
    assert reason in last[FAILED]
    assert b"=" in desk.storage.read(desk.file("t1", LOG_FILE))


def test_a_command_that_is_not_there_is_said(started: Callable[..., CommandTrial]) -> None:
    template = CommandTemplate(arguments=("/no/such/program",), collector=STDOUT)
    assert "'/no/such/program' can't be started" in started(template).step()[FAILED]


def test_metrics_from_a_file_of_the_trials_own(started: Callable[..., CommandTrial]) -> None:
    lines = [json.dumps({"loss": "0.25", "step": 1}), json.dumps({"accuracy": 0.5, "loss": 0.5})]
    write = "; ".join(f"echo '{line}' >> /katib/m.log" for line in lines)
    config = CollectorConfig(
        objective="loss",
        strategies={"loss": "latest", "accuracy": "max"},
        file="/katib/m.log",
        is_json=True,
    )
    found = reports(started(script(f"echo loss=9; {write}", collector=config)))
    assert [report["loss"] for report in found if REPORT in report] == [0.25, 0.5]
    assert found[1]["accuracy"] == 0.5
    assert not Path("/katib").exists()


def test_a_line_that_is_no_json_fails_the_trial(started: Callable[..., CommandTrial]) -> None:
    config = CollectorConfig(
        objective="loss", strategies={"loss": "min"}, file="/katib/m.log", is_json=True
    )
    last = reports(started(script("echo loss=1 > /katib/m.log", collector=config)))[-1]
    assert "holds a line that is no JSON" in last[FAILED]


def test_a_trial_that_is_stopped_leaves_no_process_and_no_file(
    started: Callable[..., CommandTrial],
) -> None:
    trial = started(script("sleep 600 & echo $! loss=1; wait"))
    trial.step()
    folder = trial._folder
    assert folder is not None
    pid = int((folder / LOG_FILE).read_text().split()[0])
    assert alive(pid)
    trial.end()
    wait_until(lambda: not alive(pid))
    assert not folder.exists()


def test_a_program_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from lib.train.process_group import ProcessGroup;"
        "log = open(sys.argv[1], 'wb');"
        "ProcessGroup(['/bin/sh', '-c', 'echo $$; exec sleep 600'], env=dict(os.environ), cwd=None,"
        " output=log).wait(600)"
    )
    log = tmp_path / "log"
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=root)
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    pid = int(log.read_text())
    assert alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not alive(pid))


def test_a_trial_that_takes_more_memory_than_its_limit_fails(
    started: Callable[..., CommandTrial],
) -> None:
    last = reports(started(script("sleep 600", memory_bytes=1000)))[-1]
    assert "more than its limit of 1,000" in last[FAILED]


def test_a_template_survives_json() -> None:
    template = script("true", env={"A": "b"}, constants={"y": "1"}, trial_name="me")
    content: Mapping[str, Any] = json.loads(json.dumps(asdict(template)))
    assert CommandTemplate.from_dict(content) == template


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("loss=0.3", {"loss": 0.3}),
        ("epoch 2: loss = -7.5e-05, accuracy=.98", {"loss": -7.5e-5, "accuracy": 0.98}),
        ("2026-06-01T10:00:00Z accuracy=1", {"accuracy": 1.0}),
        ("val-loss=4 other=2", {}),
        ("loss=", {}),
    ],
)
def test_lines_are_read_as_katib_reads_them(line: str, found: dict[str, float]) -> None:
    collector = Collector(config=STDOUT)
    assert collector.read(line) == ("loss" in found)
    assert collector.latest == found
