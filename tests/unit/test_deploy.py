"""Changes of traffic against a stand-in for Serve and one for the registry, on real storage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lib import pipeline
from lib.config import Settings
from lib.errors import RaylineError, RefusedError, RegistryError, ServingError, StartError
from lib.registry import models
from lib.registry.models import CHALLENGER, CHAMPION
from lib.serving import apply, deploy, plan, policy
from lib.serving.bundle import bundle_path, write_bundle
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from tests.unit.serving_parts import card

MODEL = "shapes"
BY: dict[str, Any] = {"who": "ada", "why": "test"}
TEAM_B = {"name": "team-b", "import_path": "teamb:app", "route_prefix": "/team-b"}


class Serve:
    """What a PUT does to Serve's applications: those made by PUT and missing in it are deleted."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.apps: dict[str, dict[str, Any]] = {}
        self.by_serve_run: dict[str, dict[str, Any]] = {}
        self.broken: set[str] = set()
        self.gateways = {"g1": "RUNNING"}
        self.meanwhile: Callable[[], None] = lambda: None

    def details(self) -> dict[str, Any]:
        newest = policy.current(self.storage)
        policy.acknowledge(self.storage, "g1", newest.generation if newest else 0)
        replicas = [{"replica_id": name, "state": s} for name, s in self.gateways.items()]
        gateway = {"Gateway": {"replicas": replicas}}
        found = {
            name: {
                "status": "DEPLOY_FAILED" if name in self.broken else "RUNNING",
                "deployed_app_config": copy.deepcopy(config),
                "route_prefix": config.get("route_prefix"),
                "deployments": gateway if name == plan.GATEWAY else {},
            }
            for name, config in self.apps.items()
        }
        return {"applications": found | self.by_serve_run}

    def apply(self, config: dict[str, Any]) -> None:
        self.apps = {app["name"]: app for app in copy.deepcopy(config["applications"])}
        self.meanwhile()


@dataclass
class Known:
    """A version of the registry."""

    version: int
    run_id: str
    aliases: tuple[str, ...] = ()
    name: str = MODEL
    data_digest: str = "d" * 32

    @property
    def bundle(self) -> str:
        return bundle_path(self.name, self.version, self.run_id)


@dataclass
class Line:
    """Storage, Serve and the registry of one model."""

    storage: Storage
    settings: Settings
    serve: Serve
    known: dict[int, Known] = field(default_factory=dict)
    is_away: bool = False

    def register(
        self, number: int, alias: str = "", run: str = "0123456789abcdef", **card_changes: Any
    ) -> None:
        made = replace(card(number), run_id=run, **card_changes)
        write_bundle(self.storage, made, b"onnx", b"pt2")
        if alias:
            for known in self.known.values():
                known.aliases = tuple(name for name in known.aliases if name != alias)
        self.known[number] = Known(number, run, (alias,) if alias else ())

    def versions(self, settings: Settings, *_: Any) -> list[Known]:
        if self.is_away:
            raise RegistryError("MLflow does not answer")
        return list(self.known.values()) if settings.model == MODEL else []

    def resolve(self, settings: Settings, name: str, ref: str) -> Known:
        for found in self.versions(settings):
            if ref in (str(found.version), *found.aliases):
                return found
        raise RegistryError(f"model {name!r} has no version {ref!r}")

    def set_champion(self, settings: Settings, name: str, version: int) -> bool:
        for found in self.versions(settings):
            found.aliases = (CHAMPION,) if found.version == version else ()
        return True

    def traffic(self) -> ModelTraffic:
        newest = policy.current(self.storage)
        assert newest is not None
        return newest.models[MODEL]

    def deploy(self, **options: Any) -> Any:
        return deploy.deploy(self.settings, self.storage, **BY, **options)

    def weights(self, weights: dict[int, float], **options: Any) -> Any:
        options = {"shadows": {}, "pins": {}, **options}
        return deploy.set_traffic(self.settings, self.storage, weights=weights, **options, **BY)

    def promote(self, version: int, **options: Any) -> Any:
        return deploy.promote(self.settings, self.storage, version, **options, **BY)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    storage = Storage(str(tmp_path / "storage"))
    settings = Settings(storage=storage.uri, mlflow_uri="http://127.0.0.1:9", model=MODEL)
    made = Line(storage, settings, Serve(storage))
    monkeypatch.setattr(apply, "ServeClient", lambda settings: made.serve)
    monkeypatch.setattr(apply, "_probe", lambda *_: None)
    monkeypatch.setattr(models, "versions", made.versions)
    monkeypatch.setattr(pipeline, "versions", made.versions)
    monkeypatch.setattr(models, "resolve", made.resolve)
    monkeypatch.setattr(models, "ensure_bundle", lambda settings, storage, found: found.bundle)
    monkeypatch.setattr(models, "set_champion", made.set_champion)
    made.register(1, CHAMPION)
    made.register(2, CHALLENGER)
    made.deploy()
    assert set(made.serve.apps) == {"gateway", "shapes-v1", "shapes-v2"}
    assert made.traffic().weights == {1: 90, 2: 10}
    return made


