"""Fault catalogue, requests: what is malformed, hostile or merely odd gets its exact answer and goes no further."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest

from proxy.core.model import Limits
from tests.edge.faults_app import (
    BEARER,
    KEY,
    Running,
    assert_silent,
    ibid,
    log_of,
    question,
    request,
    send,
    serving,
    up,
)
from tests.edge.faults_wire import whole
from tests.edge.rawclient import RawClient
from tests.upstream import Json, Raw, ScriptedUpstream
from tests.waiting import until

__all__ = ["ibid", "up"]  # fixtures

MIB = 1024 * 1024


async def refused(ibid: Running, raw: bytes, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Sent alone, the request gets this envelope, and the upstream hears nothing of it."""
    before = ibid.asked
    reply = await ibid.send(raw)
    assert (reply.status, reply.code, reply.error["param"]) == (status, code, param)
    assert reply.whole
    assert ibid.asked == before
    assert_silent([KEY], reply.raw)
    return reply.error


# --- size, encoding, framing, path ----------------------------------------------------------------------------------


def large(size: int, **fields: Any) -> bytes:
    url = "data:image/png;base64," + "QUJD" * (size // 4)
    parts = [{"type": "text", "text": "What is on it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": parts}], **fields}).encode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["declared", "chunked", "gzip"])
async def test_a_body_over_the_limit_is_forwarded_unread(ibid: Running, way: str, stream: bool) -> None:
    body = large(9 * MIB, stream=stream)
    raw = request(body)
    if way == "gzip":
        raw = request(gzip.compress(body, 1), "Content-Encoding: gzip")
        ibid.up.script(Json(200, whole()))  # it can read it, this one cannot
    if way == "chunked":
        head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        raw = head + b"".join([b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:MIB], body[MIB:])]) + b"0\r\n\r\n"
    reply = await ibid.send(raw)
    assert (reply.status, reply.whole) == (200, True)
    assert "detail=body_too_large" in reply.headers["cache-status"]
    (seen,) = ibid.up.requests
    assert (gzip.decompress(seen.body) if way == "gzip" else seen.body) == body
    assert seen.header("content-encoding") == ("gzip" if way == "gzip" else None)
    assert await ibid.stored() == 0


async def test_it_is_forwarded_while_it_arrives(ibid: Running) -> None:
    head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    client = await RawClient.connect(ibid.port)
    await client.send(head + b"500000\r\n" + b"x" * 5 * MIB + b"\r\n")
    await until(lambda: ibid.handlers[0].admission.free < Limits().in_flight)
    client.close()


@pytest.mark.parametrize(
    ("coding", "body", "status", "code"),
    [
        ("gzip", b"not gzip at all", 400, "invalid_encoding"),
        ("gzip", gzip.compress(question())[:-4], 400, "invalid_encoding"),
    ],
    ids=["bad gzip", "cut gzip"],
)
async def test_an_encoded_body_is_read_within_the_limit_or_refused(
    ibid: Running, coding: str, body: bytes, status: int, code: str
) -> None:
    await refused(ibid, request(body, f"Content-Encoding: {coding}"), status, code)


UNREAD = {
    "gzip bomb": ("gzip", gzip.compress(bytes(64 * MIB)), "body_too_large"),
    "deflate bomb": ("deflate", zlib.compress(bytes(64 * MIB)), "body_too_large"),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b"{}")), "body_encoding"),
    "br": ("br", b"{}", "body_encoding"),
    "zstd": ("zstd", b"{}", "body_encoding"),
    "unknown": ("rot13", b"{}", "body_encoding"),
}


