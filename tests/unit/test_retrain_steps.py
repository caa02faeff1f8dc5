"""The steps of a retrain over a real data set and real files; search and registry are made up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib import pipeline
from lib.config import Settings, preset
from lib.data.direct import read_split
from lib.data.manifest import LIVE, Manifest, load_manifest
from lib.errors import RegistryError, SearchError, TooFewError
from lib.steps import Step, run_step
from lib.storage import Storage
from lib.train import same_sweep, search
from lib.train.presets import preset_experiment
from lib.train.samplers import Study
from lib.train.search import sweep_spec
from lib.watch import retrain, retrain_steps
from lib.watch.labelled import labelled_images
from lib.watch.retrain_asked import Options
from lib.watch.retrain_record import DONE, REFUSED
from lib.watch.retrain_steps import RetrainSteps, warm
from tests.made_set import NAMES, SHAPE, images_of, made_set

MODEL = "kinds"
PARAMS = {
    "stage_width": "12",
    "depth": "1",
    "growth": "4",
    "learning_rate": "0.7",
    "sampler": "tpe",
}


class Line:
    """What stands for search, registry and rollout; counts what is asked of it."""

    def __init__(self, storage: Storage, parent: Manifest, *, cure: bool = True) -> None:
        self.storage = storage
        self.calls: Counter[str] = Counter()
        self.presets: list[Any] = []
        self.withdrawn: list[int] = []
        self.known = {1: self._version(1, parent.digest)}
        self.champion = 1
        self.cure = cure
        self.rows: dict[str, Any] = {}

    def _version(self, number: int, digest: str) -> SimpleNamespace:
        return SimpleNamespace(
            version=number, run_id=f"run{number}", data_digest=digest, val_accuracy=0.9,
            test_accuracy=0.9, bundle=f"bundle{number}",
        )  # fmt: skip

    def joined(self, storage: Storage, model: str, **asked: Any) -> pa.Table:
        """Give all rows for one of the spans, as if they had come in that one."""
        self.calls["spans"] += 1
        rows = self.rows if asked["end_us"] == self.rows["end_us"] else {"image": []}
        count = len(rows["image"])
        return pa.table(
            {
                "shadow": pa.array(rows.get("shadow", [False] * count), pa.bool_()),
                "image": pa.array(rows["image"], pa.binary()),
                "label": pa.array(rows.get("label", []), pa.int32()),
            }
        )

    def tune(self, settings: Settings, storage: Storage, manifest: Manifest, chosen: Any) -> Step:
        def work() -> Mapping[str, Any]:
            self.calls["tune"] += 1
            self.presets.append(chosen)
            return {"sweep_run_id": f"sweep-{manifest.digest}", "num_trials": 2}

        inputs = {"data_digest": manifest.digest, "preset": asdict(chosen)}
        return run_step(storage, "tune", inputs, work, lambda kept: True)

    def register(self, settings: Settings, storage: Storage, manifest: Manifest, *rest: Any,
                 **others: Any) -> list[SimpleNamespace]:  # fmt: skip
        self.calls["register"] += 1
        # Its gates come later: until then no deploy may take it for the challenger.
        assert others["challenges"] is False
        number = max(self.known) + 1
        self.known[number] = self._version(number, manifest.digest)
        return [self.known[number]]

    def predictor(self, storage: Storage, bundle: str, card: Any) -> Any:
        """Version 1 knows the parent's images, the others inverted ones as well."""
        self.calls["predictor"] += 1

        def predict(images: np.ndarray) -> np.ndarray:
            brightness = images.reshape(len(images), -1).mean(axis=1)
            if bundle != "bundle1" and self.cure:
                brightness = 255 - brightness
            answers = np.clip(((brightness - 40) / 80).round(), 0, 2).astype(int)
            return np.eye(len(NAMES), dtype=np.float32)[answers]

        return SimpleNamespace(predict=predict)

    def rollout(self, settings: Settings, storage: Storage, version: int, how: Any) -> Any:
        self.calls["rollout"] += 1
        self.champion = version
        return {
            "status": "promoted",
            "who": how.who,
            "steps": list(how.steps),
            "min_requests": how.min_requests,
        }


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def parent(storage: Storage) -> Manifest:
    return made_set(storage)


@pytest.fixture
def make(
    storage: Storage, parent: Manifest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Line, RetrainSteps]]:
    def made(**how: Any) -> tuple[Line, RetrainSteps]:
        line = Line(storage, parent, **how)
        settings = Settings(storage=storage.uri, mlflow_uri="http://nowhere", model=MODEL)
        for name, stand_in in {
            "tune_once": line.tune,
            "register": line.register,
            "served_champion": lambda settings, storage: line.known[line.champion],
            "parameters": lambda settings, version: PARAMS,
            "mark": lambda *ignored: None,
            "withdraw": lambda settings, version, why: line.withdrawn.append(version),
            "versions": lambda settings: list(line.known.values()),
            "resolve": lambda settings, model, ref: line.known[int(ref)],
            "ensure_bundle": lambda settings, storage, version: version.bundle,
            "read_card": lambda storage, bundle: None,
            "load_predictor": line.predictor,
        }.items():
            monkeypatch.setattr(retrain_steps, name, stand_in)
        steps = RetrainSteps(
            settings=settings,
            storage=storage,
            preset=preset("smoke"),
            joined=line.joined,
            rollout_of=line.rollout,
        )
        return line, steps

    return made