def test_what_gateways_acknowledged_is_forgotten_once_they_are_gone(line: Line) -> None:
    policy.acknowledge(line.storage, "gone", 1)
    policy.acknowledge(line.storage, "starting", 1)
    line.serve.gateways["starting"] = "STARTING"
    line.promote(2)
    assert policy.acknowledging(line.storage) == {"g1", "starting"}


def test_only_this_line_s_applications_are_touched(line: Line) -> None:
    other_line = copy.deepcopy(line.serve.apps["shapes-v1"])
    other_line |= {"name": "shapes-v9", "args": {**other_line["args"], "storage": "/elsewhere"}}
    line.serve.apps |= {"team-b": TEAM_B, "shapes-v9": other_line}
    line.serve.by_serve_run = {"notebook": {"status": "RUNNING", "route_prefix": "/notebook"}}
    line.weights({1: 100})
    assert set(line.serve.apps) == {"gateway", "shapes-v1", "team-b", "shapes-v9"}
    assert line.serve.apps["team-b"] == TEAM_B
    assert line.serve.apps["shapes-v9"] == other_line
    line.deploy(new_code=True)
    line.promote(2)
    deploy.rollback(line.settings, line.storage, **BY)
    assert {"team-b", "shapes-v9"} < set(line.serve.apps)


def test_a_failed_start_takes_back_only_what_it_brought(line: Line) -> None:
    line.register(3)
    line.serve.broken = {"shapes-v3"}

    def others_deploy() -> None:
        line.serve.apps["team-b"] = TEAM_B

    line.serve.meanwhile = others_deploy
    with pytest.raises(StartError, match="shapes-v3 failed to start"):
        line.weights({1: 90, 3: 10})
    assert set(line.serve.apps) == {"gateway", "shapes-v1", "shapes-v2", "team-b"}
    assert line.traffic().weights == {1: 90, 2: 10}


def test_another_model_s_version_that_is_coming_up_stays(line: Line) -> None:
    coming = copy.deepcopy(line.serve.apps["shapes-v1"]) | {"name": "parts-v1"}
    line.serve.apps["parts-v1"] = coming
    line.weights({1: 100})
    assert set(line.serve.apps) == {"gateway", "shapes-v1", "parts-v1"}


@pytest.mark.parametrize("name", ["shapes-v3", "front"])
def test_a_name_or_route_that_is_somebody_else_s_is_not_taken(line: Line, name: str) -> None:
    line.register(3)
    theirs = {"name": name, "import_path": "teamb:app", "route_prefix": "/"}
    line.serve.apps[name] = theirs
    with pytest.raises(
        ServingError, match=rf"application '{name}'.*teamb:app.*nothing was changed"
    ):
        line.weights({1: 90, 3: 10})
    assert line.serve.apps[name] == theirs
    assert line.traffic().weights == {1: 90, 2: 10}
    line.serve.apps.pop(name)
    line.serve.by_serve_run = {name: {"status": "RUNNING", "route_prefix": "/"}}
    with pytest.raises(ServingError, match="made with serve.run"):
        line.weights({1: 90, 3: 10})


def test_a_registered_model_that_was_made_again_is_not_taken_for_what_is_served(
    line: Line,
) -> None:
    generation = policy.current(line.storage)
    line.known.clear()
    line.register(1, CHAMPION, run="ffff" * 4)
    line.register(2, CHALLENGER, run="eeee" * 4)
    for command in (
        line.deploy,
        lambda: line.promote(2),
        lambda: line.weights({1: 50, 2: 50}),
        lambda: deploy.bundle(line.settings, line.storage, 2),
        lambda: pipeline.check_model(line.settings, line.storage, manifest()),
    ):
        with pytest.raises(RefusedError, match="1-01234567.*run ffff.*1-ffffffff.*MODEL="):
            command()
    assert policy.current(line.storage) == generation
    # Going back never waits for the registry, and gives no alias to another version.
    line.is_away = True
    line.promote(2)
    line.is_away = False
    done = deploy.rollback(line.settings, line.storage, **BY)
    assert (done["champion"], line.traffic().bundles[1]) == (1, card_path(1))
    assert "is two different models" in done["warning"]
    assert CHALLENGER in line.known[2].aliases
    # Nothing of it is in the registry at all: no search begins, but what is served is repaired.
    line.known.clear()
    with pytest.raises(RefusedError, match="no version that is.*MODEL=another-name"):
        pipeline.check_model(line.settings, line.storage, manifest())
    assert "has no version '1'" in line.deploy()["warning"]


