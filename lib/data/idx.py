"""IDX files, the format of MNIST: four files in a folder, plain or gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np

from lib.data.checks import (
    IDX_IMAGES_HEADER_BYTES,
    IdxHeader,
    Labels,
    check_class_names,
    check_idx_size,
    check_labels,
    check_row_counts,
    check_same_shape,
    parse_idx_header,
)
from lib.data.manifest import Ignored
from lib.data.readers import RawReader, Shape
from lib.data.sources import (
    CLASSES_FILE,
    Listing,
    Opened,
    SplitRows,
    read_class_names,
    sha256_files,
)
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage

SUMS_FILE = "SHA256SUMS"
_PIECE_BYTES = 4 * 2**20
_SPLIT_PREFIXES = {"train": "train", "test": "t10k"}
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdxSource:
    """The four canonical files."""

    name: str
    root: Storage
    files: Mapping[tuple[str, str], str]
    """(split, `images` or `labels`) → file name."""
    digests: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()

    @classmethod
    def find(
        cls, root: Storage, listing: Listing, *, name: str, requires_sums: bool = False
    ) -> IdxSource:
        """Find and hash the files; where SHA256SUMS lies beside them, they must match it."""
        there = set(listing.files)
        files = {}
        for split, prefix in _SPLIT_PREFIXES.items():
            for kind in ("images", "labels"):
                variants = _variants(prefix, kind)
                found = [file for file in variants if file in there]
                if not found:
                    raise DataError(f"{root.uri}: {variants[0]} (or {variants[1]}) is missing")
                files[split, kind] = found[0]
        names = list(files.values()) + ([CLASSES_FILE] if CLASSES_FILE in there else [])
        digests = dict(zip(names, sha256_files(root, names), strict=True))
        if requires_sums or SUMS_FILE in there:
            _check_sums(root, digests)
        others = sorted(there - {*names, SUMS_FILE})
        ignored = listing.ignoring({"none of the four IDX files that are read": others})
        return cls(name=name, root=root, files=files, digests=digests, ignored=ignored)

    def open(self, staging: Staging) -> Opened:
        """Read heads and labels; unpack gzip images into staging."""
        headers = {
            split: _read_header(self.root, self.files[split, "images"], images=True)
            for split in _SPLIT_PREFIXES
        }
        shapes = {
            self.files[split, "images"]: (*header.row_shape, 1) for split, header in headers.items()
        }
        check_same_shape(shapes)  # type: ignore[arg-type]
        labels = {split: self._labels(split, headers[split]) for split in _SPLIT_PREFIXES}
        class_names = self._class_names(labels)
        splits = tuple(
            SplitRows(
                split=split,
                labels=labels[split],
                reader=self._reader(split, headers[split], staging),
                labels_name=self.files[split, "labels"],
            )
            for split in _SPLIT_PREFIXES
        )
        shape: Shape = (*headers["train"].row_shape, 1)  # type: ignore[assignment]
        return Opened(class_names=class_names, shape=shape, splits=splits)

    def _labels(self, split: str, images_header: IdxHeader) -> Labels:
        file, images_file = self.files[split, "labels"], self.files[split, "images"]
        content = self.root.read(file)
        if file.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except _GZIP_ERRORS as error:
                raise _damaged_gzip(file, error) from error
        header = parse_idx_header(file, content[:8], images=False)
        check_idx_size(file, header, len(content))
        check_row_counts(images_file, images_header.rows, file, header.rows)
        return np.frombuffer(content, dtype=np.uint8, offset=header.header_bytes).astype(np.int32)

    def _class_names(self, labels: Mapping[str, Labels]) -> tuple[str, ...]:
        class_names, classes_from = read_class_names(self.root), CLASSES_FILE
        if class_names is None:
            classes_from = self.files["train", "labels"]
            num_classes = int(labels["train"].max(initial=-1)) + 1
            class_names = tuple(str(label) for label in range(num_classes))
            check_class_names(classes_from, class_names)
        for split, values in labels.items():
            check_labels(self.files[split, "labels"], values, len(class_names), classes_from)
        return class_names

    def _reader(self, split: str, header: IdxHeader, staging: Staging) -> RawReader:
        file = self.files[split, "images"]
        root, path, offset_bytes = self.root, file, header.header_bytes
        if file.endswith(".gz"):
            pieces = _unpack(self.root, file, header)
            root, offset_bytes = staging.storage, 0
            path = staging.add(f"{split}-images", pieces, header.rows * header.row_bytes)
        else:
            size_bytes = self.root.filesystem.get_file_info(self.root.path(file)).size
            check_idx_size(file, header, size_bytes)
        return RawReader(
            name=file, root=root, path=path, offset_bytes=offset_bytes, start=0, stop=header.rows
        )


def holds_idx_files(listing: Listing) -> bool:
    """Whether any of the canonical files is in the folder."""
    there = set(listing.files)
    return any(
        file in there
        for prefix in _SPLIT_PREFIXES.values()
        for kind in ("images", "labels")
        for file in _variants(prefix, kind)
    )


def _variants(prefix: str, kind: str) -> list[str]:
    dimensions = 3 if kind == "images" else 1
    plain = [f"{prefix}-{kind}{separator}idx{dimensions}-ubyte" for separator in "-."]
    return [name + suffix for name in plain for suffix in ("", ".gz")]


def _check_sums(root: Storage, digests: Mapping[str, str]) -> None:
    lines = root.read(SUMS_FILE).decode().splitlines()
    sums = {parts[1].lstrip("*"): parts[0] for line in lines if len(parts := line.split()) == 2}
    for file, digest in digests.items():
        if file in sums and sums[file] != digest:
            raise DataError(
                f"{root.uri}/{file}: its SHA-256 is {digest[:16]}…, {SUMS_FILE} says "
                f"{sums[file][:16]}…: the file is damaged or was changed; fetch it again"
            )


def _open(root: Storage, file: str) -> IO[bytes]:
    # Seekable and buffered: gzip reads a few bytes at a time.
    stream: IO[bytes] = root.filesystem.open_input_stream(
        root.path(file), compression=None, buffer_size=2**20
    )
    return gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream  # type: ignore[return-value]


def _read_header(root: Storage, file: str, *, images: bool) -> IdxHeader:
    try:
        with _open(root, file) as stream:
            head = stream.read(IDX_IMAGES_HEADER_BYTES)
    except _GZIP_ERRORS as error:
        raise _damaged_gzip(file, error) from error
    return parse_idx_header(file, head, images=images)


def _unpack(root: Storage, file: str, header: IdxHeader) -> Iterator[bytes]:
    """Yield the pixels; raise DataError when there are fewer or more than promised."""
    size_bytes = 0
    try:
        with _open(root, file) as stream:
            stream.read(header.header_bytes)
            size_bytes = header.header_bytes
            while piece := stream.read(_PIECE_BYTES):
                size_bytes += len(piece)
                yield piece
    except EOFError:
        check_idx_size(file, header, size_bytes)
        raise
    except _GZIP_ERRORS as error:
        raise _damaged_gzip(file, error) from error
    check_idx_size(file, header, size_bytes)


def _damaged_gzip(file: str, error: Exception) -> DataError:
    return DataError(f"{file}: truncated or damaged gzip file ({error}); fetch it again")
