"""The traffic split and the policy's history."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import Settings
from lib.errors import ServingError, StorageError
from lib.serving import deploy, policy
from lib.serving.traffic import ModelTraffic, choose
from lib.storage import Storage

KEYS = [f"key-{number}" for number in range(100_000)]


def shares(weights: dict[int, float]) -> dict[int, float]:
    chosen = [choose(weights, key) for key in KEYS]
    return {version: chosen.count(version) / len(KEYS) for version in weights}


@pytest.mark.parametrize(
    "weights", [{1: 90, 2: 10}, {1: 95, 2: 5}, {3: 50, 4: 30, 5: 20}, {1: 0.9, 2: 0.1, 7: 0.0}]
)
def test_each_version_gets_its_share_of_100_000_keys_within_half_a_percent(
    weights: dict[int, float],
) -> None:
    total = sum(weights.values())
    for version, share in shares(weights).items():
        assert share == pytest.approx(weights[version] / total, abs=0.005)


def test_raising_a_canary_moves_keys_only_towards_it() -> None:
    before = [choose({1: 95, 2: 5}, key) for key in KEYS]
    after = [choose({1: 90, 2: 10}, key) for key in KEYS]
    moved = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    assert moved == {(1, 2)}


def test_a_version_without_weight_is_never_chosen() -> None:
    assert {choose({1: 1, 2: 0}, key) for key in KEYS[:1000]} == {1}


@pytest.mark.parametrize(
    ("weights", "champion", "message"),
    [
        ({1: 50, 3: 50}, 1, r"\[3\] have a weight but are not deployed"),
        ({1: -1}, 1, "is not ≥ 0"),
        ({1: float("nan")}, 1, "is not ≥ 0"),
        ({1: 0, 2: 0}, 1, "all weights are 0"),
        ({1: 1}, 9, "champion 9 is not deployed"),
    ],
)
def test_a_policy_that_could_not_be_served_is_refused(
    weights: dict[int, float], champion: int, message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        ModelTraffic(weights=weights, bundles={1: "a", 2: "b"}, champion=champion)


def traffic(share: float) -> dict[str, ModelTraffic]:
    return {
        "digits": ModelTraffic(
            weights={1: 100 - share, 2: share}, bundles={1: "a", 2: "b"}, champion=1
        )
    }


def test_policies_follow_each_other_and_all_are_kept(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert policy.current(storage) is None
    first = policy.commit(storage, None, traffic(5), default_model="digits", who="ada", why="start")
    second = policy.commit(
        storage, first, traffic(10), default_model="digits", who="bob", why="canary"
    )
    assert policy.current(storage) == second
    assert policy.current(storage, known=first) == second
    assert second.generation == 2
    assert storage.read_json("traffic/00000001.json")["who"] == "ada"
    assert storage.read_json("traffic/00000002.json")["models"]["digits"]["weights"] == {
        "1": 90,
        "2": 10,
    }


def test_a_change_based_on_an_old_policy_overwrites_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = policy.commit(storage, None, traffic(5), default_model="digits", who="ada", why="a")
    policy.commit(storage, first, traffic(10), default_model="digits", who="bob", why="b")
    with pytest.raises(ServingError, match="changed meanwhile"):
        policy.commit(storage, first, traffic(50), default_model="digits", who="eve", why="c")
    newest = policy.current(storage)
    assert newest is not None
    assert newest.who == "bob"


KILLED = """
import os
import sys

from lib.storage import Storage

os.link = lambda *_: os._exit(9)
Storage(sys.argv[1]).create_json(sys.argv[2], {"generation": 3})
"""


@pytest.mark.parametrize("path", ["traffic/00000003.json", "plan.json"])
def test_who_is_killed_just_before_a_file_is_there_leaves_nothing_that_is_seen(
    tmp_path: Path, path: str
) -> None:
    storage = Storage(str(tmp_path))
    first = policy.commit(storage, None, traffic(5), default_model="digits", who="ada", why="a")
    second = policy.commit(storage, first, traffic(10), default_model="digits", who="bob", why="b")
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), path], cwd=root, check=False
    )
    assert killed.returncode == 9
    assert [name for name in storage.list("", recursive=True) if "00000003" in name] == []
    assert storage.list("") == []
    # A job that begins now sees what the gateways see.
    newest = policy.current(storage)
    assert newest == second == policy.current(storage, known=first)
    third = policy.commit(storage, newest, traffic(50), default_model="digits", who="eve", why="c")
    assert third.generation == 3
    assert policy.current(storage) == policy.current(storage, known=second) == third


def test_a_link_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: str) -> None:
        raise OSError(5, "Input/output error")

    storage = Storage(str(tmp_path))
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match="Input/output"):
        storage.create_json("traffic/00000001.json", {})
    assert list((tmp_path / "traffic").iterdir()) == []


def test_what_is_no_generation_is_passed_over(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = policy.commit(storage, None, traffic(5), default_model="digits", who="ada", why="a")
    storage.write_json("traffic/00000002.json.0f1e", {})
    assert policy.current(storage) == first
    assert policy.history(storage) == [first]


def test_a_model_that_is_not_served_names_those_that_are(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    settings = Settings(storage=str(tmp_path), mlflow_uri="http://mlflow:5000", model="digits")
    with pytest.raises(ServingError, match="digits is not served yet. Set RAYLINE_MODEL"):
        deploy.bundle(settings, storage, 1)
    traffic = ModelTraffic(champion=1, weights={1: 100.0}, bundles={1: "models/photos/1"})
    policy.commit(storage, None, {"photos": traffic}, default_model="photos", who="a", why="b")
    with pytest.raises(ServingError, match="served: photos. Set RAYLINE_MODEL.*serve digits"):
        deploy.bundle(settings, storage, 1)
