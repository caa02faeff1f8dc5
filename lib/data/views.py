"""How people read data sets: tables on the terminal, pictures in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data.catalog import catalog, describe, samples
from lib.data.difference import Difference, Rows, difference, images_of, read_rows
from lib.data.extend import Extension
from lib.data.manifest import SPLITS, Manifest
from lib.data.readers import Images
from lib.errors import DataError
from lib.storage import Storage
from lib.tables import print_facts, print_line, print_table, size

_SHORT = 12
_PER_CLASS = 10
_MAX_DRAWN = 24


def list_sets(storage: Storage) -> dict[str, Any]:
    """Print a line a data set, the newest first; return them as JSON."""
    sets = [entry.to_json() for entry in catalog(storage)]
    if not sets:
        print_line("no data sets; run jobs.ingest")
    else:
        print_table(
            ("digest", "made", "train", "val", "test", "classes", "shape", "size", "of"),
            [
                (
                    found["digest"][:_SHORT],
                    found["created"][:16].replace("T", " "),
                    *(f"{found['rows'][split]:,}" for split in SPLITS),
                    str(found["classes"]),
                    "×".join(str(side) for side in found["shape"]),
                    size(found["bytes"]),
                    found["source"],
                )
                for found in sets
            ],
            right=("train", "val", "test", "classes", "size"),
        )
    return {"sets": sets}


def show_extension(storage: Storage, made: Extension) -> dict[str, Any]:
    """Print what became of the labelled requests, then the child; return both as JSON."""
    print_facts(
        {
            "new images": ", ".join(f"{rows:,} {split}" for split, rows in made.rows.items()),
            "there already": f"{made.num_known:,}",
            "repeated": f"{made.num_repeated:,}",
            "contradicting": f"{made.num_contradicting:,}, not used",
            "of another shape": f"{made.num_unfit:,}, not used",
        }
    )
    return {**made.summary(), "set": show_set(storage, made.manifest, None)}


def show_deletion(content: dict[str, Any]) -> dict[str, Any]:
    """Print what went with a data set, or would go."""
    print_facts(
        {
            "data set": content["digest"],
            "shards": f"{content['shards']} of its own, {content['shared_shards']} stay for others",
            "size": size(content["bytes"]),
        }
    )
    print_line("deleted" if content["deleted"] else "nothing was deleted: --yes deletes it")
    return content


def show_erasure(content: dict[str, Any]) -> dict[str, Any]:
    """Print what was erased, or would be, and what could not."""
    print_facts(
        {
            "log rows": ", ".join(f"{n:,} of {m}" for m, n in content["log_rows"].items()) or "–",
            "labels": ", ".join(f"{n:,} of {m}" for m, n in content["labels"].items()) or "–",
            **{f"data set {found['digest'][:_SHORT]}": f"{found['rows']:,} rows"
               + (f", replaced by {found['new'][:_SHORT]}" if found["new"] else "")
               for found in content["sets"]},
        }
    )  # fmt: skip
    for line in content["not_erased"]:
        print_line(f"not erased: {line}")
    print_line("erased" if content["erased"] else "nothing was erased: --yes erases it")
    return content


def show_set(storage: Storage, manifest: Manifest, pictures: Path | None) -> dict[str, Any]:
    """Print all that is known of a data set; draw samples of its classes if asked to."""
    content = describe(storage, manifest)
    grey_range = manifest.preprocess.grey_range
    depth = f", of 16-bit values {grey_range[0]}–{grey_range[1]}" if grey_range else ""
    print_facts(
        {
            "digest": manifest.digest,
            "made": content["created"],
            "of": manifest.source,
            "split by": f"groups, of column {manifest.group}" if manifest.group else "rows",
            "shape": "×".join(str(side) for side in manifest.shape) + depth,
            "pixels": ", ".join(
                f"{mean:.4f} ± {std:.4f}"
                for mean, std in zip(manifest.pixel_mean, manifest.pixel_std, strict=True)
            ),
            "size": f"{size(content['bytes'])} in {len(manifest.shards)} shards",
            "ignored": "; ".join(f"{i.count:,}: {i.reason}" for i in manifest.ignored) or "nothing",
            "made of": " ← ".join(d[:_SHORT] for d in content["ancestors"]) or "a source alone",
            "children": ", ".join(d[:_SHORT] for d in content["children"]) or "none",
        }
    )
    print_table(
        ("class", *manifest.counts),
        [
            (name, *(f"{counts[index]:,}" for counts in manifest.counts.values()))
            for index, name in enumerate(manifest.class_names)
        ],
        right=tuple(manifest.counts),
    )
    if pictures:
        from lib.data.sheets import class_sheet

        images = samples(storage, manifest, "train", _PER_CLASS)
        title = f"{manifest.digest[:_SHORT]} of {manifest.source}: samples of train"
        drawn = class_sheet(title, manifest.class_names, manifest.counts, images)
        content["picture"] = _write(pictures, f"data-{manifest.digest[:_SHORT]}.png", drawn)
    return content


def compare_sets(
    storage: Storage, a: Manifest, b: Manifest, pictures: Path | None
) -> dict[str, Any]:
    """Print what rows came and went from `a` to `b`; draw some of them if asked to.

    Raises DataError if the two have other classes or shapes: then no row can be the same. Nor can
    rows be compared whose ids are of another kind.
    """
    if a.class_names != b.class_names or a.shape != b.shape:
        raise DataError(
            f"{a.digest[:_SHORT]} has {a.num_classes} classes of {a.shape}, {b.digest[:_SHORT]} "
            f"{b.num_classes} of {b.shape}; only sets of the same classes and shape are compared"
        )
    if a.format_version != b.format_version:
        older = min(a, b, key=lambda manifest: manifest.format_version)
        raise DataError(
            f"{older.digest[:_SHORT]} was made by an older Rayline, with other ids for its rows; "
            f"run jobs.ingest with its source, {older.source}, and compare the set that it makes"
        )
    rows_a, rows_b = read_rows(storage, a), read_rows(storage, b)
    found = difference(rows_a, rows_b, a.class_names)
    content = {"a": a.digest, "b": b.digest, **found.content}
    _print_difference(content)
    if pictures:
        from lib.data.sheets import rows_sheet

        sheet = rows_sheet(_sections(storage, a, b, rows_a, rows_b, found))
        name = f"diff-{a.digest[:_SHORT]}-{b.digest[:_SHORT]}.png"
        content["picture"] = _write(pictures, name, sheet)
    return content


def _print_difference(content: Mapping[str, Any]) -> None:
    print_line(f"{content['same']:,} rows are the same")
    for verb in ("came", "went"):
        for split, counts in content[verb].items():
            classes = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            print_line(f"{sum(counts.values()):,} {verb} in {split}: {classes}")
    for verb in ("moved", "relabelled"):
        for change, count in content[verb].items():
            print_line(f"{count:,} {verb}: {change}")


def _sections(
    storage: Storage, a: Manifest, b: Manifest, rows_a: Rows, rows_b: Rows, found: Difference
) -> dict[str, tuple[Images, list[str]]]:
    def section(
        manifest: Manifest, rows: Rows, chosen: npt.NDArray[np.int64]
    ) -> tuple[Images, list[str]]:
        # Spread over all of them, so that every class has a chance to be seen.
        drawn = chosen[:: max(1, len(chosen) // _MAX_DRAWN)][:_MAX_DRAWN]
        labels = [manifest.class_names[label] for label in rows.labels[drawn]]
        return images_of(storage, manifest, rows, drawn), labels

    return {
        f"{len(found.came):,} came": section(b, rows_b, found.came),
        f"{len(found.went):,} went": section(a, rows_a, found.went),
    }


def _write(folder: Path, name: str, content: bytes) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    except OSError as error:
        raise DataError(f"{folder / name} can't be written: {error}; give another DIR") from error
    print_line(f"picture: {folder / name}")
    return str(folder / name)
