"""Liberties that model servers take and every SDK bears: compression nobody asked for, streams under other names,
fields refused, long heads. What is understood of it is kept; all of it is relayed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from proxy.upstreams.attempt import LocalResponse, Peeked
from proxy.upstreams.decoding import Decoded
from proxy.upstreams.unpacking import CODINGS, PIECE_BYTES
from tests.edge.faults_app import Reply, Running, ibid, question, up
from tests.edge.faults_wire import DONE, ONE, ROLE, STOP, TWO, USAGE, chunk, whole
from tests.upstream import Body, Chat, Json, Raw, Seen, Stream, event

__all__ = ["ibid", "up"]  # fixtures

# --- compressed bodies ------------------------------------------------------------------------------------------------

PACKINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", lambda plain: zlib.compress(plain)[2:-4]),
    "gzip in two members": ("gzip", lambda plain: gzip.compress(plain[:90]) + gzip.compress(plain[90:])),
    "gzip unsaid": ("", gzip.compress),
    "gzip said and not done": ("gzip", bytes),
    "deflate said and not done": ("deflate", bytes),
    "identity said": ("identity", bytes),
    "gzip twice": ("gzip, gzip", lambda plain: gzip.compress(gzip.compress(plain))),
    "gzip in deflate": ("gzip, deflate", lambda plain: zlib.compress(gzip.compress(plain))),
}
SSE = [ROLE, ONE, TWO, STOP, event({"choices": [], "usage": USAGE}), DONE]
SPOKEN: dict[str, tuple[str, bytes, str, bytes]] = {
    "chat, whole": ("/v1/chat/completions", question(), "application/json", json.dumps(whole()).encode()),
    "chat, streamed": ("/v1/chat/completions", question(stream=True), "text/event-stream", b"".join(SSE)),
    "completions": (
        "/v1/completions", b'{"model":"gpt-4o-mini","prompt":"on"}', "application/json",
        b'{"model":"gpt-4o-mini","choices":[{"index":0,"text":"one two","finish_reason":"stop"}]}',
    ),
    "messages, whole": (
        "/v1/messages", b'{"model":"c","max_tokens":9,"messages":[{"role":"user","content":"on"}]}', "application/json",
        b'{"type":"message","id":"m","role":"assistant","model":"c","content":[{"type":"text","text":"one two"}],'
        b'"stop_reason":"end_turn","usage":{"input_tokens":3,"output_tokens":2}}',
    ),
    "ollama, streamed": (
        "/api/chat", b'{"model":"m","messages":[{"role":"user","content":"on"}]}', "application/x-ndjson",
        b'{"model":"m","message":{"role":"assistant","content":"one "},"done":false}\n'
        b'{"model":"m","message":{"role":"assistant","content":"two"},"done":true,"done_reason":"stop"}\n',
    ),
    "gemini, streamed": (
        "/v1beta/models/g:streamGenerateContent?alt=sse", b'{"contents":[{"role":"user","parts":[{"text":"on"}]}]}',
        "text/event-stream",
        b'data: {"candidates":[{"content":{"parts":[{"text":"one two"}]},"finishReason":"STOP"}],'
        b'"modelVersion":"g"}\n\n',
    ),
    "responses, whole": (
        "/v1/responses", b'{"model":"m","store":false,"input":"on"}', "application/json",
        b'{"object":"response","status":"completed","model":"m","output":[{"type":"message","role":"assistant","content":'
        b'[{"type":"output_text","text":"one two","annotations":[]}]}]}',
    ),
}  # fmt: skip
SAID = pytest.mark.parametrize("form", SPOKEN)


def pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


@SAID
@pytest.mark.parametrize("packing", PACKINGS)
async def test_a_compressed_answer_is_read_and_kept_whatever_was_asked_for(
    ibid: Running, packing: str, form: str
) -> None:
    coding, pack = PACKINGS[packing]
    target, body, media, plain = SPOKEN[form]
    headers = {"Content-Encoding": coding} if coding else {}
    ibid.up.script(Stream(pieces(pack(plain), 37), content_type=media, headers=headers))
    reply = await ibid.ask(body, "Accept-Encoding: gzip, deflate, br", target=target)
    assert reply.status == 200
    assert b"one" in reply.body
    assert b"two" in reply.body
    assert "content-encoding" not in reply.headers or coding == "identity"
    await ibid.settled()
    assert (await ibid.ask(body, target=target)).is_hit


@pytest.mark.parametrize("packing", PACKINGS)
async def test_so_is_one_whose_length_is_told(ibid: Running, packing: str) -> None:
    coding, pack = PACKINGS[packing]
    plain = json.dumps(whole()).encode()
    ibid.up.script(Body(200, pack(plain), headers={"Content-Encoding": coding} if coding else {}))
    reply = await ibid.ask()
    assert (reply.body, reply.whole) == (plain, True)
    await ibid.settled()
    assert (await ibid.ask()).is_hit


async def test_a_compressed_error_can_be_read(ibid: Running) -> None:
    told = {"error": {"message": "slow down", "type": "t", "param": None, "code": "c"}}
    ibid.up.script(Body(429, gzip.compress(json.dumps(told).encode()), headers={"Content-Encoding": "gzip"}))
    reply = await ibid.ask()
    assert (reply.status, json.loads(reply.body)) == (429, told)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("coding", ["snappy", "gzip, snappy", *({"br", "zstd"} - CODINGS.keys())])
async def test_a_coding_that_nobody_knows_stays_with_its_header(ibid: Running, stream: bool, coding: str) -> None:
    media = "text/event-stream" if stream else "application/json"
    ibid.up.script(Body(200, b"\x0b\x02\x80opaque\x03", media, headers={"Content-Encoding": coding}))
    reply = await ibid.ask(question(stream=stream), "Accept-Encoding: br, zstd, snappy")
    assert (reply.body, reply.headers["content-encoding"]) == (b"\x0b\x02\x80opaque\x03", coding)
    assert ibid.up.requests[-1].header("accept-encoding") == "identity", "nobody is asked for what cannot be read"
    await ibid.nothing_kept(question(stream=stream))
    told = (await ibid.admin("/metrics")).body.decode()
    assert 'ibid_unstored_total{reason="encoded"}' in told


PACKERS: dict[str, tuple[str, Callable[[Any], Callable[[bytes], bytes]]]] = {
    "br": ("brotli", lambda module: module.compress),  # type: ignore[no-any-return]
    "zstd": ("backports.zstd", lambda module: module.compress),  # type: ignore[no-any-return]
    "zstd in two frames": (
        "backports.zstd",
        lambda module: lambda plain: module.compress(plain[:90]) + module.compress(plain[90:]),
    ),
    "br said and not done": ("brotli", lambda _module: bytes),
    "zstd said and not done": ("backports.zstd", lambda _module: bytes),
}
"""With packages that an installation may have or not (extra `codings`)."""


@SAID
@pytest.mark.parametrize("packing", PACKERS)
async def test_so_is_one_in_a_coding_that_needs_a_package(ibid: Running, packing: str, form: str) -> None:
    name, packer = PACKERS[packing]
    pack = packer(pytest.importorskip(name))
    target, body, media, plain = SPOKEN[form]
    headers = {"Content-Encoding": packing.partition(" ")[0]}
    ibid.up.script(Stream(pieces(pack(plain), 37), content_type=media, headers=headers))
    reply = await ibid.ask(body, target=target)
    assert (reply.status, "content-encoding" in reply.headers) == (200, False)
    assert b"one" in reply.body
    await ibid.settled()
    assert (await ibid.ask(body, target=target)).is_hit


@pytest.mark.parametrize(("name", "coding"), [("brotli", "br"), ("backports.zstd", "zstd")])
async def test_little_that_unpacks_into_much_does_not_come_at_once(name: str, coding: str) -> None:
    module = pytest.importorskip(name)
    plain = b'{"a":"' + b"a" * (64 << 20) + b'"}'
    response = Decoded(Peeked(LocalResponse(200, "application/json", b""), module.compress(plain)), coding)
    size_bytes = 0
    while piece := await response.read_some():
        assert len(piece) <= 2 * PIECE_BYTES
        size_bytes += len(piece)
    assert size_bytes == len(plain)


@pytest.mark.parametrize("lost", [1, 8, 30])
async def test_a_compressed_stream_that_is_cut_is_an_error(ibid: Running, lost: int) -> None:
    raw = gzip.compress(b"".join([ROLE, ONE, TWO, STOP, DONE]))[:-lost]
    ibid.up.script(Stream([raw], headers={"Content-Encoding": "gzip"}))
    body = question(stream=True)
    reply = await ibid.ask(body)
    assert json.loads(reply.events[-1])["error"]["code"] == "upstream_incomplete"
    await ibid.nothing_kept(body)


async def test_bytes_that_cannot_be_decoded_are_an_error(ibid: Running) -> None:
    raw = gzip.compress(json.dumps(whole()).encode())
    ibid.up.script(Body(200, raw[:12] + b"\xff\xff\xff\xff" + raw[16:], headers={"Content-Encoding": "gzip"}))
    reply = await ibid.ask()
    assert not reply.whole or reply.status == 502
    await ibid.nothing_kept()


# --- streams under other names, and what ibid asked for -------------------------------------------------------------


def usage_chunks() -> dict[str, bytes]:
    head = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-4o-mini"}
    return {
        "empty": event({**head, "choices": [], "usage": USAGE}),
        "null": event({**head, "choices": None, "usage": USAGE}),
        "absent": event({**head, "usage": USAGE}),
        "spaced": b"data: " + json.dumps({**head, "usage": USAGE}).encode() + b"\n\n",
    }


@pytest.mark.parametrize("size", [20, 100_000])
@pytest.mark.parametrize("name", usage_chunks())
@pytest.mark.parametrize(
    "media", ["text/event-stream", "text/plain", "application/json", "application/octet-stream", ""]
)
async def test_the_usage_that_only_ibid_asked_for_is_never_shown(
    ibid: Running, media: str, name: str, size: int
) -> None:
    last = usage_chunks()[name]
    raw = b"".join([ROLE, ONE, TWO, STOP, last, DONE])
    head = b"HTTP/1.1 200 OK\r\n" + (b"Content-Type: %b\r\n" % media.encode() if media else b"") + b"\r\n"
    ibid.up.script(Raw(head + raw) if size > len(raw) or not media else Stream(pieces(raw, size), content_type=media))
    body = question(stream=True)
    reply = await ibid.ask(body)
    assert reply.body == raw.replace(last, b"")
    await ibid.settled()
    assert (await ibid.ask(body)).is_hit, "and it is understood"


async def test_a_client_that_asked_for_usage_gets_it(ibid: Running) -> None:
    for last in usage_chunks().values():
        raw = b"".join([ROLE, ONE, TWO, STOP, last, DONE])
        ibid.up.script(Stream([raw], content_type="text/plain"))
        body = question(f"asked {len(last)} {last[-20:-10]!r}", stream=True, stream_options={"include_usage": True})
        assert (await ibid.ask(body)).body == raw


async def test_what_is_no_stream_passes_as_it_came_whatever_it_is_called(ibid: Running) -> None:
    for media, raw in (("text/plain", b"Sign in first."), ("text/html", b"<html>"), ("application/json", b"{}")):
        ibid.up.script(Body(200, raw, media))
        reply = await ibid.ask(question(f"none of {media}", stream=True))
        assert (reply.body, reply.whole) == (raw, True)


REFUSALS: dict[str, Any] = {
    "OpenAI": (400, {"error": {"message": "Unrecognized request argument supplied: stream_options", "code": None}}),
    "FastAPI": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}),
    "words only": (400, {"message": "Extra inputs are not permitted"}),
    "another code": (422, {"error": "property 'stream_options' is unsupported"}),
    "nothing": (400, None),
}
ASKED = {
    "/v1/chat/completions": question(stream=True),
    "/v1/completions": b'{"model":"gpt-4o-mini","prompt":"Lyon","stream":true}',
}


def strict(status: int, told: Any) -> Callable[[Seen], Json | Body | Stream]:
    def answer(seen: Seen) -> Json | Body | Stream:
        if "stream_options" in seen.json:
            return Body(status, b"") if told is None else Json(status, told)
        if "prompt" in seen.json:
            text = {"model": "gpt-4o-mini", "choices": [{"index": 0, "text": "one two", "finish_reason": "stop"}]}
            return Stream([event(text), DONE])
        return Stream([ROLE, ONE, TWO, STOP, DONE])

    return answer


@pytest.mark.parametrize("target", ASKED)
@pytest.mark.parametrize("name", REFUSALS)
async def test_an_upstream_that_refuses_to_be_asked_for_usage_is_asked_without_and_remembered(
    ibid: Running, name: str, target: str
) -> None:
    ibid.up.default = strict(*REFUSALS[name])
    reply = await ibid.ask(ASKED[target], target=target)
    assert (reply.status, reply.whole, b"one" in reply.body) == (200, True, True)
    assert [b"stream_options" in seen.body for seen in ibid.up.requests] == [True, False]
    assert ibid.up.requests[1].body == ASKED[target], "as the client wrote it"
    await ibid.settled()
    assert (await ibid.ask(ASKED[target], target=target)).is_hit
    other = question("Something else altogether, by the same one?", stream=True, temperature=0)
    assert (await ibid.ask(other)).status == 200
    assert [b"stream_options" in seen.body for seen in ibid.up.requests] == [True, False, False]


async def test_a_clients_own_stream_options_are_put_back_as_they_were(ibid: Running) -> None:
    def answer(seen: Seen) -> Json | Stream:
        if "include_usage" in seen.json["stream_options"]:
            return Json(400, {"error": {"message": "unknown field include_usage"}})
        return Stream([ROLE, ONE, TWO, STOP, DONE])

    ibid.up.default = answer
    body = question(stream=True, stream_options={"include_obfuscation": False})
    assert (await ibid.ask(body)).text == "one two"
    assert ibid.up.requests[-1].body == body


async def test_a_refusal_that_is_the_clients_own_is_relayed_and_nothing_is_learnt(ibid: Running) -> None:
    told = {"error": {"message": "max_tokens is too large", "type": "t", "param": "max_tokens", "code": "c"}}
    ibid.up.script(Json(400, told, {"x-told": "yes"}))
    reply = await ibid.ask(question(stream=True))
    assert (reply.status, json.loads(reply.body), reply.headers["x-told"]) == (400, told, "yes")
    assert ibid.asked == 1
    both = {"error": {"message": "Unknown parameter: 'foo'", "type": "t", "param": "foo", "code": "c"}}
    ibid.up.script(Json(400, both), Json(400, both))
    assert (await ibid.ask(question(stream=True, foo=1))).status == 400
    await ibid.ask(question("Is it asked again, as ever?", stream=True))
    assert b"include_usage" in ibid.up.requests[-1].body
    asked = question(stream=True, stream_options={"include_usage": True})
    ibid.up.script(Json(400, both))
    assert (await ibid.ask(asked)).status == 400
    assert ibid.up.requests[-1].body == asked, "nothing was added, so nothing is taken away"


# --- heads ------------------------------------------------------------------------------------------------------------

HEADS = {
    "one line of 9 kB": {"X-Long": "a" * 9_000},
    "one line of 60 kB": {"Content-Security-Policy": "a" * 60_000},
    "150 lines": {f"X-H-{i}": "v" for i in range(150)},
    "240 lines": {f"X-H-{i}": "v" for i in range(240)},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HEADS)
async def test_a_long_head_of_an_answer_is_relayed(ibid: Running, name: str, stream: bool) -> None:
    ibid.up.script(Chat(headers=HEADS[name]))
    reply: Reply = await ibid.ask(question(stream=stream))
    assert reply.status == 200
    for header, value in HEADS[name].items():
        assert reply.headers[header.lower()] == value
    ibid.up.script(Json(200, {}, HEADS[name]))
    assert (await ibid.ask(b"x" * 2_000_000, target="/v1/rerank")).status == 200, "uploaded piece by piece too"


def test_the_chunks_are_what_they_are_called() -> None:
    assert json.loads(chunk({})[6:])["choices"]
