"""Turns a model of another framework into ONNX, in a process that knows no secrets.

python -m lib.registry.convert pytorch|sklearn MODEL_FOLDER OUT_FOLDER

What it reads is someone else's: a pickle runs code, and a torch program is built by evaluating its
text. So `convert` starts this module with an almost empty environment, in an empty home, and takes
back nothing but an ONNX file, arrays and JSON. It still runs as the same user of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.errors import RefusedError
from lib.secrets import bare_environment

_DEADLINE_S = 300
_ROOT = Path(__file__).resolve().parents[2]
_OPSET = 18
_PROBE, _ONNX, _SCORES, _ABOUT = "probe.npy", "converted.onnx", "scores.npy", "about.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What comes back."""

    onnx: bytes
    scores: npt.NDArray[Any]
    """Of the probe, computed by the framework itself."""
    framework: str
    classes: list[Any] | None
    """Labels of the columns, where the framework knows them."""


def convert(
    flavor: str, model_folder: Path, probe: npt.NDArray[Any], *, trust_code: bool
) -> Converted:
    """Convert a model in a process of its own; raise RefusedError with its reason if it can't.

    `probe` are images as the model takes them; `trust_code` allows pickles.
    """
    with tempfile.TemporaryDirectory(prefix="rayline-convert-") as place:
        folder = Path(place)
        np.save(folder / _PROBE, probe)
        command = [sys.executable, "-m", "lib.registry.convert", flavor, str(model_folder), place]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={
                    **bare_environment(place, _ROOT),
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": str(trust_code).lower(),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code: int | None = process.wait(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever the model's code has started ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            ended = f"took more than {_DEADLINE_S} s" if code is None else "failed"
            raise RefusedError(
                f"converting the {flavor} model to ONNX {ended}: {said[-1][:600]}; export it to "
                "ONNX where it was trained, log that with mlflow.onnx and register it instead"
            )
        about = json.loads((folder / _ABOUT).read_text())
        return Converted(
            onnx=(folder / _ONNX).read_bytes(),
            scores=np.load(folder / _SCORES, allow_pickle=False),
            framework=str(about["framework"]),
            classes=about["classes"],
        )


def _convert_pytorch(folder: Path, out: Path, probe: npt.NDArray[Any]) -> dict[str, Any]:
    import mlflow.pytorch
    import torch

    # Refuses an archive with a pickle in it, before torch would load that.
    module = mlflow.pytorch.load_model(str(folder))
    with torch.inference_mode():
        scores = module(torch.from_numpy(probe))
    program: Any = torch.onnx.export(
        torch.export.load(folder / "data" / "model.pt2"),
        (),
        dynamo=True,
        opset_version=_OPSET,
        verbose=False,
    )
    program.save(out / _ONNX, external_data=False)
    np.save(out / _SCORES, scores.numpy())
    return {"framework": f"pytorch {torch.__version__}", "classes": None}


def _convert_sklearn(folder: Path, out: Path, probe: npt.NDArray[Any]) -> dict[str, Any]:
    import mlflow.sklearn
    import sklearn
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    model = mlflow.sklearn.load_model(str(folder))
    if not hasattr(model, "classes_"):
        raise TypeError(f"{type(model).__name__} is no classifier that was fitted")
    converted = to_onnx(
        model,
        initial_types=[("pixels", FloatTensorType([None, probe.shape[1]]))],
        options={"zipmap": False},
        target_opset={"": _OPSET, "ai.onnx.ml": 3},
    )
    (out / _ONNX).write_bytes(converted.SerializeToString())
    score = getattr(model, "predict_proba", None) or model.decision_function
    np.save(out / _SCORES, score(probe))
    classes = np.asarray(model.classes_).tolist()
    return {"framework": f"scikit-learn {sklearn.__version__}", "classes": classes}


def main() -> None:
    """Convert; a failure is one line at the end of what is said."""
    flavor, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    probe = np.load(out / _PROBE, allow_pickle=False)
    work = {"pytorch": _convert_pytorch, "sklearn": _convert_sklearn}[flavor]
    try:
        about = work(folder, out, probe)
    # Whatever the frameworks raise over someone else's model is the reason to refuse it.
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        sys.exit(1)
    (out / _ABOUT).write_text(json.dumps(about))


if __name__ == "__main__":
    main()
