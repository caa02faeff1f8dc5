"""Peer: BentoML, one worker. It takes JSON, so the pixels come in base64.

BENCH_MODEL=MODEL.onnx BENCH_SHAPE=28,28,1 bentoml serve bentoml_peer:Digits --port PORT
"""

import base64
import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Digits:
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self._shape = tuple(int(side) for side in os.environ["BENCH_SHAPE"].split(","))

    # A coroutine: the thread that BentoML gives to plain functions costs more than the answer.
    @bentoml.api
    async def predict(self, image: str) -> dict:
        images_NHWC = np.frombuffer(base64.b64decode(image), np.uint8).reshape(1, *self._shape)
        probabilities = self._session.run(None, {"images": images_NHWC})[0][0]
        return {
            "label": str(int(probabilities.argmax())),
            "probabilities": probabilities.tolist(),
            "model_version": 1,
        }
