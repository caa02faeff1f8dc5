from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jobs.datasets
from lib.data.loader import Split
from lib.data.manifest import SPLITS, Manifest, load_manifest
from lib.storage import Storage
from lib.watch.labels import LabelLog
from lib.watch.recorder import Recorder
from tests.made_set import images_of, made_set
from tests.unit.data_sets import write_set
from tests.unit.serving_parts import card

NAMES = ("cat", "dog", "owl")
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (90, 6, 4, 1), dtype=np.uint8)
LABELS = np.arange(90, dtype=np.int64) % 3


def splits(**rows: Any) -> dict[str, Split]:
    """Rows 0–59 train, 60–74 val, 75–89 test, or those that are given."""
    chosen = {"train": range(60), "val": range(60, 75), "test": range(75, 90), **rows}
    return {
        split: Split(images_NHWC=PIXELS[list(chosen[split])], labels_N=LABELS[list(chosen[split])])
        for split in SPLITS
    }


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("RAYLINE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def base(storage: Storage) -> Manifest:
    return write_set(storage, splits(train=range(50)), NAMES)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str]:
    with pytest.raises(SystemExit):
        jobs.datasets.main(words)
    *said, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(said)


def test_list_names_every_set_and_what_it_was_made_of(
    storage: Storage, base: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    child = write_set(storage, splits(), NAMES, parent=base.digest)
    content, said = ask(capsys, "list")
    found = {entry["digest"]: entry for entry in content["sets"]}
    assert set(found) == {base.digest, child.digest}
    assert found[base.digest]["rows"] == {"train": 50, "val": 15, "test": 15}
    assert found[child.digest]["parent"] == base.digest
    assert base.digest[:12] in said
    assert child.digest[:12] in said


def test_show_follows_the_lineage_both_ways(
    storage: Storage, base: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    child = write_set(storage, splits(train=range(55)), NAMES, parent=base.digest)
    grandchild = write_set(storage, splits(), NAMES, parent=child.digest)
    content, _ = ask(capsys, "show", grandchild.digest[:10])
    assert content["ancestors"] == [child.digest, base.digest]
    assert ask(capsys, "show", base.digest)[0]["children"] == [child.digest]


def test_the_column_of_groups_is_shown_and_kept_by_children(
    storage: Storage, base: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "split by  rows" in ask(capsys, "show", base.digest)[1]
    grouped = write_set(storage, splits(train=range(55)), NAMES, group="patient")
    content, said = ask(capsys, "show", grouped.digest)
    assert content["group"] == "patient"
    assert "groups, of column patient" in said


def test_show_draws_samples_of_every_class(
    base: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, _ = ask(capsys, "show", base.digest, "--pictures", str(tmp_path / "new" / "folder"))
    drawn = np.asarray(Image.open(io.BytesIO(Path(content["picture"]).read_bytes())).convert("L"))
    # Random pixels have every grey; text and bars alone have few.
    assert len(np.unique(drawn)) > 200


def test_diff_says_what_came_went_moved_and_was_relabelled(
    storage: Storage, base: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rows 0–4 gone, 50–56 new, row 60 (of class 0) from val to train, row 75 with a new label.
    changed = splits(train=[*range(5, 57), 60], val=range(61, 75))
    labels = changed["test"].labels_N.copy()
    labels[0] = 2
    changed["test"] = replace(changed["test"], labels_N=labels)
    other = write_set(storage, changed, NAMES)
    content, said = ask(
        capsys, "diff", base.digest, other.digest, "--pictures", str(tmp_path / "pictures")
    )
    assert content["went"] == {"train": {"cat": 2, "dog": 2, "owl": 1}}
    assert content["came"] == {"train": {"cat": 2, "dog": 2, "owl": 3}}
    assert content["moved"] == {"val → train": 1}
    assert content["relabelled"] == {"cat → owl": 1}
    assert content["same"] == 50 + 15 + 15 - 5 - 1 - 1
    assert "7 came in train" in said
    assert Path(content["picture"]).stat().st_size > 1000


def test_sets_of_other_classes_are_not_compared(
    storage: Storage, base: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_set(storage, splits(), ("cat", "dog", "emu"))
    content, _ = ask(capsys, "diff", base.digest, other.digest)
    assert content["error"] == "DataError"
    assert "same classes" in content["message"]


def test_an_unknown_digest_is_answered_with_the_known_ones(
    base: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    message = ask(capsys, "show", "zz")[0]["message"]
    assert "no data set" in message
    assert base.digest[:12] in message


def test_a_set_is_extended_with_the_requests_that_were_labelled(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = made_set(storage)
    height, width, channels = parent.shape
    version = replace(
        card(3, channels=channels, name="made"),
        height=height,
        width=width,
        class_names=parent.class_names,
    )
    labels = np.arange(90) % 3
    images = 255 - images_of(labels, 7)
    recorder = Recorder(storage)
    answers = np.full((1, 3), 1 / 3, dtype=np.float32)
    for number, image in enumerate(images):
        recorder.add(
            version, image[None], answers, request_id=f"r{number}", caller="day", latency_s=0.1
        )
    recorder.close()

    async def give() -> None:
        log = LabelLog(storage)
        for number, label in enumerate(labels[:80].tolist()):
            row = {"request_id": f"r{number}", "index": 0, "label": label, "caller": "day"}
            await log.add("made", {**row, "class_name": parent.class_names[label]})

    asyncio.run(give())
    content, said = ask(capsys, "extend", parent.digest[:8], "--model", "made")
    assert sum(content["rows"].values()) == 80, said
    child = load_manifest(storage, content["digest"])
    assert (child.parent, child.counts["test"]) == (parent.digest, parent.counts["test"])
    assert content["set"]["ancestors"] == [parent.digest]
    changed, told = ask(capsys, "diff", parent.digest, child.digest)
    came = {split: sum(by_class.values()) for split, by_class in changed["came"].items()}
    assert came == {**content["rows"]}
    assert came["live"] > 0
    assert (changed["went"], changed["moved"]) == ({}, {})
    shown, told = ask(capsys, "show", child.digest)
    assert "live" in told
    assert shown["counts"]["live"] == list(child.counts["live"])
    # Again, nothing is new to train on; what is held out is held out again.
    again, _ = ask(capsys, "extend", child.digest, "--model", "made")
    assert again["error"] == "TooFewError"
    known = content["rows"]["train"] + content["rows"]["val"]
    assert f"{known} are in the data set already" in again["message"]
