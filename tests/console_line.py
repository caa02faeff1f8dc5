"""A gateway over HTTP without Ray, with stand-ins for models that know digits, for the console."""

from __future__ import annotations

import asyncio
import io
import math
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn

from lib.data.manifest import Manifest, Preprocess, Shard, manifest_path
from lib.serving import policy
from lib.serving.bundle import Card, write_bundle
from lib.serving.router import Images, Probabilities, Replicas, Router
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch.metrics import LATENCY_BUCKETS_S
from lib.watch.overview import rollout_path, watch_path
from lib.watch.stats import BUCKET_S, FOLDER, KEPT_S
from serve_apps.asgi import App
from tests.data_sources import mnist
from tests.unit.serving_parts import app_over, by_brightness, card

DIGITS = tuple("0123456789")
DIGEST = "e" * 32


def digits_card(version: int) -> Card:
    return replace(
        card(version, name="digits"),
        height=28,
        width=28,
        class_names=DIGITS,
        preprocess=Preprocess(mode="L", fill=(0,)),
        data_digest=DIGEST,
        test_accuracy=0.9937 - 0.0042 * (version - 3),
    )


async def make_replicas(made_for: Card, bundle: str, placement: str) -> Replicas:
    """Digits: the nearest mean of MNIST's classes, later versions less sure. Others: brightness."""
    if made_for.class_names != DIGITS:

        async def by_first_pixel(images_NHWC: Images) -> Probabilities:
            return by_brightness(images_NHWC)

        return Replicas(by_first_pixel)
    images, labels = mnist("train")
    means_KP = np.stack([images[:6000][labels[:6000] == k].mean(axis=0).ravel() for k in range(10)])
    sharpness = 0.02 / made_for.version

    async def predict(images_NHWC: Images) -> Probabilities:
        pixels_NP = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)
        away_NK = np.linalg.norm(pixels_NP[:, None] - means_KP[None], axis=2)
        likely_NK = np.exp(-sharpness * (away_NK - away_NK.min(axis=1, keepdims=True)))
        shares_NK: Probabilities = likely_NK / likely_NK.sum(axis=1, keepdims=True)
        return shares_NK.astype(np.float32)

    return Replicas(predict)


def publish_models(storage: Storage) -> None:
    """Serve digits 3 and 4 with a shadow 5 and a pin, and three shapes in colour."""
    bundles = {n: write_bundle(storage, digits_card(n), b"onnx", b"pt2") for n in (3, 4, 5)}
    shapes = card(1, channels=3)
    models = {
        "digits": ModelTraffic(
            weights={3: 90, 4: 10},
            bundles=bundles,
            champion=3,
            shadows={5: 20},
            pins={"user-7": 4},
        ),
        "shapes": ModelTraffic(
            weights={1: 1}, bundles={1: write_bundle(storage, shapes, b"onnx", b"pt2")}, champion=1
        ),
    }
    policy.commit(
        storage, None, models, default_model="digits", who="rene", why="first look at version 4"
    )
    images, labels = mnist("test")
    write_data_set(storage, DIGEST, images[:200, :, :, None], labels[:200], DIGITS)


