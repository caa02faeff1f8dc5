"""A version's bundle: what a replica needs, kept under the storage root.

Serving reads bundles only, so replicas start, and restart, while MLflow is away.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.data.manifest import Preprocess
from lib.errors import StorageError
from lib.storage import Storage

ONNX_FILE = "model.onnx"
PT2_FILE = "model.pt2"
CARD_FILE = "card.json"
_SHOWN = 12
"""Names of classes in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What serving knows about a version beyond its weights."""

    name: str
    version: int
    run_id: str
    """MLflow run of the trial."""
    data_digest: str
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    preprocess: Preprocess
    runtime: str
    """`onnxruntime` or `torch`, whichever was faster when the version was registered."""
    git_commit: str | None
    test_accuracy: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of one image."""
        return (self.height, self.width, self.channels)

    @property
    def image_bytes(self) -> int:
        """Bytes of one raw image."""
        return self.height * self.width * self.channels

    def difference(self, class_names: Sequence[str], shape: Sequence[int]) -> str | None:
        """Return how other classes and another shape differ from these, None if they do not.

        The order of the classes counts: callers and labels name them by number too.
        """
        if tuple(class_names) != self.class_names:
            return f"{_some(class_names)} instead of {_some(self.class_names)}"
        if tuple(shape) != self.shape:
            return f"shape {list(shape)} instead of {list(self.shape)} (height, width, channels)"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Card:
        """Rebuild a card from its JSON."""
        fields = dict(content)
        fields["class_names"] = tuple(fields["class_names"])
        fields["preprocess"] = Preprocess.from_json(fields["preprocess"])
        return cls(**fields)


def _some(class_names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, class_names[:_SHOWN]))
    return f"{len(class_names)} classes ({shown}{', …' if len(class_names) > _SHOWN else ''})"


def bundle_path(name: str, version: int, run_id: str) -> str:
    """Return a version's folder relative to the storage root.

    The run is part of the name: a registry that starts again at version 1 must not meet the files
    of an older version 1.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise StorageError(f"model name {name!r} may hold only letters, digits, `_`, `.` and `-`")
    return f"models/{name}/{version}-{run_id[:8]}"


def write_bundle(storage: Storage, card: Card, onnx: bytes, pt2: bytes | None) -> str:
    """Publish a bundle, its card last, and return its path; other people's models lack the pt2."""
    path = bundle_path(card.name, card.version, card.run_id)
    storage.write(f"{path}/{ONNX_FILE}", onnx)
    if pt2 is not None:
        storage.write(f"{path}/{PT2_FILE}", pt2)
    storage.write_json(f"{path}/{CARD_FILE}", card.to_json())
    return path


def read_card(storage: Storage, path: str) -> Card:
    """Read a bundle's card; raise StorageError if the bundle was never published."""
    return Card.from_json(storage.read_json(f"{path}/{CARD_FILE}"))


def local_model_file(storage: Storage, path: str, file_name: str) -> Path:
    """Return a bundle's model file on a local disk, fetched there first if storage is remote."""
    if storage.is_local:
        return Path(storage.path(f"{path}/{file_name}"))
    target = Path(tempfile.mkdtemp(prefix="rayline-bundle-")) / file_name
    target.write_bytes(storage.read(f"{path}/{file_name}"))
    return target