@pytest.mark.parametrize("name", UNREAD)
async def test_an_encoded_body_that_is_not_read_goes_on_as_it_came(ibid: Running, name: str) -> None:
    coding, body, reason = UNREAD[name]
    ibid.up.script(Raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"))
    reply = await ibid.send(request(body, f"Content-Encoding: {coding}"))
    assert (reply.status, reply.body, reply.headers["x-cache-reason"]) == (200, b"{}", reason)
    assert ibid.up.requests[0].header("content-encoding") == coding


async def test_a_gzipped_question_is_the_same_question(ibid: Running) -> None:
    assert (await ibid.ask(gzip.compress(question()), "Content-Encoding: gzip")).status == 200
    await ibid.settled()
    assert (await ibid.ask()).is_hit
    assert ibid.up.requests[0].body == question(), "decoded on its way"
    assert ibid.up.requests[0].header("content-encoding") is None


SMUGGLED = request(question("smuggled"))


@pytest.mark.parametrize(
    "line",
    [
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 1\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"X-A: 1\r\n 2\r\n",
        b"X-A : 1\r\n",
        b"X-A: a\0b\r\n",
        b"Host: other\r\n",
    ],
    ids=["CL and TE", "two CL", "xchunked", "obs-fold", "space before colon", "NUL", "two hosts"],
)
async def test_ambiguous_framing_is_refused_and_what_follows_never_runs(ibid: Running, line: bytes) -> None:
    raw = request(question(), close=False).replace(b"Host: localhost\r\n", b"Host: localhost\r\n" + line)
    client = await RawClient.connect(ibid.port)
    await client.send(raw + SMUGGLED)
    reply = await client.answer()
    assert (reply.status, reply.code) == (400, "bad_request")
    assert reply.headers["connection"] == "close"
    assert await client.rest() == b""
    assert ibid.asked == 0
    client.close()


@pytest.mark.parametrize("host", ["a/b", "a?b", "a#b"])
async def test_a_host_that_is_none_is_refused(ibid: Running, host: str) -> None:
    raw = request(question()).replace(b"Host: localhost", b"Host: " + host.encode())
    await refused(ibid, raw, 400, "bad_request")


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (request(question(), *(f"X-{i}: 1" for i in range(140))), 431, "headers_too_large"),
        (request(question(), "X-A: " + "a" * 9000), 431, "headers_too_large"),
        (request(question(), credential=BEARER + "x" * 8200), 431, "headers_too_large"),
        (request(question(), target="/v1/" + "a" * 9000), 414, "uri_too_long"),
    ],
    ids=["140 headers", "9 kB header", "8 kB credential", "9 kB URL"],
)
async def test_an_oversized_head_is_refused(ibid: Running, raw: bytes, status: int, code: str) -> None:
    await refused(ibid, raw, status, code)


async def test_slow_heads_bodies_and_idle_connections_are_closed(tmp_path: Path, up: ScriptedUpstream) -> None:
    toml = "[cache]\nsemantic = false\n[limits]\nheader_timeout_s = 0.3\nbody_timeout_s = 0.3\nkeep_alive_s = 1.0\n"
    async with serving(tmp_path, up, toml) as ibid:
        head, body = await asyncio.gather(ibid.send(b"POST /v1/chat"), ibid.send(request(question())[:-5]))
        for reply in (head, body):
            assert (reply.status, reply.code) == (408, "request_timeout")
        idle = await RawClient.connect(ibid.port)
        assert await idle.rest() == b""
        idle.close()
        assert ibid.asked == 0


async def test_a_hundred_pipelined_requests_are_answered_in_order(ibid: Running) -> None:
    client = await RawClient.connect(ibid.port)
    await client.send(b"".join(request(question(f"pipelined number {i}"), close=False) for i in range(100)))
    for i in range(100):
        answer = await client.answer()
        assert json.loads(answer.body)["choices"][0]["message"]["content"].endswith(f"pipelined number {i}")
    client.close()