def write_data_set(
    storage: Storage,
    digest: str,
    images_NHWC: npt.NDArray[np.uint8],
    labels_N: npt.NDArray[Any],
    names: tuple[str, ...],
) -> None:
    """Publish a manifest with one shard of test images."""
    count, height, width, channels = images_NHWC.shape
    rows = [image.tobytes() for image in images_NHWC]
    table = pa.table(
        {
            "image": pa.array(rows, pa.binary(height * width * channels)),
            "label": pa.array(labels_N.tolist(), pa.int32()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    path = f"data/shards/{digest}.parquet"
    storage.write(path, buffer.getvalue())
    manifest = Manifest(
        digest=digest,
        source="test",
        source_digests={},
        height=height,
        width=width,
        channels=channels,
        class_names=names,
        counts={},
        split_digests={},
        pixel_mean=(0.0,) * channels,
        pixel_std=(1.0,) * channels,
        preprocess=Preprocess(mode="L" if channels == 1 else "RGB", fill=(0,) * channels),
        shards=(Shard(split="test", path=path, rows=count, sha256="", size_bytes=1),),
        seed=0,
    )
    storage.write_json(manifest_path(digest), manifest.to_json())


def write_history(storage: Storage, now_s: float) -> None:
    """Write what two gateways and the watching jobs would have written in the last minutes."""
    last = int(now_s // BUCKET_S) * BUCKET_S
    for gateway in range(2):
        buckets = {}
        for step, start in enumerate(range(last - KEPT_S, last + 60, BUCKET_S)):
            load = 60 + 35 * math.sin(step / 9 + gateway / 3) + 9 * math.sin(2.7 * step)
            counts = {"digits/3": int(9 * load), "digits/4": int(load) if step > 30 else 0}
            buckets[str(start)] = {
                "seconds": BUCKET_S,
                "requests": {n: {"200": k} for n, k in counts.items() if k},
                "latency": {n: _latency(k, step, n) for n, k in counts.items() if k},
            }
        storage.write_json(f"{FOLDER}/gateway-{gateway}.json", buckets)
    points = [_judged(last - 900 * (40 - step), step) for step in range(41)]
    storage.write_json(watch_path("digits"), {**points[-1], "history": points})
    storage.write_json(rollout_path("digits"), _rollout(last))


def _latency(count: int, step: int, name: str) -> list[int]:
    shares = [0.02, 0.45, 0.4, 0.1, 0.02, 0.01]
    if name == "digits/4":
        shares = [0.0, 0.2, 0.45, 0.2 + 0.1 * math.sin(step / 7), 0.1, 0.05]
    counts = [round(share * count) for share in shares]
    shortest = LATENCY_BUCKETS_S.index(0.001)
    return [0] * shortest + counts + [0] * (len(LATENCY_BUCKETS_S) - len(counts) - shortest)


def _judged(time_s: int, step: int) -> Mapping[str, Any]:
    versions = {}
    for number, best in (("3", 0.985), ("4", 0.981)):
        if number == "4" and step < 12:
            continue
        accuracy = best - 0.012 * abs(math.sin(step / 5 + int(number))) - 0.0006 * max(0, step - 30)
        versions[number] = {
            "accuracy": accuracy,
            "low": accuracy - 0.013,
            "high": min(1.0, accuracy + 0.008),
            "labels": 400,
        }
    score = 0.05 + 0.015 * math.sin(step / 3) + 0.012 * max(0, step - 33)
    drift = {"score": score, "p_value": 0.3 if step < 38 else 0.0004, "alarm": step >= 38}
    moved = ["class 7", "rows 20–24"] if step >= 38 else []
    return {"time": time_s, "versions": versions, "drift": {**drift, "moved": moved}}


def _rollout(now_s: int) -> Mapping[str, Any]:
    return {
        "candidate": 4,
        "champion": 3,
        "status": "running",
        "stage": "canary-5",
        "stages": [
            "replay",
            "shadow",
            "canary-1",
            "canary-5",
            "canary-25",
            "canary-50",
            "canary-100",
        ],  # fmt: skip
        "weight": 5,
        "since": now_s - 260,
        "reason": "waiting for samples: 812 of 1,500",
        "gates": [
            {"name": "error_rate", "verdict": "pass", "value": 0, "limit": 0.01, "samples": 812},
            {"name": "p99_ms", "verdict": "pass", "value": 11.2, "limit": 14.6, "samples": 812},
            {"name": "accuracy", "verdict": "wait", "value": 0.981, "limit": 0.975, "samples": 64},
        ],
        "history": [
            {"time": now_s - 1900, "stage": "replay", "status": "passed", "reason": "2,000 rows"},
            {"time": now_s - 1500, "stage": "shadow", "status": "passed", "reason": "99.1 % agree"},
            {"time": now_s - 700, "stage": "canary-1", "status": "passed", "reason": "no errors"},
        ],
    }


@dataclass(slots=True)
class Served:
    """Where a gateway answers, and the true labels that it took."""

    url: str
    labels: list[dict[str, Any]] = field(default_factory=list)

    def noting_labels(self, app: App) -> Any:
        """Put a note of every label that is acknowledged in front of an application."""

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"] != "/feedback":
                await app(scope, receive, send)
                return
            bodies: list[bytes] = []

            async def received() -> Any:
                message = await receive()
                bodies.append(message.get("body", b""))
                return message

            async def sent(message: Any) -> None:
                if message.get("status") == 200:
                    self.labels.append(orjson.loads(b"".join(bodies)))
                await send(message)

            await app(scope, received, sent)

        return noting


@contextmanager
def served(storage: Storage) -> Iterator[Served]:
    """Serve what the storage's policy says."""
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    servers: list[uvicorn.Server] = []
    line = Served(f"http://127.0.0.1:{listener.getsockname()[1]}")

    async def main() -> None:
        router = Router(storage, make_replicas)
        await router.refresh()
        app = line.noting_labels(app_over(router, storage))
        config = uvicorn.Config(app, lifespan="off", log_level="warning")
        servers.append(uvicorn.Server(config))
        started.set()
        await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    try:
        assert started.wait(30), "the server did not start"
        yield line
    finally:
        for server in servers:
            # Browsers keep their connections.
            server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()
