"""Peer: LitServe, one worker, batches of up to 64. It takes JSON, so the pixels come in base64.

python litserve_peer.py MODEL.onnx HEIGHT WIDTH CHANNELS PORT
"""

import base64
import sys

import litserve
import numpy as np
import onnxruntime
import orjson
from fastapi import Response


class Model(litserve.LitAPI):
    def __init__(self, model_file, shape):
        super().__init__(max_batch_size=64, batch_timeout=0.001)
        self._model_file, self._shape = model_file, shape

    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self._model_file, options, providers=["CPUExecutionProvider"]
        )

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["image"]), np.uint8).reshape(self._shape)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images_NHWC):
        return self._session.run(None, {"images": images_NHWC})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, probabilities):
        answer = {
            "label": str(int(probabilities.argmax())),
            "probabilities": probabilities,
            "model_version": 1,
        }
        content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    *sides, port = (int(number) for number in numbers)
    server = litserve.LitServer(Model(file, tuple(sides)), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
