"""Distributed tracing: W3C trace context in and out, OpenTelemetry spans where they are wanted.

A caller's `traceparent` is always taken, returned, and kept with the rows of the prediction log.
Spans are made only if OTEL_EXPORTER_OTLP_ENDPOINT names a collector (OTLP over HTTP); the SDK reads
its other settings, such as OTEL_TRACES_SAMPLER, by itself. Without it nothing of it is imported.
See https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

HEADER = b"traceparent"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE = "rayline-gateway"
"""Name of the service in spans, unless OTEL_SERVICE_NAME gives another one."""

_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


class Trace:
    """One request's part of a trace."""

    __slots__ = ("_marks", "_span", "_start_ns", "header", "trace_id")

    def __init__(self, trace_id: str, header: bytes, span: Any = None) -> None:
        self.trace_id = trace_id
        """32 hexadecimal digits."""
        self.header = header
        """Value of `traceparent` for the answer: of the gateway's span, where it has one."""
        self._span = span
        self._start_ns = time.time_ns() if span else 0
        self._marks: list[tuple[str, int]] = []

    def mark(self, phase: str) -> None:
        """End a phase, which began where the one before ended: receive, decode, queue, predict."""
        if self._span:
            self._marks.append((phase, time.time_ns()))


class Tracing:
    """Begins and ends the traces of requests.

    Args:
        provider: Where spans go; None: no spans, and a trace only for callers that have one.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("rayline") if provider else None
        self.is_on = provider is not None
        """Whether requests without `traceparent` have a trace too."""

    @classmethod
    def from_env(cls, env: Mapping[str, str], instance: str) -> Tracing:
        """Return what sends spans to the collector that the environment names, if it names one.

        Args:
            env: Of this process; the SDK reads `os.environ` itself.
            instance: Id of this gateway.
        """
        if not any(env.get(name) for name in ENDPOINT_VARIABLES):
            return cls()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = env.get("OTEL_SERVICE_NAME") or SERVICE
        resource = Resource.create({"service.name": name, "service.instance.id": instance})
        provider = TracerProvider(resource=resource)
        # Sends from a thread of its own; what a collector does not take in time is dropped.
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def begin(self, headers: Mapping[bytes, bytes], name: str) -> Trace | None:
        """Return the trace of a request; None if it has none, and no spans are wanted.

        Callers on a hot path look first: `tracing.is_on or tracing.HEADER in headers`.

        Args:
            headers: Names in lower case. A malformed `traceparent` counts as none.
            name: Of the span, such as `POST /predict`.
        """
        match = _TRACEPARENT.fullmatch(headers.get(HEADER, b""))
        if match and match[1] == b"00" and match[5]:
            match = None  # Only a later version of the standard may add fields.
        if self._tracer is None:
            return Trace(match[2].decode(), match[0]) if match else None
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            SpanKind,
            TraceFlags,
            set_span_in_context,
        )

        parent = None
        if match:
            context = SpanContext(
                int(match[2], 16), int(match[3], 16), True, TraceFlags(int(match[4], 16) & 3)
            )
            parent = set_span_in_context(NonRecordingSpan(context))
        span = self._tracer.start_span(name, parent, SpanKind.SERVER)
        own = span.get_span_context()
        header = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
        return Trace(header[3:35], header.encode(), span)

    def finish(self, trace: Trace, status: int, **attributes: str | int | None) -> None:
        """End a request's span and those of its phases.

        Args:
            trace: What `begin` returned.
            status: HTTP status of the answer.
            attributes: Of the span; those that are None are left out.
        """
        span = trace._span
        if self._tracer is None or span is None or not span.is_recording():
            return
        from opentelemetry.trace import StatusCode, set_span_in_context

        context, start_ns = set_span_in_context(span), trace._start_ns
        for phase, end_ns in trace._marks:
            self._tracer.start_span(phase, context, start_time=start_ns).end(end_ns)
            start_ns = end_ns
        span.set_attribute("http.response.status_code", status)
        for name, value in attributes.items():
            if value is not None:
                span.set_attribute(f"rayline.{name}", value)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is not sent yet."""
        if self._provider:
            self._provider.shutdown()
