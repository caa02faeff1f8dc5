"""Folders of pictures: one folder of PNG or JPEG files per class.

Pictures in folders below a class are of that class. A picture of a format that isn't read, a folder
of which it isn't clear what it is, and a split without classes stop the ingest; whatever else is
left out is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lib.data.checks import Labels, check_class_names, check_same_shape
from lib.data.manifest import SPLITS, Ignored
from lib.data.pictures import DECODE_ERRORS, MODE_CHANNELS, SIXTEEN_BIT, decode
from lib.data.readers import PictureReader, checked_range, merged_range
from lib.data.sources import (
    CLASSES_FILE,
    SPLIT_WORDS,
    Listing,
    Opened,
    SplitRows,
    check_split_names,
    read_class_names,
    sha256_files,
    split_of,
)
from lib.data.splits import row_hash
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (
    ".avif", ".bmp", ".cr2", ".dcm", ".dib", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif",
    ".ico", ".j2k", ".jp2", ".jxl", ".nef", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of pictures that aren't read: left out, a class would silently be a part of itself."""
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
    def find(cls, root: Storage, listing: Listing, *, name: str) -> FolderSource:
        """Tell splits and classes by the folders, and hash the files."""
        _check_formats(listing)
        classes_of = _classes_of(listing)
        has_splits = any(folder for _, folder in classes_of)
        class_names, classes_from = read_class_names(root), CLASSES_FILE
        if class_names is None:
            train = next(folder for split, folder in classes_of if split == "train")
            class_names = tuple(classes_of["train", train])
            classes_from = f"{root.uri}/{train}" if has_splits else root.uri
            check_class_names(classes_from, class_names)
        files: dict[str, tuple[tuple[str, int], ...]] = {}
        digests: dict[str, str] = {}
        for (split, folder), classes in classes_of.items():
            rows: list[tuple[str, int]] = []
            for class_name, paths in classes.items():
                place = f"{folder}/{class_name}" if has_splits else class_name
                if class_name not in class_names:
                    raise DataError(
                        f"folder {place if has_splits else f'{root.uri}/{place}'}: no such class "
                        f"in {classes_from}: {', '.join(class_names)}"
                    )
                digests[place] = _digest(root, place, paths)
                label = class_names.index(class_name)
                rows += [(path, label) for path in paths]
            # Sorted by class, a shard would hold one class only.
            order = np.argsort(row_hash(len(rows), _SHUFFLE_SEED), kind="stable")
            files[split] = tuple(rows[index] for index in order)
        if classes_from == CLASSES_FILE:
            digests[CLASSES_FILE] = sha256_files(root, [CLASSES_FILE])[0]
        used = {path for rows_of in files.values() for path, _ in rows_of}
        return cls(
            name=name,
            root=root,
            class_names=class_names,
            files=files,
            digests=digests,
            ignored=listing.ignoring(_left_out(listing, {*used, CLASSES_FILE})),
        )

    def open(self, staging: Staging) -> Opened:
        """Decode the first picture of each split: the first sets colour mode and size of all."""
        shapes, modes = {}, {}
        for split, rows in self.files.items():
            if not rows:
                raise DataError(f"{self.name}: {split} holds no {', '.join(SUFFIXES)} files")
            first = rows[0][0]
            try:
                pixels, modes[first] = decode(self.root.read(first))
            except DECODE_ERRORS as error:
                raise DataError(
                    f"{first}: unreadable picture: {error}; repair or remove it"
                ) from error
            shapes[first] = (pixels.shape[0], pixels.shape[1], MODE_CHANNELS[modes[first]])
        check_same_shape(shapes)
        mode_from, mode = next(iter(modes.items()))
        grey_range = self._grey_range() if mode == SIXTEEN_BIT else None
        splits = tuple(
            SplitRows(
                split=split,
                labels=_labels(rows),
                reader=PictureReader(
                    root=self.root,
                    paths=tuple(path for path, _ in rows),
                    mode=mode,
                    mode_from=mode_from,
                    grey_range=grey_range,
                ),
                labels_name=f"{self.name}/{split}" if len(self.files) > 1 else self.name,
            )
            for split, rows in self.files.items()
        )
        return Opened(
            class_names=self.class_names,
            shape=next(iter(shapes.values())),
            splits=splits,
            grey_range=grey_range,
        )

    def _grey_range(self) -> tuple[int, int]:
        """Read all pictures once more, for the range of their values."""
        paths = [path for rows in self.files.values() for path, _ in rows]
        with ThreadPoolExecutor() as pool:
            return merged_range(
                pool.map(lambda path: checked_range(path, self.root.read(path)), paths)
            )


