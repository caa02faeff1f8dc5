"""Peer: FastAPI on uvicorn, one process, one model, no split, no batches.

python -m tests.bench.fastapi_peer MODEL.onnx HEIGHT WIDTH CHANNELS PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from lib.serving.predictor import OnnxPredictor


def build(model_file: Path, shape: tuple[int, ...]) -> FastAPI:
    """Return the app. The model runs inline and the answer skips FastAPI's own encoder: faster."""
    predictor = OnnxPredictor(model_file)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        images_NHWC = np.frombuffer(await request.body(), np.uint8).reshape(1, *shape)
        probabilities = predictor.predict(images_NHWC)[0]
        answer = {
            "label": str(int(probabilities.argmax())),
            "probabilities": probabilities,
            "model_version": 1,
        }
        return Response(
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )

    return app


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    *sides, port = (int(number) for number in numbers)
    uvicorn.run(
        build(Path(file), tuple(sides)),
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        workers=1,
        access_log=False,
        log_level="warning",
    )
