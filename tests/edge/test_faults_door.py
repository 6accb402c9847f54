"""Fault catalogue, the door: whoever came before, a request is read as if it were the first, and nobody fills the house
who has no key to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from tests.edge.faults_app import EXACT_ONLY, PATIENCE_S, Running, ibid, question, request, serving, until, up
from tests.edge.rawclient import RawClient
from tests.upstream import Json, ScriptedUpstream, Seen

__all__ = ["ibid", "up"]  # fixtures

MIB = 1024 * 1024
CHAT = "/v1/chat/completions"
GEMINI = "/v1beta/models/gemini-2.5-flash:generateContent"
BODIES = {
    CHAT: question(),
    GEMINI: json.dumps({"contents": [{"role": "user", "parts": [{"text": "How tall is it?"}]}]}).encode(),
}


# --- who asks -------------------------------------------------------------------------------------------------------

HEADERS = {"authorization": "Bearer {}", "x-api-key": "{}", "api-key": "{}", "x-goog-api-key": "{}"}
QUERIED = {"key": "key", "key again": "k%65y"}
CARRIERS = [*HEADERS, *QUERIED]


def secrets_in(seen: Seen) -> frozenset[str]:
    """Every credential that reached the upstream."""
    query = seen.path.partition("?")[2]
    headers = [value.removeprefix("Bearer ") for name, value in seen.headers if name.lower() in HEADERS]
    return frozenset([*headers, *(value for name, value in parse_qsl(query) if name == "key")])


def told(seen: Seen) -> Json:
    """An answer that says for whom it was made."""
    text = " ".join(sorted(secrets_in(seen)))
    if "contents" in seen.json:
        candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP", "index": 0}
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}
        return Json(200, {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash"})
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini"}
    return Json(200, {**head, "choices": [choice], "usage": usage})


def as_sent(path: str, secrets: Mapping[str, str]) -> bytes:
    """The same body to the same path, with these credentials by carrier. Equal headers make equal header blocks."""
    lines = [f"{name}: {HEADERS[name].format(secret)}" for name, secret in secrets.items() if name in HEADERS]
    pairs = [
        ("k%65y" if name == "key again" else "key", secrets[name]) for name in ("key", "key again") if name in secrets
    ]
    target = path + ("?" + "&".join(f"{name}={secret}" for name, secret in pairs) if pairs else "")
    return request(BODIES[path], *lines, target=target, credential=None, close=False)


@pytest.mark.parametrize("seed", range(3))
async def test_an_answer_goes_to_whom_it_was_made_for_whatever_carried_the_credentials(
    ibid: Running, up: ScriptedUpstream, seed: int
) -> None:
    up.default = told
    dice = random.Random(seed)
    client, hits = await RawClient.connect(ibid.port), 0
    for number in range(250):
        path = dice.choice([CHAT, GEMINI])
        carriers = dice.sample(CARRIERS, dice.randint(1, 3))
        secrets = {name: dice.choice(["sk-one", "sk-two"]) for name in carriers}
        if not {*secrets} - {*QUERIED} and path == CHAT:
            continue  # a key in the query alone is Gemini's habit
        await client.send(as_sent(path, secrets))
        answer = await client.answer()
        assert answer.status == 200, (number, secrets, answer)
        said = json.loads(answer.body)
        text = (
            said["candidates"][0]["content"]["parts"][0]["text"]
            if path == GEMINI
            else said["choices"][0]["message"]["content"]
        )
        assert text == " ".join(sorted({*secrets.values()})), f"request {number} with {secrets} got {text!r}"
        if "; hit" in answer.headers["cache-status"]:
            hits += 1
        else:
            await ibid.settled()  # the answer is stored before somebody else asks the same
    client.close()
    assert hits > 50, "the sequence repeats itself, so that there is something to mix up"


# --- what is checked of a head ----------------------------------------------------------------------------------------

BEHIND = b"GET /v1/behind HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-a\r\nConnection: close\r\n\r\n"
BAD_HEADS = {
    **{
        f"host {host}": (b"%b HTTP/1.1\r\nHost: " + host.encode(), 400)
        for host in ("a/b", "a?b", "a#b", "u@h", "u:p@h", "h:8x", "h:1:2", "h:123456", "[::1", "[::1]x", "a[b]", "::1")
    },
    "1.0 with transfer-encoding": (b"%b HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked", 400),
    "0.9 in disguise": (b"%b\\,HTTP/1.1\r\nHost: h", 400),
}
PATHS = {CHAT: "POST", GEMINI: "POST", "/v1/models": "GET", "/v1/moderations": "POST"}


@pytest.mark.parametrize("path", PATHS)
async def test_a_head_is_checked_as_if_its_path_were_new(ibid: Running, up: ScriptedUpstream, path: str) -> None:
    up.default = told
    method, body = PATHS[path], BODIES.get(path, b"{}")
    for _ in range(2):
        assert (await ibid.ask(body if method == "POST" else b"", target=path, method=method)).status == 200
    before, wrong = ibid.asked, []
    for name, (head, status) in BAD_HEADS.items():
        first = head % f"{method} {path}".encode()
        length = b"" if b"Transfer-Encoding" in head else b"\r\nContent-Length: %d" % len(body)
        sent = b"0\r\n\r\n" if b"Transfer-Encoding" in head else body
        lines = b"\r\nAuthorization: Bearer sk-a\r\nContent-Type: application/json"
        reply = await ibid.send(first + length + lines + b"\r\n\r\n" + sent + BEHIND)
        if (reply.status, reply.headers.get("connection")) != (status, "close") or reply.raw.count(b"HTTP/1.1 ") != 1:
            wrong.append((name, reply.status, reply.raw.count(b"HTTP/1.1 ")))
    for tunnel in ("TRACE", "CONNECT"):
        reply = await ibid.ask(b"", target=path, method=tunnel)
        wrong += [] if reply.status in (400, 405) else [(tunnel, reply.status, 1)]
    assert wrong == []
    assert ibid.asked == before, "the upstream heard of it"


# --- what is held for whom --------------------------------------------------------------------------------------------

REFUSED: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "no credential": (401, {"credential": None}),
    "a tunnel": (405, {"method": "TRACE"}),
    "no json": (415, {"content_type": "application/xml"}),
    "a broken body": (400, {"body": b"{"}),
    "not let in upstream": (401, {"body": question()}),
    "not let in upstream, passed through": (401, {"target": "/v1/moderations"}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_nothing_is_held_of_a_request_that_was_refused(ibid: Running, up: ScriptedUpstream, name: str) -> None:
    status, how = REFUSED[name]
    up.default = Json(401, {"error": {"message": "no", "type": "t", "param": None, "code": "c"}})
    body = how.get("body", b"{}")
    plain = {key: value for key, value in how.items() if key not in ("body", "target")}

    async def refuse(number: int) -> None:
        lines = [f"anthropic-x-{line}: {number:08}{'v' * 8000}" for line in range(100)]
        target = f"{how.get('target', CHAT)}?n={number:08}{'q' * 4000}"
        reply = await ibid.send(request(body, *lines, target=target, **plain))
        assert reply.status == status
        up.requests.clear()

    for number in range(5):
        await refuse(number)
    await ibid.settled()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(5, 65):
            await refuse(number)
        await ibid.settled()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 4 * MIB, f"{held / MIB:.1f} MiB of 60 requests with 0.8 MB of headers each"


# --- half a body ------------------------------------------------------------------------------------------------------

HALVES = {
    "a question": (CHAT, "application/json", question()[:-9]),
    "an upload of ours": ("/v1/files", "multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; na"),
    "a batch": ("/v1/batches", "application/json", b"{"),
    "a message batch": ("/v1/messages/batches", "application/json", b'{"requests": ['),
    "passed through": ("/v1/audio/transcriptions", "application/octet-stream", b"x" * 100),
}


def half(name: str, credential: str) -> bytes:
    path, media, part = HALVES[name]
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Authorization: Bearer {credential}", f"Content-Type: {media}"]
    return "\r\n".join([*lines, "Content-Length: 5000", "", ""]).encode() + part


@contextlib.asynccontextmanager
async def clients_of(ibid: Running, count: int) -> AsyncIterator[list[RawClient]]:
    clients = [await RawClient.connect(ibid.port) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("name", HALVES)
async def test_half_bodies_keep_nobody_else_out(tmp_path: Path, up: ScriptedUpstream, name: str) -> None:
    tight = "[limits]\nin_flight = 6\nqueued = 2\nqueue_timeout_s = 0.5\nbodies = 2\n"
    async with serving(tmp_path, up, EXACT_ONLY + tight) as ibid:
        assert (await ibid.ask(question("Is it kept?"))).status == 200
        await ibid.settled()
        async with clients_of(ibid, 12) as clients:
            for number, client in enumerate(clients):
                await client.send(half(name, f"sk-none-{number}"))
            waiting = {asyncio.create_task(client.answer()) for client in clients}
            refused = set[int]()
            while len(waiting) > 2:  # as many as there are places stay
                done, waiting = await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                refused |= {task.result().status for task in done}
                assert done, f"{len(waiting)} half bodies stay"
            assert refused <= {503, 408}
            for number in range(4):
                kept = await ibid.ask(question("Is it kept?"))
                assert (kept.status, kept.headers.get("cache-status", "").count("; hit")) == (200, 1)
                assert (await ibid.ask(question(f"And number {number}?"))).status == 200
            for task in waiting:
                task.cancel()
        handler = ibid.handlers[0]
        await until(lambda: not len(handler.arriving) and handler.admission.free == 6)
        assert handler.arriving.held_bytes == 0


@pytest.mark.parametrize("drip", [b"", b" "], ids=["half", "trickle"])
@pytest.mark.parametrize("name", HALVES)
async def test_a_body_that_does_not_keep_up_is_cut_on_every_path(
    tmp_path: Path, up: ScriptedUpstream, name: str, drip: bytes
) -> None:
    async with serving(tmp_path, up, EXACT_ONLY + "[limits]\nbody_timeout_s = 0.5\n") as ibid:
        async with clients_of(ibid, 1) as (client,):
            await client.send(half(name, "sk-slow"))
            answering = asyncio.create_task(client.answer())
            while drip and not answering.done():
                client.writer.write(drip)
                await asyncio.sleep(0.1)
            answer = await answering
            assert (answer.status, answer.headers["connection"]) == (408, "close"), answer
            assert await client.rest() == b""
        await until(lambda: not len(ibid.handlers[0].arriving))


@pytest.mark.parametrize("target", [CHAT, "/v1/moderations"], ids=["read", "passed through"])
async def test_large_bodies_arrive_whole_though_there_is_one_place(
    tmp_path: Path, up: ScriptedUpstream, target: str
) -> None:
    body = question("x" * 900_000)
    async with serving(tmp_path, up, EXACT_ONLY + "[limits]\nbodies = 1\n") as ibid, clients_of(ibid, 1) as (client,):
        for _ in range(3):
            raw = request(body, target=target, close=False)
            for start in range(0, len(raw), 300_000):
                await client.send(raw[start : start + 300_000])
            assert (await client.answer()).status == 200
        assert {len(seen.body) for seen in up.requests} == {len(body)}


# --- hop by hop -------------------------------------------------------------------------------------------------------

HOPS = {
    "Connection": "keep-alive, authorization, openai-organization, x-stainless-lang",
    "Keep-Alive": "timeout=5",
    "TE": "trailers",
    "Proxy-Authorization": "Basic canary",
    "Proxy-Authenticate": "Basic canary",
    "Proxy-Connection": "keep-alive",
    "Proxy-Foo": "canary",
    "HTTP2-Settings": "canary",
    "Cookie": "canary=1",
    "Sec-WebSocket-Accept": "canary",
    "OpenAI-Organization": "canary",
    "X-Stainless-Lang": "canary",
}
EXTRA = (
    '[forward]\nextra_headers = ["proxy-authenticate", "proxy-foo", "http2-settings", "te", "cookie", "keep-alive"]\n'
)
WAYS = {
    "a question": f"POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\n",
    "passed through": "GET /v1/models HTTP/1.1\r\n",
    "an upload": "POST /v1/audio/speech HTTP/1.1\r\nContent-Type: text/plain\r\n",
    "a socket": "GET /v1/realtime?model=m HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: Y2FuYXJ5Y2FuYXJ5Y2FuYQ==\r\nSec-WebSocket-Extensions: canary\r\n",
}


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_of_one_hop_goes_to_the_next_on_any_way(tmp_path: Path, up: ScriptedUpstream, way: str) -> None:
    async with serving(tmp_path, up, EXACT_ONLY + EXTRA) as ibid, clients_of(ibid, 1) as (client,):
        hops = HOPS | ({"Connection": f"upgrade, {HOPS['Connection']}"} if way == "a socket" else {})
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "h", **hops, "x-api-key": "sk-a"}.items())
        head = f"{WAYS[way]}Authorization: Bearer sk-a\r\n{lines}"
        if way == "an upload":  # sent on as it comes: its end comes after its beginning was seen
            await client.send(f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n".encode())
            await until(lambda: len(ibid.handlers[0].arriving) == 1)
            await client.send(b"0\r\n\r\n")
        else:
            body = question() if way == "a question" else b""
            length = f"Content-Length: {len(body)}\r\n" if body else ""
            await client.send(f"{head}{length}\r\n".encode() + body)
        await client.answer()
        (seen,) = up.requests
        assert not [header for header in seen.headers if "canary" in header[1] or "Y2FuYXJ5" in header[1]]
        names = {name.lower() for name, _ in seen.headers}
        assert names.isdisjoint({*map(str.lower, HOPS)} - {"connection"} | {"authorization"})
        assert seen.header("x-api-key") == "sk-a"
