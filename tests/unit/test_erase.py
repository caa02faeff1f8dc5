"""Deleting data sets, and erasing requests from logs, labels and data sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import jobs.datasets
import lib.registry.deletion
import lib.watch.erasure
from lib.data.assemble import content_digest
from lib.data.direct import check_data, read_split
from lib.data.extend import ExtendConfig, LabelledImages, extend
from lib.data.manifest import LIVE, SPLITS, Manifest, load_manifest, manifest_path
from lib.data.shards import row_ids
from lib.storage import Storage
from lib.watch import labels, predictions, retrain_record
from lib.watch.segments import Segments
from tests.made_set import images_of, made_set

MODEL = "made"
NOW_S = 1_700_000_000.0
LABELS = np.arange(90, dtype=np.int32) % 3
IMAGES = images_of(LABELS, seed=7)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("RAYLINE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for the registry: version → digest of its data set."""
    known: dict[str, str] = {}

    def versions_of(settings: Any, digests: Any) -> list[str]:
        return [version for version, digest in known.items() if digest in digests]

    monkeypatch.setattr(lib.registry.deletion, "versions_of", versions_of)
    monkeypatch.setattr(lib.watch.erasure, "versions_of", versions_of)
    return known


@pytest.fixture
def parent(storage: Storage) -> Manifest:
    return made_set(storage)


@pytest.fixture
def child(storage: Storage, parent: Manifest) -> Manifest:
    """The parent with the images of requests r0 to r89."""
    found = LabelledImages(images_NHWC=IMAGES, labels_N=LABELS)
    return extend(storage, parent, found, ExtendConfig()).manifest


def log(storage: Storage, *, time_s: float = NOW_S - 3600) -> None:
    """Log request r0 to r89, an answer of a shadow and a label for each."""
    rows, given = [], []
    for number, image in enumerate(IMAGES):
        same = {
            "time_us": int(time_s * 1e6), "request_id": f"r{number}", "index": 0, "caller": "key",
            "latency_ms": 1.0, "predicted": 1, "probabilities": [0.1, 0.8, 0.1], "status": 200,
            "features": None, "run_id": "run",
        }  # fmt: skip
        rows.append({**same, "version": 1, "shadow": False, "image": image.tobytes()})
        rows.append({**same, "version": 2, "shadow": True, "image": None})
        label = int(LABELS[number])
        given.append({"time_us": int(time_s * 1e6), "request_id": f"r{number}", "index": 0,
                      "label": label, "class_name": "x", "caller": "key"})  # fmt: skip
    for root, schema, content in (
        (predictions.predictions_root(MODEL), predictions.SCHEMA, rows),
        (labels.labels_root(MODEL), labels.SCHEMA, given),
    ):
        table = pa.Table.from_pylist(content, schema)
        Segments(storage, root, max_rows=1000, dictionary=["caller"]).append(table)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        jobs.datasets.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def logged(storage: Storage) -> list[str]:
    table = predictions.read(storage, MODEL, start_us=0, end_us=2**62, columns=["request_id"])
    return table["request_id"].to_pylist()


