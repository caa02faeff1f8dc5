"""Erase a caller's requests: from the prediction log, the labels and the data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config import Settings
from lib.data.erase import erase_rows, find_rows
from lib.data.manifest import FORMAT_VERSIONS
from lib.data.shards import row_ids
from lib.errors import DataError, RefusedError
from lib.registry.deletion import unfinished, versions_of
from lib.storage import Storage
from lib.watch import predictions

_ROW_ID = re.compile("[0-9a-f]{32}")


def erase(
    settings: Settings, storage: Storage, ids: Sequence[str], *, remove: bool
) -> dict[str, Any]:
    """Erase requests and rows by their ids, and return what that touched and what it could not.

    An id of 32 hex digits names a request or a row, whichever there is. A row goes from data sets
    with all requests that asked about its image. Without `remove` it is only said what would go.

    Raises: RefusedError while a sweep or retrain reads one of the data sets, DataError if nothing
    has one of the ids, or (with exit code `HELD`) for a request of the last minutes.
    """
    given = {bytes.fromhex(found) for found in ids if _ROW_ID.fullmatch(found)}

    def hashes(image: bytes) -> set[bytes]:
        pixels = np.frombuffer(image, np.uint8)[None]
        return {row_ids(pixels, version).tobytes() for version in FORMAT_VERSIONS}

    def is_image(image: bytes) -> bool:
        return not given.isdisjoint(hashes(image))

    logged = predictions.erase(storage, ids, is_image if given else lambda _: False, remove=False)
    rows = given.union(*(hashes(image) for image in logged.images))
    hits = find_rows(storage, rows)
    digests = {manifest.digest for manifest in hits.manifests}
    if not (logged.rows or logged.labels or digests):
        raise DataError(
            f"no request, label or row has the id {', '.join(ids)}; of a request whose log has "
            "expired, give the id of its row"
        )
    if running := unfinished(storage, digests):
        raise RefusedError(
            f"nothing was erased; these read the data sets: {'; '.join(running)}. Run the same "
            "command again when they have ended"
        )
    versions = versions_of(settings, digests)
    replaced: dict[str, str] = {}
    if remove:
        # The log goes last: from its images the rows are found again, should this be interrupted.
        replaced = erase_rows(storage, hits)
        predictions.erase(storage, ids, is_image if given else lambda _: False, remove=True)
    return {
        "ids": list(ids),
        "log_rows": dict(logged.rows),
        "labels": dict(logged.labels),
        "sets": [
            {
                "digest": manifest.digest,
                "rows": hits.rows(manifest),
                "new": replaced.get(manifest.digest),
            }
            for manifest in hits.manifests
        ],
        "not_erased": [
            *(f"version {version} was trained with it" for version in versions),
            *(
                f"{source}, a source of {manifest.digest[:12]}: ingest may bring the row back"
                for manifest in hits.manifests
                if any(s.path in hits.kept and s.path not in manifest.live_shards
                       and s.split != "live" for s in manifest.shards)
                for source in [manifest.source]
            ),
            "backups, and earlier versions of objects that a store keeps",
            "pictures and reports that show it: of sweeps in MLflow, of --pictures, jobs.report",
            *(
                ["features and answers of samples, in the folder of a version that is served"]
                if versions
                else []
            ),
        ],
        "erased": remove,
    }  # fmt: skip
