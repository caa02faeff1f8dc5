from __future__ import annotations

import io
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import Manifest, Preprocess
from lib.errors import DataError
from lib.score import score
from lib.serving.bundle import Card, write_bundle
from lib.serving.payload import decode_picture
from lib.serving.predictor import Predictor, load_predictor
from lib.storage import Storage
from tests.data_sources import idx_files, mnist, write_files

pytestmark = pytest.mark.usefixtures("local_ray")

CARD = Card(
    name="digits",
    version=3,
    run_id="0123456789abcdef",
    data_digest="d" * 32,
    height=28,
    width=28,
    channels=1,
    class_names=tuple(f"digit {label}" for label in range(10)),
    preprocess=Preprocess(mode="L", fill=(0,)),
    runtime="onnxruntime",
    git_commit=None,
    test_accuracy=0.8,
)


class NearestMean(torch.nn.Module):
    """A real classifier without training: the class whose mean image is nearest."""

    means: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        images, labels = mnist("train")
        flat = images[:10_000].reshape(-1, 784) / 255.0
        means = np.stack([flat[labels[:10_000] == label].mean(axis=0) for label in range(10)])
        self.register_buffer("means", torch.from_numpy(means.astype(np.float32)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.float().flatten(1) / 255.0
        return torch.softmax(flat @ self.means.T - self.means.square().sum(1) / 2, dim=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, str, Predictor]:
    storage = Storage(str(tmp_path_factory.mktemp("models")))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            NearestMean().eval(),
            (torch.zeros((2, 28, 28, 1), dtype=torch.uint8),),
            file,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_axes={"images": {0: "N"}, "probabilities": {0: "N"}},
            dynamo=False,
        )
    bundle = write_bundle(storage, CARD, file.getvalue(), b"")
    return storage, bundle, load_predictor(storage, bundle, CARD)


@pytest.fixture
def manifest(tmp_path: Path, storage: Storage) -> Manifest:
    return ingest(storage, str(write_files(tmp_path / "idx", idx_files())))


def _pictures(folder: Path, count: int) -> Path:
    """Real digits as pictures of several sizes, kinds and colour modes, in folders."""
    for row in range(count):
        picture = Image.fromarray(mnist("test")[0][row])
        if row % 3 == 1:
            picture = picture.resize((56 + row % 5, 48))
        if row % 4 == 3:
            picture = picture.convert("RGB")
        path = folder / f"day {row % 2}" / f"{row:05d}.{'jpg' if row % 5 == 4 else 'PNG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "JPEG" if row % 5 == 4 else "PNG")
    return folder


def _parts(output: Path) -> list[Path]:
    return sorted(output.glob("*.parquet"))


def _read(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in _parts(output)])


