"""What the gateway's paths do; knows HTTP and nothing of Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import orjson

from lib.errors import StorageError
from lib.serving import oip, payload
from lib.serving.feedback import parse_feedback, second_of
from lib.serving.payload import PayloadError
from lib.serving.router import Router, Version
from lib.storage import Storage
from lib.watch.labels import LabelLog
from lib.watch.predictions import num_answers
from lib.watch.recorder import FLUSH_EVERY_S
from lib.watch.segments import SPAN_US
from serve_apps import openapi, repository, schemas, watching
from serve_apps.asgi import JSON, Call, Header, Reply, Route, json_reply

LARGE_BODY_BYTES = 2**16
OTHERS_FLUSH_S = FLUSH_EVERY_S + 0.5
"""After so long, what another gateway has answered is in the log."""
MAX_LOOKUPS = 4
"""At once, for the answers that labels belong to; they must not take the places of predictions."""
LOOKUP_S = 1.0
"""Longest search for an answer of which the time is not known."""
_ANSWERED_WITHIN_S = 120

_log = logging.getLogger(__name__)


class Endpoints:
    """The handlers, over a router."""

    def __init__(
        self,
        router: Router,
        storage: Storage,
        *,
        others_flush_s: float = OTHERS_FLUSH_S,
        counts: repository.Counts = repository.nothing,
    ) -> None:
        self._router = router
        self._labels = LabelLog(storage)
        self._others_flush_s = others_flush_s
        self._storage = storage
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self.watching = watching.Watching(router, storage)
        self.repository = repository.Repository(router, counts)

    async def predict(self, call: Call) -> Reply:
        """POST /predict: one image in, label and probabilities out."""
        table = self._router.table
        version = table.pick(call.params.get("model"), call.header(b"x-model-version"), _key(call))
        call.card = version.card
        body, content_type = call.body, call.header(b"content-type") or ""
        parse = payload.parse_predict
        if len(body) <= LARGE_BODY_BYTES:
            images = call.images = parse(body, content_type, version.card)
            probabilities_NK = await self._router.answer(version, images, call.trace)
        else:
            # A large picture takes long to decode: other requests must not wait for it.
            with version.batcher.held():
                images = await asyncio.to_thread(parse, body, content_type, version.card)
                call.images = images
                probabilities_NK = await self._router.answer(version, images, call.trace)
        call.probabilities = probabilities_NK
        self._router.copy_to_shadows(
            version, images, probabilities_NK, call.request_id, call.caller
        )
        probabilities_K = probabilities_NK[0]
        digit = int(probabilities_K.argmax())
        card = version.card
        answer = {
            "label": card.class_names[digit],
            "digit": digit,
            "probabilities": probabilities_K,
            "model": card.name,
            "model_version": card.version,
            "request_id": call.request_id,
        }
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return Reply(body, headers=[JSON, _version_header(version)])

    async def infer(self, call: Call) -> Reply:
        """POST /v2/models/…/infer: the Open Inference Protocol."""
        pin = call.params.get("version") or call.header(b"x-model-version")
        table = self._router.table
        version = table.pick(call.params["model"], pin, _key(call))
        call.card = version.card
        length = call.header(b"inference-header-content-length")
        request = oip.parse_infer(call.body, length, version.card)
        call.request_id = request.id or call.request_id
        images_NHWC = call.images = request.images_NHWC
        probabilities_NK = await self._router.answer(version, images_NHWC, call.trace)
        call.probabilities = probabilities_NK
        self._router.copy_to_shadows(
            version, images_NHWC, probabilities_NK, call.request_id, call.caller
        )
        body, header_length = oip.render_infer(
            version.card, request, probabilities_NK, call.request_id
        )
        headers = [JSON, _version_header(version)]
        if header_length is not None:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"inference-header-content-length", str(header_length).encode()),
                _version_header(version),
            ]
        return Reply(body, headers=headers)

    async def feedback(self, call: Call) -> Reply:
        """POST /feedback: the true label of an answer, on disk before this returns."""
        kind = (call.header(b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A form of another site's page can send other types without asking first.
            raise PayloadError(415, "send the label with `Content-Type: application/json`")
        content = payload.load_json(call.body)
        model = content.get("model") if isinstance(content, dict) else None
        if model is not None and not isinstance(model, str):
            raise PayloadError(422, "`model` must be a model's name")
        table = self._router.table
        card = table.champion(model).card
        name, label = card.name, parse_feedback(content, card)
        try:
            await self._labels.add(name, {**label, "caller": call.caller})
        except StorageError as error:
            _log.error("labels can't be stored: %s", error)
            raise PayloadError(503, "the label could not be stored; try again") from error
        known, why = await self._is_known(name, label["request_id"], label["index"])
        content = {"request_id": label["request_id"], "stored": True, "known": known}
        return json_reply({**content, "why": why} if why else content)

    async def _is_known(self, model: str, request_id: str, index: int) -> tuple[bool | None, str]:
        """Return whether a label can be joined with an answer, None if it was not found out.

        The answer is in this gateway's memory, in the log, or in the memory of another gateway,
        which writes it into the log soon.
        """
        found: int | None = self._router.recorder.num_answers(model, request_id, index)
        if not found and self._lookups.locked():
            return None, "too many labels at once to look for their answers; it counts if it fits"
        if not found:
            async with self._lookups:
                found = await asyncio.to_thread(self._num_logged, model, request_id, index)
                if found == 0:
                    await asyncio.sleep(self._others_flush_s)
                    now_us = int(time.time() * 1e6)
                    found = await asyncio.to_thread(
                        num_answers,
                        self._storage,
                        model,
                        request_id,
                        index,
                        start_us=now_us - SPAN_US,
                        end_us=now_us + SPAN_US,
                        budget_s=LOOKUP_S,
                    )
        if found is None:
            return None, f"no answer with this id in {LOOKUP_S:g} s of search; it counts if it fits"
        if found > 1:
            return False, f"{found} answers have this id, so none of them gets the label"
        if not found:
            return False, "no answer has this id and index; the label counts once there is one"
        return True, ""

    def _num_logged(self, model: str, request_id: str, index: int) -> int | None:
        now_us = int(time.time() * 1e6)
        image = (self._storage, model, request_id, index)
        second = second_of(request_id)
        if second is not None:
            start_us, end_us = (
                (second + shift_s) * 10**6 for shift_s in (-_ANSWERED_WITHIN_S, _ANSWERED_WITHIN_S)
            )
            if found := num_answers(*image, start_us=start_us, end_us=end_us):
                return found
        return num_answers(*image, start_us=0, end_us=now_us + SPAN_US, budget_s=LOOKUP_S)

    async def traffic(self, call: Call) -> Reply:
        """GET /traffic: the policy in force, and the versions behind it."""
        table = self._router.table
        content = table.policy.to_json()
        content["versions"] = {
            f"{name}/{number}": {
                "run_id": version.card.run_id,
                "test_accuracy": version.card.test_accuracy,
                "data_digest": version.card.data_digest,
                "runtime": version.card.runtime,
                "class_names": version.card.class_names,
                "shape": version.card.shape,
                "fill": version.card.preprocess.fill,
                "placement": version.placement,
            }
            for (name, number), version in sorted(table.versions.items())
        }
        content["shadows"] = self._router.shadows.counts()
        return Reply(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS))

    async def server(self, call: Call) -> Reply:
        """GET /v2: the protocol's server metadata."""
        return json_reply({"name": "rayline", "version": "2", "extensions": oip.EXTENSIONS})

    async def live(self, call: Call) -> Reply:
        """GET /v2/health/live: the process answers."""
        return json_reply({"live": True})

    async def ready(self, call: Call) -> Reply:
        """GET /v2/health/ready: a policy is loaded, and each model answers."""
        if self._router.is_ready:
            return json_reply({"ready": True})
        table = self._router.table
        down = [name for name in sorted(table.policy.models) if not table.is_ready(name)]
        raise PayloadError(503, f"no version of {', '.join(down)} is up; run jobs.deploy")

    async def model(self, call: Call) -> Reply:
        """GET /v2/models/…: the protocol's model metadata."""
        version = self._pinned(call)
        _, traffic = self._router.table.model(version.card.name)
        return json_reply(
            oip.model_metadata(version.card.name, version.card, sorted(traffic.bundles))
        )

    async def model_ready(self, call: Call) -> Reply:
        """GET /v2/models/…/ready: the version answers, or some version where none is named."""
        name, pin = call.params["model"], call.params.get("version")
        if not self._router.table.is_ready(name, pin):
            which = f"version {pin} of {name}" if pin else name
            raise PayloadError(503, f"{which} has no replica that answers now")
        return json_reply({"name": name, "ready": True})

    def _pinned(self, call: Call) -> Version:
        table = self._router.table
        name, traffic = table.model(call.params["model"])
        pin = call.params.get("version") or str(traffic.champion)
        return replace(table, gone=frozenset()).pick(name, pin, "")