def test_a_request_is_erased_from_log_labels_and_data_sets(
    storage: Storage, parent: Manifest, child: Manifest, versions: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log(storage)
    versions["7 of made"] = child.digest
    shown = ask(capsys, "erase", "r5")
    assert shown["log_rows"] == {MODEL: 2}
    assert shown["sets"] == [{"digest": child.digest, "rows": 1, "new": None}]
    assert not shown["erased"]
    assert len(logged(storage)) == 180
    assert load_manifest(storage, child.digest) == child

    erased = ask(capsys, "erase", "r5", "--yes")
    (found,) = erased["sets"]
    assert erased["labels"] == {MODEL: 1}
    assert any("version 7 of made was trained" in line for line in erased["not_erased"])
    assert len(logged(storage)) == 178
    assert "r5" not in logged(storage)
    left = predictions.read_labels(storage, MODEL, start_us=0, end_us=2**62)
    assert left.num_rows == 89

    assert not storage.exists(f"data/sets/{child.digest}.json")
    rest = load_manifest(storage, child.digest)
    assert rest.digest == found["new"] != child.digest
    assert rest.parent == parent.digest
    check_data(storage, rest)
    for path in storage.list("data/shards"):
        assert IMAGES[5].tobytes() not in bytes(storage.read(path))
    pixels = np.concatenate([read_split(storage, rest, s)[0] for s in rest.counts])
    assert not (pixels == IMAGES[5]).all(axis=(1, 2, 3)).any()
    assert (pixels == IMAGES[6]).all(axis=(1, 2, 3)).any()
    lost = [child.rows(split) - rest.rows(split) for split in child.counts]
    assert sum(count > 0 for count in lost) == 1
    # The parent never had it.
    assert load_manifest(storage, parent.digest) == parent
    check_data(storage, parent)


def test_a_row_is_erased_from_a_set_and_all_that_extend_it(
    storage: Storage, parent: Manifest, child: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = read_split(storage, parent, "train")
    (row,) = row_ids(images[:1])
    erased = ask(capsys, "erase", row.tobytes().hex(), "--yes")
    new = {found["digest"]: found["new"] for found in erased["sets"]}
    assert set(new) == {parent.digest, child.digest}
    rest = load_manifest(storage, new[parent.digest])
    assert rest.rows("train") == parent.rows("train") - 1
    train, _ = read_split(storage, rest, "train")
    assert (train == images[1:]).all()
    assert rest.pixel_mean[0] == pytest.approx(images[1:].mean() / 255)
    assert rest.pixel_std[0] == pytest.approx(images[1:].std() / 255)
    grown = load_manifest(storage, new[child.digest])
    assert grown.parent == rest.digest
    assert set(grown.live_shards) == set(child.live_shards)
    check_data(storage, grown)
    assert any("ingest may bring the row back" in line for line in erased["not_erased"])


def test_a_row_is_erased_from_sets_that_list_its_file_as_other_splits(
    storage: Storage, parent: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = {"train": "train", "val": "test", "test": "val"}
    digests = {split: parent.split_digests[swapped[split]] for split in SPLITS}
    other = replace(
        parent,
        digest=content_digest(
            parent.shape, parent.class_names, digests, parent.format_version, None
        ),
        counts={split: parent.counts[swapped[split]] for split in SPLITS},
        split_digests=digests,
        shards=tuple(replace(shard, split=swapped[shard.split]) for shard in parent.shards),
    )
    storage.write_json(manifest_path(other.digest), other.to_json())
    images, _ = read_split(storage, parent, "val")
    (row,) = row_ids(images[:1])
    erased = ask(capsys, "erase", row.tobytes().hex(), "--yes")
    new = {found["digest"]: load_manifest(storage, found["new"]) for found in erased["sets"]}
    for before, split in ((parent, "val"), (other, "test")):
        rest = new[before.digest]
        lost = {name: before.rows(name) - rest.rows(name) for name in SPLITS}
        assert lost == {**dict.fromkeys(SPLITS, 0), split: 1}
        check_data(storage, rest)


def test_a_held_out_row_of_a_parent_leaves_the_child_with_its_new_parent(
    storage: Storage, child: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    more = images_of(LABELS, seed=8)
    grandchild = extend(
        storage, child, LabelledImages(images_NHWC=more, labels_N=LABELS), ExtendConfig()
    ).manifest
    held_out, _ = read_split(storage, child, LIVE)
    (row,) = row_ids(held_out[:1])
    (found,) = ask(capsys, "erase", row.tobytes().hex(), "--yes")["sets"]
    assert found["digest"] == child.digest
    assert load_manifest(storage, grandchild.digest).parent == found["new"]


def test_requests_of_the_last_minutes_are_held(
    storage: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log(storage)
    monkeypatch.setattr(predictions.time, "time", lambda: NOW_S - 3600 + 300)
    answer = ask(capsys, "erase", "r5", "--yes")
    assert answer["exit_code"] == 4
    assert len(logged(storage)) == 180


def test_an_unknown_id_is_an_error(
    storage: Storage, parent: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no request, label or row" in ask(capsys, "erase", "nobody")["message"]


def test_a_data_set_goes_with_the_shards_of_its_own(
    storage: Storage, parent: Manifest, child: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not ask(capsys, "delete", child.digest)["deleted"]
    assert load_manifest(storage, child.digest) == child
    assert ask(capsys, "delete", child.digest, "--yes")["shared_shards"] == len(parent.shards)
    assert storage.list("data/sets") == [f"data/sets/{parent.digest}.json"]
    assert set(storage.list("data/shards")) == {shard.path for shard in parent.shards}
    check_data(storage, parent)


def test_a_data_set_that_something_refers_to_stays_and_is_told_by_what(
    storage: Storage, parent: Manifest, child: Manifest, versions: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    versions["7 of made"] = parent.digest
    storage.write_json("sweeps/s1/sweep.json", {"work": {"data_digest": parent.digest}})
    storage.write("sweeps/s1/journal.jsonl", b'{"event": "session"}\n')
    storage.write_json("sweeps/s2/sweep.json", {"work": {"data_digest": parent.digest}})
    storage.write("sweeps/s2/journal.jsonl", b'{"event": "closed"}\n')
    record = retrain_record.new(MODEL, "drift", who="me", start_us=0, options={}, now=NOW_S)
    champion = retrain_record.replace(record, champion={"data_digest": parent.digest})
    retrain_record.write(storage, champion)
    answer = ask(capsys, "delete", parent.digest, "--yes")
    assert answer["exit_code"] == 3
    for name in ("version 7 of made", f"data set {child.digest[:12]}", "sweep s1", record.id):
        assert name in answer["message"]
    assert "s2" not in answer["message"]
    assert load_manifest(storage, parent.digest) == parent
