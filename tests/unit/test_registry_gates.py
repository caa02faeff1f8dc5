"""The rules of registration that need no server: ranking, aliases, gates, the choice of runtime."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jobs.submit
import jobs.up
from lib.config import Settings, preset
from lib.data.stream import Batch
from lib.errors import ConfigError, RefusedError, RegistryError
from lib.registry import export, registration, runtime
from lib.registry.baseline import Baseline, check_against, train_baseline
from lib.registry.evaluate import evaluate
from lib.registry.models import Facts, Version, _worst
from lib.registry.registration import choose_aliases
from lib.registry.runtime import Measured
from lib.registry.trials import ranked_trials
from lib.serving.bundle import write_bundle
from lib.storage import Storage
from lib.train.presets import preset_experiment
from tests.unit.serving_parts import card


class FakeMlflow:
    """Runs in memory, handed out in pages of two."""

    def __init__(
        self, *trials: tuple[str, float | None, str], objectives: Sequence[str] = ()
    ) -> None:
        tags = {"rayline.kind": "sweep", "rayline.data_digest": "d" * 32}
        self.sweep = _run("sweep", {}, "FINISHED", 0, tags)
        if objectives:
            asked = preset_experiment(preset("smoke"), objectives=objectives).objectives
            fields = [{"metric": o.metric, "goal": o.goal, "constant": o.constant} for o in asked]
            tags["rayline.objectives"] = json.dumps(fields)
        self.children = [
            _run(name, {} if value is None else {"val_accuracy": value}, status, start)
            for start, (name, value, status) in enumerate(trials)
        ]

    def get_run(self, run_id: str) -> Any:
        return self.sweep

    def search_runs(
        self, experiment_ids: list[str], page_token: str | None, **query: Any
    ) -> list[Any]:
        start = int(page_token or 0)
        page = _Page(self.children[start : start + 2])
        page.token = str(start + 2) if start + 2 < len(self.children) else None
        return page


class _Page(list[Any]):
    token: str | None = None


def _run(
    name: str,
    metrics: dict[str, float],
    status: str,
    start: int,
    tags: dict[str, str] | None = None,
) -> Any:
    return SimpleNamespace(
        info=SimpleNamespace(
            run_id=name,
            experiment_id="1",
            lifecycle_stage="active",
            status=status,
            start_time=start,
            artifact_uri=f"mlflow-artifacts:/{name}",
        ),
        data=SimpleNamespace(metrics=metrics, tags=tags or {}),
    )


def test_trials_are_ranked_by_validation_over_all_pages_and_ties_go_to_the_earlier() -> None:
    client: Any = FakeMlflow(
        ("worse", 0.90, "FINISHED"),
        ("tied-early", 0.98, "FINISHED"),
        ("tied-late", 0.98, "FINISHED"),
        ("failed", 0.99, "FAILED"),
        ("still-running", 0.995, "RUNNING"),
        ("no-metric", None, "FINISHED"),
        ("best", 0.985, "FINISHED"),
    )
    ranked = ranked_trials(client, "sweep", "d" * 32)
    assert [trial.run_id for trial in ranked] == ["best", "tied-early", "tied-late", "worse"]
    assert ranked[0].checkpoint_uri == "mlflow-artifacts:/best/checkpoint/model.pt"


def test_ties_go_to_the_lower_loss_on_validation() -> None:
    client: Any = FakeMlflow(*((name, 1.0, "FINISHED") for name in ("a", "b", "c")))
    for run, loss in zip(client.children, (0.3, 0.1, 0.2), strict=True):
        run.data.metrics["val_loss"] = loss
    assert [trial.run_id for trial in ranked_trials(client, "sweep")] == ["b", "c", "a"]


@pytest.mark.parametrize("tag", ["{", "null", '[{"metric": "val_loss", "goal": "least"}]', "[]"])
def test_trials_of_a_sweep_whose_objective_was_edited_are_ranked_by_accuracy(
    tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = FakeMlflow(("a", 0.9, "FINISHED"), ("b", 0.8, "FINISHED"))
    client.sweep.data.tags["rayline.objectives"] = tag
    assert [trial.run_id for trial in ranked_trials(client, "sweep")] == ["a", "b"]
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objectives", "order"),
    [
        ((), ["a", "c", "b"]),
        (["val_accuracy"], ["a", "c", "b"]),
        (["val_loss"], ["b", "c", "a"]),
        (["num_parameters", "val_loss", "val_accuracy"], ["b", "c", "a"]),
        (["latency_ms", "val_accuracy"], ["a", "c", "b"]),
    ],
)
def test_trials_are_ranked_by_the_first_objective_that_training_changes(
    objectives: Sequence[str], order: list[str]
) -> None:
    client: Any = FakeMlflow(
        ("a", 0.99, "FINISHED"),
        ("b", 0.97, "FINISHED"),
        ("c", 0.98, "FINISHED"),
        objectives=objectives,
    )
    for run, loss, size in zip(client.children, (0.3, 0.1, 0.2), (10, 30, 20), strict=True):
        run.data.metrics |= {"val_loss": loss, "num_parameters": size}
    assert [trial.run_id for trial in ranked_trials(client, "sweep")] == order


def test_a_trial_counts_at_its_best_epoch_and_a_result_that_is_no_number_does_not() -> None:
    client: Any = FakeMlflow(
        ("got worse", 0.5, "FINISHED"),
        ("steady", 0.9, "FINISHED"),
        ("nan", math.nan, "FINISHED"),
        ("inf", math.inf, "FINISHED"),
    )
    client.children[0].data.metrics["best/val_accuracy"] = 0.95
    ranked = ranked_trials(client, "sweep")
    assert [(trial.run_id, trial.metrics["val_accuracy"]) for trial in ranked] == [
        ("got worse", 0.95),
        ("steady", 0.9),
    ]


def test_a_sweep_of_commands_has_nothing_to_register() -> None:
    client: Any = FakeMlflow(("a", 0.99, "FINISHED"))
    client.sweep.data.tags["rayline.trainable"] = "command"
    with pytest.raises(RegistryError, match="left no model"):
        ranked_trials(client, "sweep")


def test_a_sweep_of_other_data_or_without_a_finished_trial_is_refused() -> None:
    failed: Any = FakeMlflow(("failed", 0.99, "FAILED"))
    with pytest.raises(RegistryError, match="no finished trial"):
        ranked_trials(failed, "sweep", "d" * 32)
    with pytest.raises(RegistryError, match="was trained on data set d"):
        ranked_trials(failed, "sweep", "e" * 32)


@pytest.mark.parametrize(
    ("pending", "champion", "aliases"),
    [
        ([1, 2], None, {"champion": 1, "challenger": 2}),
        ([1], None, {"champion": 1}),
        ([3, 4], 1, {"challenger": 3}),
        # Interrupted after the first alias: version 1 is champion, and pending still.
        ([1, 2], 1, {"challenger": 2}),
        # Interrupted after one version; the better one came second.
        ([2, 1], None, {"champion": 2, "challenger": 1}),
        ([1], 1, {}),
        ([], None, {}),
    ],
)
def test_the_champion_is_set_once_and_afterwards_only_the_challenger(
    pending: list[int], champion: int | None, aliases: dict[str, int]
) -> None:
    assert choose_aliases(pending, champion) == aliases


class Aliases:
    """The part of MLflow's client that sets aliases and tags."""

    def __init__(self, aliases: dict[str, str]) -> None:
        self.aliases = aliases
        self.tags: dict[tuple[str, str], str] = {}

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(aliases=dict(self.aliases))

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.tags[version, key] = value

    def get_model_version(self, name: str, version: str) -> Any:
        tags = {key: value for (number, key), value in self.tags.items() if number == version}
        return SimpleNamespace(tags=tags)