@pytest.mark.parametrize("method", ["POST", "GET", "CONNECT", "TRACE", "OPTIONS"])
async def test_a_target_that_names_another_host_never_leads_there(ibid: Running, method: str) -> None:
    async with ScriptedUpstream() as elsewhere:
        body = question() if method == "POST" else b""
        for target in (
            f"{elsewhere.url}/v1/chat/completions",
            f"127.0.0.1:{elsewhere.port}",
            "*",
            f"//127.0.0.1:{elsewhere.port}/v1/models",
            f"/v1@127.0.0.1:{elsewhere.port}/v1/models",
        ):
            reply = await send(ibid.port, request(body, method=method, target=target))
            assert reply.status in (200, 400, 404, 405)
            if reply.status != 200 and not ibid.asked:
                assert reply.code in ("bad_request", "unknown_url", "method_not_allowed")
        assert elsewhere.requests == []
        assert {seen.header("host") for seen in ibid.up.requests} <= {f"127.0.0.1:{ibid.up.port}"}


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
async def test_tunnels_are_not_allowed(ibid: Running, method: str) -> None:
    await refused(ibid, request(b"", method=method, target="/v1/chat/completions"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "target",
    ["//v1/models", "/v1/../cache/flush", "/v1/%2e%2e/cache", "/v1/models%00", "/v1/chat;x/..", "/V1/chat/completions"],
)
async def test_path_tricks_lead_nowhere(ibid: Running, target: str) -> None:
    await refused(ibid, request(question(), target=target), 404, "unknown_url")


@pytest.mark.parametrize("target", ["/cache/flush", "/cache/stats", "/metrics", "/readyz", "/healthz", "/savings", "/"])
async def test_no_admin_handler_answers_on_the_client_port(ibid: Running, target: str) -> None:
    await ibid.ask()
    await ibid.settled()
    reply = await ibid.ask(b'{"confirm":"flush"}', target=target, credential=f"Authorization: Bearer {'a' * 32}")
    assert ibid.up.requests[-1].path == target, "an ordinary path, passed on"
    assert reply.headers["x-upstream"] == ibid.app.edges.upstreams.route(target, {}, None)
    assert (await ibid.ask()).is_hit, "nothing was flushed"


async def test_an_expectation_is_met_and_an_upgrade_ignored(ibid: Running) -> None:
    client = await RawClient.connect(ibid.port)
    body = question()
    await client.send(request(body, "Expect: 100-continue")[: -len(body)])
    assert (await client.head())[1] == 100
    await client.send(body)
    assert (await client.answer()).status == 200
    client.close()
    for upgrade in ("h2c", "websocket"):
        raw = request(body, f"Upgrade: {upgrade}").replace(b"Connection: close", b"Connection: upgrade, close")
        assert (await ibid.send(raw)).status == 200


# --- media type and credential --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media", ["multipart/form-data; boundary=x", "application/xml", "application/jsonp", "json", "image/png"]
)
async def test_a_body_that_is_called_something_else_is_refused(ibid: Running, media: str) -> None:
    await refused(ibid, request(question(), content_type=media), 415, "unsupported_media_type")


@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded", "application/vnd.x+json"])
async def test_a_body_whose_name_says_nothing_is_json(ibid: Running, media: str | None) -> None:
    assert (await ibid.ask(content_type=media)).status == 200
    assert ibid.up.requests[0].body == question()
    await ibid.settled()
    assert (await ibid.ask()).is_hit, "the same question, whatever it is called"


async def test_json_with_a_charset_is_json(ibid: Running) -> None:
    assert (await ibid.ask(content_type="application/json; charset=utf-8")).status == 200


CREDENTIALS = {
    "absent": None,
    "empty": "Authorization:",
    "no key": "Authorization: Bearer",
    "a scheme alone": "Authorization: basic",
    "twice": f"{BEARER}\r\n{BEARER}",
    "twice, another": f"{BEARER}\r\nAuthorization: Bearer sk-other",
    "SQL": f"Authorization: Bearer {KEY}' OR 1=1--",
    "quote": f'x-api-key: {KEY}"',
    "two keys": f"Authorization: Bearer {KEY} {KEY}",
    "not ASCII": f"Authorization: Bearer {KEY}é",
}


