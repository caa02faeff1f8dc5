"""From a checkpoint to a self-contained model: a torch.export program and its ONNX twin.

Neither needs the project's code or a pickle to be loaded: uint8 images in, probabilities out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
import numpy.typing as npt
import onnx
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from lib.data.manifest import Manifest
from lib.data.stream import Batch
from lib.errors import RefusedError, RegistryError
from lib.registry.models import PT2_PATH, Origin
from lib.serving.bundle import ONNX_FILE
from lib.serving.predictor import OnnxPredictor
from lib.train.exported import quiet, write_onnx
from lib.train.model import ConvNet, ModelConfig, Served


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A model in MLflow's layout, in a local folder."""

    folder: Path
    origin: Origin | None = None
    """Of other people's models, which are ONNX alone."""

    @property
    def pt2_file(self) -> Path:
        """The torch.export program, unless it has an origin."""
        return self.folder / PT2_PATH

    @property
    def onnx_file(self) -> Path:
        """Its ONNX twin, or the only file."""
        return self.folder / ONNX_FILE


def load_served(checkpoint_file: Path, manifest: Manifest) -> Served:
    """Rebuild the net of a checkpoint as it will be served, on the CPU.

    Raises RegistryError if the file is damaged or belongs to images of another shape.
    """
    try:
        content = torch.load(checkpoint_file, map_location="cpu", weights_only=True)
        config = ModelConfig(**content["model_config"])
        net = ConvNet(config)
        net.load_state_dict(content["model"])
    # Damage shows as an error of zip, pickle, torch, or the dict's, depending on the byte.
    except Exception as error:
        raise RegistryError(
            f"checkpoint {checkpoint_file.name} can't be loaded ({type(error).__name__}: {error}); "
            "train the trial again"
        ) from error
    shape = (config.height, config.width, config.channels)
    if shape != manifest.shape or config.num_classes != manifest.num_classes:
        raise RegistryError(
            f"the checkpoint is for {config.num_classes} classes of {shape} images, data set "
            f"{manifest.digest[:12]} has {manifest.num_classes} of {manifest.shape}; "
            "register with the data set that the sweep was trained on"
        )
    return Served(net).eval()


def export(
    served: Served,
    example_NHWC: npt.NDArray[np.uint8],
    folder: Path,
    run_id: str,
    class_names: Sequence[str] = (),
) -> Exported:
    """Write MLflow's model folder with the pt2 program, then the ONNX twin of that program.

    The example needs two images or more: a batch of one would be taken for a constant.
    """
    exported = Exported(folder=folder)
    shape = example_NHWC.shape[1:]
    with torch.no_grad():
        num_classes = served(torch.from_numpy(example_NHWC)).shape[1]
    description = Model(run_id=run_id)
    # As mlflow.onnx.save_model writes it: `mlflow.onnx.load_model` loads the same folder.
    description.add_flavor(
        "onnx",
        onnx_version=onnx.__version__,
        data=ONNX_FILE,
        providers=["CPUExecutionProvider"],
        onnx_session_options=None,
        code=None,
    )
    with quiet():
        mlflow.pytorch.save_model(
            served,
            str(folder),
            mlflow_model=description,
            metadata={"class_names": list(class_names)},
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))]),
                outputs=Schema(
                    [TensorSpec(np.dtype(np.float32), (-1, num_classes), "probabilities")]
                ),
            ),
            input_example=example_NHWC,
            serialization_format="pt2",
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch", "numpy")],
        )
        # From the saved program, not from the net: what is served in ONNX is what lies beside it.
        write_onnx(torch.export.load(exported.pt2_file), exported.onnx_file)
    return exported


def check_equal(
    exported: Exported, batches: Iterable[Batch], trial_run_id: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], float]:
    """Run both files over a split; return labels, ONNX's probabilities, the largest difference.

    Raises RefusedError if one image gets two labels: a version must not answer differently
    with the runtime that happens to serve it.
    """
    twin = OnnxPredictor(exported.onnx_file)
    with quiet():
        module = torch.export.load(exported.pt2_file).module()
    labels, probabilities = [], []
    differing, largest = 0, 0.0
    for batch in batches:
        with torch.inference_mode():
            pt2_NK = module(torch.from_numpy(np.array(batch.images_NHWC))).numpy()
        onnx_NK = twin.predict(batch.images_NHWC)
        differing += int((pt2_NK.argmax(axis=1) != onnx_NK.argmax(axis=1)).sum())
        # Unlike `max`, it keeps what is not a number.
        largest = float(np.maximum(largest, np.abs(pt2_NK - onnx_NK).max()))
        labels.append(batch.labels_N)
        probabilities.append(onnx_NK)
    labels_N = np.concatenate(labels)
    # Not a number compares as false everywhere: ask for what must hold.
    if differing or not largest <= 1.0:
        raise RefusedError(
            f"trial {trial_run_id} is refused: its torch and ONNX exports give different labels "
            f"for {differing} of {len(labels_N)} test images (largest difference of a "
            f"probability: {largest:.2g}); register another trial, and report this model"
        )
    return labels_N, np.concatenate(probabilities), largest
