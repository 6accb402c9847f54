"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.flows.running import running
from tests.upstream import Json, ScriptedUpstream

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CARRIED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
CLIENT, SERVER = 3, 2  # kinds


class Collector:
    """Takes OTLP over HTTP, as protobuf."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()  # aiohttp has undone the coding it knows
        told = ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        for group in told.resource_spans:
            self.resource = {one.key: one.value.string_value for one in group.resource.attributes}
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return web.Response()


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{runner.addresses[0][1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield collector
    await runner.cleanup()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def by_request(spans: list[Any]) -> Mapping[str, tuple[Any, list[Any]]]:
    """Request id → its own span and those below it."""
    roots = {span.span_id: span for span in spans if span.kind == SERVER}
    return {
        attributes(root)["ibid.request_id"]: (root, [span for span in spans if span.parent_span_id == root.span_id])
        for root in roots.values()
    }


async def test_a_request_is_a_span_of_the_clients_trace_with_its_steps_and_calls(
    data_dir: Path, up: ScriptedUpstream, collector: Collector
) -> None:
    async with running(data_dir, up.url, {"log": {"traces": "otlp"}}) as ibid:
        miss = await ibid.ask(ASKED, headers=CARRIED)
        await ibid.settled()
        exact, alike = await ibid.ask(ASKED), await ibid.ask(REWORDED, headers=CARRIED)
        up.script(Json(400, {"error": {"message": "no", "type": "invalid_request_error"}}))
        refused = await ibid.ask("What else?")
        await ibid.settled()
    assert collector.resource["service.name"] == "ibid"
    assert (up.requests[0].header("traceparent"), up.requests[0].header("tracestate")) == tuple(CARRIED.values())
    found = by_request(collector.spans)
    assert set(found) == {reply.headers["x-request-id"] for reply in (miss, exact, alike, refused)}
    root, below = found[miss.headers["x-request-id"]]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    told = attributes(root)
    assert root.name == f"chat {told['gen_ai.request.model']}"
    assert (told["ibid.cache.status"], told["ibid.cache.reason"]) == ("MISS", "no_candidate")
    assert told["gen_ai.usage.output_tokens"] > 0
    (call,) = [span for span in below if span.kind == CLIENT]
    assert attributes(call)["ibid.call.purpose"] == "answer"
    assert {"ibid.exact", "ibid.embed"} <= {span.name for span in below}
    assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in below)
    assert all(span.end_time_unix_nano <= root.end_time_unix_nano for span in below)
    own, below = found[exact.headers["x-request-id"]]
    assert (own.parent_span_id, attributes(own)["ibid.lane"]) == (b"", "cache.exact")
    assert [span for span in below if span.kind == CLIENT] == []
    own, _ = found[alike.headers["x-request-id"]]
    assert own.trace_id.hex() == TRACE
    assert attributes(own)["ibid.cache.similarity"] > 0.95
    own, _ = found[refused.headers["x-request-id"]]
    assert (attributes(own)["error.type"], own.status.code) == ("400", 2)
    assert b"hose" not in b"".join(span.SerializeToString() for span in collector.spans)


async def test_without_the_setting_nothing_is_sent(data_dir: Path, up: ScriptedUpstream, collector: Collector) -> None:
    async with running(data_dir, up.url, {"cache": {"semantic": False}}) as ibid:
        await ibid.ask(ASKED, headers=CARRIED)
        await ibid.settled()
    assert collector.spans == []
