"""One model version as a Serve application of its own, called by the gateway alone."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import ray
from ray import serve
from ray.serve import Application

from lib.device import granted_device
from lib.secrets import PRIVATE_DIR_VARIABLE
from lib.serving.bundle import read_card
from lib.serving.channel import channel_folder, serve_channel
from lib.serving.plan import version_application
from lib.serving.predictor import load_predictor
from lib.storage import Storage
from serve_apps import logs
from serve_apps.scaling import BUSY, CALLS, BusyMeter


class Version:
    """A replica of a version: loads the bundle, answers batches."""

    async def __init__(self, storage: str, bundle: str) -> None:  # type: ignore[misc]
        logs.start_for_replica()
        opened = Storage(storage)
        card = read_card(opened, bundle)
        self._predictor = load_predictor(opened, bundle, card, device=granted_device())
        self._meter: BusyMeter | None = None
        self._calls = 0
        self._channel = await serve_channel(
            channel_folder(
                ray.get_runtime_context().gcs_address, os.environ.get(PRIVATE_DIR_VARIABLE)
            ),
            version_application(card.name, card.version),
            serve.get_replica_context().replica_id.unique_id,
            self._answer,
            card.shape,
        )

    def __del__(self) -> None:
        """Take the socket away first, when Serve stops the replica: no more calls come then."""
        self._channel.withdraw()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `serve_apps.scaling` goes by, since the last call."""
        calls, self._calls = self._calls, 0
        return {BUSY: self._meter.read() if self._meter else 0.0, CALLS: float(calls)}

    async def predict(self, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return probabilities (N, classes) for uint8 images (N, H, W, C)."""
        return self._answer(images_NHWC)

    def _answer(self, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self._calls += 1
        # Made here: this is the thread that does the work.
        self._meter = self._meter or BusyMeter()
        with self._meter.taken():
            return self._predictor.predict(images_NHWC)


def build(args: dict[str, str]) -> Application:
    """Build a version's application; args: `storage` root and `bundle` path below it."""
    return serve.deployment()(Version).bind(args["storage"], args["bundle"])