def card_path(number: int) -> str:
    return bundle_path(MODEL, number, card(number).run_id)


def manifest(**changes: Any) -> Any:
    @dataclass
    class Manifest:
        class_names: tuple[str, ...] = card().class_names
        shape: tuple[int, int, int] = card().shape
        source: str = "/b/shapes"

    return Manifest(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("left", "right")}, r"2 classes \('left', 'right'\) instead of 3 classes"),
        ({"class_names": ("circle", "square", "star")}, "instead of 3"),
        ({"width": 12, "height": 12}, r"shape \[12, 12, 1\] instead of \[4, 6, 1\]"),
    ],
)
def test_a_version_with_other_classes_gets_no_request_without_the_flag(
    line: Line, changes: dict[str, Any], message: str
) -> None:
    line.register(3, CHALLENGER, **changes)
    served = line.traffic()
    put = replace(served, shadows={3: 20}, bundles={**served.bundles, 3: line.known[3].bundle})
    for door in (
        line.deploy,
        lambda: line.promote(3),
        lambda: line.weights({1: 90, 3: 10}),
        lambda: line.weights({1: 90}, shadows={3: 5.0}),
        lambda: line.weights({1: 90}, pins={"user-7": 3}),
        lambda: deploy.put(line.settings, line.storage, put, **BY),
    ):
        with pytest.raises(RefusedError, match=message) as caught:
            door()
        assert "--other-classes" in str(caught.value)
        assert line.traffic() == served
    # Up without a request of its own, it can be asked by its number; then with the flag.
    line.weights({1: 100, 3: 0})
    assert set(line.serve.apps) == {"gateway", "shapes-v1", "shapes-v3"}
    with pytest.raises(RefusedError, match=message):
        line.weights({1: 50, 3: 50})
    assert line.promote(3, other_classes=True)["champion"] == 3
    assert deploy.rollback(line.settings, line.storage, **BY)["champion"] == 1


def test_data_with_other_classes_is_refused_before_the_search(line: Line) -> None:
    pipeline.check_model(line.settings, line.storage, manifest())
    for changes in ({"class_names": ("left", "right")}, {"shape": (12, 12, 1)}):
        with pytest.raises(RefusedError, match="/b/shapes has .*MODEL=shapes-2"):
            pipeline.check_model(line.settings, line.storage, manifest(**changes))
    other = replace(line.settings, model="parts")
    pipeline.check_model(other, line.storage, manifest(class_names=("left", "right")))


def test_deploying_again_never_moves_traffic_to_a_version_that_has_no_right_to_it(
    line: Line,
) -> None:
    line.weights({1: 50, 2: 50})
    # A retrain registered version 3: it has no alias, its gates have not passed.
    line.register(3)
    line.deploy()
    assert line.traffic().weights == {1: 50, 2: 50}
    # What a person took out does not come back, although the registry still calls it challenger.
    line.known[2].aliases = (CHALLENGER,)
    line.weights({1: 100})
    line.known[2].aliases = (CHALLENGER,)
    line.deploy()
    assert line.traffic().weights == {1: 100}
    # Only a challenger that is new, which a person's registration made one, is added.
    line.weights({1: 60, 2: 20})
    line.register(4, CHALLENGER)
    assert line.deploy()["weights"] == {"1": 67.5, "2": 22.5, "4": 10}
    assert line.deploy()["weights"] == {"1": 67.5, "2": 22.5, "4": 10}


def test_traffic_that_moved_is_no_failure_while_the_registry_is_away(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    # The registry's own functions, and nothing at MLflow's address.
    monkeypatch.setattr(apply, "ServeClient", lambda settings: line.serve)
    monkeypatch.setattr(apply, "_probe", lambda *_: None)
    promoted = line.promote(2)
    assert (promoted["champion"], line.traffic().champion) == (2, 2)
    assert "MLflow does not answer at http://127.0.0.1:9" in promoted["warning"]
    assert "warning" in line.weights({1: 50, 2: 50})
    back = deploy.rollback(line.settings, line.storage, **BY)
    assert (back["champion"], line.traffic().weights) == (1, {1: 100, 2: 0})
    assert "`python -m jobs.deploy` sets it later" in back["warning"]
    # A version that only the registry knows needs it.
    with pytest.raises(RaylineError, match="MLflow does not answer"):
        line.promote(3)


def test_the_next_deploy_repairs_the_alias(line: Line) -> None:
    line.is_away = True
    assert "warning" in line.promote(2)
    assert line.known[1].aliases == (CHAMPION,)
    line.is_away = False
    assert "warning" not in line.deploy()
    assert line.known[2].aliases == (CHAMPION,)