def live_rows(num_rows: int, seed: int = 3) -> dict[str, Any]:
    labels = np.arange(num_rows) % len(NAMES)
    images = 255 - images_of(labels, seed)
    return {"image": [image.tobytes() for image in images], "label": labels.tolist()}


def run(
    line: Line, steps: RetrainSteps, rows: dict[str, Any], options: Options | None = None
) -> Any:
    record = retrain.begin(steps.storage, MODEL, "drift", who="me", options=options)
    line.rows = {**rows, "end_us": record.end_us}
    return retrain.run(steps.storage, record, steps)


def test_drifted_requests_become_a_better_champion(
    make: Any, storage: Storage, parent: Manifest
) -> None:
    line, steps = make()
    record = run(line, steps, live_rows(150))
    assert record.state == DONE
    assert line.champion == 2
    assert line.calls["spans"] == 7 * 4
    child = load_manifest(storage, record.step("data").result["digest"])
    assert child.parent == parent.digest
    gate = record.step("gate").result
    assert gate["rows"] == len(read_split(storage, child, LIVE)[1]) > 20
    assert gate["candidate_accuracy"] == 1.0
    assert gate["champion_accuracy"] < 0.6
    assert record.step("rollout").result["who"] == f"me, retrain {record.id}"
    assert record.step("rollout").result["steps"] == [1, 5, 25, 50, 100]


def test_its_rollout_goes_as_it_was_asked_for(make: Any) -> None:
    line, steps = make()
    record = run(line, steps, live_rows(150), Options(steps=(10, 100), min_requests=70))
    found = record.step("rollout").result
    assert (found["steps"], found["min_requests"]) == ([10, 100], 70)


def test_the_same_again_does_nothing(make: Any) -> None:
    line, steps = make(cure=False)
    first = run(line, steps, live_rows(150))
    assert first.state == REFUSED
    assert "not shown to be better" in first.why
    before = Counter(line.calls)
    second = run(line, steps, live_rows(150))
    assert second.why == first.why
    assert line.calls - before == Counter({"spans": 28})
    assert all(step.reused for step in second.steps)
    assert line.withdrawn == [2, 2]
    # Other rows are other work.
    run(line, steps, live_rows(150, seed=4))
    assert line.calls["tune"] == line.calls["register"] == 2


def test_after_a_promotion_the_same_rows_are_nothing_new(make: Any) -> None:
    line, steps = make()
    run(line, steps, live_rows(150))
    with pytest.raises(TooFewError, match="already"):
        run(line, steps, live_rows(150))
    assert line.calls["tune"] == 1


def test_no_labelled_requests_are_refused(make: Any) -> None:
    line, steps = make()
    with pytest.raises(TooFewError, match="0 new labelled live images"):
        run(line, steps, {"image": [], "label": []})
    assert set(line.calls) == {"spans"}


def test_the_champions_parameters_are_tried_first(make: Any) -> None:
    line, steps = make()
    run(line, steps, live_rows(150))
    experiment = preset_experiment(line.presets[0])
    _, params, _ = Study(experiment).ask()
    assert (params["stage_width"], params["depth"]) == (12, 1)
    assert params["learning_rate"] == pytest.approx(0.3)  # The space's end: it had 0.7.


def test_parameters_that_are_none_of_the_spaces_change_nothing() -> None:
    usual = preset("smoke")
    assert warm(usual, {}) == usual
    assert warm(usual, {"sampler": "tpe", "framework": "sklearn"}) == usual
    warmed = warm(usual, {"label_smoothing": "0.0734", "stage_width": "48"})
    assert warmed.first_guesses[0] == {"label_smoothing": pytest.approx(0.05), "stage_width": 48}
    assert warmed.widths == (8, 48)
    study = Study(preset_experiment(warmed))
    assert study.ask()[1]["stage_width"] == 48
    assert study.ask()[1]["stage_width"] == 8


def test_only_labelled_answers_with_fitting_images_count(parent: Manifest) -> None:
    size = int(np.prod(SHAPE))
    table = pa.table(
        {
            "shadow": [False, True, False, False, False],
            "image": pa.array([b"a" * size, b"b" * size, None, b"d" * 5, b"e" * size], pa.binary()),
            "label": pa.array([1, 1, 1, 1, None], pa.int32()),
        }
    )
    found = labelled_images([table, table.slice(0, 0), table], parent)
    assert found.labels_N.tolist() == [1, 1]
    assert found.images_NHWC.shape == (2, *SHAPE)
    assert found.num_unfit == 2


