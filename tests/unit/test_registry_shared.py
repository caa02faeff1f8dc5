"""A registry that others use too, or that was damaged: one such thing never stops a command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.errors import RefusedError, RegistryError
from lib.provenance import Provenance
from lib.registry import claims, publish, removal
from lib.registry.claims import claimed
from lib.registry.garbage import collect
from lib.registry.leaderboard import best, leaderboard
from lib.registry.models import resolve, survey, versions
from lib.registry.publish import Publisher
from lib.registry.registration import register_ranked
from lib.registry.removal import delete
from lib.registry.server import ensure_experiment
from lib.registry.sweep_runs import reopen_sweep, start_sweep
from lib.registry.trials import ranked_trials
from lib.serving.deploy import _champion_and_challenger as traffic_of
from lib.watch import retrain_record, rollout_state
from tests.registries import DIGEST, MODEL, Registry, make_registry


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return make_registry(tmp_path / "line", empty_database, monkeypatch)


def tag(registry: Registry, number: int, name: str, value: str) -> None:
    registry.client.set_model_version_tag(MODEL, str(number), name, value)


EDITS = [
    ("rayline.test_accuracy", "n/a"),
    ("rayline.test_accuracy", '"0.9"'),
    ("rayline.test_accuracy", "NaN"),
    ("rayline.git_dirty", "1"),
    ("rayline.per_class_accuracy", "0.9"),
    ("rayline.trial_run_id", "another"),
    ("rayline.created_ms", "yesterday"),
]


def test_a_version_whose_tag_was_edited_is_named_and_only_it_is_refused(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    good, edited = registry.add(), registry.add()
    registry.client.set_registered_model_alias(MODEL, "champion", "1")
    registry.client.set_registered_model_alias(MODEL, "challenger", "2")
    tags = registry.client.get_model_version(MODEL, "2").tags
    capsys.readouterr()
    for name, value in EDITS:
        tag(registry, edited.version, name, value)

        assert [version.version for version in versions(registry.settings)] == [good.version]
        assert versions(registry.settings)[0].aliases == ("champion",)

        printed = capsys.readouterr().out
        assert printed.count("1 of 2 versions are left out: version 2 of 'digits'") == 1
        assert name in printed or value in printed
        with pytest.raises(RegistryError, match="set a changed tag back"):
            resolve(registry.settings, MODEL, "2")
        if name in tags:
            tag(registry, edited.version, name, tags[name])
    wanted = traffic_of(registry.settings, registry.storage, None, 10.0)
    assert wanted.weights == {1: 100.0}
    assert resolve(registry.settings, MODEL, "champion").version == 1
    assert registry.add().version == 3


def test_a_trial_whose_version_was_edited_is_not_registered_again(registry: Registry) -> None:
    trial = registry.trial()
    made = registry.register(trial)
    tag(registry, made.version, "rayline.test_accuracy", "n/a")
    registry.patch.setattr(publish, "GRACE_S", 0.0)

    with pytest.raises(RegistryError, match=r"can't be registered again.*test_accuracy is 'n/a'"):
        registry.register(trial)

    assert (registry.files_of(made) / "model.onnx").exists()
    assert registry.client.search_model_versions(f"name = '{MODEL}'")[0].version == made.version


def test_a_trial_without_checkpoint_is_refused_by_name(registry: Registry) -> None:
    trial = registry.trial()
    board = leaderboard(registry.settings, registry.storage, with_trials=True)
    with pytest.raises(RefusedError, match="rank 1.*no checkpoint any more.*jobs.tune") as refused:
        register_ranked(registry.settings, registry.storage, board, best(board, 1))
    assert trial.run_id in str(refused.value)
    assert versions(registry.settings) == []


def test_models_of_other_tools_are_surveyed_whatever_their_name(registry: Registry) -> None:
    registry.add_models_of_others()
    for name in ("Fraud Detector", "O'Neill", "both ' and \""):
        ours, foreign = survey(registry.settings, name)
        assert (ours, [other.version for other in foreign]) == ([], [1])


def test_garbage_is_found_beside_models_of_other_tools_and_damaged_things(
    registry: Registry,
) -> None:
    registry.add_models_of_others()
    kept = registry.add()
    storage = registry.storage
    storage.write(f"models/{MODEL}/9-deadbeef/model.onnx", b"x")
    storage.write("steps/tune/damaged.json", b"{")
    storage.write_json("steps/tune/gone.json", {"result": {"sweep_run_id": "gone"}})
    left = registry.client.create_logged_model(
        registry.experiment, "model", tags={"rayline.model": MODEL}
    )
    unlisted = registry.client.create_logged_model(
        registry.experiment, "model", tags={"rayline.model": MODEL}
    )
    real = publish.remove_model.__globals__["get_artifact_repository"]

    def repository(uri: str, **options: Any) -> Any:
        if unlisted.model_id in uri:
            raise PermissionError("Access Denied")
        return real(uri, **options)

    registry.patch.setitem(publish.remove_model.__globals__, "get_artifact_repository", repository)

    found = collect(registry.settings, storage, remove=True, grace_s=0, tune_grace_s=0)

    assert {(g["kind"], g["what"]) for g in found["garbage"]} == {
        ("bundle", f"models/{MODEL}/9-deadbeef"),
        ("step", "steps/tune/gone.json"),
        ("logged model", left.model_id),
    }
    assert found["failed"] == []
    notes = "\n".join(found["notes"])
    assert "3 models of other tools were left alone: Fraud Detector, O'Neill, both" in notes
    assert "steps/tune/damaged.json was left alone" in notes
    assert "Access Denied" in notes
    assert storage.exists(f"{kept.bundle}/model.onnx")


def test_steps_stay_when_mlflow_knows_no_bundle_and_no_sweep_of_this_storage(
    registry: Registry,
) -> None:
    storage = registry.storage
    storage.write_json("steps/tune/0.json", {"result": {"sweep_run_id": "of another server"}})

    found = collect(registry.settings, storage, remove=True, grace_s=0, tune_grace_s=0)

    assert storage.exists("steps/tune/0.json")
    assert any("MLFLOW_TRACKING_URI" in note for note in found["notes"])
    storage.write_json("steps/tune/1.json", {"result": {"sweep_run_id": registry.sweep}})
    collect(registry.settings, storage, remove=True, grace_s=0, tune_grace_s=0)
    assert storage.list("steps/tune") == ["steps/tune/1.json"]


def interleaved(registry: Registry, method: str) -> list[Any]:
    """Let another registration of the same trial run as a whole just before a method's first call.

    Return what it came to.
    """
    real = getattr(Publisher, method)
    others: list[Any] = []

    def then(self: Publisher, trial: Any, *rest: Any) -> Any:
        if not others:
            others.append(None)
            others[0] = registry.register(trial)
        return real(self, trial, *rest)

    registry.patch.setattr(Publisher, method, then)
    return others


@pytest.mark.parametrize("method", ["_remove_leftovers", "_log_model", "_create_version"])
def test_two_registrations_of_a_trial_leave_one_whole_version(
    registry: Registry, method: str
) -> None:
    # As where each took the other for dead: what follows must be safe without the claim.
    registry.patch.setattr(claims, "is_over", lambda *_: True)
    others = interleaved(registry, method)

    made = registry.register(registry.trial())

    assert made.run_id == others[0].run_id
    (only,) = versions(registry.settings)
    assert only.version == made.version == others[0].version
    assert sorted(file.name for file in registry.files_of(only).iterdir()) == [
        "MLmodel",
        "README.md",
        "card.json",
        "data",
        "evaluation.json",
        "model.onnx",
    ]
    logged = registry.client.search_logged_models([registry.experiment])
    assert len(logged) == 1


def test_a_claim_is_waited_for_and_a_dead_one_is_not(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, path = registry.storage, f"claims/{MODEL}/trial.json"
    alive = {"host": "elsewhere", "pid": 1, "since_s": claims.time.time()}
    storage.write_json(path, alive)
    waited: list[float] = []

    def gives_back(seconds: float) -> None:
        waited.append(seconds)
        storage.delete(path)

    registry.patch.setattr(claims.time, "sleep", gives_back)
    with claimed(storage, MODEL, "trial"):
        assert storage.read_json(path)["pid"] != 1
    assert len(waited) == 1
    assert "waiting for another registration" in capsys.readouterr().out
    assert not storage.exists(path)
    for dead in (
        {**alive, "since_s": alive["since_s"] - claims.CLAIM_S - 1},
        {**alive, "host": claims.socket.gethostname(), "pid": 2**22 + 1},
        {"other": "content"},
    ):
        storage.write_json(path, dead)
        with claimed(storage, MODEL, "trial"):
            pass
    assert len(waited) == 1


def test_a_deleted_experiment_is_restored_with_a_line_of_output(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.client.delete_experiment(registry.experiment)

    sweep = start_sweep(
        registry.settings,
        registry.storage,
        name="again",
        manifest=None,
        tags={},
        facts={},
        experiment={},
    )

    assert sweep.experiment_id == registry.experiment
    assert "had been deleted in MLflow: it is restored" in capsys.readouterr().out
    assert registry.client.get_experiment(registry.experiment).lifecycle_stage == "active"
    trial = registry.trial()
    registry.client.delete_experiment(registry.experiment)
    (found,) = ranked_trials(registry.client, registry.sweep, DIGEST)
    assert found.run_id == trial.run_id
    registry.client.delete_experiment(registry.experiment)
    assert reopen_sweep(registry.settings, registry.sweep).run_id == registry.sweep
    registry.client.delete_run(registry.sweep)
    with pytest.raises(RegistryError, match="mlflow runs restore"):
        ranked_trials(registry.client, registry.sweep, DIGEST)
    assert ensure_experiment(registry.client, "another") == ensure_experiment(
        registry.client, "another"
    )


def test_a_resumed_sweep_carries_no_code_of_before(registry: Registry) -> None:
    before = {"rayline.git_commit": "0" * 40, "rayline.git_diff_sha256": "1" * 64}
    for name, value in {**before, "rayline.seed": "7"}.items():
        registry.client.set_tag(registry.sweep, name, value)
    clean = Provenance(commit="2" * 40, dirty=False)
    registry.patch.setenv("RAYLINE_PROVENANCE", clean.encode())
    tags = reopen_sweep(registry.settings, registry.sweep).tags
    assert tags["rayline.git_commit"] == tags["mlflow.source.git.commit"] == "2" * 40
    assert tags["rayline.git_dirty"] == "false"
    assert "rayline.git_diff_sha256" not in tags
    assert (tags["rayline.seed"], tags["rayline.data_digest"]) == ("7", DIGEST)


def test_leftovers_go_when_they_are_old(registry: Registry) -> None:
    trial = registry.trial()
    registry.client.create_logged_model(
        registry.experiment, "model", source_run_id=trial.run_id, tags={"rayline.model": MODEL}
    )
    registry.patch.setattr(publish, "GRACE_S", 0.0)
    made = registry.register(trial)
    logged = registry.client.search_logged_models([registry.experiment])
    assert [model.model_id for model in logged] == [registry.model_id(made)]


def test_a_version_in_a_rollout_or_coming_up_is_not_deleted(registry: Registry) -> None:
    champion, candidate = registry.add(), registry.add()
    registry.serve(champion)
    settings, storage = registry.settings, registry.storage
    state = rollout_state.State(
        id="1",
        model=MODEL,
        candidate=candidate.version,
        champion=champion.version,
        who="me",
        stages=(rollout_state.REPLAY, rollout_state.SHADOW),
        min_requests=1,
        stage_timeout_s=1.0,
        max_disagreement=0.1,
        before_weights={},
        before_shadows={},
        set_weights={},
        set_shadows={},
        evidence_since_us=0,
        stage=rollout_state.REPLAY,
    )
    for status in (
        rollout_state.RUNNING,
        rollout_state.PAUSED,
        rollout_state.WITHDRAWING,
        rollout_state.HELD,
        rollout_state.PROMOTING,
    ):
        rollout_state.save(storage, replace(state, status=status))
        with pytest.raises(RefusedError, match=rf"candidate of a rollout that is {status} .*abort"):
            delete(settings, storage, "2", remove=True)
    rollout_state.save(storage, replace(state, status=rollout_state.ABORTED))

    record = retrain_record.new(MODEL, "drift", who="me", start_us=0, options={}, now=0.0)
    made = retrain_record.StepRecord(
        name="register", started=0.0, result={"version": 2, "run_id": candidate.run_id}
    )
    retrain_record.write(storage, record.begun(made))
    with pytest.raises(RefusedError, match=rf"candidate of retrain {record.id}"):
        delete(settings, storage, "2", remove=True)
    retrain_record.write(storage, retrain_record.ended(record.begun(made), retrain_record.DONE))

    registry.patch.setattr(removal, "live_applications", lambda _: {f"{MODEL}-v2": {}})
    registry.patch.setattr(removal.plan, "is_ours", lambda *_: True)
    registry.patch.setattr(removal.ServeClient, "details", lambda _: {})
    with pytest.raises(RefusedError, match="coming up in Serve"):
        delete(settings, storage, "2", remove=True)

    # Begun while the delete was: the version stays as it was.
    looks = [{}, {f"{MODEL}-v2": {}}]
    registry.patch.setattr(removal, "live_applications", lambda _: looks.pop(0))
    with pytest.raises(RefusedError, match="coming up in Serve"):
        delete(settings, storage, "2", remove=True)
    assert versions(settings)[1].ready

    registry.patch.setattr(removal, "live_applications", lambda _: {})
    assert delete(settings, storage, "2", remove=False)["deleted"] is False
    assert [version.version for version in versions(settings)] == [1, 2]
    assert delete(settings, storage, "2", remove=True)["deleted"] is True
    assert [version.version for version in versions(settings)] == [1]