def pictures_in_folders(listing: Listing) -> list[str]:
    """Return the pictures that lie in a folder, and so may have a class."""
    return [path for path in listing.files if "/" in path and path.lower().endswith(SUFFIXES)]


def _check_formats(listing: Listing) -> None:
    others = [path for path in listing.files if path.lower().endswith(OTHER_SUFFIXES)]
    others = [path for path in others if "/" in path]
    if others:
        counts = Counter("." + path.lower().rpartition(".")[2] for path in others)
        raise DataError(
            f"{others[0]}: only PNG and JPEG files are read; there are "
            f"{', '.join(f'{count:,} {suffix}' for suffix, count in counts.items())} files. "
            "Convert them to PNG (for example with `mogrify -format png`), or take them away"
        )


def _classes_of(listing: Listing) -> dict[tuple[str, str], dict[str, list[str]]]:
    """Return (split, its folder) → class → pictures; the folder is empty without splits."""
    pictures = [path.split("/") for path in pictures_in_folders(listing)]
    tops = [folder for folder in listing.folders if "/" not in folder]
    nested = {parts[0] for parts in pictures if len(parts) > 2}
    words = {top: found[1] for top in tops if (found := split_of(top))}
    others = sorted({parts[0] for parts in pictures} - set(words))
    if not words or (others and not nested.intersection(words)):
        # A folder `train` that holds pictures itself, beside `bus` and `car`, is a class.
        return {("train", ""): _by_class(pictures, tops, depth=0)}
    check_split_names(words, others, one_each=True)
    splits = {}
    for top, word in sorted(words.items(), key=lambda item: SPLITS.index(SPLIT_WORDS[item[1]])):
        of_split = [parts for parts in pictures if parts[0] == top]
        if top not in nested:
            raise DataError(
                f"{top} holds {len(of_split):,} pictures, none of them in a folder of a class; "
                f"put them into {top}/CLASS, or take {top} away"
            )
        below = [folder.split("/") for folder in listing.folders if folder.startswith(f"{top}/")]
        classes = [parts[1] for parts in below if len(parts) == 2]
        splits[SPLIT_WORDS[word], top] = _by_class(of_split, classes, depth=1)
    return splits


def _by_class(
    pictures: Sequence[Sequence[str]], classes: Sequence[str], *, depth: int
) -> dict[str, list[str]]:
    """Group pictures by the folder at `depth`; raise DataError where another may be the class."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    classes_with: dict[str, set[str]] = defaultdict(set)
    for parts in pictures:
        if len(parts) < depth + 2:
            continue  # In no folder of a class.
        for folder in parts[depth + 1 : -1]:
            if split_of(folder) and folder.strip("0123456789-_. ").isalpha():
                raise DataError(
                    f"{'/'.join(parts)} lies in a folder {folder} below its class {parts[depth]}; "
                    f"put splits above classes: {folder}/{parts[depth]}"
                )
        found[parts[depth]].append("/".join(parts))
        classes_with[parts[depth + 1] if len(parts) > depth + 2 else ""].add(parts[depth])
    shared = [folder for folder, names in classes_with.items() if len(names) > 1]
    if shared and "" not in classes_with:
        first, second = sorted(classes_with[shared[0]])[:2]
        raise DataError(
            f"{first}/{shared[0]} and {second}/{shared[0]}: which folder is the class? No picture "
            f"lies in {first} or {second} themselves; put the folders of classes on top, or below "
            "train, val and test"
        )
    return found


def _left_out(listing: Listing, used: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in listing.files:
        if path not in used:
            is_picture = path.lower().endswith(SUFFIXES + OTHER_SUFFIXES)
            found["a picture in no folder of a class" if is_picture else "no picture"].append(path)
    return found


def _labels(rows: tuple[tuple[str, int], ...]) -> Labels:
    return np.fromiter((label for _, label in rows), dtype=np.int32, count=len(rows))


def _digest(root: Storage, folder: str, paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path, file_digest in zip(paths, sha256_files(root, paths), strict=True):
        digest.update(f"{file_digest}  {path[len(folder) + 1 :]}\n".encode())
    return digest.hexdigest()
