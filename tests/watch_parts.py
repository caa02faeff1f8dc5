"""A model that answers at once, a log in memory, and drifted digits, for the tests of watching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from scipy import ndimage

from lib.errors import StorageError
from lib.storage import Storage
from lib.watch.features import features
from tests.data_sources import mnist

Images = npt.NDArray[np.uint8]

SCHEMA = pa.schema(
    [
        ("time_us", pa.int64()),
        ("request_id", pa.string()),
        ("index", pa.int32()),
        ("version", pa.int32()),
        ("shadow", pa.bool_()),
        ("predicted", pa.int32()),
        ("probabilities", pa.list_(pa.float32())),
        ("features", pa.list_(pa.float32())),
    ]
)


def digits(split: str) -> tuple[Images, npt.NDArray[np.int64]]:
    images, labels = mnist(split)
    return images[..., None], labels.astype(np.int64)


def inverted(images_NHWC: Images) -> Images:
    return 255 - images_NHWC


def shifted(images_NHWC: Images) -> Images:
    """By three pixels to the right, black comes in from the left."""
    result = np.zeros_like(images_NHWC)
    result[:, :, 3:] = images_NHWC[:, :, :-3]
    return result


def blurred(images_NHWC: Images) -> Images:
    return ndimage.gaussian_filter(images_NHWC, sigma=(0, 1, 1, 0))


def other_digits() -> Images:
    """The 1,797 digits of scikit-learn, 8×8 with 17 greys, scaled to 28×28."""
    from sklearn.datasets import load_digits

    small = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((28, 28))) for image in small]
    return np.stack(large)[..., None]


@dataclass
class FakeLog:
    """What `lib.watch.predictions` is to the monitor."""

    rows: pa.Table = field(default_factory=SCHEMA.empty_table)
    labels: dict[str, int] = field(default_factory=dict)
    is_away: bool = False
    labels_are_away: bool = False

    def add(
        self,
        images_NHWC: Images,
        probabilities_NK: npt.NDArray[np.float32],
        *,
        from_s: float,
        version: int = 1,
        shadow: bool = False,
        step_s: float = 0.01,
        ids: Sequence[str] | None = None,
    ) -> list[str]:
        """Log a request per image; return their ids."""
        num = len(images_NHWC)
        ids = ids or [f"r{self.rows.num_rows + row}" for row in range(num)]
        found = features(images_NHWC)
        table = pa.table(
            {
                "time_us": ((from_s + step_s * np.arange(num)) * 1e6).astype(np.int64),
                "request_id": ids,
                "index": np.zeros(num, np.int32),
                "version": np.full(num, version, np.int32),
                "shadow": np.full(num, shadow),
                "predicted": probabilities_NK.argmax(axis=1).astype(np.int32),
                "probabilities": list(probabilities_NK),
                "features": pa.nulls(num, pa.list_(pa.float32())) if shadow else list(found),
            },
            schema=SCHEMA,
        )
        self.rows = pa.concat_tables([self.rows, table]).sort_by("time_us")
        return list(ids)

    def read(
        self,
        storage: Storage,
        model: str,
        *,
        start_us: int,
        end_us: int,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        if self.is_away:
            raise StorageError("the log is away")
        times = self.rows["time_us"].to_numpy()
        inside = self.rows.filter(pa.array((times >= start_us) & (times < end_us)))
        return inside.select(list(columns)) if columns else inside

    def joined(
        self,
        storage: Storage,
        model: str,
        *,
        start_us: int,
        end_us: int,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        if self.labels_are_away:
            raise StorageError("the labels are away")
        rows = self.read(storage, model, start_us=start_us, end_us=end_us, columns=columns)
        known = [self.labels.get(name) for name in rows["request_id"].to_pylist()]
        return rows.append_column("label", pa.array(known, pa.int32()))

    def read_labels(self, storage: Storage, model: str, *, start_us: int, end_us: int) -> pa.Table:
        if self.labels_are_away:
            raise StorageError("the labels are away")
        return pa.table({"request_id": list(self.labels), "label": list(self.labels.values())})


@dataclass
class FakeRetrains:
    """Retrains that are only written down."""

    clock: Any
    entries: list[Mapping[str, Any]] = field(default_factory=list)

    def start(self, reason: str) -> str:
        self.entries.append({"started": self.clock(), "reason": reason})
        return f"retrain-{len(self.entries)}"

    def history(self) -> list[Mapping[str, Any]]:
        return self.entries
