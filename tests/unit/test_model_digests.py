"""Digests of models: a file that was swapped or rotted is refused by name wherever it is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lib.errors import FilesError, StorageError
from lib.registry.fetch import fetch
from lib.registry.models import ensure_bundle, resolve
from lib.serving.bundle import Card, file_sha256, local_model_file, read_card, write_bundle
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from tests.registries import MODEL, Registry, make_registry
from tests.unit.serving_parts import card


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return make_registry(tmp_path / "line", empty_database, monkeypatch)


@pytest.mark.parametrize(
    ("runtime", "file"), [("onnxruntime", "model.onnx"), ("torch", "model.pt2")]
)
def test_a_file_that_is_not_the_published_one_is_not_loaded(
    tmp_path: Path, runtime: str, file: str
) -> None:
    storage = Storage(str(tmp_path))
    bundle = write_bundle(storage, replace(card(), runtime=runtime), b"onnx", b"pt2")
    storage.write(f"{bundle}/{file}", b"swapped")
    with pytest.raises(StorageError, match=rf"{file} is not the file.*jobs\.register"):
        load_predictor(storage, bundle, read_card(storage, bundle))
    storage.delete(f"{bundle}/{file}")
    with pytest.raises(StorageError, match=rf"{file} is missing.*jobs\.register"):
        load_predictor(storage, bundle, read_card(storage, bundle))


def test_a_bundle_from_before_digests_loads_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path))
    bundle = write_bundle(storage, card(), b"onnx", None)
    old = storage.read_json(f"{bundle}/card.json")
    del old["onnx_sha256"], old["pt2_sha256"]
    storage.write_json(f"{bundle}/card.json", {**old, "of a later Rayline": 1})
    for _ in range(2):
        read = read_card(storage, bundle)
        with local_model_file(storage, bundle, "model.onnx", read.onnx_sha256) as file:
            assert file.exists()
    assert capsys.readouterr().out.count("before digests were kept") == 1


def test_files_of_mlflow_and_of_the_bundle_are_those_that_were_registered(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, storage = registry.settings, registry.storage
    version = registry.add()
    files = registry.files_of(version)
    assert version.onnx_sha256 == file_sha256(files / "model.onnx")
    assert version.pt2_sha256 == file_sha256(files / "data/model.pt2")
    published: Card = read_card(storage, version.bundle)
    assert published.onnx_sha256 == version.onnx_sha256
    assert published.pt2_sha256 == version.pt2_sha256

    storage.write(f"{version.bundle}/model.pt2", b"rotten")
    with pytest.raises(StorageError, match=r"model\.pt2 is not the file"):
        ensure_bundle(settings, storage, version)
    storage.delete_folder(version.bundle)
    assert ensure_bundle(settings, storage, version) == version.bundle

    right = (files / "model.onnx").read_bytes()
    (files / "model.onnx").write_bytes(b"swapped")
    storage.delete_folder(version.bundle)
    wrong = r"model\.onnx of version 1 .* is not the file that was registered.*restore a backup"
    with pytest.raises(FilesError, match=wrong):
        ensure_bundle(settings, storage, version)
    with pytest.raises(FilesError, match=wrong):
        fetch(settings, "1", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert storage.list(version.bundle) == []

    for kind in ("onnx", "pt2"):
        registry.client.delete_model_version_tag(MODEL, "1", f"rayline.{kind}_sha256")
    old = resolve(settings, MODEL, "1")
    assert old.onnx_sha256 is None
    capsys.readouterr()
    ensure_bundle(settings, storage, old)
    fetch(settings, "1", tmp_path / "fetched")
    assert capsys.readouterr().out.count("registered before digests were kept") == 1

    (files / "model.onnx").write_bytes(right)
    (files / "card.json").write_text("{")
    storage.delete_folder(version.bundle)
    with pytest.raises(FilesError, match=r"card\.json of version 1"):
        ensure_bundle(settings, storage, version)
    shutil.rmtree(files)
    with pytest.raises(FilesError, match="files of version 1 .* were deleted"):
        ensure_bundle(settings, storage, version)
