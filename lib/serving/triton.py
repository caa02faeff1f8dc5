"""Triton's extensions of the Open Inference Protocol: repository index, configuration, statistics.

Field names are those of Triton's HTTP API, which its gRPC messages share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.serving.bundle import Card
from lib.serving.oip import INPUT, OUTPUT, platform
from lib.serving.payload import MAX_BATCH
from lib.serving.record import Record

_NOT_MEASURED = {"count": 0, "ns": 0}


def repository_index(versions: Mapping[tuple[str, int], bool]) -> list[dict[str, str]]:
    """Return the index of the models that are served.

    Args:
        versions: Whether it is up, by model and version.
    """
    return [
        {
            "name": name,
            "version": str(version),
            "state": "READY" if is_up else "UNAVAILABLE",
            "reason": "" if is_up else "it has no replica that answers now",
        }
        for (name, version), is_up in sorted(versions.items())
    ]


def model_config(card: Card, versions: list[int]) -> dict[str, Any]:
    """Return the configuration of a model; dimensions are without that of the batch."""
    return {
        "name": card.name,
        "platform": platform(card),
        "backend": platform(card).partition("_")[0],
        "version_policy": {"specific": {"versions": versions}},
        "max_batch_size": MAX_BATCH,
        "input": [
            {
                "name": INPUT,
                "data_type": "TYPE_UINT8",
                "format": "FORMAT_NHWC",
                "dims": list(card.shape),
            }
        ],
        "output": [
            {"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(card.class_names)]},
        ],
    }


def model_statistics(
    name: str, version: int, record: Record, last_ms: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """Return what one gateway has counted for a version since it started.

    Batches join requests of several callers and are not told apart, so an execution is a request;
    of its time, only the sum is measured.

    Args:
        name: Of the model.
        version: Of the model.
        record: All that the gateway has counted.
        last_ms: When a version was last counted, in milliseconds since 1970.
    """
    key = (name, str(version))
    counts = {True: 0, False: 0}
    for (model, number, _, status), count in record.requests.items():
        if (model, number) == key:
            counts[status == 200] += count
    _, (seconds, failed_s, num_images) = record.latency.get(key, ([], [0.0, 0.0, 0]))
    nanoseconds = {True: int((seconds - failed_s) * 1e9), False: int(failed_s * 1e9)}
    return {
        "name": name,
        "version": str(version),
        "last_inference": last_ms.get(key, 0),
        "inference_count": int(num_images),
        "execution_count": counts[True],
        "inference_stats": {
            "success": {"count": counts[True], "ns": nanoseconds[True]},
            "fail": {"count": counts[False], "ns": nanoseconds[False]},
            **dict.fromkeys(
                (
                    "queue",
                    "compute_input",
                    "compute_infer",
                    "compute_output",
                    "cache_hit",
                    "cache_miss",
                ),
                _NOT_MEASURED,
            ),
        },
        "batch_stats": [],
    }
