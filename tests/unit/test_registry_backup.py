"""Backups of a registry that changes, and whose versions were damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib.errors import RegistryError
from lib.registry import backup as module
from lib.registry.backup import INDEX_FILE, backup, read_backup
from lib.registry.models import Version, resolve, versions
from lib.registry.restore import restore
from lib.registry.sweep_runs import code_path
from lib.serving import policy
from lib.serving.bundle import file_sha256
from tests.registries import MODEL, Registry, make_registry


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return make_registry(tmp_path / "line", empty_database, monkeypatch)


def test_a_promotion_meanwhile_does_not_get_in_and_the_restored_line_can_serve(
    registry: Registry, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = registry.add(), registry.add()
    registry.serve(first, second)
    real = module._Writer.registry

    def promoted_meanwhile(self: module._Writer) -> dict[str, object]:
        content = real(self)
        registry.serve(registry.add(), second)
        return content

    monkeypatch.setattr(module._Writer, "registry", promoted_meanwhile)
    made = backup(registry.settings, registry.storage, tmp_path / "saved")

    assert made["models"] == {MODEL: [1, 2]}
    assert any("policy was changed 1 times meanwhile" in note for note in made["notes"])
    empty = make_registry(tmp_path / "empty", empty_database, monkeypatch)
    done = restore(empty.settings, empty.storage, tmp_path / "saved")
    assert done["generation"] == 1
    served = policy.current(empty.storage)
    assert served is not None
    assert served.models[MODEL].champion == resolve(empty.settings, MODEL, "champion").version == 1
    assert served.models[MODEL].bundles == {v.version: v.bundle for v in versions(empty.settings)}
    assert all(empty.storage.exists(f"{v.bundle}/model.onnx") for v in versions(empty.settings))


def damaged_and_foreign(registry: Registry) -> tuple[Version, Version, Version, Version]:
    """One whole version, one without files, one with another file, one with another tag."""
    whole, gone, swapped, edited = (registry.add() for _ in range(4))
    shutil.rmtree(registry.files_of(gone))
    (registry.files_of(swapped) / "model.onnx").write_bytes(b"other")
    registry.client.set_model_version_tag(MODEL, "4", "rayline.test_accuracy", "n/a")
    registry.add_models_of_others()
    return whole, gone, swapped, edited


def test_what_is_damaged_or_foreign_is_left_out_by_name_and_the_rest_is_whole(
    registry: Registry, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gone, *_ = damaged_and_foreign(registry)
    registry.serve(whole)
    registry.serve(gone, whole)
    storage = registry.storage
    storage.write_json(f"rollouts/{MODEL}/history/1.json", {"run": whole.run_id, "n": 7})
    storage.write_json(f"retrains/{MODEL}/1.json", {"result": {"run_id": whole.run_id}})
    storage.write_json(f"scorecard/{MODEL}/check.json", {"who": "me"})
    storage.write_json(code_path(registry.sweep), {"diff_sha256": "d" * 64})

    made = backup(registry.settings, storage, tmp_path / "saved")

    assert made["models"] == {MODEL: [1]}
    first, second, third = made["left_out"]
    assert "version 4" in first
    assert "test_accuracy is 'n/a'" in first
    assert "files of version 2" in second
    assert "model.onnx of version 3" in third
    assert "not the file that was registered" in third
    notes = "\n".join(made["notes"])
    for name in ("Fraud Detector", "O'Neill", "traffic/00000002.json", "predictions"):
        assert name in notes
    empty = make_registry(tmp_path / "empty", empty_database, monkeypatch)
    assert restore(empty.settings, empty.storage, tmp_path / "saved")["generation"] == 1
    (back,) = versions(empty.settings)
    assert back.run_id != whole.run_id
    read = empty.storage.read_json
    assert read(f"rollouts/{MODEL}/history/1.json") == {"run": back.run_id, "n": 7}
    assert read(f"retrains/{MODEL}/1.json") == {"result": {"run_id": back.run_id}}
    assert read(f"scorecard/{MODEL}/check.json") == {"who": "me"}
    assert read(code_path(back.sweep_run_id)) == {"diff_sha256": "d" * 64}


def rewrite(folder: Path, path: str, content: bytes) -> None:
    """Change a file of a backup as if it had been written so."""
    (folder / path).write_bytes(content)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["sha256"][path] = file_sha256(folder / path)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_backup_whose_policy_cannot_serve_is_refused_before_any_change(
    registry: Registry, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registry.add()
    registry.serve(first)
    backup(registry.settings, registry.storage, tmp_path / "saved")
    path = "storage/traffic/00000001.json"
    content = (tmp_path / "saved" / path).read_text()
    rewrite(tmp_path / "saved", path, content.replace(first.bundle, "models/x/9-0").encode())
    empty = make_registry(tmp_path / "empty", empty_database, monkeypatch)

    with pytest.raises(RegistryError, match="can't serve: .*00000001.json names models/x/9-0"):
        restore(empty.settings, empty.storage, tmp_path / "saved")

    assert versions(empty.settings) == []
    assert empty.storage.list("traffic") == []
    rewrite(tmp_path / "saved", path, content.encode())
    read_backup(tmp_path / "saved")
    rewrite(tmp_path / "saved", f"models/{MODEL}/1/model.onnx", b"swapped")
    with pytest.raises(RegistryError, match=r"model\.onnx is not the file that was registered"):
        read_backup(tmp_path / "saved")
