"""Models that no sweep of Rayline trained: fetched, understood, and made into an ONNX bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.onnx
import numpy as np
import numpy.typing as npt
import onnx
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from onnx import ModelProto

from lib.cli import progress
from lib.config import Settings
from lib.data.loader import Split
from lib.data.manifest import Manifest
from lib.errors import RefusedError, RegistryError
from lib.registry.adapter import (
    Intake,
    Outlet,
    adapt,
    column_order,
    declared_classes,
    match_graph,
    read_signature,
)
from lib.registry.convert import Converted, convert
from lib.registry.export import Exported
from lib.registry.models import Origin
from lib.registry.server import download
from lib.registry.session import Session, one_line
from lib.serving.predictor import OnnxPredictor
from lib.train.exported import quiet

_PROBE_IMAGES = 128
_CHOICE_IMAGES = 2000
"""Validation images on which the scale of the pixels is found."""
_DIVISORS = (255.0, 1.0)
_ROUNDING = 0.01
"""By how much a sum of probabilities may miss one: some models compute in half precision."""
_MAX_DISAGREEING = 0.01
"""Share of the probe that may get another label by conversion: rounding at the edge of two."""
_MISORDERED = 0.3
"""Accuracy that another order of the columns must gain before it is held to be the mistake."""
_NO_MODEL = ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt")
_NO_MODEL_STARTS = ("registered_model_meta", "input_example", "serving_input")


@dataclass(frozen=True, kw_only=True, slots=True)
class External:
    """A model as its owner logged it, on this disk."""

    uri: str
    folder: Path
    description: Model
    sha256: str
    """Over the files that make it, whatever MLflow wrote beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Understood:
    """What serves it."""

    onnx: ModelProto
    framework: str
    val_accuracy: float
    max_difference: float
    """Of a probability, between the owner's model and what will be served."""


@contextmanager
def fetched(settings: Settings, uri: str) -> Iterator[External]:
    """Yield a local copy of an MLflow model; raise RegistryError if there is none at the URI."""
    local = Path(uri).expanduser()
    if not uri.startswith(("runs:/", "models:/")) and not local.is_dir():
        raise RegistryError(
            f"--uri {uri}: give runs:/RUN_ID/NAME, models:/NAME/VERSION or the folder of an "
            "MLflow model"
        )
    with tempfile.TemporaryDirectory(prefix="rayline-external-") as place:
        folder = local if local.is_dir() else download(settings, uri, Path(place))
        if not (folder / "MLmodel").is_file():
            raise RegistryError(f"{uri} is no MLflow model: it has no file MLmodel")
        try:
            description = Model.load(str(folder))
        except MlflowException as error:
            raise RegistryError(f"the MLmodel file of {uri} can't be read: {error}") from error
        yield External(
            uri=uri, folder=folder, description=description, sha256=_content_digest(folder)
        )


def understand(
    external: External, manifest: Manifest, val: Split, *, trust_code: bool
) -> Understood:
    """Convert a model to ONNX where it is none, and put the graph around it that serving needs.

    Raises RefusedError with the reason and what its owner can do.
    """
    intake = _signed(external, manifest)
    probe_NHWC = val.images_NHWC[:_PROBE_IMAGES]
    model, converted, framework = _as_onnx(external, intake, probe_NHWC, trust_code)
    intake = match_graph(model, intake, manifest.shape)
    session = Session(model)
    labels = converted.classes if converted else None
    labels = labels or declared_classes(model, manifest.num_classes)
    outlet = Outlet(
        name=session.scores_name(intake.prepare(probe_NHWC[:3]), manifest.num_classes),
        softmax=False,
        order=column_order(labels, manifest.class_names) if labels else None,
    )
    session.check_speed(intake.prepare(probe_NHWC[:1]))
    difference = 0.0
    if converted:
        ours = session.run(intake.prepare(probe_NHWC), outlet.name)
        difference = _difference(ours, converted.scores, "conversion to ONNX")
    adapted, intake, outlet, accuracy = _best_scale(session, model, intake, outlet, manifest, val)
    expected = outlet.finish(session.run(intake.prepare(probe_NHWC), outlet.name))
    around = _difference(_predictions(adapted, probe_NHWC), expected, "the graph around the model")
    return Understood(
        onnx=adapted,
        framework=framework,
        val_accuracy=accuracy,
        max_difference=max(difference, around),
    )


def save(
    understood: Understood, external: External, manifest: Manifest, owner: str | None, folder: Path
) -> Exported:
    """Write MLflow's model folder, which MLflow alone can load."""
    with quiet():
        mlflow.onnx.save_model(
            understood.onnx,
            str(folder),
            mlflow_model=Model(),
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *manifest.shape))]),
                outputs=Schema(
                    [TensorSpec(np.dtype(np.float32), (-1, manifest.num_classes), "probabilities")]
                ),
            ),
            pip_requirements=[
                f"{name}=={version(name)}" for name in ("mlflow", "onnx", "onnxruntime", "numpy")
            ],
            metadata={"class_names": list(manifest.class_names)},
            save_as_external_data=False,
        )
    return Exported(
        folder=folder,
        origin=Origin(
            uri=external.uri,
            sha256=external.sha256,
            framework=understood.framework,
            owner=owner,
            max_difference=understood.max_difference,
        ),
    )


def _signed(external: External, manifest: Manifest) -> Intake:
    signature = external.description.signature
    inputs = signature.inputs.inputs if signature else []
    if len(inputs) != 1 or not isinstance(inputs[0], TensorSpec):
        raise RefusedError(
            f"{external.uri} has no signature with one tensor of images; log it with "
            "signature=infer_signature(images, probabilities), both numpy arrays"
        )
    return read_signature(inputs[0].shape, inputs[0].type, manifest.shape)


