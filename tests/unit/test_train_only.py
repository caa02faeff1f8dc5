"""Training without a deploy: the pipeline ends with the registry, and a report tells of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib import pipeline
from lib.config import Settings, preset
from lib.line.layout import Line
from lib.line.summary import write_report
from lib.steps import Step
from lib.storage import Storage


@pytest.fixture
def deploys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps before the last one that do nothing, and a list of the deploys."""
    made: list[str] = []
    manifest = SimpleNamespace(digest="d" * 64, counts={"train": (1, 1), "test": (1,)})
    ingested = SimpleNamespace(manifest=manifest, reused=False, seconds=1.0, ignored=())
    result = {"sweep_run_id": "run-1", "num_trials": 3}
    sweep = Step(name="tune", digest="x", result=result, seconds=1.0, reused=True)
    version = SimpleNamespace(version=4, test_accuracy=0.98765, val_accuracy=0.99)

    def deploy(*_: Any, why: str, **__: Any) -> dict[str, Any]:
        made.append(why)
        return {"weights": {"4": 100.0}}

    monkeypatch.setattr(pipeline, "ingest_source", lambda *_: ingested)
    monkeypatch.setattr(pipeline, "check_model", lambda *_: None)
    monkeypatch.setattr(pipeline, "tune_once", lambda *_: sweep)
    monkeypatch.setattr(pipeline, "register", lambda *_: [version])
    monkeypatch.setattr(pipeline, "resolve", lambda *_: version)
    monkeypatch.setattr(pipeline, "deploy", deploy)
    return made


def run(tmp_path: Path, *, serve: bool) -> dict[str, Any]:
    settings = Settings(storage=str(tmp_path), mlflow_uri="http://mlflow")
    storage = Storage(str(tmp_path))
    return pipeline.run_pipeline(settings, storage, "mnist", preset("smoke"), who="me", serve=serve)


def test_nothing_that_is_served_changes(tmp_path: Path, deploys: list[str]) -> None:
    assert run(tmp_path, serve=False)["weights"] == {}
    assert deploys == []
    assert run(tmp_path, serve=True)["weights"] == {"4": 100.0}
    assert deploys == ["pipeline: smoke sweep run-1"]


def test_the_report_has_what_a_reviewer_asks(tmp_path: Path, deploys: list[str]) -> None:
    line = Line.from_env({"RAYLINE_HOME": str(tmp_path)})
    text = write_report(line, run(tmp_path, serve=False)).read_text()
    for expected in ("digits", "dddddddddddd", "3 images", "3 trials", "run-1", "version 4"):
        assert expected in text
    assert "98.77 % on test" in text
    assert "of an earlier run" in text
