"""Models that others trained, registered on a real MLflow server and served beside ours."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import mlflow
import mlflow.onnx
import mlflow.pytorch
import mlflow.sklearn
import numpy as np
import onnx
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LogisticRegression

import jobs.register
from lib.config import Settings
from lib.data.ingest import ingest
from lib.data.loader import Split, read_splits
from lib.data.manifest import Manifest
from lib.errors import RefusedError, RegistryError
from lib.registry.models import Version, ensure_bundle, resolve, versions
from lib.registry.registration import register_external
from lib.registry.reproduce import How, reproduce
from lib.serving.bundle import read_card
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from tests.data_sources import idx_files, write_files

# What MLflow and torch say when owners log models, and when it loads its own modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
    pytest.mark.filterwarnings("ignore:No complete tensor found"),
]
PIXELS = 28 * 28
FLOAT_NCHW = (-1, 1, 28, 28)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A small real data set and a linear model of it, on pixels of 0–1."""

    storage: Storage
    manifest: Manifest
    test: Split
    linear: LogisticRegression

    def probabilities(self) -> Any:
        """What the linear model says of the test images, in numpy."""
        pixels = self.test.images_NHWC.reshape(-1, PIXELS) / 255.0
        scores = pixels @ self.linear.coef_.T + self.linear.intercept_
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("external")
    storage = Storage(str(folder / "storage"))
    manifest = ingest(storage, str(write_files(folder / "source", idx_files(3000, 400))))
    splits = read_splits(storage, manifest, ["train", "test"])
    train = splits["train"]
    linear = LogisticRegression(C=0.2, tol=1e-3, max_iter=1000)
    linear.fit(train.images_NHWC.reshape(-1, PIXELS) / 255.0, train.labels_N)
    return Data(storage=storage, manifest=manifest, test=splits["test"], linear=linear)


@pytest.fixture
def settings(data: Data, mlflow_server: str) -> Settings:
    return Settings(
        storage=data.storage.uri, mlflow_uri=mlflow_server, model=f"theirs-{uuid.uuid4().hex[:8]}"
    )