def test_pictures_are_scored_as_uploads_are(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, predictor = model
    folder = _pictures(tmp_path / "in", 300)
    result = score(storage, bundle, str(folder), str(tmp_path / "out"))
    assert (result.rows, result.errors, result.parts, result.version) == (300, 0, 1, 3)
    table = _read(tmp_path / "out")
    assert table["path"].to_pylist() == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.*")
    )
    bodies = [(folder / path).read_bytes() for path in table["path"].to_pylist()]
    expected = predictor.predict(np.stack([decode_picture(body, CARD) for body in bodies]))
    found = np.array(table["probabilities"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert table["class_index"].to_pylist() == expected.argmax(axis=1).tolist()
    assert table["label"].to_pylist() == [f"digit {i}" for i in expected.argmax(axis=1)]
    assert set(table["model_version"].to_pylist()) == {3}
    truth = [mnist("test")[1][int(Path(path).stem)] for path in table["path"].to_pylist()]
    assert np.mean(np.array(truth) == expected.argmax(axis=1)) > 0.65


def test_shards_of_a_data_set_are_scored_with_their_row_ids(
    tmp_path: Path, storage: Storage, manifest: Manifest, model: tuple[Storage, str, Predictor]
) -> None:
    models, bundle, predictor = model
    (shard,) = [shard for shard in manifest.shards if shard.split == "test"]
    result = score(models, bundle, storage.path(shard.path), str(tmp_path / "out"))
    assert (result.rows, result.errors) == (200, 0)
    table = _read(tmp_path / "out")
    images = read_splits(storage, manifest, ["test"])["test"].images_NHWC
    assert table["class_index"].to_pylist() == predictor.predict(images).argmax(axis=1).tolist()
    ids = pq.read_table(storage.path(shard.path))["row_id"].to_pylist()
    assert table["row_id"].to_pylist() == [row_id.hex() for row_id in ids]


def test_encoded_pictures_in_parquet_are_named_by_row(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, predictor = model
    files = sorted(_pictures(tmp_path / "in", 20).rglob("*.*"))
    bodies = [path.read_bytes() for path in files]
    (tmp_path / "table").mkdir()
    table = pa.table({"image": bodies})
    with pq.ParquetWriter(tmp_path / "table" / "a.parquet", table.schema) as file:
        # A group without rows, as some writers leave one.
        for start, stop in ((0, 8), (8, 8), (8, 16), (16, 20)):
            file.write_table(table.slice(start, stop - start), row_group_size=8)
    assert pq.ParquetFile(tmp_path / "table" / "a.parquet").num_row_groups == 4
    result = score(storage, bundle, str(tmp_path / "table"), str(tmp_path / "out"))
    assert (result.rows, result.parts) == (20, 3)
    table = _read(tmp_path / "out")
    assert table["row_id"].to_pylist() == [str(row) for row in range(20)]
    expected = predictor.predict(np.stack([decode_picture(body, CARD) for body in bodies]))
    assert table["class_index"].to_pylist() == expected.argmax(axis=1).tolist()


def test_an_interrupted_job_goes_on_where_it_stopped(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, _ = model
    images = mnist("test")[0][:100].reshape(-1, 784)
    table = pa.table({"image": pa.array([image.tobytes() for image in images], pa.binary(784))})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=25)
    score(storage, bundle, str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    whole = _read(tmp_path / "out")
    first, second, *_ = _parts(tmp_path / "out")
    second.unlink()
    kept = os.stat(first).st_mtime_ns
    again = score(storage, bundle, str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    assert (again.rows, again.parts, again.parts_reused) == (100, 4, 3)
    assert os.stat(first).st_mtime_ns == kept
    assert _read(tmp_path / "out").equals(whole)


def test_unreadable_images_get_an_error_and_the_others_their_label(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, _ = model
    folder = _pictures(tmp_path / "in", 10)
    (folder / "day 0" / "00002.PNG").write_bytes(
        (folder / "day 0" / "00002.PNG").read_bytes()[:100]
    )
    (folder / "day 1" / "00003.PNG").write_text("hello")
    Image.new("L", (28, 28)).save(folder / "day 1" / "00010.webp")
    (folder / "notes.txt").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.parquet").touch()
    result = score(storage, bundle, str(folder), str(tmp_path / "out"))
    assert (result.rows, result.errors) == (11, 3)
    assert {entry.example: entry.count for entry in result.ignored} == {"notes.txt": 1, ".cache": 1}
    rows = {row["path"]: row for row in _read(tmp_path / "out").to_pylist()}
    for path in ("day 0/00002.PNG", "day 1/00003.PNG", "day 1/00010.webp"):
        assert rows[path]["label"] is rows[path]["probabilities"] is None
        assert rows[path]["class_index"] is None
    assert "whole" in rows["day 0/00002.PNG"]["error"]
    assert "neither a PNG nor a JPEG" in rows["day 1/00003.PNG"]["error"]
    others = [row for row in rows.values() if row["error"] is None]
    assert len(others) == 8
    assert all(row["label"].startswith("digit ") for row in others)


def test_rows_of_another_shape_get_an_error(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, _ = model
    table = pa.table({"image": pa.array([b"x" * 100, None], pa.binary(100))})
    pq.write_table(table, tmp_path / "in.parquet")
    result = score(storage, bundle, str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    assert (result.rows, result.errors) == (2, 2)
    assert _read(tmp_path / "out")["error"].to_pylist() == [
        "100 raw bytes; one image of this model is 784",
        "the image is null",
    ]


def test_an_output_folder_belongs_to_one_input_and_version(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, _ = model
    folder, output = _pictures(tmp_path / "in", 5), str(tmp_path / "out")
    score(storage, bundle, str(folder), output)
    onnx = storage.read(f"{bundle}/model.onnx")
    other = write_bundle(storage, replace(CARD, version=4), onnx, b"")
    with pytest.raises(DataError, match="predictions of another version"):
        score(storage, other, str(folder), output)
    (folder / "more.png").write_bytes((folder / "day 0" / "00000.PNG").read_bytes())
    with pytest.raises(DataError, match="predictions of another files"):
        score(storage, bundle, str(folder), output)
    assert _read(tmp_path / "out").num_rows == 5


def test_nothing_to_score_says_what_can_be_given(
    tmp_path: Path, model: tuple[Storage, str, Predictor]
) -> None:
    storage, bundle, _ = model
    (tmp_path / "in").mkdir()
    for path in ("in", "nowhere"):
        with pytest.raises(DataError, match="nothing to score"):
            score(storage, bundle, str(tmp_path / path), str(tmp_path / "out"))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: needs a column `image`"):
        score(storage, bundle, str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"b\.parquet is no whole Parquet file"):
        score(storage, bundle, str(tmp_path / "b.parquet"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