def _key(call: Call) -> str:
    return call.header(b"x-routing-key") or call.request_id


def _version_header(version: Version) -> Header:
    return (b"x-model-version", str(version.card.version).encode())


def routes(endpoints: Endpoints) -> list[Route]:
    """Return the gateway's paths."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    picture = {
        "image/png": binary,
        "image/jpeg": binary,
        "application/octet-stream": binary,
        "application/json": {"schema": schemas.ImageBody.model_json_schema()},
    }
    feedback = {"application/json": {"schema": schemas.Feedback.model_json_schema()}}
    infer = {
        "application/json": {"schema": openapi.inlined(schemas.InferBody)},
        "application/octet-stream": binary,
    }
    post_errors = (400, 401, 404, 408, 413, 415, 422, 503)
    chosen = ("X-Model-Version", "X-Routing-Key", "traceparent")
    table: list[Route] = []

    def add(method: str, path: str, handler: Any, summary: str, **options: Any) -> None:
        table.append(Route(method=method, path=path, handler=handler, summary=summary, **options))

    for path in ("/predict", "/predict/{model}"):
        add(
            "POST", path, endpoints.predict, "Classify one image.", tag="predict",
            scope="predict", is_hot=True, headers=chosen,
            response=schemas.Prediction, request=picture, errors=post_errors,
        )  # fmt: skip
    add(
        "POST", "/feedback", endpoints.feedback, "Store the true label of an answer.",
        tag="label", scope="label",
        response=schemas.FeedbackStored, request=feedback, errors=post_errors,
    )  # fmt: skip
    add(
        "GET", "/traffic", endpoints.traffic, "The traffic policy in force.",
        scope="view", errors=(503,),
    )  # fmt: skip
    v2 = oip.TAG
    table += repository.routes(endpoints.repository)
    add("GET", "/v2", endpoints.server, "Server metadata.", tag=v2)
    add("GET", "/v2/health/live", endpoints.live, "Whether the server is up.", tag=v2)
    add(
        "GET", "/v2/health/ready", endpoints.ready, "Whether models are loaded.",
        tag=v2, errors=(503,),
    )  # fmt: skip
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        asked: dict[str, Any] = {"tag": v2, "scope": "predict", "errors": (404, 503)}
        add("GET", base, endpoints.model, "Model metadata.", **asked)
        add("GET", f"{base}/ready", endpoints.model_ready, "Model ready.", **asked)
        add(
            "POST", f"{base}/infer", endpoints.infer, "Classify a batch.",
            tag=v2, scope="predict", is_hot=True,
            headers=(*chosen, "Inference-Header-Content-Length"),
            request=infer, errors=post_errors,
        )  # fmt: skip
    return [*table, *watching.routes(endpoints.watching)]