def test_a_version_or_data_set_that_is_gone_is_noticed(
    make: Any, storage: Storage, parent: Manifest
) -> None:
    line, steps = make()
    assert steps.is_there("data", {"digest": parent.digest})
    assert not steps.is_there("data", {"digest": "f" * 32})
    storage.delete(parent.shards[0].path)
    assert not steps.is_there("data", {"digest": parent.digest})
    assert steps.is_there("register", {"version": 1, "run_id": "run1"})
    assert not steps.is_there("register", {"version": 1, "run_id": "another"})


class Resuming:
    """Stands for `resume_sweep`."""

    def __init__(self, **outcomes: Any) -> None:
        self.outcomes = outcomes
        self.asked: list[str] = []

    def __call__(self, settings: Any, storage: Any, sweep_run_id: str) -> Any:
        self.asked.append(sweep_run_id)
        outcome = self.outcomes[sweep_run_id]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def kept_sweep(
    storage: Storage, name: str, work: Any, *, closed: bool = False, **changes: str
) -> None:
    spec = sweep_spec(preset_experiment(preset("smoke")), work)
    storage.write_json(f"sweeps/{name}/sweep.json", {**spec, **changes})
    event = "closed" if closed else "asked"
    storage.write(f"sweeps/{name}/journal.jsonl", f'{{"event": "{event}"}}\n'.encode())


def test_a_killed_sweep_of_the_same_work_goes_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(storage=storage.uri, mlflow_uri="http://nowhere")
    experiment = preset_experiment(preset("smoke"))
    work: Any = SimpleNamespace(kind="images", spec={"data_digest": "d"})
    other: Any = SimpleNamespace(kind="images", spec={"data_digest": "e"})
    assert same_sweep.resume_same_sweep(settings, storage, experiment, work) is None
    kept_sweep(storage, "mine", work)
    kept_sweep(storage, "another", other)
    kept_sweep(storage, "other-code", work, code="0" * 32)
    resume = Resuming(mine="found")
    monkeypatch.setattr(same_sweep, "resume_sweep", resume)
    assert same_sweep.resume_same_sweep(settings, storage, experiment, work) == "found"
    reseeded = replace(experiment, seed=1)
    assert same_sweep.resume_same_sweep(settings, storage, reseeded, work) is None
    assert resume.asked == ["mine"]


def test_a_sweep_that_is_of_no_use_is_left(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(storage=storage.uri, mlflow_uri="http://nowhere")
    experiment = preset_experiment(preset("smoke"))
    work: Any = SimpleNamespace(kind="images", spec={"data_digest": "d"})
    kept_sweep(storage, "deleted", work)
    kept_sweep(storage, "empty", work, closed=True)
    resume = Resuming(deleted=RegistryError("no such run"), empty=SearchError("no trial"))
    monkeypatch.setattr(same_sweep, "resume_sweep", resume)
    assert same_sweep.resume_same_sweep(settings, storage, experiment, work) is None
    assert sorted(resume.asked) == ["deleted", "empty"]
    # One that another process runs is not done a second time beside it.
    kept_sweep(storage, "empty", work)
    with pytest.raises(SearchError):
        same_sweep.resume_same_sweep(settings, storage, experiment, work)


def test_a_sweep_of_other_training_code_is_a_new_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pipeline's tune step; the sweep itself is a stand-in."""
    manifest: Any = SimpleNamespace(digest="d")
    found = [SimpleNamespace(sweep_run_id=name, trials=[1]) for name in ("second", "first")]
    monkeypatch.setattr(pipeline, "image_work", lambda *_: SimpleNamespace(kind="images", spec={}))
    monkeypatch.setattr(pipeline, "run_sweep", lambda *_: found.pop())
    monkeypatch.setattr(pipeline, "connect", lambda *_: None)
    monkeypatch.setattr(pipeline, "ranked_trials", lambda *_: [])
    settings = Settings(storage=storage.uri, mlflow_uri="http://nowhere")

    def tuned() -> Any:
        return pipeline.tune_once(settings, storage, manifest, preset("smoke")).result

    assert [tuned()["sweep_run_id"] for _ in range(2)] == ["first", "first"]
    monkeypatch.setattr(pipeline, "training_code_digest", lambda: "other")
    assert tuned()["sweep_run_id"] == "second"


def test_resuming_with_other_code_says_so_and_leaves_no_sweep_of_one_code(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    work: Any = SimpleNamespace(kind="images", spec={"data_digest": "d"})
    experiment = preset_experiment(preset("smoke"))
    kept_sweep(storage, "same", work)
    kept_sweep(storage, "changed", work, code="0" * 32)
    search._note_other_code(storage, "same")
    assert capsys.readouterr().out == ""
    search._note_other_code(storage, "changed")
    assert "sweep changed was started with other code" in capsys.readouterr().out
    spec = json.loads(json.dumps(sweep_spec(experiment, work)))
    assert same_sweep.same_sweeps(storage, spec) == ["same"]
    assert storage.read_json("sweeps/changed/sweep.json")["code"] == "mixed"