def graph(weights: Any, bias: Any, *, batch: int | str = "n") -> onnx.ModelProto:
    """Logits of flattened NCHW floats: what a framework's exporter would write."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"], transB=1),
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(weights, np.float32), "weights"),
        numpy_helper.from_array(np.asarray(bias, np.float32), "bias"),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "linear",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 28, 28])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(bias)])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="their-framework",
    )


def signature(shape: Sequence[int] = FLOAT_NCHW, dtype: Any = np.float32) -> ModelSignature:
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(dtype), tuple(shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
    )


def saved(folder: Path, model: onnx.ModelProto, signed: ModelSignature | None) -> str:
    mlflow.onnx.save_model(
        model, str(folder), signature=signed, pip_requirements=[], save_as_external_data=False
    )
    return str(folder)


def served(data: Data, version: Version) -> Any:
    card = read_card(data.storage, version.bundle)
    assert card.version == version.version
    return load_predictor(data.storage, version.bundle, card).predict(data.test.images_NHWC)


def take(settings: Settings, data: Data, uri: str, **how: bool) -> Version:
    return register_external(settings, data.storage, data.manifest, uri, **how)


def test_an_onnx_model_of_a_run_is_registered_once_and_served(
    data: Data, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(settings.mlflow_uri)
    experiment = client.create_experiment(f"theirs-{uuid.uuid4().hex}")
    run = client.create_run(experiment, tags={"mlflow.user": "grace"}).info.run_id
    folder = tmp_path / "model"
    mlflow.onnx.save_model(
        graph(data.linear.coef_, data.linear.intercept_),
        str(folder),
        mlflow_model=mlflow.models.Model(run_id=run),
        signature=signature(),
        pip_requirements=[],
    )
    client.log_artifacts(run, str(folder), "model")
    uri = f"runs:/{run}/model"

    version = take(settings, data, uri)

    assert (version.version, version.aliases, version.ready) == (1, ("champion",), True)
    assert (version.owner, version.origin_uri) == ("grace", uri)
    assert version.framework == "onnx (their-framework)"
    assert version.data_digest == data.manifest.digest
    probabilities = served(data, version)
    assert np.allclose(probabilities, data.probabilities(), atol=1e-4)
    hits = probabilities.argmax(axis=1) == data.test.labels_N
    assert version.test_accuracy == pytest.approx(hits.mean())
    assert version.runtime == "onnxruntime"
    assert set(version.images_per_s) == {"onnxruntime"}
    assert {path.rsplit("/", 1)[1] for path in data.storage.list(version.bundle)} == {
        "model.onnx",
        "card.json",
    }

    # The same model again, from another place and through the job.
    monkeypatch.setenv("RAYLINE_STORAGE", settings.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
    monkeypatch.setenv("RAYLINE_MODEL", settings.model)
    arguments = ["--uri", str(folder), "--data", data.manifest.digest]
    monkeypatch.setattr(sys, "argv", ["register", *arguments])
    with pytest.raises(SystemExit) as ended:
        jobs.register.main()
    assert ended.value.code == 0
    assert versions(settings) == [version]

    # MLflow alone loads it, and what serving lost comes back from there.
    alone = mlflow.pyfunc.load_model(f"models:/{settings.model}/1").predict(data.test.images_NHWC)
    assert np.array_equal(alone["probabilities"], probabilities)
    for path in data.storage.list(version.bundle):
        data.storage.delete(path)
    ensure_bundle(settings, data.storage, resolve(settings, settings.model, "champion"))
    assert np.array_equal(served(data, version), probabilities)
    with pytest.raises(RefusedError, match="ask grace"):
        reproduce(settings, data.storage, version, root=tmp_path, how=How())


def test_a_pt2_model_is_converted_and_pixels_of_0_to_255_are_found_out(
    data: Data, settings: Settings, tmp_path: Path
) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, 10), torch.nn.Softmax(1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor(data.linear.coef_ / 255.0))
        net[1].bias.copy_(torch.tensor(data.linear.intercept_))
    example = np.zeros((2, 1, 28, 28), np.float32)
    mlflow.pytorch.save_model(
        net.eval(),
        str(tmp_path / "model"),
        signature=signature(),
        input_example=example,
        serialization_format="pt2",
        pip_requirements=[],
    )

    version = take(settings, data, str(tmp_path / "model"))

    assert version.framework == f"pytorch {torch.__version__}"
    assert np.allclose(served(data, version), data.probabilities(), atol=1e-4)
    assert version.onnx_max_difference < 1e-4


class Spy:
    """A pickle that writes down what it can see, then becomes the model that it carries."""

    def __init__(self, model: Any, file: Path) -> None:
        self.model, self.file = model, file

    def __reduce__(self) -> tuple[Any, ...]:
        def look(model: Any, file: str) -> Any:
            import json
            import os

            with open(file, "w") as stream:
                json.dump(dict(os.environ), stream)
            return model

        return (look, (self.model, str(self.file)))


def test_a_pickle_runs_only_when_trusted_and_then_sees_no_secret(
    data: Data, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    images = data.test.images_NHWC.reshape(-1, PIXELS) / 255.0
    mlflow.sklearn.save_model(
        data.linear,
        str(tmp_path / "model"),
        serialization_format="cloudpickle",
        signature=infer_signature(images, data.linear.predict_proba(images)),
        pip_requirements=[],
    )
    seen = tmp_path / "environment.json"
    (tmp_path / "model" / "model.pkl").write_bytes(cloudpickle.dumps(Spy(data.linear, seen)))
    uri = str(tmp_path / "model")

    with pytest.raises(RefusedError, match=r"is a pickle.*skl2onnx.*--trust-code"):
        take(settings, data, uri)
    assert not seen.exists()
    assert versions(settings) == []

    version = take(settings, data, uri, trust_code=True)

    assert version.framework.startswith("scikit-learn ")
    assert np.allclose(served(data, version), data.probabilities(), atol=1e-4)
    environment = json.loads(seen.read_text())
    assert "secret" not in environment.values()
    assert not [name for name in environment if "TOKEN" in name or name.startswith("RAY")]
    assert Path(environment["HOME"]) != Path.home()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no signature", "no signature"),
        ("other shape", r"\(-1, 32, 32\).*must be one of .*\(-1, 784\)"),
        ("fixed batch", "batches of exactly 4"),
        ("nine classes", r"one output of shape \(3, 10\).*logits \(3, 9\)"),
        ("other order", "in another order .* 1, 2, 3, 4, 5, 6, 7, 8, 9, 0 "),
        ("random weights", "far below that of logistic regression"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    data: Data, settings: Settings, tmp_path: Path, fault: str, reason: str
) -> None:
    weights, bias, signed = data.linear.coef_, data.linear.intercept_, signature()
    batch: int | str = "n"
    if fault == "no signature":
        signed = None
    elif fault == "other shape":
        signed = signature((-1, 32, 32))
    elif fault == "fixed batch":
        batch = 4
    elif fault == "nine classes":
        weights, bias = weights[:9], bias[:9]
    elif fault == "other order":
        weights, bias = np.roll(weights, -1, axis=0), np.roll(bias, -1)
    else:
        weights = np.random.default_rng(0).normal(size=weights.shape)
    uri = saved(tmp_path / "model", graph(weights, bias, batch=batch), signed)

    with pytest.raises(RefusedError, match=reason):
        take(settings, data, uri)

    assert versions(settings) == []
    client = MlflowClient(settings.mlflow_uri)
    experiment = client.get_experiment_by_name(f"rayline/{settings.model}")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags["rayline.refused"]
    assert client.search_logged_models([experiment.experiment_id]) == []


def test_what_is_no_model_of_a_known_kind_is_said(
    data: Data, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match="give runs:/RUN_ID"):
        take(settings, data, "s3://bucket/model")
    with pytest.raises(RegistryError, match="no MLflow model"):
        take(settings, data, str(tmp_path))
    uri = saved(tmp_path / "model", graph(data.linear.coef_, data.linear.intercept_), signature())
    description = Path(uri) / "MLmodel"
    description.write_text(description.read_text().replace("  onnx:\n", "  catboost:\n"))
    with pytest.raises(RefusedError, match="the flavours .*catboost.*Rayline takes onnx"):
        take(settings, data, uri)