def _as_onnx(
    external: External, intake: Intake, probe_NHWC: npt.NDArray[np.uint8], trust_code: bool
) -> tuple[ModelProto, Converted | None, str]:
    """Return the graph, what converting told, and the framework."""
    flavors = external.description.flavors
    if "onnx" in flavors:
        file = external.folder / flavors["onnx"]["data"]
        try:
            model = onnx.load(file)
            onnx.checker.check_model(model)
        except Exception as error:
            raise RefusedError(f"{file.name} is no valid ONNX model: {one_line(error)}") from error
        return model, None, f"onnx ({model.producer_name or 'producer unknown'})"
    if "pytorch" in flavors and (external.folder / "data" / "model.pt2").is_file():
        flavor, pickled = "pytorch", False
    elif "sklearn" in flavors:
        flavor, pickled = "sklearn", True
    else:
        raise RefusedError(
            f"{external.uri} has the flavours {', '.join(flavors)}; Rayline takes onnx, pytorch "
            "with serialization_format='pt2', and sklearn: export it to ONNX, log that with "
            "mlflow.onnx"
        )
    if pickled and not trust_code:
        raise RefusedError(
            f"{external.uri} is a pickle, which runs its code when it is loaded; convert it with "
            "skl2onnx (zipmap off) and log that with mlflow.onnx, or, if you trust its owner as "
            "you trust yourself, add --trust-code"
        )
    progress("register", f"converting the {flavor} model to ONNX in a process of its own")
    probe = intake.prepare(probe_NHWC)
    if pickled:
        probe = probe.astype(np.float32)
        if intake.layout != "flat":
            raise RefusedError("a scikit-learn model must take flat images, (-1, pixels)")
    converted = convert(flavor, external.folder, probe, trust_code=trust_code and pickled)
    return onnx.load_from_string(converted.onnx), converted, converted.framework


def _best_scale(
    session: Session,
    model: ModelProto,
    intake: Intake,
    outlet: Outlet,
    manifest: Manifest,
    val: Split,
) -> tuple[ModelProto, Intake, Outlet, float]:
    """Return the graph with the scale of pixels at which the model knows validation images best.

    No signature says whether floats are pixels of 0–1 or of 0–255; the images do.
    """
    images, labels = val.images_NHWC[:_CHOICE_IMAGES], val.labels_N[:_CHOICE_IMAGES]
    tried = []
    for divisor in (1.0,) if intake.dtype == np.uint8 else _DIVISORS:
        scaled = replace(intake, divisor=divisor)
        scores = session.run(scaled.prepare(images), outlet.name)
        sums = scores.astype(np.float64).sum(axis=1)
        # Written so that not-a-number counts as scores, not as probabilities.
        is_probability = scores.min() >= 0 and np.abs(sums - 1).max() <= _ROUNDING
        finished = replace(outlet, softmax=not is_probability)
        tried.append((_log_loss(finished.finish(scores), labels), scaled, finished, scores))
    # By the loss: the label of an image often stays the same at a wrong scale, its probability not.
    _, scaled, finished, scores = min(tried, key=lambda found: found[0])
    if len(tried) > 1:
        said = ", ".join(f"{loss:.3f} from 0–{255 / way.divisor:.0f}" for loss, way, _, _ in tried)
        progress("register", f"pixels as floats: loss on validation {said}")
    probabilities = finished.finish(scores)
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    _check_order(probabilities, labels, accuracy, manifest)
    adapted = adapt(model, scaled, finished, manifest.shape, manifest.num_classes)
    return adapted, scaled, finished, accuracy


def _log_loss(probabilities_NK: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64]) -> float:
    right = probabilities_NK[np.arange(len(labels_N)), labels_N]
    loss = float(-np.log(np.maximum(right, 1e-12)).mean())
    return loss if np.isfinite(loss) else float("inf")


def _check_order(
    probabilities_NK: npt.NDArray[np.float32],
    labels_N: npt.NDArray[np.int64],
    accuracy: float,
    manifest: Manifest,
) -> None:
    """Raise RefusedError if the model knows the classes, but in another order."""
    num_classes = manifest.num_classes
    answers = probabilities_NK.argmax(axis=1)
    pairs = np.bincount(answers * num_classes + labels_N, minlength=num_classes**2)
    meant = pairs.reshape(num_classes, num_classes).argmax(axis=1)
    ordered = float((meant[answers] == labels_N).mean())
    if sorted(meant) == list(range(num_classes)) and ordered > accuracy + _MISORDERED:
        names = ", ".join(manifest.class_names[index] for index in meant)
        raise RefusedError(
            f"the model's columns are in another order than the data set's classes: they seem to "
            f"be {names} (validation accuracy {ordered:.4f} so, {accuracy:.4f} as they are); "
            f"export it with {', '.join(manifest.class_names)}"
        )


def _predictions(model: ModelProto, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with tempfile.TemporaryDirectory(prefix="rayline-external-") as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        return OnnxPredictor(file).predict(np.ascontiguousarray(images))


def _difference(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], where: str) -> float:
    """Return the largest difference; raise RefusedError if the labels are not the same."""
    if ours.shape != theirs.shape:
        raise RefusedError(f"{where} changed the scores' shape: {theirs.shape} → {ours.shape}")
    other = float((ours.argmax(axis=1) != theirs.argmax(axis=1)).mean())
    if other > _MAX_DISAGREEING:
        raise RefusedError(f"{where} changed the labels of {other:.1%} of {len(ours)} images")
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def _content_digest(folder: Path) -> str:
    digest = sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.name not in _NO_MODEL and not file.name.startswith(_NO_MODEL_STARTS):
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