@pytest.mark.parametrize("name", CREDENTIALS)
async def test_what_is_no_credential_is_401_and_never_shown(
    ibid: Running, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await refused(ibid, request(question(), credential=CREDENTIALS[name]), 401, "invalid_api_key")
    await refused(
        ibid, request(b"", method="GET", target="/v1/models", credential=CREDENTIALS[name]), 401, "invalid_api_key"
    )
    assert_silent([KEY, "OR 1=1"], log_of(caplog))


async def test_line_ends_inside_a_credential_do_not_make_headers(ibid: Running) -> None:
    for end in ("\r", "\n", "\r\n "):
        reply = await ibid.send(request(question(), credential=f"Authorization: Bearer {KEY}{end}X-Evil: 1"))
        assert reply.status in (400, 401), repr(end)
        assert_silent([KEY], reply.raw)
    assert ibid.asked == 0


# --- JSON -----------------------------------------------------------------------------------------------------------

PLAIN = question()
BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "invalid_json"),
    "words": (b"hello", "invalid_json"),
    "BOM": (b"\xef\xbb\xbf" + PLAIN, "invalid_json"),
    "trailing junk": (PLAIN + b"x", "invalid_json"),
    "two values": (PLAIN + PLAIN, "invalid_json"),
    "array": (b"[]", "invalid_json"),
    "scalar": (b"1", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "cut": (PLAIN[:-1], "invalid_json"),
    "trailing comma": (PLAIN[:-1] + b",}", "invalid_json"),
    "comment": (b"/**/" + PLAIN, "invalid_json"),
    "invalid UTF-8": (PLAIN.replace(b"Paris", b"Pari\xff"), "invalid_utf8"),
    "overlong UTF-8": (PLAIN.replace(b"Paris", b"\xc0\xaf"), "invalid_utf8"),
    "lone surrogate": (PLAIN.replace(b"Paris", b"\\ud800"), "invalid_utf8"),
    "lone low surrogate": (PLAIN.replace(b"Paris", b"\\udc00!"), "invalid_utf8"),
    "NaN": (PLAIN[:-1] + b',"temperature":NaN}', "invalid_number"),
    "Infinity": (PLAIN[:-1] + b',"temperature":-Infinity}', "invalid_number"),
    "1e999": (PLAIN[:-1] + b',"temperature":1e999}', "invalid_number"),
    "5,000 digits": (PLAIN[:-1] + b',"seed":' + b"9" * 5000 + b"}", "invalid_number"),
    "depth 65": (PLAIN[:-1] + b',"x":' + b"[" * 65 + b"]" * 65 + b"}", "json_too_deep"),
    "depth 2,000": (PLAIN[:-1] + b',"x":' + b"[" * 2000 + b"]" * 2000 + b"}", "json_too_deep"),
    "depth 100,000": (b'{"x":' * 100_000, "json_too_deep"),
    "model twice": (b'{"model":"a",' + PLAIN[1:], "duplicate_key"),
    "role twice": (PLAIN.replace(b'"role"', b'"role":"system","role"'), "duplicate_key"),
    "escaped twin": (b'{"\\u006dodel":"a",' + PLAIN[1:], "duplicate_key"),
}


@pytest.mark.parametrize("name", BAD_JSON)
async def test_a_body_that_could_be_read_in_two_ways_is_refused(ibid: Running, name: str) -> None:
    body, code = BAD_JSON[name]
    before = ibid.asked
    reply = await ibid.send(request(body))
    assert (reply.status, reply.code) == (400, code)
    assert ibid.asked == before
    if code == "invalid_json":
        assert any(character.isdigit() for character in reply.error["message"]), "the byte offset"


BAD_FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "model list": ({"model": ["m"]}, "invalid_type", "model"),
    "model number": ({"model": 5}, "invalid_type", "model"),
    "messages null": ({"messages": None}, "invalid_type", "messages"),
    "no message": ({"messages": []}, "invalid_type", "messages"),
    "10,000 messages": ({"messages": [{"role": "user", "content": "a"}] * 10_000}, "invalid_type", "messages"),
    "message text": ({"messages": ["a"]}, "invalid_type", "messages[0]"),
    "role number": ({"messages": [{"role": 1, "content": "a"}]}, "invalid_type", "messages[0].role"),
    "content number": ({"messages": [{"role": "user", "content": 1}]}, "invalid_type", "messages[0].content"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages[0].content"),
    "part number": ({"messages": [{"role": "user", "content": [1]}]}, "invalid_type", "messages[0].content[0]"),
    "stream text": ({"stream": "yes"}, "invalid_type", "stream"),
    "temperature text": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "temperature bool": ({"temperature": True}, "invalid_type", "temperature"),
    "stop number": ({"stop": 1}, "invalid_type", "stop"),
    "n million": ({"n": 1_000_000}, "invalid_value", "n"),
    "n 129": ({"n": 129}, "invalid_value", "n"),
    "n zero": ({"n": 0}, "invalid_value", "n"),
    "n negative": ({"n": -1}, "invalid_value", "n"),
    "n float": ({"n": 1.5}, "invalid_value", "n"),
    "n bool": ({"n": True}, "invalid_value", "n"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
async def test_a_field_of_the_wrong_type_is_named(ibid: Running, name: str) -> None:
    fields, code, param = BAD_FIELDS[name]
    await refused(ibid, request(question(**fields)), 400, code, param)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [{"role": "wizard", "content": "an unknown role speaks here"}]}, "unknown_field"),
        ({"messages": [{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}]}, "unknown_field"),
        ({"frobnicate": {"deep": [1, 2.50, "x"]}}, "unknown_field"),
        ({"api_base": "http://127.0.0.1:9", "base_url": "http://127.0.0.1:9"}, "unknown_field"),
    ],
    ids=["role", "part", "field", "api_base"],
)
async def test_what_is_merely_unknown_goes_on_byte_for_byte_and_is_never_matched_by_meaning(
    tmp_path: Path, up: ScriptedUpstream, fields: dict[str, Any], reason: str
) -> None:
    async with serving(tmp_path, up, "[embedding]\nmodel = '/nowhere'\n") as ibid:
        body = question(**fields)
        up.script(*[lambda seen: chat_answer()] * 2)
        first = await ibid.ask(body)
        assert first.status == 200
        assert up.requests[0].body == body
        assert first.headers["x-cache-reason"] == reason
        await ibid.settled()
        assert (await ibid.ask(body)).is_hit, "its exact identity still hits"
        changed = question(**{**fields, "extra": 1})
        assert not (await ibid.ask(changed)).is_hit