@pytest.mark.parametrize(
    ("challenges", "classes", "aliases"),
    [
        (True, ("square", "circle", "star"), {"champion": "1", "challenger": "2"}),
        (False, ("square", "circle", "star"), {"champion": "1"}),
        (True, ("left", "right"), {"champion": "1"}),
    ],
)
def test_only_a_version_of_the_same_classes_that_may_challenge_gets_the_alias(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    challenges: bool,
    classes: tuple[str, ...],
    aliases: dict[str, str],
) -> None:
    storage = Storage(str(tmp_path))
    champion = card(1)
    bundle = write_bundle(storage, champion, b"onnx", b"pt2")
    known = [
        SimpleNamespace(version=1, bundle=bundle, data_digest="a", test_accuracy=0.9, ready=True),
        SimpleNamespace(version=2, bundle="", data_digest="b", test_accuracy=0.9, ready=False),
    ]
    monkeypatch.setattr(registration, "versions", lambda settings: known)
    client: Any = Aliases({"champion": "1"})
    settings = Settings(storage=str(tmp_path), mlflow_uri="http://m", model="shapes")
    manifest: Any = SimpleNamespace(class_names=classes, shape=champion.shape, digest="b")
    registered: Any = known[1:]
    registration._complete(client, settings, storage, manifest, registered, challenges=challenges)
    assert client.aliases == aliases
    assert client.tags["2", "rayline.ready"] == "true"
    why = client.tags.get(("2", "rayline.no_challenger"), "")
    assert ("2 classes ('left', 'right')" in why) == (classes == ("left", "right"))


