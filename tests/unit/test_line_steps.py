from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ConfigError
from lib.line.layout import PROJECT_ROOT
from lib.line.source import absolute_paths, default_model, resolve_source
from lib.steps import run_step
from lib.storage import Storage


class Work:
    def __init__(self) -> None:
        self.done = 0

    def __call__(self) -> Mapping[str, Any]:
        self.done += 1
        return {"number": self.done}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def yes(result: Mapping[str, Any]) -> bool:
    return True


def no(result: Mapping[str, Any]) -> bool:
    return False


def test_the_same_inputs_are_worked_on_once(storage: Storage) -> None:
    work = Work()
    first = run_step(storage, "tune", {"a": 1, "b": [2]}, work, yes)
    second = run_step(storage, "tune", {"b": (2,), "a": 1}, work, yes)
    assert (first.reused, second.reused) == (False, True)
    assert second.result == {"number": 1}
    assert work.done == 1


def test_other_inputs_are_another_step(storage: Storage) -> None:
    work = Work()
    run_step(storage, "tune", {"a": 1}, work, yes)
    assert not run_step(storage, "tune", {"a": 2}, work, yes).reused
    assert not run_step(storage, "other", {"a": 1}, work, yes).reused


def test_a_result_that_is_no_longer_true_is_made_again(storage: Storage) -> None:
    work = Work()
    run_step(storage, "tune", {}, work, yes)
    assert run_step(storage, "tune", {}, work, no).result == {"number": 2}
    assert run_step(storage, "tune", {}, work, yes).result == {"number": 2}


def test_a_step_that_failed_is_not_kept(storage: Storage) -> None:
    def broken() -> Mapping[str, Any]:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        run_step(storage, "tune", {}, broken, yes)
    assert not run_step(storage, "tune", {}, Work(), yes).reused


@pytest.mark.parametrize(
    ("source", "model"),
    [
        ("mnist", "digits"),
        ("torchvision:FashionMNIST", "fashionmnist"),
        ("/data/My Cats & Dogs/", "my-cats-dogs"),
    ],
)
def test_a_model_is_named_after_its_source(source: str, model: str) -> None:
    assert default_model(source) == model


def test_a_source_without_letters_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="MODEL=name"):
        default_model("/")


def test_a_folder_is_known_to_jobs_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_source("images") == str(tmp_path / "images")
    assert resolve_source("torchvision:KMNIST") == "torchvision:KMNIST"
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_source("imagse")


def test_a_job_finds_the_paths_that_its_user_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--input", "photos", "--output", "s3://bucket/out", "--model-version", "photos"]
    assert absolute_paths(given) == ["--input", str(tmp_path / "photos"), *given[2:]]
    assert absolute_paths(["--source", "mnist"]) == ["--source", "mnist"]
    assert absolute_paths(["--uri", "models:/theirs/3"]) == ["--uri", "models:/theirs/3"]
    assert absolute_paths(["--uri", "model"]) == ["--uri", str(tmp_path / "model")]
    assert absolute_paths(["--source=photos"]) == [f"--source={tmp_path / 'photos'}"]
    own = ["--experiment", "search.yaml"]
    assert absolute_paths(own) == ["--experiment", str(tmp_path / "search.yaml")]
    monkeypatch.chdir(PROJECT_ROOT / "lib")
    assert absolute_paths(own) == ["--experiment", "lib/search.yaml"]