def chat_answer() -> Any:
    message = {"role": "assistant", "content": "fine"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini", "choices": [choice]}
    return Json(200, {**whole, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})


async def test_more_than_one_choice_is_neither_looked_up_nor_kept(ibid: Running) -> None:
    reply = await ibid.ask(question(n=2))
    assert (reply.status, reply.headers["x-cache"], reply.headers["x-cache-reason"]) == (200, "BYPASS", "n")
    await ibid.nothing_kept(question(n=2))


TWINS = {
    "composed": "Is a caf\u00e9 open in town?",
    "decomposed": "Is a cafe\u0301 open in town?",
    "zero width": "Is a ca\u200bf\u00e9 open in town?",
    "bidi": "Is a \u202ecaf\u00e9\u202c open in town?",
    "full width": "Is a caf\u00e9 open in t\uff4fwn?",
    "homoglyph": "Is \u0430 caf\u00e9 open in town?",
    "case": "is a caf\u00e9 open in town?",
    "trailing blank": "Is a caf\u00e9 open in town? ",
}


async def test_text_twins_are_entries_of_their_own_and_keep_their_text(ibid: Running) -> None:
    for text in TWINS.values():
        assert not (await ibid.ask(question(text))).is_hit
    await ibid.settled()
    for text in TWINS.values():
        reply = await ibid.ask(question(text))
        assert reply.is_hit
        assert reply.text.endswith(f"to: {text}"), "its own answer, its text unchanged"
    assert ibid.asked == len(TWINS)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "a", "\U0001f600", "\U0001f600\U0001f680 \U0001f44d"])
async def test_an_empty_or_tiny_prompt_is_forwarded_and_never_compared(
    tmp_path: Path, up: ScriptedUpstream, prompt: str
) -> None:
    async with serving(tmp_path, up, "[embedding]\nmodel = '/nowhere'\n") as ibid:
        reply = await ibid.ask(question(prompt))
        assert reply.status == 200
        assert reply.headers["x-cache-reason"] == "short", "the embedder, which is absent, was not asked"
        assert up.requests[0].body == question(prompt)


async def test_ids_of_answers_are_fresh_whatever_the_client_sends(ibid: Running) -> None:
    mine = "x-request-id: mine-mine-mine-mine"
    replies = [await ibid.ask(None, mine) for _ in range(3)] + [await ibid.ask(b"{", mine)]
    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == 4
    assert "mine-mine-mine-mine" not in ids


async def test_an_answer_has_one_request_id_ours_and_names_the_upstreams_apart(ibid: Running) -> None:
    for target, body in (("/v1/chat/completions", question()), ("/v1/moderations", b"{}")):
        ibid.up.script(Json(200, {"id": "x"}, headers={"X-Request-ID": "req_upstream"}))
        reply = await ibid.ask(body, target=target)
        assert sum(line.lower().startswith("x-request-id:") for line in reply.lines) == 1
        assert reply.headers["x-request-id"] != "req_upstream"
        assert reply.headers["x-upstream-request-id"] == "req_upstream"
