"""
Traces over OTLP, off unless `telemetry.otlp_endpoint` is set (extra `otel`).

One span per request, with its time in the queue, prefill and decode as attributes and events; a W3C `traceparent` of
the client becomes its parent. Attribute names are those of OpenTelemetry's GenAI conventions (still in development).
Prompts and answers are never recorded.
"""

from __future__ import annotations

import time
from typing import Any

from trilithon_server.config import TelemetryConfig
from trilithon_server.metrics import RequestRecord

Tracing = Any
"""An OpenTelemetry tracer; the extra may not be installed."""


class Span:
    """The span of one request; does nothing while tracing is off."""

    def end(self, record: RequestRecord) -> None:
        """Close it with what is known of the request."""


class _LiveSpan(Span):
    def __init__(self, tracer: Tracing, route: str, traceparent: str | None, request_id: str) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": traceparent} if traceparent else {}
        parent = TraceContextTextMapPropagator().extract(carrier)
        self._start_ns = time.time_ns()
        self._tracer = tracer
        self._span = tracer.start_span(
            route,
            context=parent,
            kind=SpanKind.SERVER,
            start_time=self._start_ns,
            attributes={"trilithon.request_id": request_id},
        )

    def end(self, record: RequestRecord) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        span, start_ns = self._span, self._start_ns
        span.set_attribute("gen_ai.provider.name", "trilithon")
        if record.model:
            span.set_attribute("gen_ai.request.model", record.model)
            span.set_attribute("gen_ai.usage.input_tokens", record.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", record.generated_tokens)
        if record.finish_reason:
            span.set_attribute("gen_ai.response.finish_reasons", [record.finish_reason])
        if record.code != "ok":
            span.set_status(Status(StatusCode.ERROR, record.code))
        for name, seconds in (("queue", record.queue_s), ("prefill", record.prefill_s), ("decode", record.decode_s)):
            if seconds is not None:
                child = self._tracer.start_span(name, context=set_span_in_context(span), start_time=start_ns)
                start_ns += int(seconds * 1e9)
                child.end(end_time=start_ns)
        span.end()


_OFF = Span()


def span_of(tracer: Tracing | None, route: str, traceparent: str | None, request_id: str) -> Span:
    """A span for one request, or one that does nothing."""
    return _OFF if tracer is None else _LiveSpan(tracer, route, traceparent, request_id)


def make_tracer(config: TelemetryConfig, *, version: str) -> Tracing | None:
    """
    The tracer that the configuration asks for, or None.

    Raises:
        ValueError: traces are asked for and the extra `otel` is not installed.
    """
    if config.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError:
        raise ValueError(
            "telemetry.otlp_endpoint needs the extra `otel`, which is not installed. "
            "Run: pip install 'trilithon[otel]'."
        ) from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": config.service_name, "service.version": version}),
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
    )
    endpoint = config.otlp_endpoint.rstrip("/")
    if not endpoint.endswith("/v1/traces"):
        endpoint += "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer("trilithon", version)
