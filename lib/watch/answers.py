"""Answers of one version as a gateway saw them, and as rows of the prediction log."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.serving.bundle import Card
from lib.watch.features import features
from lib.watch.predictions import SCHEMA

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Answers:
    """Requests that one version answered, or all failed on. A list a field: to append is all.

    Lists of numbers, strings and arrays are nothing that the garbage collector goes through, as it
    would a tuple for each request.
    """

    card: Card
    is_shadow: bool
    times_s: list[float] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    trace_ids: list[str | None] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    images: list[Images | None] = field(default_factory=list)
    """(N, H, W, C) each; None where they are not kept."""
    probabilities: list[Probabilities | None] = field(default_factory=list)
    """(N, classes) each; None if the version failed."""

    @property
    def num_rows(self) -> int:
        """Rows that this is in the log."""
        return sum(self.num_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Of the requests, 0 to 1: those whose images are kept, and those whose features are."""

    images: float
    features: float


def to_table(answers: Answers, shares: Shares) -> pa.Table:
    """Return a row for each image."""
    sizes = np.array(answers.num_images)
    request = np.repeat(np.arange(len(sizes)), sizes)
    index = np.arange(len(request)) - (np.cumsum(sizes) - sizes)[request]
    predicted, probabilities = _predictions(answers.probabilities, len(request))
    image, coarse = _pictures(answers, request, shares)
    columns = {
        "time_us": (np.array(answers.times_s) * 1e6).astype(np.int64)[request],
        "request_id": pa.array(answers.request_ids, pa.string()).take(request),
        "index": index.astype(np.int32),
        "version": np.full(len(request), answers.card.version, np.int32),
        "shadow": np.full(len(request), answers.is_shadow),
        "caller": pa.array(answers.callers, pa.string()).take(request),
        "latency_ms": (np.array(answers.latencies_s) * 1e3).astype(np.float32)[request],
        "predicted": predicted,
        "probabilities": probabilities,
        "status": np.array(answers.statuses, np.int32)[request],
        "image": image,
        "features": coarse,
        "run_id": pa.repeat(answers.card.run_id, len(request)),
        "trace_id": pa.array(answers.trace_ids, pa.string()).take(request),
    }
    return pa.table(columns, schema=SCHEMA)


def _predictions(
    found: Sequence[Probabilities | None], num_rows: int
) -> tuple[npt.NDArray[np.int32], pa.Array]:
    given = [probabilities for probabilities in found if probabilities is not None]
    if not given:
        nothing = pa.nulls(num_rows, SCHEMA.field("probabilities").type)
        return np.full(num_rows, -1, np.int32), nothing
    probabilities_NK = np.concatenate(given).astype(np.float32, copy=False)
    lists = _lists(probabilities_NK, np.ones(num_rows, np.bool_))
    return probabilities_NK.argmax(axis=1).astype(np.int32), lists


def _pictures(
    answers: Answers, request: npt.NDArray[np.intp], shares: Shares
) -> tuple[pa.Array, pa.Array]:
    """Return the columns of images and features; `request` tells whose each row is."""
    drawn = _draw(answers.request_ids, shares)
    is_there = np.array([images is not None for images in answers.images], np.bool_)
    has_image = is_there & (drawn < shares.images)
    has_features = is_there & (drawn < shares.features)
    used = has_image | has_features
    given = [
        images
        for images, is_used in zip(answers.images, used, strict=True)
        if is_used and images is not None
    ]
    if not given:
        return tuple(pa.nulls(len(request), SCHEMA.field(name).type) for name in _PICTURES)
    images_MHWC = np.concatenate(given)
    used, has_image, has_features = used[request], has_image[request], has_features[request]
    return (
        _binaries(_where(images_MHWC, has_image[used]), has_image),
        _lists(features(_where(images_MHWC, has_features[used])), has_features),
    )


_PICTURES = ("image", "features")


def _draw(request_ids: list[str], shares: Shares) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each request: the same in every gateway, by the id alone."""
    if min(shares.images, shares.features) >= 1:
        return np.zeros(len(request_ids))
    hashes = [zlib.crc32(request_id.encode()) for request_id in request_ids]
    return np.array(hashes, np.float64) / 2**32


def _where(images_MHWC: Images, chosen: Mask) -> Images:
    return images_MHWC if chosen.all() else images_MHWC[chosen]


def _offsets(is_there: Mask, width: int) -> npt.NDArray[np.int32]:
    offsets = np.zeros(len(is_there) + 1, np.int32)
    np.cumsum(is_there * width, out=offsets[1:])
    return offsets


def _lists(values_MK: npt.NDArray[np.float32], is_there: Mask) -> pa.Array:
    """Return M lists of K numbers at the N rows where there is one."""
    offsets = pa.array(_offsets(is_there, values_MK.shape[1]))
    mask = None if is_there.all() else pa.array(~is_there)
    return pa.ListArray.from_arrays(offsets, pa.array(values_MK.ravel()), mask=mask)


def _binaries(images_MHWC: Images, is_there: Mask) -> pa.Array:
    """Return the bytes of M images at the N rows where there is one."""
    offsets = _offsets(is_there, int(np.prod(images_MHWC.shape[1:])))
    is_valid = np.packbits(is_there, bitorder="little")
    buffers = [pa.py_buffer(part) for part in (is_valid, offsets, images_MHWC.ravel())]
    return pa.Array.from_buffers(pa.binary(), len(is_there), buffers)
