"""Fault catalogue, upstreams: whatever a model server does, the client learns it and nothing incomplete is kept."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.client import delivery
from tests.edge.faults_app import Running, ibid, question, request, serving, up
from tests.edge.faults_wire import DONE, FORMS, JSON_HEAD, ONE, ROLE, SSE_HEAD, STOP, TWO, chunk, whole
from tests.edge.rawclient import RawClient
from tests.faultproxy import Fault, FaultProxy
from tests.upstream import Body, Chat, Json, Raw, Reply, ScriptedUpstream, Stream, event
from tests.waiting import PATIENCE_S

__all__ = ["ibid", "up"]  # fixtures

SHORT = (
    "[cache]\nsemantic = false\n[forward]\nfirst_byte_timeout_s = 0.3\nidle_timeout_s = 0.3\nconnect_timeout_s = 1.0\n"
)


@pytest.fixture
async def short(tmp_path: Path, up: ScriptedUpstream) -> AsyncIterator[Running]:
    async with serving(tmp_path, up, SHORT) as running:
        yield running


@pytest.fixture
async def fp(up: ScriptedUpstream) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", up.port) as proxy:
        yield proxy


# --- no answer at all -----------------------------------------------------------------------------------------------


@FORMS
async def test_an_upstream_that_is_not_there_is_502_at_once(tmp_path: Path, up: ScriptedUpstream, stream: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    for url in (closed, "http://name.invalid"):
        folder = tmp_path / url[7:11]
        folder.mkdir()
        async with serving(folder, up, url=url) as ibid:
            reply = await ibid.ask(question(stream=stream))
            assert (reply.status, reply.code) == (502, "upstream_unreachable")
            assert await ibid.stored() == 0


async def test_a_certificate_that_does_not_hold_is_502(tmp_path: Path, up: ScriptedUpstream) -> None:
    async with serving(tmp_path, up, url=up.url.replace("http:", "https:")) as ibid:
        reply = await ibid.ask()
        assert (reply.status, reply.code) == (502, "upstream_unreachable")
        assert ibid.asked == 0


@FORMS
async def test_an_upstream_that_never_answers_is_504(
    tmp_path: Path, up: ScriptedUpstream, fp: FaultProxy, stream: bool
) -> None:
    fp.downstream = Fault(blackhole=True)
    async with serving(tmp_path, up, SHORT, url=fp.url) as ibid:
        reply = await ibid.ask(question(stream=stream))
        assert (reply.status, reply.code) == (504, "upstream_timeout")
        connections = fp.connections
        fp.downstream = Fault()
        await ibid.nothing_kept(question(stream=stream))
        assert fp.connections == connections + 1, "the silent connection is not used again"


@FORMS
async def test_a_reset_before_the_head_is_502(ibid: Running, stream: bool) -> None:
    ibid.up.script(Raw(b"", "rst"))
    reply = await ibid.ask(question(stream=stream))
    assert (reply.status, reply.code) == (502, "upstream_reset")
    assert ibid.asked == 1, "not asked again"
    await ibid.nothing_kept(question(stream=stream))


CUT_WHOLE = json.dumps(whole()).encode()
BROKEN_WHOLE = {
    "reset after the head": (Raw(JSON_HEAD + b"Content-Length: 500\r\n\r\n", "rst"), "upstream_reset"),
    "reset in the body": (Raw(JSON_HEAD + b"Content-Length: 500\r\n\r\n" + CUT_WHOLE[:90], "rst"), "upstream_reset"),
    "short of its length": (Raw(JSON_HEAD + b"Content-Length: 500\r\n\r\n" + CUT_WHOLE[:90]), "upstream_incomplete"),
}


@pytest.mark.parametrize("name", BROKEN_WHOLE)
async def test_a_body_that_breaks_is_502_and_not_kept(ibid: Running, name: str) -> None:
    script, code = BROKEN_WHOLE[name]
    ibid.up.script(script)
    reply = await ibid.ask()
    assert (reply.status, reply.code) == (502, code)
    await ibid.nothing_kept()


async def test_a_chunked_body_that_breaks_is_never_ended_as_if_whole(ibid: Running) -> None:
    ibid.up.script(Stream([CUT_WHOLE[:50], CUT_WHOLE[50:90]], cut="fin", content_type="application/json"))
    reply = await ibid.ask()
    assert not reply.whole or reply.status == 502
    assert CUT_WHOLE.startswith(reply.body) or reply.status == 502
    await ibid.nothing_kept()


async def test_more_than_the_declared_length_is_dropped_with_its_connection(ibid: Running) -> None:
    body = json.dumps(whole()).encode()
    head = JSON_HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    ibid.up.script(Raw(head + body + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
    assert (await ibid.ask()).body == body
    await ibid.settled()
    assert b"evil" not in (await ibid.ask(question("Another question about something else?"))).body


# --- streams that break ---------------------------------------------------------------------------------------------

CUT = {
    "reset": (Stream([ROLE, ONE], cut="rst"), ROLE + ONE, "upstream_reset"),
    "reset at the start": (Stream([], cut="rst"), b"", "upstream_reset"),
    "cut between events": (Stream([ROLE, ONE], cut="fin"), ROLE + ONE, "upstream_incomplete"),
    "cut inside an event": (Stream([ROLE, ONE, TWO[:30]], cut="fin"), ROLE + ONE, "upstream_incomplete"),
    "clean end, no [DONE]": (Stream([ROLE, ONE]), ROLE + ONE, "upstream_incomplete"),
    "end of connection": (Raw(SSE_HEAD + b"\r\n" + ROLE + ONE), ROLE + ONE, "upstream_incomplete"),
    "[DONE] without finish_reason": (Stream([ROLE, ONE, DONE]), ROLE + ONE, "upstream_incomplete"),
    "cut behind the finish_reason": (
        Stream([ROLE, ONE, STOP, b'data: {"choices": [], "us']), ROLE + ONE + STOP, "upstream_incomplete"
    ),
    "short of its length": (
        Raw(SSE_HEAD + b"Content-Length: 5000\r\n\r\n" + ROLE + ONE), ROLE + ONE, "upstream_incomplete"
    ),
    "nothing": (Stream([]), b"", "upstream_incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
async def test_a_broken_stream_gives_what_came_then_an_error_and_no_end(ibid: Running, name: str) -> None:
    script, relayed, code = CUT[name]
    ibid.up.script(script)
    body = question(stream=True)
    reply = await ibid.ask(body)
    assert reply.status == 200
    assert reply.body.startswith(relayed)
    assert reply.body[len(relayed) :].count(b"data:") == 1
    assert reply.stream_error == code
    await ibid.nothing_kept(body)


UNMARKED = {
    "chunked": Stream([ROLE, ONE, STOP]),
    "with a length": Raw(SSE_HEAD + b"Content-Length: %d\r\n\r\n" % len(ROLE + ONE + STOP) + ROLE + ONE + STOP),
    "until the connection ends": Raw(SSE_HEAD + b"\r\n" + ROLE + ONE + STOP),
}


@pytest.mark.parametrize("name", UNMARKED)
async def test_a_stream_that_ends_well_needs_no_done_but_is_not_kept_without_it(ibid: Running, name: str) -> None:
    ibid.up.script(UNMARKED[name])
    body = question(stream=True)
    reply = await ibid.ask(body)
    assert (reply.body, reply.whole) == (ROLE + ONE + STOP, True)
    await ibid.nothing_kept(body)


@pytest.mark.parametrize("lead", [b"data: ", b'data: {"choices":[{"delta":{"content":"'])
async def test_an_event_of_10_mib_is_relayed_and_not_kept(ibid: Running, lead: bytes) -> None:
    chunks = [ROLE, lead + b"x" * (10 << 20) + b"\n\n", STOP, DONE]
    ibid.up.script(Stream(chunks))
    body = question(stream=True)
    reply = await ibid.ask(body)
    assert reply.whole
    assert reply.body == b"".join(chunks)
    await ibid.nothing_kept(body)


async def test_nothing_is_said_inside_an_event_that_is_not_whole(
    ibid: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "HEARTBEAT_S", 0.0)
    gate = asyncio.Event()
    half = b"data: " + b"x" * (2 << 20)
    ibid.up.script(Stream([ROLE, half, b"y\n\n", STOP, DONE], gates={2: gate}))
    client = await RawClient.connect(ibid.port)
    await client.send(request(question(stream=True)))
    async with asyncio.timeout(PATIENCE_S):
        before = await client.reader.readuntil(b"xxx\r\n")
        for _ in range(3):
            ibid.handlers[0].beat(1e12)
    gate.set()
    rest = await client.rest()
    client.close()
    said = before + rest
    assert b": ping" not in said[said.index(b"data: x") : said.index(b"y\n\n")]


@pytest.mark.parametrize("charset", ["; charset=utf-8", ";charset=UTF-8"])
async def test_a_stream_that_names_its_charset_is_a_stream(ibid: Running, charset: str) -> None:
    media = "text/event-stream" + charset
    body = question(stream=True)
    ibid.up.script(Stream([ROLE, ONE], content_type=media), Stream([ROLE, ONE, TWO, STOP, DONE], content_type=media))
    assert (await ibid.ask(body)).stream_error == "upstream_incomplete"
    await ibid.settled()
    assert (await ibid.ask(body)).text == "one two"
    await ibid.settled()
    assert (await ibid.ask(body)).is_hit


async def test_a_stream_that_stalls_is_kept_alive_and_then_ended(
    short: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    short.up.script(Raw(SSE_HEAD + b"\r\n" + ROLE + ONE, "stall"))
    body = question(stream=True)
    reply = await short.ask(body)
    assert reply.body.startswith(ROLE + ONE)
    assert reply.stream_error == "upstream_idle_timeout"
    await short.nothing_kept(body)


async def test_a_silent_stream_gets_comments_between_events(ibid: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "HEARTBEAT_S", 0.0)
    gate = asyncio.Event()
    ibid.up.script(Stream([ROLE, ONE[:20], ONE[20:], STOP, DONE], gates={2: gate}))
    client = await RawClient.connect(ibid.port)
    await client.send(request(question(stream=True)))
    head = await client.reader.readuntil(b"\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        before = await client.reader.readuntil(b": ping\n")
    gate.set()
    rest = await client.rest()
    client.close()
    assert b"text/event-stream" in head
    relayed = b"".join(piece for piece in (before + rest).split(b"\r\n") if b"data" in piece or b"ping" in piece)
    assert relayed.replace(b": ping\n", b"") == ROLE + ONE + STOP + DONE
    await ibid.settled()
    assert (await ibid.ask(question(stream=True))).text == "one ", "the comments are no part of what is kept"


async def test_an_upstream_that_goes_silent_in_a_whole_answer_is_504(short: Running) -> None:
    short.up.script(Raw(JSON_HEAD + b"Content-Length: 500\r\n\r\n{", "stall"))
    reply = await short.ask()
    assert (reply.status, reply.code) == (504, "upstream_idle_timeout")
    await short.nothing_kept()


ODD_STREAMS = {
    "data that is no JSON": [ROLE, b"data: {{{\n\n", ONE, STOP, DONE],
    "an array as data": [ROLE, b"data: []\n\n", ONE, STOP, DONE],
    "an unknown object": [ROLE, event({"weather": "fine"}), ONE, STOP, DONE],
    "data after [DONE]": [ROLE, ONE, STOP, DONE, TWO],
    "a named event": [ROLE, b"event: surprise\n" + ONE, STOP, DONE],
    "an error after text": [ROLE, ONE, event({"error": {"message": "overloaded", "code": "x"}}), DONE],
    "an error alone": [event({"error": {"message": "overloaded", "type": "server_error", "code": None}})],
    "a tool call without a name": [ROLE, chunk({"tool_calls": [{"index": 0, "id": "c", "function": {}}]}), STOP, DONE],
    "invalid UTF-8": [ROLE, b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', STOP, DONE],
    "another finish": [ROLE, ONE, chunk({}, "length"), DONE],
}


@pytest.mark.parametrize("name", ODD_STREAMS)
async def test_a_stream_that_is_not_understood_is_relayed_verbatim_and_not_kept(ibid: Running, name: str) -> None:
    chunks = ODD_STREAMS[name]
    ibid.up.script(Stream(chunks))
    body = question(stream=True, stream_options={"include_usage": True})
    reply = await ibid.ask(body)
    assert reply.body == b"".join(chunks)
    await ibid.nothing_kept(body)


FINE_STREAMS = {
    "CR only": b"".join([ROLE, ONE, TWO, STOP, DONE]).replace(b"\n", b"\r"),
    "CRLF": b"".join([ROLE, ONE, TWO, STOP, DONE]).replace(b"\n", b"\r\n"),
    "BOM": b"\xef\xbb\xbf" + b"".join([ROLE, ONE, TWO, STOP, DONE]),
    "comments": b": hello\n\n" + b"".join([ROLE, ONE, TWO, STOP, DONE]),
}


@pytest.mark.parametrize("name", FINE_STREAMS)
@pytest.mark.parametrize("size", [1, 7, 10_000], ids=["bytes", "sevens", "whole"])
async def test_an_unusual_spelling_is_relayed_verbatim_however_it_is_cut(ibid: Running, name: str, size: int) -> None:
    raw = FINE_STREAMS[name]
    ibid.up.script(Stream([raw[at : at + size] for at in range(0, len(raw), size)]))
    body = question(stream=True, stream_options={"include_usage": True})
    assert (await ibid.ask(body)).body == raw
    await ibid.settled()
    again = await ibid.ask(body)
    assert again.is_hit
    assert again.text == "one two"


# --- what may be kept: 30 answers, streamed and whole ---------------------------------------------------------------

TOOL = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CUT_TOOL = [{**TOOL[0], "function": {"name": "f", "arguments": '{"city'}}]
NOT_KEPT: dict[str, Reply] = {
    **{f"finish {word}": Chat(finish_reason=word) for word in (
        "length", "content_filter", "tool_calls", "function_call", "max_tokens", "pause_turn", "refusal", "tool_use",
        "incomplete", "", "something_new",
    )},
    "tool calls that are cut": Chat(message={"tool_calls": CUT_TOOL}),
    "a function call that is cut": Chat(message={"function_call": {"name": "f", "arguments": '{"city'}}),
    "a function call beside a tool's": Chat(message={"function_call": TOOL[0]["function"], "tool_calls": TOOL}),
    "a refusal that says stop": Chat(message={"refusal": "I cannot help with that."}),
    "no text": Chat(text=""),
    "blank text": Chat(text=" \n\t "),
    "another model": Chat(model="gpt-3.5-turbo"),
    "no-store": Chat(headers={"Cache-Control": "no-store"}),
    "private": Chat(headers={"Cache-Control": "max-age=60, private"}),
    "Vary: *": Chat(headers={"Vary": "Accept, *"}),
    "a cookie": Chat(headers={"Set-Cookie": "session=abc; Path=/"}),
    "status 201": Json(201, whole()),
    "status 206": Json(206, whole()),
    "status 400": Json(400, {"error": {"message": "bad", "type": "t", "param": None, "code": "c"}}),
    "status 401": Json(401, {"error": {"message": "bad key", "type": "t", "param": None, "code": "c"}}),
    "status 403": Json(403, {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}),
    "status 404": Json(404, {"error": {"message": "no model", "type": "t", "param": None, "code": "c"}}),
    "status 422": Json(422, {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}),
    "status 429": Json(429, {"error": {"message": "slow down", "type": "t", "param": None, "code": "c"}}),
    "status 500": Json(500, {"error": {"message": "oops", "type": "t", "param": None, "code": "c"}}),
    "status 529": Json(529, {"error": {"message": "overloaded", "type": "t", "param": None, "code": "c"}}),
    "an error in a 200": Json(200, {"error": {"message": "overloaded", "type": "t", "param": None, "code": None}}),
    "HTML": Body(200, b"<html>Sign in</html>", "text/html"),
    "an empty body": Body(200, b""),
    "an empty object": Json(200, {}),
    "no choice": Json(200, whole(choices=[])),
    "null content": Json(200, whole(None)),
    "finish null": Json(200, whole(finish=None)),
    "more than 1 MiB": Chat(text="long " * 220_000),
    "status incomplete": Json(200, {"object": "response", "status": "incomplete", "output": []}),
}  # fmt: skip


def test_the_matrix_has_sixty_cases_or_more() -> None:
    assert 2 * len(NOT_KEPT) >= 60


@FORMS
@pytest.mark.parametrize("name", NOT_KEPT)
async def test_nothing_incomplete_refused_or_forbidden_is_kept(ibid: Running, name: str, stream: bool) -> None:
    script = NOT_KEPT[name]
    ibid.up.script(script)
    body = question(stream=stream, stream_options={"include_usage": True}) if stream else question()
    reply = await ibid.ask(body)
    assert reply.whole
    if isinstance(script, Json | Body):
        assert reply.status == script.status
        assert reply.body == (script.body if isinstance(script, Body) else json.dumps(script.body).encode())
    assert "cookie" not in reply.raw.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
    await ibid.nothing_kept(body)
    await ibid.settled()
    other_form = question() if stream else question(stream=True)
    assert (await ibid.ask(other_form)).is_hit, "the plain answer that followed is kept for both forms"
