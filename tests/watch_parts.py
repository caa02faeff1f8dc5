"""A model that answers at once, a log in memory, and drifted digits, for the tests of watching."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from scipy import ndimage

from lib.data.manifest import Manifest, Preprocess, manifest_path
from lib.data.shards import row_ids, store_shard, to_parquet
from lib.errors import StorageError
from lib.serving import policy
from lib.serving.bundle import Card, write_bundle
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import predictions
from lib.watch.features import features
from lib.watch.monitor import Monitor, Options
from lib.watch.reference import load_reference
from tests.data_sources import mnist

Images = npt.NDArray[np.uint8]

COLUMNS = (
    "time_us",
    "request_id",
    "index",
    "version",
    "shadow",
    "predicted",
    "probabilities",
    "features",
)
"""What a monitor reads of the prediction log."""
SCHEMA = pa.schema([predictions.SCHEMA.field(name) for name in COLUMNS])


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
        bundles: Mapping[int, str] | None = None,
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
        bundles: Mapping[int, str] | None = None,
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


@dataclass
class FakeInterrupted:
    """What was killed and waits to go on."""

    names: list[str] = field(default_factory=list)
    asked: int = 0

    def go_on(self) -> str | None:
        self.asked += 1
        return self.names.pop() if self.names else None


@functools.cache
def linear_model() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weights and bias of a model that needs no training: least squares on 8,000 digits."""
    images, labels = digits("train")
    pixels = np.hstack([images[:8000].reshape(8000, -1) / 255, np.ones((8000, 1))])
    squares = pixels.T @ pixels + 10 * np.eye(pixels.shape[1])
    solved = 8 * np.linalg.solve(squares, pixels.T @ np.eye(10)[labels[:8000]])
    return (solved[:-1] / 255).astype(np.float32), solved[-1].astype(np.float32)


def predict(images_NHWC: Images) -> npt.NDArray[np.float32]:
    weights, bias = linear_model()
    scores = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32) @ weights + bias
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def onnx_model() -> bytes:
    """The same model as a file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights, bias = linear_model()
    constants = {"shape": np.array([-1, 784], np.int64), "weights": weights, "bias": bias}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 28, 28, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_set(storage: Storage, splits: Mapping[str, slice], *, shard_rows: int = 2000) -> Manifest:
    """Publish some training digits as a data set, without Ray."""
    images, labels = digits("train")
    shards, counts = [], {}
    for split, rows in splits.items():
        mine, its = images[rows], labels[rows]
        counts[split] = tuple(int(count) for count in np.bincount(its, minlength=10))
        for start in range(0, len(mine), shard_rows):
            part = mine[start : start + shard_rows]
            content = to_parquet(part, its[start : start + shard_rows], row_ids(part))
            shards.append(store_shard(storage, split, len(part), content))
    manifest = Manifest(
        digest=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:32],
        source="mnist",
        source_digests={},
        height=28,
        width=28,
        channels=1,
        class_names=tuple("0123456789"),
        counts=counts,
        split_digests={},
        pixel_mean=(0.13,),
        pixel_std=(0.31,),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=tuple(shards),
        seed=0,
    )
    storage.write_json(manifest_path(manifest.digest), manifest.to_json())
    return manifest


def write_version(
    storage: Storage, manifest: Manifest, version: int, *, test_accuracy: float = 0.85
) -> str:
    """Publish the linear model as a version; return its bundle."""
    card = Card(
        name="digits",
        version=version,
        run_id=f"{version:08x}",
        data_digest=manifest.digest,
        height=28,
        width=28,
        channels=1,
        class_names=manifest.class_names,
        preprocess=manifest.preprocess,
        runtime="onnxruntime",
        git_commit=None,
        test_accuracy=test_accuracy,
    )
    return write_bundle(storage, card, onnx_model(), None)


def serve(storage: Storage, bundles: Mapping[int, str], *, champion: int, **traffic: Any) -> None:
    """Commit a traffic policy."""
    model = ModelTraffic(
        weights={champion: 100.0, **traffic.pop("weights", {})},
        bundles=dict(bundles),
        champion=champion,
        **traffic,
    )
    policy.commit(
        storage,
        policy.current(storage),
        {"digits": model},
        default_model="digits",
        who="test",
        why="test",
    )


NOW = 1_700_000_000.0
WATCHED_SPLITS = {"train": slice(8000, 14_000), "val": slice(14_000, 16_000)}


@dataclass
class Line:
    storage: Storage
    manifest: Manifest
    bundles: dict[int, str]
    log: FakeLog
    retrains: FakeRetrains
    interrupted: FakeInterrupted = field(default_factory=FakeInterrupted)
    now_s: float = NOW

    def monitor(self, *, acts: bool = False, **options: Any) -> Monitor:
        return Monitor(
            storage=self.storage,
            model="digits",
            log=self.log,
            retrains=self.retrains,
            interrupted=self.interrupted,
            acts=acts,
            options=Options(**options),
            clock=lambda: self.now_s,
        )

    def ask(
        self, images_NHWC: Images, *, version: int = 1, shadow: bool = False, **more: Any
    ) -> Any:
        """Log some requests, a look's worth of time later."""
        return self.log.add(
            images_NHWC,
            predict(images_NHWC),
            from_s=self.now_s,
            version=version,
            shadow=shadow,
            **more,
        )

    def later(self, seconds: float = 60.0) -> None:
        self.now_s += seconds

    def history(self) -> list[str]:
        return self.storage.list("watch/digits/history")


def prepare(root: Path) -> tuple[Manifest, dict[int, str]]:
    """Write a data set, two versions of a model, and what they are compared with."""
    storage = Storage(str(root))
    manifest = write_set(storage, WATCHED_SPLITS)
    bundles = {version: write_version(storage, manifest, version) for version in (1, 2)}
    load_reference(storage, bundles, 1)
    return manifest, bundles


def usual(seed: int, num: int) -> Images:
    images = digits("test")[0]
    return images[np.random.default_rng(seed).permutation(len(images))[:num]]
