"""A card, pictures and a gateway without Serve, for the unit tests of serving."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import orjson
from PIL import Image

from lib.data.manifest import Preprocess
from lib.serving import policy
from lib.serving.bundle import Card, write_bundle
from lib.serving.keys import authenticate, read_keys
from lib.serving.router import Images, Probabilities, Replicas, Router
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from serve_apps import exposition
from serve_apps.asgi import App
from serve_apps.endpoints import Endpoints, routes
from serve_apps.exposition import Exposition


def card(version: int = 1, *, channels: int = 1, name: str = "shapes") -> Card:
    return Card(
        name=name,
        version=version,
        run_id="0123456789abcdef",
        data_digest="d" * 32,
        height=4,
        width=6,
        channels=channels,
        class_names=("square", "circle", "star"),
        preprocess=Preprocess(mode="L" if channels == 1 else "RGB", fill=(7,) * channels),
        runtime="onnxruntime",
        git_commit="c0ffee",
        test_accuracy=0.5,
    )


def picture(pixels: np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def by_brightness(images_NHWC: Images) -> Probabilities:
    """The stand-in for a model: class 0, 1 or 2 by the first pixel, so answers can be told."""
    first = images_NHWC.reshape(len(images_NHWC), -1)[:, 0] % 3
    return np.eye(3, dtype=np.float32)[first]


async def make_replicas(card: Card, bundle: str, placement: str) -> Replicas:
    async def predict(images_NHWC: Images) -> Probabilities:
        return by_brightness(images_NHWC)

    return Replicas(predict)


async def broken(card: Card, bundle: str, placement: str) -> Replicas:
    async def predict(images_NHWC: Images) -> Probabilities:
        raise RuntimeError("the weights are on fire")

    return Replicas(predict)


def publish(storage: Storage, weights: dict[int, float]) -> None:
    bundles = {
        version: write_bundle(storage, card(version), b"onnx", b"pt2") for version in weights
    }
    base = policy.current(storage)
    champion = min(weights)
    models = {"shapes": ModelTraffic(weights=weights, bundles=bundles, champion=champion)}
    policy.commit(storage, base, models, default_model="shapes", who="test", why="test")


async def gateway(storage: Storage, **options: Any) -> App:
    router = Router(storage, options.pop("make_replicas", make_replicas), **options)
    await router.refresh()
    return app_over(router, storage)


def app_over(router: Router, storage: Storage, **options: Any) -> App:
    """An application that asks for keys as soon as there are some when it is made."""
    keys = read_keys(storage)
    seen = Exposition("replica", lambda: app.record, lambda: app.in_flight)
    endpoints = Endpoints(router, storage, others_flush_s=0, counts=seen.counts)
    app = App(
        [*routes(endpoints), exposition.route(seen)],
        title="Rayline",
        description="test",
        authenticate=lambda headers: authenticate(keys, headers),
        recorder=router.recorder,
        **options,
    )
    return app


class Response:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


async def request(
    app: App, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Response:
    sent: list[Any] = []
    chunks = [body[:1000], body[1000:]] if len(body) > 1000 else [body]

    async def receive() -> dict[str, Any]:
        if not chunks:
            # Nothing comes after the body while the client waits.
            await asyncio.Event().wait()
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}
    await app(scope, receive, send)
    start, *parts = sent
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Response(start["status"], names, b"".join(part.get("body", b"") for part in parts))
