"""Score: pictures or Parquet in, predictions as Parquet out, with any version of a model.

The input is cut into parts, each of which becomes one file of the output, written in one step.
Parts that are there are not computed again, so an interrupted job goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data

from lib.cli import progress
from lib.data.execution import quiet_ray_data
from lib.data.folders import OTHER_SUFFIXES, SUFFIXES
from lib.data.manifest import Ignored
from lib.data.sources import Listing, list_source
from lib.errors import DataError, RaylineError, StorageError
from lib.scorer import Part, Scorer, open_parquet
from lib.serving.bundle import Card, read_card
from lib.storage import Storage

PLAN_FILE = "_plan.json"
"""In the output folder: what it is a prediction of. Parquet readers skip names with `_`."""
PICTURES_PER_PART = 1024
_GPUS_PER_ACTOR = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a job did."""

    output: str
    version: int
    rows: int
    errors: int
    """Rows whose image can't be read; their column `error` says why."""
    parts: int
    parts_reused: int
    seconds: float
    ignored: tuple[Ignored, ...]
    """What lies in the input and is not scored."""


def score(storage: Storage, bundle: str, input_uri: str, output_uri: str) -> Scored:
    """Predict all images of a folder or of Parquet files. Ray must be initialised.

    `input_uri` is a folder of PNG or JPEG files (searched to the bottom), a Parquet file or a
    folder of them, with a column `image`: raw pixels (fixed-size binary) or encoded pictures.
    Raises DataError if there is nothing to score or the output folder holds something else.
    """
    started_s = time.monotonic()
    card = read_card(storage, bundle)
    source, paths, fingerprint, ignored = _find_input(input_uri)
    target = _root(output_uri)
    parts = _parts(source, paths)
    _claim(target, {"input": source.uri, "files": fingerprint, **_identity(card)})
    there = set(target.list(""))
    todo = [part for part in parts if part.output not in there]
    if len(todo) < len(parts):
        progress("score", f"{len(parts) - len(todo)} of {len(parts)} parts are there already")
    for done, result in enumerate(_run(storage, bundle, source, target, todo, card), start=1):
        if isinstance(result, RaylineError):
            raise result
        progress("score", f"{done} of {len(todo)} parts, {result:,} rows in the last")
    rows, errors = _count(target, parts)
    return Scored(
        output=target.uri,
        version=card.version,
        rows=rows,
        errors=errors,
        parts=len(parts),
        parts_reused=len(parts) - len(todo),
        seconds=time.monotonic() - started_s,
        ignored=ignored,
    )


def _root(uri: str) -> Storage:
    return Storage(uri if "://" in uri else os.path.abspath(uri))


def _find_input(uri: str) -> tuple[Storage, list[str], str, tuple[Ignored, ...]]:
    """Return a folder, the files in it, a fingerprint of their names, sizes and times, the rest.

    Pictures of a format that isn't read are among them: their rows say so.
    """
    root = _root(uri)
    try:
        if root.filesystem.get_file_info(root.root).is_file:
            root = _root(uri.rstrip("/").rpartition("/")[0] or ".")
            name = uri.rstrip("/").rpartition("/")[2]
            listing = Listing(files=(name,), folders=(), ignored={})
        else:
            listing = list_source(root)
    except OSError as error:
        raise DataError(f"--input {uri}: can't be read: {error}") from error
    parquet = [name for name in listing.files if name.lower().endswith(".parquet")]
    pictures = [name for name in listing.files if name.lower().endswith(SUFFIXES + OTHER_SUFFIXES)]
    if parquet and pictures:
        raise DataError(
            f"--input {uri} holds pictures ({pictures[0]}) and Parquet ({parquet[0]}): score them "
            "one after the other, from folders of their own"
        )
    found = parquet or pictures
    if not found:
        raise DataError(
            f"--input {uri}: nothing to score there; give a folder with PNG or JPEG files, a "
            "Parquet file, or a folder of Parquet files"
        )
    infos: list[pafs.FileInfo] = root.filesystem.get_file_info([root.path(name) for name in found])
    lines = (
        f"{name}\0{info.size}\0{info.mtime_ns}\n" for name, info in zip(found, infos, strict=True)
    )
    fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()
    others = sorted(set(listing.files) - set(found))
    return root, found, fingerprint, listing.ignoring({"neither a picture nor Parquet": others})


def _parts(source: Storage, paths: Sequence[str]) -> list[Part]:
    """Cut the input, the same way each time: pictures by number, Parquet by row group."""
    ranges: list[tuple[tuple[str, ...], int | None, int]] = []
    if paths[0].lower().endswith(".parquet"):
        for path in paths:
            metadata = open_parquet(source, path).metadata
            first_row = 0
            for group in range(metadata.num_row_groups):
                if num_rows := metadata.row_group(group).num_rows:
                    ranges.append(((path,), group, first_row))
                first_row += num_rows
    else:
        for start in range(0, len(paths), PICTURES_PER_PART):
            ranges.append((tuple(paths[start : start + PICTURES_PER_PART]), None, 0))
    return [
        Part(
            output=f"part-{index:06d}-of-{len(ranges):06d}.parquet",
            paths=part_paths,
            row_group=group,
            first_row=first_row,
        )
        for index, (part_paths, group, first_row) in enumerate(ranges)
    ]


def _identity(card: Card) -> dict[str, Any]:
    return {"model": card.name, "version": card.version, "run_id": card.run_id}


def _claim(target: Storage, plan: dict[str, Any]) -> None:
    """Take the output folder for this input and version, or find that it is taken for it."""
    if target.create_json(PLAN_FILE, plan):
        return
    existing = target.read_json(PLAN_FILE)
    changed = [key for key in plan if plan[key] != existing.get(key)]
    if changed:
        raise DataError(
            f"--output {target.uri} holds predictions of another {' and '.join(changed)}; give "
            "another folder, or delete that one"
        )


def _run(
    storage: Storage,
    bundle: str,
    source: Storage,
    target: Storage,
    parts: Sequence[Part],
    card: Card,
) -> Iterator[int | RaylineError]:
    """Run the parts on a pool of actors, each of which loads the model once."""
    if not parts:
        return
    quiet_ray_data()
    resources = ray.cluster_resources()
    on_gpu = card.runtime == "torch" and resources.get("GPU", 0) > 0
    num_slots = resources["GPU"] / _GPUS_PER_ACTOR if on_gpu else resources.get("CPU", 1)
    items = [{"item": pickle.dumps(part)} for part in parts]
    # Typed for functions only; a class makes an actor pool.
    scorer: Any = Scorer
    results = ray.data.from_items(items, override_num_blocks=len(items)).map(
        scorer,
        fn_constructor_args=(storage, bundle, source, target),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=max(1, min(len(parts), int(num_slots)))
        ),
        num_cpus=None if on_gpu else 1,
        num_gpus=_GPUS_PER_ACTOR if on_gpu else None,
    )
    for row in results.iter_rows():
        yield pickle.loads(row["item"])


def _count(target: Storage, parts: Sequence[Part]) -> tuple[int, int]:
    """Return how many rows, and how many with an error, the output has."""
    rows = errors = 0
    for part in parts:
        try:
            column = pq.read_table(
                pa.BufferReader(target.read_buffer(part.output)), columns=["error"]
            )["error"]
        except (pa.ArrowException, StorageError) as error:
            raise DataError(
                f"{target.path(part.output)} is damaged ({error}): delete it and run again"
            ) from error
        rows += len(column)
        errors += len(column) - column.null_count
    return rows, errors
