"""Where images come from: one interface over IDX, Parquet, folders of pictures and torchvision."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow.fs as pafs

from lib.data.checks import Labels, check_class_names
from lib.data.manifest import Ignored
from lib.data.readers import Reader, Shape
from lib.data.splits import Keys
from lib.data.staging import Staging
from lib.errors import DataError, StorageError
from lib.storage import Storage

BUNDLED_MNIST = Path(__file__).parent / "mnist"
CLASSES_FILE = "classes.txt"
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "eval",
    "evaluation": "eval",
}
"""Word of a name → split. `eval` is validation to some and test to others: it is refused."""
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
"""In lower case; names that start with a dot are hidden as well."""
_FILE, _FOLDER = "file", "folder"
_HIDDEN = "hidden, or made by a file manager"
_DANGLING = "a link to what is not there"
_LOOP = "a link to a folder that it lies in"
_SPECIAL = "neither a file nor a folder"
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
    groups: Keys | None = None
    """Per row the key of its group, if rows are split by a column of groups."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Everything below a source's folder, by paths relative to it, sorted."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    ignored: Mapping[str, tuple[str, ...]]
    """Reason → files and folders that no source reads, such as hidden ones."""

    def ignoring(self, more: Mapping[str, Sequence[str]]) -> tuple[Ignored, ...]:
        """Return what is ignored altogether, with what the source leaves out itself."""
        return tuple(
            Ignored(reason=reason, count=len(paths), example=paths[0])
            for reason, paths in sorted((*self.ignored.items(), *more.items()))
            if paths
        )


def list_source(root: Storage) -> Listing:
    """List a folder to the bottom; raise DataError for a name that is not UTF-8."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, kind in _local_entries(root.root) if root.is_local else _remote_entries(root):
        found[kind].append(path)
    files, folders = sorted(found.pop(_FILE, ())), sorted(found.pop(_FOLDER, ()))
    return Listing(
        files=tuple(files),
        folders=tuple(folders),
        ignored={reason: tuple(sorted(paths)) for reason, paths in found.items()},
    )


def split_of(name: str) -> tuple[str, str] | None:
    """Return the split that a folder or file is named after, and the word that says so.

    Understands `train`, `Training`, `valid`, `test1`, `test-00000-of-00002.parquet`, `mnist_val`.
    A name that says two splits, such as `train-test-split`, says none.
    """
    words = [re.sub("(set|data)$", "", word) for word in re.findall("[a-z]+", name.lower())]
    found = {SPLIT_WORDS[word]: word for word in words if word in SPLIT_WORDS}
    return next(iter(found.items())) if len(found) == 1 else None


def check_split_names(
    places: Mapping[str, str], unknown: Sequence[str], *, one_each: bool = False
) -> None:
    """Raise DataError unless it is clear which split everything is of.

    `places` maps files or folders to the word that names their split, `unknown` are the others. A
    split may have several places, all of one spelling, unless `one_each`.
    """
    words: dict[str, dict[str, str]] = defaultdict(dict)
    for path, word in places.items():
        words[SPLIT_WORDS[word]].setdefault(path if one_each else word, path)
    if "eval" in words:
        path = next(iter(words["eval"].values()))
        raise DataError(f"{path}: is this validation or test? Rename it to val or to test")
    for split, spellings in words.items():
        if len(spellings) > 1:
            raise DataError(
                f"{' and '.join(spellings.values())} are both named after the split {split}; "
                "put them together under one name, or take one away"
            )
    if words and unknown:
        raise DataError(
            f"{unknown[0]}: of which split is it? Its name says none, but {next(iter(places))} "
            f"is of {SPLIT_WORDS[next(iter(places.values()))]} ({len(unknown)} such); rename it "
            "after train, val or test, or take it away"
        )
    if words and "train" not in words:
        raise DataError(
            f"{next(iter(places))} is of {next(iter(words))}, and nothing is of train; rename it "
            "if it is to be trained on"
        )


def find_source(spec: str, *, cache_dir: Path | None = None) -> Source:
    """Return the source that `mnist`, a folder, a Parquet file or `torchvision:NAME` means.

    A folder is a local path or a URI of a pyarrow file system. Raises DataError if there is no
    source, or if it isn't clear what a file in it is.
    """
    # Imported here: each of these modules builds on this one.
    from lib.data.folders import FolderSource, pictures_in_folders
    from lib.data.idx import IdxSource, holds_idx_files
    from lib.data.parquet_source import ParquetSource, has_images, parquet_files

    if spec.startswith("torchvision:"):
        from lib.data.torchvision_sets import TorchvisionSource

        return TorchvisionSource.load(
            spec.removeprefix("torchvision:"), cache_dir=cache_dir or default_cache_dir()
        )
    if spec == "mnist":
        root = Storage(str(BUNDLED_MNIST))
        found = IdxSource.find(root, list_source(root), name="mnist", requires_sums=True)
        # Beside the files lies their README, not something that a user expects to be read.
        return replace(found, ignored=())
    try:
        place = spec if "://" in spec else os.path.abspath(spec)
        root = Storage(place)
        if root.filesystem.get_file_info(root.root).is_file and place.endswith(".parquet"):
            folder, _, file = place.rpartition("/")
            return ParquetSource.find_file(Storage(folder), file, name=place)
        listing = list_source(root)
        if holds_idx_files(listing):
            return IdxSource.find(root, listing, name=root.uri)
        tables, pictures = parquet_files(listing), pictures_in_folders(listing)
        with_images = [path for path in tables if pictures and has_images(root, path)]
        if with_images:
            raise DataError(
                f"source {spec!r} holds Parquet files with images ({with_images[0]}) and folders "
                f"of pictures ({pictures[0]}); give each of them a folder of its own"
            )
        if tables and not pictures:
            return ParquetSource.find(root, listing, name=root.uri)
        if listing.folders:
            return FolderSource.find(root, listing, name=root.uri)
    except (OSError, StorageError, UnicodeError) as error:
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


def _local_entries(root: str) -> Iterator[tuple[str, str]]:
    """Yield (path, kind) of all that lies below a local folder; links to folders are followed."""
    # Like an empty folder: what is missing is said by who asks for it.
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    if not os.path.exists(root):
        return
    while pending:
        folder, above = pending.pop()
        status = os.stat(f"{root}/{folder}")
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            yield folder, _LOOP
            continue
        if folder:
            yield folder, _FOLDER
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_hidden(entry.name):
                    yield _shown(path), _HIDDEN
                    continue
                _check_name(root, path)
                if entry.is_dir():
                    pending.append((path, above | {identity}))
                elif entry.is_file():
                    yield path, _FILE
                else:
                    yield path, _DANGLING if entry.is_symlink() else _SPECIAL


def _remote_entries(root: Storage) -> Iterator[tuple[str, str]]:
    prefix = len(root.root) + 1
    hidden = set()
    for info in root.walk("", recursive=True):
        names = info.path[prefix:].split("/")
        first = next((place for place, name in enumerate(names) if _is_hidden(name)), None)
        if first is not None:
            hidden.add("/".join(names[: first + 1]))
        elif info.type in (pafs.FileType.File, pafs.FileType.Directory):
            yield "/".join(names), _FILE if info.is_file else _FOLDER
    yield from ((path, _HIDDEN) for path in hidden)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _shown(path: str) -> str:
    """Return a path that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _check_name(root: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{root}/{_shown(path)}: its name is not UTF-8; rename it, for example with `convmv -r "
            f"-f latin1 -t utf8 --notest {root}`"
        ) from error
