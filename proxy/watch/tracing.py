"""Spans of finished requests, for OpenTelemetry; made from what is booked, when it is booked, and only where asked for.

A request's span continues the client's `traceparent`; the same header goes on to the model server as it came. Names and
attributes follow the semantic conventions for generative AI (opentelemetry.io/docs/specs/semconv/gen-ai, 2026), what is
ibid's own begins with `ibid.`. No text of a prompt or an answer is in a span.

Steps are told by their lengths: they stand one after the other from the request's begin. A call stands at its end.
The SDK is imported here alone, where traces are on; its own thread sends spans, and drops them when it falls behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proxy.core.errors import ConfigError
from proxy.core.model import Call, Outcome

NS_PER_MS = 1_000_000
CARRIED = (b"traceparent", b"tracestate")
Headers = Iterable[tuple[bytes, bytes]]


class Spans:
    """Takes finished requests. `exporter` sends spans; by default to where the OTEL_EXPORTER_OTLP_* variables say.

    Raises ConfigError where the SDK is not installed.
    """

    def __init__(self, version: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            why = "log.traces: otlp needs the OpenTelemetry SDK: pip install 'ibid-proxy[otel]'"
            raise ConfigError(why) from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        named = Resource.create().merge(Resource({"service.name": "ibid", "service.version": version}))
        named = named.merge(OTELResourceDetector().detect())  # what the operator's variables say goes before
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ibid", version)

    def close(self) -> None:
        """Sends what waits, and blocks meanwhile for the exporter's own deadline at most."""
        self._provider.shutdown()

    def note(self, outcome: Outcome, steps_ms: Mapping[str, float] | None, headers: Headers) -> None:
        """One request with its steps and calls."""
        began_ns = outcome.ts_ms * NS_PER_MS
        ended_ns = began_ns + _ns(outcome.total_ms)
        carried = {name.decode(): value.decode("latin-1") for name, value in headers if name.lower() in CARRIED}
        carried = {name.lower(): value for name, value in carried.items()}
        kinds, operation = self._trace.SpanKind, operation_of(outcome.endpoint)
        root = self._tracer.start_span(
            f"{operation} {outcome.model_requested}",
            context=self._propagator.extract(carried) if carried else None,
            kind=kinds.SERVER,
            start_time=began_ns,
            attributes=_of_request(outcome, operation),
        )
        inside = self._trace.set_span_in_context(root)
        at_ns = began_ns
        for step, spent_ms in (steps_ms or {}).items():
            span = self._tracer.start_span(f"ibid.{step}", context=inside, start_time=at_ns)
            at_ns = min(at_ns + _ns(spent_ms), ended_ns)
            span.end(at_ns)
        for call in outcome.calls:
            span = self._tracer.start_span(
                f"{operation} {call.model}",
                context=inside,
                kind=kinds.CLIENT,
                start_time=max(began_ns, ended_ns - _ns(call.total_ms)),
                attributes=_of_call(call, operation),
            )
            self._mark(span, call.status)
            span.end(ended_ns)
        self._mark(root, outcome.status if outcome.outcome != "cancelled" else 499)
        root.end(ended_ns)

    def _mark(self, span: Any, status: int) -> None:
        if status >= 400 or not status:
            span.set_attribute("error.type", str(status or "no_response"))
            span.set_status(self._trace.StatusCode.ERROR)


def operation_of(endpoint: str) -> str:
    """`gen_ai.operation.name` of a path."""
    if "embed" in endpoint.lower():
        return "embeddings"
    if "generatecontent" in endpoint.lower():
        return "generate_content"
    if endpoint.endswith(("/completions", "/api/generate")) and not endpoint.endswith("/chat/completions"):
        return "text_completion"
    return "chat"


def _of_request(outcome: Outcome, operation: str) -> dict[str, Any]:
    told = _asked(operation, outcome.upstream, outcome.model_requested, outcome.status) | {
        "gen_ai.response.model": outcome.model_served,
        "url.path": outcome.endpoint,
        "ibid.request_id": outcome.request_id,
        "ibid.cache.status": outcome.cache_status,
        "ibid.cache.reason": outcome.reason,
        "ibid.lane": outcome.mechanism or "forward",
        "ibid.namespace": outcome.namespace,
        "ibid.team": outcome.team,
    }
    found = {"ibid.cache.entry": outcome.entry_id, "ibid.cache.similarity": outcome.similarity, **_tokens(outcome)}
    return told | {name: value for name, value in found.items() if value is not None}


def _of_call(call: Call, operation: str) -> dict[str, Any]:
    asked = _asked(operation, call.upstream, call.model, call.status)
    return asked | {"ibid.call.purpose": call.purpose} | _tokens(call)


def _asked(operation: str, upstream: str, model: str, status: int) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": upstream,
        "gen_ai.request.model": model,
        "http.response.status_code": status,
    }


def _tokens(of: Outcome | Call) -> dict[str, Any]:
    if of.usage is None:
        return {}
    return {
        "gen_ai.usage.input_tokens": of.usage.input_tokens,
        "gen_ai.usage.output_tokens": of.usage.output_tokens,
    }


def _ns(spent_ms: float) -> int:
    return int(spent_ms * NS_PER_MS)
