"""A version's files in a local folder, ready for MLflow, ONNX Runtime or torch alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lib.config import Settings
from lib.errors import RegistryError
from lib.registry.models import download_model, resolve
from lib.serving.bundle import CARD_FILE, ONNX_FILE


def fetch(settings: Settings, ref: str, folder: Path) -> dict[str, Any]:
    """Copy the version that a number or an alias names into `folder`, whole or not at all.

    `mlflow.pyfunc.load_model(folder)` then loads it without this project. Raises RegistryError if
    the folder holds anything.
    """
    folder = empty_folder(folder)
    version = resolve(settings, settings.model, ref)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rayline-fetch-", dir=folder.parent) as place:
        model = download_model(settings, version, Path(place) / "model")
        card_file = model / CARD_FILE
        if card_file.exists():
            card = {**json.loads(card_file.read_text()), "version": version.version}
            card_file.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
        # Takes the place of an empty folder, and of nothing else.
        model.rename(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "version": version.version,
        "run_id": version.run_id,
        "folder": str(folder),
        "files": [path.relative_to(folder).as_posix() for path in files],
        "size_bytes": sum(path.stat().st_size for path in files),
        "load": f"mlflow.pyfunc.load_model({str(folder)!r})",
        "onnx": str(folder / ONNX_FILE) if (folder / ONNX_FILE).exists() else None,
    }


def empty_folder(folder: Path) -> Path:
    """Return the absolute path of a folder that is not there or empty; else RegistryError."""
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RegistryError(f"{folder} is not empty: nothing is overwritten; name a new folder")
    return folder
