"""Where images come from: one interface over IDX, Parquet, folders of pictures and torchvision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib.data.checks import Labels, check_class_names
from lib.data.manifest import Ignored
from lib.data.readers import Reader, Shape
from lib.data.staging import Staging
from lib.errors import DataError, StorageError
from lib.storage import Storage

BUNDLED_MNIST = Path(__file__).parent / "mnist"
CLASSES_FILE = "classes.txt"
_HASH_PIECE_BYTES = 4 * 2**20
_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRows:
    """One split as the source has it."""

    split: str
    labels: Labels
    reader: Reader
    ends: tuple[int, ...] = ()
    """Rows, ascending, at which what the reader decodes at once ends; none: it reads row by row."""
    labels_name: str
    """What messages about a label name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A source whose heads and labels were read and checked; pixels are read by the tasks."""

    class_names: tuple[str, ...]
    shape: Shape
    splits: tuple[SplitRows, ...]
    grey_range: tuple[int, int] | None = None
    """Least and greatest value of a set of 16-bit grey pictures, which become 0 and 255."""


class Source(Protocol):
    """Files of images and labels."""

    @property
    def name(self) -> str:
        """What the manifest calls the source."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """File (or folder of pictures) → SHA-256."""
        ...

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """What lies in the source and is not used."""
        ...

    def open(self, staging: Staging) -> Opened:
        """Read labels and heads, and stage what can't be read by range; raise DataError."""
        ...


def find_source(
    spec: str, *, cache_dir: Path | None = None, class_names: tuple[str, ...] | None = None
) -> Source:
    """Return the source that `mnist`, a folder, a Parquet file or `torchvision:NAME` means.

    A folder is a local path or a URI of a pyarrow file system. `class_names` are those of the data
    set that pictures or Parquet rows are for, where they need not have all of them. Raises
    DataError if there is no source.
    """
    # Imported here: each of these modules builds on this one.
    from lib.data.folders import FolderSource, holds_class_folders
    from lib.data.idx import IdxSource, holds_idx_files
    from lib.data.parquet_source import ParquetSource, parquet_files

    if spec.startswith("torchvision:"):
        from lib.data.torchvision_sets import TorchvisionSource

        return TorchvisionSource.load(
            spec.removeprefix("torchvision:"), cache_dir=cache_dir or default_cache_dir()
        )
    if spec == "mnist":
        return IdxSource.find(Storage(str(BUNDLED_MNIST)), name="mnist", requires_sums=True)
    try:
        place = spec if "://" in spec else os.path.abspath(spec)
        if place.endswith(".parquet"):
            folder, _, file = place.rpartition("/")
            return ParquetSource.find(
                Storage(folder), name=place, only=file, class_names=class_names
            )
        root = Storage(place)
        if holds_idx_files(root):
            return IdxSource.find(root, name=root.uri)
        if parquet_files(root):
            return ParquetSource.find(root, name=root.uri, class_names=class_names)
        if holds_class_folders(root):
            return FolderSource.find(root, name=root.uri, class_names=class_names)
    except (OSError, StorageError) as error:
        raise DataError(f"source {spec!r} can't be read: {error}") from error
    raise DataError(
        f"source {spec!r}: no data set there. Give `mnist`, `torchvision:NAME`, or a folder with "
        "the four IDX files (train-images-idx3-ubyte[.gz] …), with Parquet files (columns image "
        "and label), or with one folder of PNG or JPEG files per class (DIR/CLASS/*.png, or "
        "DIR/train/CLASS and DIR/test/CLASS)"
    )


def default_cache_dir() -> Path:
    """Return where downloads are kept between runs: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "rayline" / "torchvision"


def sha256_files(root: Storage, paths: Sequence[str]) -> list[str]:
    """Return the SHA-256 of files, several at a time."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda path: _sha256_file(root, path), paths))


def read_class_names(root: Storage) -> tuple[str, ...] | None:
    """Return the names of `classes.txt`, one a line, or None if there is no such file."""
    if not root.exists(CLASSES_FILE):
        return None
    try:
        text = root.read(CLASSES_FILE).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{CLASSES_FILE}: not UTF-8 text: {error}") from error
    class_names = tuple(line.strip() for line in text.rstrip().splitlines())
    check_class_names(CLASSES_FILE, class_names)
    return class_names


def _sha256_file(root: Storage, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with root.filesystem.open_input_stream(root.path(path), compression=None) as file:
            while piece := file.read(_HASH_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error
    return digest.hexdigest()
