"""The Open Inference Protocol over gRPC: the same versions, keys and bounds as over HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as messages

from lib.serving import oip, oip_grpc
from lib.serving.bundle import Card
from lib.serving.feedback import REQUEST_ID
from lib.serving.payload import PayloadError
from lib.serving.router import Router, Version
from lib.serving.tracing import HEADER, Trace
from serve_apps import logs
from serve_apps.asgi import UNKNOWN, App, own_request_id, request_id_of
from serve_apps.repository import Repository

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""HTTP status of a PayloadError → the code that it has in gRPC."""


@dataclass(slots=True)
class _Call:
    """One call: its message, and what its metadata says."""

    message: Any
    metadata: dict[str, str]
    request_id: str
    trailing: list[tuple[str, str]]
    caller: str = UNKNOWN
    card: Card | None = None
    images: npt.NDArray[np.uint8] | None = None
    probabilities: npt.NDArray[np.float32] | None = None
    trace: Trace | None = None


class GrpcLane:
    """The methods of `inference.GRPCInferenceService`, as mixed into the gateway.

    Serve finds them by their names, which are the protocol's.
    """

    _app: App
    _router: Router
    _repository: Repository

    async def ServerLive(self, message: Any, grpc_context: Any) -> Any:
        """Whether the server is up."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, message: Any, grpc_context: Any) -> Any:
        """Whether a policy is loaded, and each model answers."""
        return messages.ServerReadyResponse(ready=self._router.is_ready)

    async def ServerMetadata(self, message: Any, grpc_context: Any) -> Any:
        """What this server is."""
        return messages.ServerMetadataResponse(
            name="rayline", version="2", extensions=oip.EXTENSIONS
        )

    async def ModelReady(self, message: Any, grpc_context: Any) -> Any:
        """Whether a model, or one version of it, answers."""

        async def answer(call: _Call) -> Any:
            is_ready = self._router.table.is_ready(message.name, message.version or None)
            return messages.ModelReadyResponse(ready=is_ready)

        return await self._answered(message, grpc_context, answer, messages.ModelReadyResponse)

    async def ModelMetadata(self, message: Any, grpc_context: Any) -> Any:
        """A model's versions and tensors."""

        async def answer(call: _Call) -> Any:
            card = self._pinned(message.name, message.version).card
            _, traffic = self._router.table.model(card.name)
            return oip_grpc.render_metadata(card, sorted(traffic.bundles))

        return await self._answered(message, grpc_context, answer, messages.ModelMetadataResponse)

    async def RepositoryIndex(self, message: Any, grpc_context: Any) -> Any:
        """Every version with its state."""

        async def answer(call: _Call) -> Any:
            index = self._repository.index(is_ready_only=message.ready)
            return messages.RepositoryIndexResponse(models=index)

        return await self._answered(message, grpc_context, answer, messages.RepositoryIndexResponse)

    async def ModelConfig(self, message: Any, grpc_context: Any) -> Any:
        """A model's configuration."""

        async def answer(call: _Call) -> Any:
            config = self._repository.config(message.name, message.version or None)
            return messages.ModelConfigResponse(config=config)

        return await self._answered(message, grpc_context, answer, messages.ModelConfigResponse)

    async def ModelStatistics(self, message: Any, grpc_context: Any) -> Any:
        """What this gateway has counted."""

        async def answer(call: _Call) -> Any:
            counted = self._repository.statistics(message.name or None, message.version or None)
            return messages.ModelStatisticsResponse(model_stats=counted)

        return await self._answered(message, grpc_context, answer, messages.ModelStatisticsResponse)

    async def ModelInfer(self, message: Any, grpc_context: Any) -> Any:
        """Classify a batch."""
        return await self._answered(message, grpc_context, self._infer, messages.ModelInferResponse)

    async def _infer(self, call: _Call) -> Any:
        message, table = call.message, self._router.table
        pin = message.model_version or call.metadata.get("x-model-version") or None
        key = call.metadata.get("x-routing-key") or call.request_id
        version = table.pick(message.model_name, pin, key)
        call.card = version.card
        call.trailing.append(("x-model-version", str(version.card.version)))
        images_NHWC = call.images = oip_grpc.parse_infer(message, version.card)
        probabilities_NK = await self._router.answer(version, images_NHWC, call.trace)
        call.probabilities = probabilities_NK
        self._router.copy_to_shadows(
            version, images_NHWC, probabilities_NK, call.request_id, call.caller
        )
        return oip_grpc.render_infer(version.card, probabilities_NK, call.request_id)

    def _pinned(self, name: str, version: str) -> Version:
        table = self._router.table
        _, traffic = table.model(name)
        pin = version or str(traffic.champion)
        return replace(table, gone=frozenset()).pick(name, pin, "")

    async def _answered(
        self,
        message: Any,
        context: Any,
        answer: Callable[[_Call], Awaitable[Any]],
        empty: Callable[[], Any],
    ) -> Any:
        """Answer a call within the gateway's bounds; an error becomes its code in gRPC."""
        metadata = {str(name): str(value) for name, value in context.invocation_metadata()}
        # One id for a request: that of its message, else of its metadata, else a new one.
        request_id = getattr(message, "id", "") or request_id_of(metadata.get("x-request-id"))
        call = _Call(message, metadata, request_id, [("x-request-id", request_id)])
        headers = {name.encode(): value.encode() for name, value in metadata.items()}
        if self._app.tracing.is_on or HEADER in headers:
            call.trace = self._app.tracing.begin(headers, f"gRPC {type(message).__name__}")
        status = 200
        start_s = time.perf_counter()
        self._app.in_flight += 1
        try:
            if not REQUEST_ID.fullmatch(request_id):
                call.trailing.clear()
                raise PayloadError(400, "`id`: at most 128 letters, digits, `.`, `_`, `-`")
            call.caller = self._app.admit(headers)
            call.request_id = own_request_id(request_id, call.caller)
            call.trailing[:] = [("x-request-id", call.request_id)]
            answered = await answer(call)
        except PayloadError as error:
            status, answered = error.status, empty()
            # Not raised: Serve would write a traceback for every malformed request.
            context.set_code(_CODES.get(status, grpc.StatusCode.UNKNOWN))
            context.set_details(error.message)
            if status >= 500:
                logs.failed(call.request_id, status, error)
        except Exception as error:
            logs.failed(call.request_id, 500, error)
            status, answered = 500, empty()
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details("the server failed on this request; its log has the cause")
        finally:
            self._app.in_flight -= 1
        seconds = time.perf_counter() - start_s
        self._app.count(call, call.caller, status, seconds)
        if self._app.access_share:
            what = (call.request_id, "gRPC", type(message).__name__, status, call.caller)
            self._app.log_access(call, *what, seconds)
        if call.trace:
            call.trailing.append((HEADER.decode(), call.trace.header.decode()))
            self._app.end_trace(call.trace, call, call.request_id, status)
        context.set_trailing_metadata(call.trailing)
        return answered


def _refuse(context: Any) -> Any:
    context.set_code(grpc.StatusCode.UNIMPLEMENTED)
    context.set_details("Rayline does not serve this; its jobs manage the models")
    return messages.ServerLiveResponse()


async def _unary(self: GrpcLane, message: Any, grpc_context: Any) -> Any:
    return _refuse(grpc_context)


async def _streaming(self: GrpcLane, stream: Any, grpc_context: Any) -> AsyncIterator[Any]:
    yield _refuse(grpc_context)


# Triton's extensions of the protocol are in the service too; without a method of that name Serve
# would answer with a list of the gateway's.
for _method in messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
    if not hasattr(GrpcLane, _method.name):
        setattr(GrpcLane, _method.name, _streaming if _method.server_streaming else _unary)