def test_far_below_the_baseline_is_two_points() -> None:
    baseline = Baseline(val_accuracy=0.92, train_rows=100, seconds=1.0)
    check_against(baseline, 0.9001, "run")
    with pytest.raises(RefusedError, match=r"0\.8999.*0\.9200") as refused:
        check_against(baseline, 0.8999, "run")
    assert "jobs.tune" in str(refused.value)


@pytest.mark.parametrize("shape", [(9, 5, 1), (40, 33, 3)])
def test_the_baseline_learns_a_linear_rule_and_is_the_same_every_time(
    shape: tuple[int, int, int],
) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600)
    images = random.integers(0, 100, (600, *shape), dtype=np.uint8)
    for label in range(3):
        # Each class is brighter in rows of its own.
        images[labels == label, label * 2 : label * 2 + 2] += 80

    def train() -> Baseline:
        return train_baseline(images[:500], labels[:500], images[500:], labels[500:], 3)

    first = train()
    assert first.val_accuracy > 0.95
    assert train().val_accuracy == first.val_accuracy
    assert first.train_rows == 500


def test_evaluation_counts_by_class_and_leaves_absent_classes_out() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    result = evaluate(labels, probabilities, ["cat", "dog", "owl"])
    assert result.accuracy == 0.75
    assert result.per_class_accuracy == {"cat": pytest.approx(2 / 3), "dog": 1.0}
    assert result.macro_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert result.confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))


def test_runtimes_are_timed_on_a_gpu_only_where_replicas_are_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's cluster and its task are stand-ins."""
    granted: list[float] = []

    def remote(*, num_gpus: float, num_cpus: float) -> Any:
        granted.append(num_gpus)
        return lambda function: SimpleNamespace(remote=lambda *_: "on the GPU")

    monkeypatch.setattr(runtime.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.ray, "cluster_resources", lambda: {"GPU": 8.0})
    monkeypatch.setattr(runtime.ray, "remote", remote)
    monkeypatch.setattr(runtime.ray, "wait", lambda tasks, timeout: (tasks, []))
    monkeypatch.setattr(runtime.ray, "get", lambda task: task)
    monkeypatch.setattr(runtime, "measure", lambda *_: "on the CPU")
    images = np.zeros((1, 2, 2, 1), np.uint8)
    assert runtime.measure_where_served(b"", b"", images) == "on the CPU"
    monkeypatch.setattr(runtime, "replica_gpus", lambda: 0.5)
    assert runtime.measure_where_served(b"", b"", images) == "on the GPU"
    assert granted == [0.5]


