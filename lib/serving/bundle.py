"""A version's bundle: what a replica needs, kept under the storage root.

Serving reads bundles only, so replicas start, and restart, while MLflow is away.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lib.cli import progress
from lib.config import MODEL_NAME
from lib.data.manifest import Preprocess
from lib.errors import REFUSED, StorageError
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
    onnx_sha256: str | None = None
    """Of the bundle's files; None where they were published before digests were kept."""
    pt2_sha256: str | None = None

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
        """Rebuild a card from its JSON; what a later Rayline wrote beside it is left out."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        known["class_names"] = tuple(known["class_names"])
        known["preprocess"] = Preprocess.from_json(known["preprocess"])
        return cls(**known)


def _some(class_names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, class_names[:_SHOWN]))
    return f"{len(class_names)} classes ({shown}{', …' if len(class_names) > _SHOWN else ''})"


def bundle_path(name: str, version: int, run_id: str) -> str:
    """Return a version's folder relative to the storage root.

    The run is part of the name: a registry that starts again at version 1 must not meet the files
    of an older version 1.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise StorageError(f"model name {name!r} may hold only letters, digits, `_`, `.` and `-`")
    return f"models/{name}/{version}-{run_id[:8]}"


def write_bundle(storage: Storage, card: Card, onnx: bytes, pt2: bytes | None) -> str:
    """Publish a bundle, its card last, and return its path; other people's models lack the pt2.

    The card gets the digests of what is published.
    """
    path = bundle_path(card.name, card.version, card.run_id)
    card = replace(
        card,
        onnx_sha256=hashlib.sha256(onnx).hexdigest(),
        pt2_sha256=hashlib.sha256(pt2).hexdigest() if pt2 is not None else None,
    )
    storage.write(f"{path}/{ONNX_FILE}", onnx)
    if pt2 is not None:
        storage.write(f"{path}/{PT2_FILE}", pt2)
    storage.write_json(f"{path}/{CARD_FILE}", card.to_json())
    return path


def read_card(storage: Storage, path: str) -> Card:
    """Read a bundle's card; raise StorageError if it was never published, or is damaged."""
    content = storage.read_json(f"{path}/{CARD_FILE}")
    try:
        return Card.from_json(content)
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{storage.path(path)}/{CARD_FILE} is damaged ({error!r}); {_PUBLISH_AGAIN}"
        ) from error


@contextmanager
def local_model_file(
    storage: Storage, path: str, file_name: str, sha256: str | None
) -> Iterator[Path]:
    """Yield a bundle's model file on a local disk; a copy of a remote one is there only meanwhile.

    Raises StorageError if the file is missing, or is not the one with this digest. Without a
    digest that is not looked at, which is said once.
    """
    if sha256 is None:
        _name_unchecked(path)
    content = check_model_file(storage, path, file_name, sha256)
    if storage.is_local:
        yield Path(storage.path(f"{path}/{file_name}"))
        return
    with tempfile.TemporaryDirectory(prefix="rayline-bundle-") as folder:
        copied = Path(folder) / file_name
        copied.write_bytes(content)
        yield copied


def check_model_file(storage: Storage, path: str, file_name: str, sha256: str | None) -> pa.Buffer:
    """Return a bundle's file; raise StorageError if it is missing or has another digest."""
    try:
        content = storage.read_buffer(f"{path}/{file_name}")
    except StorageError as error:
        raise StorageError(f"{error}; {_PUBLISH_AGAIN}") from error
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise StorageError(
            f"{storage.path(path)}/{file_name} is not the file that was published: its SHA-256 is "
            f"{found}, not {sha256}; {_PUBLISH_AGAIN}",
            exit_code=REFUSED,
        )
    return content


def file_sha256(file: Path) -> str:
    """Return a file's SHA-256, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_PUBLISH_AGAIN = (
    "delete that folder and run jobs.register with the version's sweep again, which publishes it "
    "from MLflow"
)


@functools.cache
def _name_unchecked(path: str) -> None:
    progress("bundle", f"{path} was published before digests were kept: its files aren't checked")
