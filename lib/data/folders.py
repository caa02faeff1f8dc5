"""Folders of pictures: one folder of PNG or JPEG files per class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.fs as pafs

from lib.data.checks import Labels, check_class_names, check_same_shape
from lib.data.manifest import Ignored
from lib.data.pictures import DECODE_ERRORS, MODE_CHANNELS, decode
from lib.data.readers import PictureReader
from lib.data.sources import (
    CLASSES_FILE,
    Opened,
    SplitRows,
    read_class_names,
    sha256_files,
)
from lib.data.splits import row_hash
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage

SUFFIXES = (".png", ".jpg", ".jpeg")
_SPLIT_FOLDERS = ("train", "val", "test")
_SHUFFLE_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """DIR/CLASS/*.png, or DIR/train/CLASS, DIR/test/CLASS and perhaps DIR/val/CLASS."""

    name: str
    root: Storage
    class_names: tuple[str, ...]
    files: Mapping[str, tuple[tuple[str, int], ...]]
    """Split → (path, label), shuffled."""
    digests: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()

    @classmethod
    def find(
        cls, root: Storage, *, name: str, class_names: tuple[str, ...] | None = None
    ) -> FolderSource:
        """List and hash the files."""
        folders = _folders(root, "")
        has_splits = "train" in folders
        classes_of = (
            {split: _folders(root, split) for split in _SPLIT_FOLDERS if split in folders}
            if has_splits
            else {"train": folders}
        )
        classes_from = CLASSES_FILE if class_names is None else "the data set"
        class_names = class_names or read_class_names(root)
        if class_names is None:
            class_names = tuple(classes_of["train"])
            classes_from = f"{root.uri}/train" if has_splits else root.uri
            check_class_names(classes_from, class_names)
        files, digests = {}, {}
        for split, found in classes_of.items():
            for class_name in found:
                if class_name not in class_names:
                    raise DataError(
                        f"folder {split if has_splits else root.uri}/{class_name}: no such class "
                        f"in {classes_from}: {', '.join(class_names)}"
                    )
            rows: list[tuple[str, int]] = []
            for class_name in found:
                folder = f"{split}/{class_name}" if has_splits else class_name
                paths = _pictures(root, folder)
                digests[folder] = _digest(root, paths)
                rows += [(path, class_names.index(class_name)) for path in paths]
            # Sorted by class, a shard would hold one class only.
            order = np.argsort(row_hash(len(rows), _SHUFFLE_SEED), kind="stable")
            files[split] = tuple(rows[index] for index in order)
        if classes_from == CLASSES_FILE:
            digests[CLASSES_FILE] = sha256_files(root, [CLASSES_FILE])[0]
        return cls(name=name, root=root, class_names=class_names, files=files, digests=digests)

    def open(self, staging: Staging) -> Opened:
        """Decode the first picture of each split, which sets size and colour mode."""
        readers, shapes = {}, {}
        for split, rows in self.files.items():
            if not rows:
                raise DataError(f"{self.name}: {split} holds no {', '.join(SUFFIXES)} files")
            first = rows[0][0]
            try:
                pixels, mode = decode(self.root.read(first))
            except DECODE_ERRORS as error:
                raise DataError(
                    f"{first}: unreadable picture: {error}; repair or remove it"
                ) from error
            shapes[first] = (pixels.shape[0], pixels.shape[1], MODE_CHANNELS[mode])
            readers[split] = PictureReader(
                root=self.root, paths=tuple(path for path, _ in rows), mode=mode, mode_from=first
            )
        check_same_shape(shapes)
        splits = tuple(
            SplitRows(
                split=split,
                labels=_labels(rows),
                reader=readers[split],
                labels_name=f"{self.name}/{split}" if len(self.files) > 1 else self.name,
            )
            for split, rows in self.files.items()
        )
        return Opened(
            class_names=self.class_names, shape=next(iter(shapes.values())), splits=splits
        )


def holds_class_folders(root: Storage) -> bool:
    """Whether the folder has folders in it."""
    return bool(_folders(root, ""))


def _labels(rows: tuple[tuple[str, int], ...]) -> Labels:
    return np.fromiter((label for _, label in rows), dtype=np.int32, count=len(rows))


def _folders(root: Storage, relative: str) -> list[str]:
    path = root.path(relative) if relative else root.root
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(
        info.base_name
        for info in root.filesystem.get_file_info(selector)
        if info.type == pafs.FileType.Directory and not info.base_name.startswith(".")
    )


def _pictures(root: Storage, folder: str) -> list[str]:
    return [
        path
        for path in root.list(folder)
        if path.lower().endswith(SUFFIXES) and not path.rsplit("/", 1)[1].startswith(".")
    ]


def _digest(root: Storage, paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path, file_digest in zip(paths, sha256_files(root, paths), strict=True):
        digest.update(f"{file_digest}  {path.rsplit('/', 1)[1]}\n".encode())
    return digest.hexdigest()