def test_the_faster_runtime_over_both_batch_sizes_serves_if_its_labels_agree() -> None:
    rates = {"onnxruntime": {1: 1_000.0, 128: 1_000.0}, "torch": {1: 500.0, 128: 9_000.0}}
    assert Measured(device="cuda", images_per_s=rates, labels_agree=True).fastest == "torch"
    assert Measured(device="cuda", images_per_s=rates, labels_agree=False).fastest == "onnxruntime"
    rates["torch"][128] = 1_900.0
    assert Measured(device="cpu", images_per_s=rates, labels_agree=True).fastest == "onnxruntime"


@pytest.mark.parametrize("commit", ["c0ffee", None])
def test_a_version_reads_back_from_its_tags(commit: str | None) -> None:
    facts: dict[str, Any] = {
        "trial_run_id": "0123456789abcdef",
        # Looks like a number in JSON, and is none.
        "sweep_run_id": "123",
        "data_digest": "1e5",
        "git_commit": commit,
        "git_dirty": True,
        "val_accuracy": 0.1 + 0.2,
        "test_accuracy": 0.5,
        "test_macro_accuracy": 0.5,
        "test_macro_f1": 0.5,
        "val_test_gap": -0.2,
        "per_class_accuracy": {"é, 7": 1.0},
        "baseline_val_accuracy": 0.9,
        "onnx_max_difference": 1e-7,
        "runtime": "torch",
        "device": "cpu",
        "images_per_s": {"torch": {"1": 2.0}},
    }
    found: Any = SimpleNamespace(
        name="digits",
        version="3",
        creation_timestamp=5,
        run_id=facts["trial_run_id"],
        tags=Facts(**facts).to_tags(),
    )
    version = Version.from_mlflow(found, ("champion",))
    assert version == Version(
        **facts, name="digits", version=3, aliases=("champion",), created_ms=5, ready=False
    )
    assert version.bundle == "models/digits/3-01234567"
    del found.tags["rayline.runtime"]
    with pytest.raises(RegistryError, match=r"version 3 .* not made by `jobs.register`"):
        Version.from_mlflow(found, ())


def test_accuracies_of_many_classes_fit_in_a_tag_and_the_worst_stay() -> None:
    many = {f"class {index} {'x' * 40}": index / 1000 for index in range(1000)}
    kept = _worst(many)
    assert len(json.dumps(kept)) <= 5000
    assert list(kept) == list(many)[: len(kept)]
    few = {"b": 0.5, "a": 0.9}
    assert _worst(few) is few


@pytest.mark.parametrize("name", ["My Model", "a/b", "", "-x", "x" * 201, "O'Neill"])
def test_a_name_that_no_version_can_have_is_refused_by_the_settings_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match="model name"):
        Settings(storage="/s", mlflow_uri="http://m", model=name)


def test_a_model_that_answers_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = np.array([[np.nan, 0.1]], dtype=np.float32)
    onnx = SimpleNamespace(predict=lambda images: answer)
    pt2 = SimpleNamespace(module=lambda: lambda images: torch.from_numpy(answer))
    monkeypatch.setattr(export, "OnnxPredictor", lambda file: onnx)
    monkeypatch.setattr(torch.export, "load", lambda file: pt2)
    batch = Batch(images_NHWC=np.zeros((1, 2, 2, 1), np.uint8), labels_N=np.zeros(1, np.int64))
    with pytest.raises(RefusedError, match="refused"):
        export.check_equal(export.Exported(folder=tmp_path), [batch], "run")


@pytest.mark.parametrize("call", ["up", "submit", "submit --model"])
def test_a_bad_model_name_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setenv("RAYLINE_HOME", str(tmp_path))
    monkeypatch.setattr("lib.line.parts.bring_up", work)
    monkeypatch.setattr("lib.line.submission.submit_job", work)
    words = ["--model", "My Model"] if "--model" in call else []
    if call == "submit":
        monkeypatch.setenv("RAYLINE_MODEL", "My Model")
    flags = argparse.Namespace(verb="tune", arguments=words)
    start: Callable[[], Any] = (
        partial(jobs.up.up, "mnist", "quick", "My Model")
        if call == "up"
        else partial(jobs.submit._submit, flags)
    )
    with pytest.raises(ConfigError, match="'My Model' may hold only"):
        start()
