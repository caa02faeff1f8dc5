"""What live requests are compared with, computed once and kept: beside the data set and the model.

`reference/<data digest>.<format>.parquet` holds the features of a sample of the training images,
`<bundle>/reference.<format>.parquet` a version's answers to validation images, which it was not
trained on. Of a data set that was extended with live requests there are two of each, these in
`….<format>.live.parquet`: requests may be all of one kind, or all of the other, and a mixed sample
would look like neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.cli import progress
from lib.data.direct import read_shard
from lib.data.manifest import LIVE, Manifest, Shard, load_manifest
from lib.data.splits import row_hash, stratified
from lib.errors import DataError
from lib.registry.evaluate import predict_all
from lib.serving.bundle import read_card
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from lib.watch.features import feature_names, features, grid_shape
from lib.watch.populations import Answers, Population, Reference

ROWS = 10_000
"""Rows of a sample at most: with more, a window's own size is what limits a test."""
MIN_LIVE_ROWS = 150
"""Live images that a data set must have been extended with to be a population of their own: by
fewer, what they looked like is known too badly to tell drift from it. The monitor starts a retrain
at 200 labels, and some of their images repeat one another or were not logged."""
_SEED = 5
_FORMAT = 2
"""Part of the files' names: raise it when the features change their meaning."""


def reference_path(digest: str, *, live: bool = False) -> str:
    """Return where the features of a data set's images are kept."""
    return f"reference/{digest}.{_FORMAT}{'.live' if live else ''}.parquet"


def answers_path(bundle: str, *, live: bool = False) -> str:
    """Return where a version's answers to held-out images are kept."""
    return f"{bundle}/reference.{_FORMAT}{'.live' if live else ''}.parquet"


def load_reference(storage: Storage, bundles: Mapping[int, str], champion: int) -> Reference:
    """Return the champion's reference with the answers of all versions; make what is missing.

    Raises DataError or StorageError if the data set is needed and is not whole any more.
    """
    digest = read_card(storage, bundles[champion]).data_digest
    manifest = load_manifest(storage, digest)
    cards = {version: read_card(storage, bundle) for version, bundle in bundles.items()}
    populations = []
    for live in (False, True) if _knows_live(manifest) else (False,):
        answers = {
            version: ensure_answers(storage, bundles[version], live=live)
            for version, card in cards.items()
            # Of other classes, it can't be counted in the same table.
            if card.class_names == manifest.class_names
            and not (live and not _knows_live(load_manifest(storage, card.data_digest)))
        }
        sample = ensure_features(storage, manifest, live=live)
        populations.append(Population(features_NF=sample, answers=answers))
    return Reference(
        populations=tuple(populations),
        feature_names=feature_names(manifest.shape),
        grid=grid_shape(manifest.shape),
        class_names=manifest.class_names,
    )


def ensure_features(
    storage: Storage, manifest: Manifest, *, live: bool = False
) -> npt.NDArray[np.float32]:
    """Return the features (N, F) of a sample of the training images, made now if need be.

    With `live`, of the live requests that the data set was extended with.
    """
    path = reference_path(manifest.digest, live=live)
    if not storage.exists(path):
        progress("monitor", f"sampling the {_named(live, 'training')} of {manifest.digest[:12]}")
        splits = ("train", "val", LIVE) if live else ("train",)
        images_NHWC, labels_N = sample(storage, manifest, splits, ROWS, live=live)
        found = features(images_NHWC)
        lists = pa.FixedSizeListArray.from_arrays(found.reshape(-1), found.shape[1])
        _write(storage, path, {"label": labels_N, "features": lists})
    lists = _read(storage, path).column("features").combine_chunks()
    flat: npt.NDArray[np.float32] = lists.flatten().to_numpy()
    return flat.reshape(len(lists), -1)


def ensure_answers(storage: Storage, bundle: str, *, live: bool = False) -> Answers:
    """Return a version's answers to a sample of the validation images, made now if need be.

    With `live`, to live requests that it was not trained on.
    """
    path = answers_path(bundle, live=live)
    if not storage.exists(path):
        card = read_card(storage, bundle)
        what = _named(live, "validation")
        progress("monitor", f"{card.name} version {card.version} answers {what}")
        manifest = load_manifest(storage, card.data_digest)
        splits = ("val", LIVE) if live else ("val",)
        images_NHWC, labels_N = sample(storage, manifest, splits, ROWS, live=live)
        made = Answers.of(predict_all(load_predictor(storage, bundle, card), images_NHWC))
        _write(
            storage,
            path,
            {
                "label": labels_N,
                "predicted": made.predicted_N,
                "confidence": made.confidence_N,
                "entropy": made.entropy_N,
            },
        )
    table = _read(storage, path)
    return Answers(
        predicted_N=table.column("predicted").to_numpy(),
        confidence_N=table.column("confidence").to_numpy(),
        entropy_N=table.column("entropy").to_numpy(),
    )


def reference_key(storage: Storage, bundles: Mapping[int, str], champion: int) -> str:
    """Return what names a reference; while it is the same, evidence adds up.

    Other versions than the champion come and go without a new start.
    """
    digest = read_card(storage, bundles[champion]).data_digest
    content = f"{_FORMAT} {digest} {bundles[champion]}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sample(
    storage: Storage, manifest: Manifest, splits: Sequence[str], num_rows: int, *, live: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return images (N, H, W, C) and labels of some rows of splits, of each class its share.

    With `live` of rows that were live requests, else of those that were ingested. One shard is held
    at a time. Raises DataError if a shard is damaged or there is no such row.
    """
    shards = _shards(manifest, splits, live=live)
    if not shards:
        raise DataError(
            f"data set {manifest.digest[:12]} has no rows in {' or '.join(splits)}; ingest it again"
        )
    labels = np.concatenate([_labels(storage, shard.path) for shard in shards])
    chosen = stratified(labels, min(1.0, num_rows / len(labels)), row_hash(len(labels), _SEED))
    if len(labels) <= num_rows:
        chosen[:] = True
    images, start = [], 0
    for shard in shards:
        mine = np.flatnonzero(chosen[start : start + shard.rows])
        start += shard.rows
        if len(mine):
            rows = read_shard(storage, shard).column("image").take(pa.array(mine))
            images.append(np.frombuffer(b"".join(rows.to_pylist()), np.uint8))
    return np.concatenate(images).reshape(-1, *manifest.shape), labels[chosen]


def _shards(manifest: Manifest, splits: Sequence[str], *, live: bool) -> list[Shard]:
    """Return the shards of ingested or of live rows, each once: some are listed repeatedly."""
    mine = {
        shard.path: shard
        for shard in manifest.shards
        if shard.split in splits
        and (shard.split == LIVE or shard.path in manifest.live_shards) == live
    }
    return list(mine.values())


def _knows_live(manifest: Manifest) -> bool:
    shards = _shards(manifest, ("train", "val", LIVE), live=True)
    return sum(shard.rows for shard in shards) >= MIN_LIVE_ROWS


def _named(live: bool, images: str) -> str:
    return "live images" if live else f"{images} images"


def _labels(storage: Storage, path: str) -> npt.NDArray[np.int64]:
    def read() -> pa.Table:
        with storage.filesystem.open_input_file(storage.path(path)) as file:
            return pq.read_table(file, columns=["label"])

    labels: npt.NDArray[np.int32] = storage.attempt("read", path, read)["label"].to_numpy()
    return labels.astype(np.int64)


def _write(storage: Storage, path: str, columns: Mapping[str, object]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    storage.write(path, sink.getvalue())


def _read(storage: Storage, path: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_buffer(path)))
