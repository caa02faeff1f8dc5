"""Peer: Ray Serve as its documentation starts: FastAPI ingress, a router, a deployment a version.

Everything is left at Serve's defaults, but for `num_cpus`: three replicas share two cores.
"""

# No postponed annotations: FastAPI must find `Request` in a class that Serve has pickled.
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from lib.serving.predictor import OnnxPredictor

app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Model:
    def __init__(self, model_file: str) -> None:
        self._predictor = OnnxPredictor(Path(model_file))

    async def predict(self, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return self._predictor.predict(images_NHWC)


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(app)
class Router:
    def __init__(self, shape: list[int], weights: list[float], *versions: DeploymentHandle) -> None:
        self._shape, self._weights, self._versions = shape, weights, versions

    @app.post("/predict")
    async def predict(self, request: Request) -> Response:
        images_NHWC = np.frombuffer(await request.body(), np.uint8).reshape(1, *self._shape)
        index = random.choices(range(len(self._versions)), self._weights)[0]
        pinned = request.headers.get("x-model-version")
        if pinned:
            index = int(pinned) - 1
        probabilities = (await self._versions[index].predict.remote(images_NHWC))[0]
        answer = {
            "label": str(int(probabilities.argmax())),
            "probabilities": probabilities,
            "model_version": index + 1,
        }
        return Response(
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )


def build(args: dict[str, Any]) -> Application:
    """Build the application; args: `models` (files), `weights`, `shape`."""
    models = [
        Model.options(name=f"v{index + 1}").bind(file) for index, file in enumerate(args["models"])
    ]
    return Router.bind(args["shape"], args["weights"], *models)
