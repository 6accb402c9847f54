"""Fault catalogue, answers: statuses, redirects, headers and sizes of what an upstream sends back."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from tests.edge.faults_app import Running, ibid, question, request, up
from tests.edge.faults_wire import DONE, FORMS, JSON_HEAD, ONE, ROLE, STOP, whole
from tests.edge.rawclient import RawClient
from tests.upstream import Body, Chat, Json, Raw, ScriptedUpstream, Stream
from tests.waiting import PATIENCE_S

__all__ = ["ibid", "up"]  # fixtures

# --- statuses, redirects, headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "7"},
        {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"},
        {"retry-after-ms": "1500"},
        {"Retry-After": "soon, perhaps"},
        {"Retry-After": "1", "retry-after-ms": "900", "x-ratelimit-remaining-tokens": "0"},
    ],
)
@FORMS
async def test_429_passes_exactly_and_is_not_tried_again(ibid: Running, headers: dict[str, str], stream: bool) -> None:
    body = b'{"error": {"message": "Rate limit", "type": "tokens", "param": null, "code": "rate_limit_exceeded"}}'
    ibid.up.script(Body(429, body, headers=headers))
    reply = await ibid.ask(question(stream=stream))
    assert (reply.status, reply.body) == (429, body)
    for name, value in headers.items():
        assert reply.headers[name.lower()] == value
    assert ibid.asked == 1


async def test_a_storm_opens_the_breaker_and_hits_are_still_served(
    ibid: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = ibid.handlers[0]._upstream.breaker("openai")  # type: ignore[attr-defined]
    moment = breaker._now()
    monkeypatch.setattr(breaker, "_now", lambda: moment)  # no probe's turn comes meanwhile
    kept = question("Which answer is kept before the storm?")
    await ibid.ask(kept)
    await ibid.settled()
    oops = Json(500, {"error": {"message": "oops", "type": "server_error", "param": None, "code": None}})
    ibid.up.default = lambda seen: replace(oops, status=(500, 502, 503, 504, 529)[len(ibid.up.requests) % 5])
    for number in range(25):
        reply = await ibid.ask(question(f"Storm question number {number} of many?"))
        if reply.status == 503 and "circuit_open" in reply.raw.decode():
            break
        assert json.loads(reply.body) == oops.body
    asked = ibid.asked
    for stream in (False, True):
        reply = await ibid.ask(question("Storm question, refused?", stream=stream))
        assert (reply.status, reply.code) == (503, "circuit_open")
        assert 1 <= int(reply.headers["retry-after"]) <= 5
    assert ibid.asked == asked
    assert (await ibid.ask(kept)).is_hit
    passed = await ibid.ask(b"", method="GET", target="/v1/models")
    assert (passed.status, passed.code) == (503, "circuit_open")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@FORMS
async def test_a_redirect_is_never_followed(ibid: Running, status: int, stream: bool) -> None:
    async with ScriptedUpstream() as elsewhere:
        ibid.up.script(Body(status, b"", headers={"Location": f"{elsewhere.url}/v1/chat/completions"}))
        reply = await ibid.ask(question(stream=stream))
        assert (reply.status, reply.code) == (502, "upstream_redirect")
        assert "location" not in reply.headers
        assert elsewhere.requests == []
    await ibid.nothing_kept(question(stream=stream))


@pytest.mark.parametrize("status", [204, 304])
@FORMS
async def test_an_answer_without_a_body_passes(ibid: Running, status: int, stream: bool) -> None:
    ibid.up.script(Raw(b"HTTP/1.1 %d X\r\nConnection: close\r\n\r\n" % status))
    reply = await ibid.ask(question(stream=stream))
    assert (reply.status, reply.body) == (status, b"")
    await ibid.nothing_kept(question(stream=stream))


async def test_a_flood_of_interim_answers_is_dropped(ibid: Running) -> None:
    body = json.dumps(whole()).encode()
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 50
    ibid.up.script(Raw(interim + JSON_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body))
    reply = await ibid.ask()
    assert (reply.status, reply.body) == (200, body)
    assert reply.raw.startswith(b"HTTP/1.1 200 ")


async def test_hop_by_hop_headers_and_cookies_stay_behind_and_are_not_replayed(ibid: Running) -> None:
    extra = (
        b"Set-Cookie: __cf_bm=abc; Path=/\r\nKeep-Alive: timeout=9\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\n"
        b"Connection: x-secret-hop, keep-alive\r\nX-Secret-Hop: 1\r\nopenai-organization: org-1\r\n"
        b"x-ratelimit-remaining-tokens: 9\r\n"
    )
    body = json.dumps(whole()).encode()
    ibid.up.script(Raw(JSON_HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body))
    first = await ibid.ask()
    await ibid.settled()
    hit = await ibid.ask()
    assert hit.is_hit, "an edge's cookie says nothing about the answer"
    for reply in (first, hit):
        assert not {"set-cookie", "keep-alive", "proxy-authenticate", "upgrade", "x-secret-hop"} & set(reply.headers)
    assert first.headers["openai-organization"] == "org-1"
    assert not {"openai-organization", "x-ratelimit-remaining-tokens"} & set(hit.headers)


async def test_a_line_end_in_a_value_makes_no_header(ibid: Running) -> None:
    body = json.dumps(whole()).encode()
    for end in (b"\r", b"\n"):
        odd = b"X-Odd: a" + end + b"Injected: 1\r\n"
        ibid.up.script(Raw(JSON_HEAD + odd + b"Content-Length: %d\r\n\r\n" % len(body) + body))
        reply = await ibid.ask(question(f"A line end of kind {end[0]} here?"))
        assert reply.status in (200, 502)
        assert not any("\r" in line or "\n" in line for line in reply.lines)


async def test_garbage_instead_of_http_is_502(ibid: Running) -> None:
    for garbage in (b"220 smtp.example ESMTP\r\n\r\n", b"\x16\x03\x01\x02\x00", b"HTTP/1.1 20x OK\r\n\r\n"):
        ibid.up.script(Raw(garbage))
        reply = await ibid.ask()
        assert reply.status == 502
        assert reply.code in ("upstream_incomplete", "upstream_reset")
    await ibid.nothing_kept()


# --- size -----------------------------------------------------------------------------------------------------------


@FORMS
async def test_a_large_answer_is_relayed_and_not_kept(ibid: Running, stream: bool) -> None:
    text = "many words " * 500_000
    ibid.up.script(Chat(text=text, pieces=300))
    body = question(stream=stream)
    assert (await ibid.ask(body)).text == text
    await ibid.nothing_kept(body)


async def test_an_answer_nobody_reads_is_not_read_ahead(ibid: Running) -> None:
    piece = ONE + b": " + b"x" * 65_000 + b"\n\n"
    ibid.up.script(Stream([ROLE, *[piece] * 1600, STOP, DONE]))
    client = await RawClient.connect(ibid.port)
    client.writer.transport.pause_reading()
    await client.send(request(question(stream=True)))
    await ibid.up.arrived.wait()
    sizes = []
    for _ in range(40):
        await asyncio.sleep(0.01)
        sizes += [flight.size_bytes for flight in ibid.pipeline.flights.values()]
    assert sizes
    assert max(sizes) < 32 * 1024 * 1024, "100 MiB wait at the upstream, not here"
    client.reset()
    async with asyncio.timeout(PATIENCE_S):
        await ibid.up.left.wait()
    assert await ibid.stored() == 0


async def test_a_large_encoded_answer_is_unpacked_on_its_way_and_not_kept(ibid: Running) -> None:
    plain = json.dumps(whole("x" * 30_000_000)).encode()
    ibid.up.script(Body(200, plain, gzipped=True))
    reply = await ibid.ask()
    assert "content-encoding" not in reply.headers
    assert reply.body == plain
    assert ibid.up.requests[0].header("accept-encoding") == "identity"
    await ibid.nothing_kept()


async def test_fewer_choices_than_asked_are_relayed_and_not_kept(ibid: Running) -> None:
    ibid.up.script(Json(200, whole()))
    reply = await ibid.ask(question(n=3))
    assert len(json.loads(reply.body)["choices"]) == 1
    await ibid.nothing_kept(question(n=3))


async def test_a_dated_snapshot_of_the_model_asked_is_kept(ibid: Running) -> None:
    ibid.up.script(Chat(model="gpt-4o-mini-2024-07-18"))
    await ibid.ask()
    await ibid.settled()
    hit = await ibid.ask()
    assert hit.is_hit
    assert json.loads(hit.body)["model"] == "gpt-4o-mini-2024-07-18"
