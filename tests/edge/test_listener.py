"""The client listener against real sockets: malformed, slow, half-closed and excessive clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from proxy.client.admission import Admission
from proxy.client.incoming import body_stream, check_head, error_response, query_of, read_body, target_of
from proxy.client.listener import Listener, start
from proxy.core.errors import Busy, IbidError
from proxy.core.model import Limits
from tests.edge.rawclient import RawClient, get, post
from tests.waiting import PATIENCE_S, until

SHORT = Limits(
    body_bytes=64 * 1024,
    header_timeout_s=0.3,
    body_timeout_s=0.3,
    keep_alive_s=0.4,
    connections=40,
    write_stall_s=0.4,
)
PATIENT = replace(SHORT, header_timeout_s=PATIENCE_S, body_timeout_s=PATIENCE_S, keep_alive_s=PATIENCE_S)


class App:
    """A handler that reads the body and says what it read; keeps what it executed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.executed: list[str] = []
        self.bodies: list[bytes] = []
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            check_head(request)
            path = target_of(request)
            self.executed.append(path)
            self.entered.set()
            if path == "/v1/wait":
                try:
                    await self.go.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            if path == "/v1/stream":
                return await self.stream(request)
            if path == "/v1/through":
                return await self.through(request)
            if path == "/v1/broken":
                raise ZeroDivisionError("secret")
            if path == "/v1/large":
                return web.Response(body=bytes(64 * 1024 * 1024))
            body = await read_body(request, self.limits)
        except IbidError as error:
            return error_response(error, "req_test")
        self.bodies.append(body)
        return web.Response(body=f"{path}{query_of(request)} {len(body)}".encode())

    async def stream(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one,")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await response.write(b"two")
        await response.write_eof()
        return response

    async def through(self, request: web.BaseRequest) -> web.StreamResponse:
        body = body_stream(request, self.limits)
        if body is None or isinstance(body, bytes):
            return web.Response(text=repr(body))
        size = 0
        async for chunk in body:
            size += len(chunk)
        return web.Response(text=f"streamed {size}")


class Server:
    def __init__(self, app: App, listener: Listener) -> None:
        self.app = app
        self.listener = listener
        self.clients: list[RawClient] = []

    async def client(self) -> RawClient:
        client = await RawClient.connect(self.listener.port)
        self.clients.append(client)
        return client


async def serve(limits: Limits) -> AsyncIterator[Server]:
    app = App(limits)
    server = Server(app, await start(app, "127.0.0.1", 0, limits, tick_s=0.02))
    yield server
    await server.listener.stop(drain_s=0.0)
    for client in server.clients:
        client.close()
    assert server.listener.server.open_count == 0


@pytest.fixture
async def short() -> AsyncIterator[Server]:
    async for server in serve(SHORT):
        yield server


@pytest.fixture
async def patient() -> AsyncIterator[Server]:
    async for server in serve(PATIENT):
        yield server


BEHIND = get("/v1/behind")
CHUNKED = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
MALFORMED = {
    "length and chunked": CHUNKED + b"Content-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "two equal lengths": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "list of lengths": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3, 3\r\n\r\nabc",
    "negative length": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: -3\r\n\r\nabc",
    "signed length": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc",
    "hex length": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 0x3\r\n\r\nabc",
    "huge length": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999999\r\n\r\nabc",
    "empty length": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: \r\n\r\nabc",
    "xchunked": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked then other": b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "tab before colon": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A\t: 1\r\n\r\n",
    "space before colon": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A : 1\r\n\r\n",
    "space before name": b"GET /v1/x HTTP/1.1\r\n Host: h\r\n\r\n",
    "folded": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A: 1\r\n 2\r\n\r\n",
    "no name": b"GET /v1/x HTTP/1.1\r\nHost: h\r\n: 1\r\n\r\n",
    "no colon": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A\r\n\r\n",
    "nul in value": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A: a\0b\r\n\r\n",
    "nul in name": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX\0A: b\r\n\r\n",
    "nul in target": b"GET /v1/\0x HTTP/1.1\r\nHost: h\r\n\r\n",
    "cr in value": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-A: a\rb\r\n\r\n",
    "bare line feeds": b"GET /v1/x HTTP/1.1\nHost: h\n\n",
    "bare line feed in headers": b"GET /v1/x HTTP/1.1\r\nHost: h\nX-A: 1\r\n\r\n",
    "two hosts": b"GET /v1/x HTTP/1.1\r\nHost: h\r\nHost: evil\r\n\r\n",
    "no host": b"GET /v1/x HTTP/1.1\r\nX-A: 1\r\n\r\n",
    "host with slash": b"GET /v1/x HTTP/1.1\r\nHost: h/evil\r\n\r\n",
    "host with question mark": b"GET /v1/x HTTP/1.1\r\nHost: h?evil\r\n\r\n",
    "host with fragment": b"GET /v1/x HTTP/1.1\r\nHost: h#evil\r\n\r\n",
    "host with user": b"GET /v1/x HTTP/1.1\r\nHost: u@h\r\n\r\n",
    "chunk size not hex": CHUNKED + b"\r\nzz\r\n\r\n",
    "chunk size signed": CHUNKED + b"\r\n+1\r\na\r\n0\r\n\r\n",
    "chunk size 0x": CHUNKED + b"\r\n0x1\r\na\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"\r\nfffffffffffffffff\r\na",
    "chunk line feed only": CHUNKED + b"\r\n1\na\n0\n\n",
    "version 2": b"GET /v1/x HTTP/2.0\r\nHost: h\r\n\r\n",
    "version word": b"GET /v1/x HTTP/x.1\r\nHost: h\r\n\r\n",
    "http 0.9": b"GET /v1/x\r\n\r\n",
    "http 0.9 in disguise": b"POST /v1/x\\,HTTP/1.1\r\nHost: h\r\n\r\n",
    "method with space": b"GE T /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "unknown method": b"FROB /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "target with space": b"GET /v1/ x HTTP/1.1\r\nHost: h\r\n\r\n",
    "tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "preface of http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "chunked in http 1.0": b"POST /v1/x HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
async def test_malformed_request_is_refused_and_what_follows_is_never_executed(patient: Server, name: str) -> None:
    client = await patient.client()
    await client.send(MALFORMED[name] + BEHIND)
    answer = await client.answer()
    assert (answer.version, answer.status, answer.code) == ("HTTP/1.1", 400, "bad_request")
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-should-retry"] == "false"
    assert await client.rest() == b""
    assert patient.app.bodies == []
    assert "/v1/behind" not in patient.app.executed


async def test_framing_that_breaks_after_the_handler_began_is_refused(patient: Server) -> None:
    client = await patient.client()
    await client.send(CHUNKED + b"\r\n1\r\na\r\n")
    await patient.app.entered.wait()
    await client.send(b"zz\r\n" + BEHIND)
    answer = await client.answer()
    assert (answer.status, answer.code, answer.headers["connection"]) == (400, "bad_request", "close")
    await client.rest()
    assert patient.app.executed == ["/v1/x"]
    assert patient.app.bodies == []


async def test_damaged_requests_never_find_an_unhandled_fault(patient: Server) -> None:
    chance = random.Random(7)
    whole = post(b'{"a":1}', "Expect: 100-continue", "X-A: b") + CHUNKED + b"\r\n3\r\nabc\r\n0\r\nT: 1\r\n\r\n"
    seen: set[int] = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            piece = bytes(chance.choice(b"\0\r\n\t :;,%/.\\AZaz09\x7f\xff") for _ in range(chance.randint(0, 3)))
            data[at : at + chance.randint(0, 3)] = piece
        client = await patient.client()
        await client.send(bytes(data))
        client.half_close()
        rest = await client.rest()
        while rest:
            head, _, after = rest.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 "), data
            status = int(head[9:12])
            seen.add(status)
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = after[: int(length[1])] if length else b""
            rest = after[len(body) :]
            assert status in (100, 200, 400, 404, 405, 408, 413, 414, 415, 431), data
            assert status < 400 or json.loads(body)["error"]["code"] not in ("internal_error", None)
        client.close()
    assert {200, 400, 404} <= seen


TOO_LARGE = {
    "129 headers": (get("/v1/x", *[f"X-{i}: 1" for i in range(128)]), 431, "headers_too_large"),
    "long header": (get("/v1/x", "X-A: " + "a" * 9000), 431, "headers_too_large"),
    "long header name": (get("/v1/x", "X" * 9000 + ": 1"), 431, "headers_too_large"),
    "long url": (get("/v1/" + "x" * 9000), 414, "uri_too_long"),
    "endless trailers": (
        CHUNKED + b"\r\n0\r\n" + b"X-T: 1\r\n" * 200,
        431,
        "headers_too_large",
    ),
}


@pytest.mark.parametrize("name", sorted(TOO_LARGE))
async def test_oversized_head_is_refused_and_closed(patient: Server, name: str) -> None:
    data, status, code = TOO_LARGE[name]
    client = await patient.client()
    await client.send(data)
    answer = await client.answer()
    assert (answer.status, answer.code, answer.headers["connection"]) == (status, code, "close")
    assert await client.rest() == b""


async def test_head_at_the_limits_is_accepted(patient: Server) -> None:
    client = await patient.client()
    line = 8190 - len("X-A: ")
    await client.send(get("/v1/x", "X-A: " + "a" * line, *[f"X-{i}: 1" for i in range(126)]))
    assert (await client.answer()).status == 200
    await client.send(get("/v1/x", "X-A: " + "a" * 8190))
    assert (await client.answer()).status == 431


async def test_half_a_head_is_closed_at_an_absolute_deadline(short: Server) -> None:
    client = await short.client()
    await client.send(b"GET /v1/x HTTP/1.1\r\n")
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def drip() -> None:
        while True:
            client.writer.write(b"X")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = await client.answer()
    took = loop.time() - begun
    dripping.cancel()
    assert (answer.status, answer.code, answer.headers["connection"]) == (408, "request_timeout", "close")
    assert took >= 0.25
    await client.rest()
    assert short.app.executed == []


async def test_half_a_head_behind_whole_requests_is_closed_too(short: Server) -> None:
    client = await short.client()
    await client.send(get("/v1/a"))
    assert (await client.answer()).status == 200
    await client.send(b"GET /v1/b HTTP/1.1\r\n")
    assert (await client.answer()).code == "request_timeout"
    assert short.app.executed == ["/v1/a"]


CUT = b"GET /v1/x HTTP/1.1\r\nHost: h\r\n" + b"".join(b"X-%d: %b\r\n" % (i, b"a" * 8000) for i in range(12))


@pytest.mark.parametrize("first", [b"", get("/v1/wait")], ids=["alone", "behind a request"])
async def test_half_heads_hold_no_more_than_their_room_and_others_are_answered(first: bytes) -> None:
    limits = replace(PATIENT, heads_bytes=4 * len(CUT), connections=400)
    tracemalloc.start()
    try:
        async with asynccontextmanager(serve)(limits) as server:
            heads, before = server.listener.server.heads, tracemalloc.get_traced_memory()[0]
            clients = [await server.client() for _ in range(60)]
            for client in clients:
                await client.send(first)
            await until(lambda: len(server.app.executed) == len(clients) * bool(first))
            for client in clients:
                await client.send(CUT)
            ends = {asyncio.create_task(client.rest()): client for client in clients}
            while len(ends) > 3:  # of one address: three quarters of the room
                done, _ = await asyncio.wait(ends, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                assert done, f"{len(ends)} half heads stay"
                assert first or all(task.result().startswith(b"HTTP/1.1 503 ") for task in done)
                for task in done:
                    ends.pop(task).close()
            other = await server.client()
            await other.send(get("/v1/y"))
            assert (await other.answer()).status == 200
            assert 0 < heads.held_bytes <= limits.heads_bytes
            assert tracemalloc.get_traced_memory()[0] - before < 6 * limits.heads_bytes
            for task, client in ends.items():
                task.cancel()
                client.close()
            await until(lambda: heads.held_bytes == 0)
    finally:
        tracemalloc.stop()


async def test_a_head_that_becomes_whole_gives_its_room_back(patient: Server) -> None:
    client, heads = await patient.client(), patient.listener.server.heads
    whole = CUT + b"\r\n"
    for end in (whole, CUT + b"no header\r\n\r\n"):  # taken, and refused
        await client.send(end[:30_000])
        await until(lambda: heads.held_bytes > 0)
        await client.send(end[30_000:])
        assert (await client.answer()).status == (200 if end is whole else 400)
        assert heads.held_bytes == 0


@pytest.mark.parametrize("drip", [b"", b"x"])
async def test_half_a_body_is_closed_at_an_absolute_deadline(short: Server, drip: bytes) -> None:
    client = await short.client()
    await client.send(post(b"abc", length=5000))
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def send() -> None:
        while True:
            client.writer.write(drip)
            await asyncio.sleep(0.02)

    sending = asyncio.create_task(send())
    answer = await client.answer()
    await client.rest()
    took = loop.time() - begun
    sending.cancel()
    assert (answer.status, answer.code, answer.headers["connection"]) == (408, "request_timeout", "close")
    assert took >= 0.25
    assert short.app.bodies == []


@pytest.mark.parametrize("first", [b"", get("/v1/x")])
async def test_idle_connection_is_closed(short: Server, first: bytes) -> None:
    client = await short.client()
    await client.send(first)
    if first:
        assert (await client.answer()).status == 200
    assert await client.rest() == b""


async def test_declared_size_over_the_limit_is_refused_before_it_is_read(patient: Server) -> None:
    client = await patient.client()
    await client.send(post(b"", "Expect: 100-continue", length=SHORT.body_bytes + 1))
    answer = await client.answer(interim := [])
    assert (answer.status, answer.code, answer.headers["connection"], interim) == (
        413,
        "request_too_large",
        "close",
        [],
    )


async def test_chunked_body_is_cut_at_the_limit(patient: Server) -> None:
    client = await patient.client()
    await client.send(CHUNKED + b"\r\n")
    for _ in range(17):
        client.writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
    answer = await client.answer()
    assert (answer.status, answer.code, answer.headers["connection"]) == (413, "request_too_large", "close")
    assert patient.app.bodies == []


@pytest.mark.parametrize("length", [0, 1, 1000, 65_536])
async def test_body_arrives_whole_however_it_is_cut(patient: Server, length: int) -> None:
    body = bytes(i % 251 for i in range(length))
    client = await patient.client()
    await client.send(post(body) + post(body))
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    data = post(body)
    for at in range(0, len(data), 9000):
        client.writer.write(data[at : at + 9000])
        await asyncio.sleep(0)
    await client.answer()
    assert patient.app.bodies == [body] * 3


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("X-GZip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda b: zlib.compress(b, wbits=-15)),
        ("identity", bytes),
    ],
)
async def test_encoded_body_is_decoded(patient: Server, coding: str, pack: object) -> None:
    client = await patient.client()
    body = b'{"model":"m"}' * 50
    await client.send(post(pack(body), f"Content-Encoding: {coding}"))  # type: ignore[operator]
    assert (await client.answer()).status == 200
    assert patient.app.bodies == [body]


BAD_ENCODING = {
    "not gzip": ("gzip", b"{}", 400, "invalid_encoding"),
    "cut gzip": ("gzip", gzip.compress(b"abc" * 100)[:-9], 400, "invalid_encoding"),
    "wrong checksum": ("gzip", gzip.compress(b"abc")[:-8] + bytes(8), 400, "invalid_encoding"),
    "bytes after": ("gzip", gzip.compress(b"abc") * 2, 400, "invalid_encoding"),
    "empty": ("gzip", b"", 400, "invalid_encoding"),
    "br": ("br", b"abc", 415, "unsupported_encoding"),
    "zstd": ("zstd", b"abc", 415, "unsupported_encoding"),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b"abc")), 415, "unsupported_encoding"),
    "unknown": ("rot13", b"abc", 415, "unsupported_encoding"),
}


@pytest.mark.parametrize("name", sorted(BAD_ENCODING))
async def test_bad_encoding_is_named(patient: Server, name: str) -> None:
    coding, body, status, code = BAD_ENCODING[name]
    client = await patient.client()
    await client.send(post(body, f"Content-Encoding: {coding}"))
    answer = await client.answer()
    assert (answer.status, answer.code) == (status, code)
    assert patient.app.bodies == []


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_bomb_is_refused_without_being_unpacked(coding: str) -> None:
    limits = Limits()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(200)]) + packer.flush()
    async for server in serve(limits):
        client = await server.client()
        tracemalloc.start()
        await client.send(post(bomb, f"Content-Encoding: {coding}"))
        answer = await client.answer()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert peak < 16 * 1024 * 1024
        assert server.app.bodies == []


BAD_TARGETS = {
    "//v1/models": 404, "/v1//models": 404, "/v1/../admin": 404, "/v1/./models": 404, "/v1/%2e%2e/admin": 404,
    "/v1/%2E%2e/admin": 404, "/v1/.%2e/admin": 404, "/v1%2f..%2fadmin": 404, "/v1/..": 404, "/v1/%00": 404,
    "/v1/models%00.json": 404, "/v1/models;x": 404, "/v1/models%3bx": 404, "/V1/models": 404,
    "/v1/Chat/completions": 404, "/v1/chat/COMPLETIONS": 404, "/v1/%252e%252e/admin": 404, "/v1/a\\b": 404,
    "/v1/a%5cb": 404, "/v1/%zz": 404, "/v1/%": 404, "/v1/%0d%0aX": 404, "/v1/a#b": 404, "/%2fv1/models": 404,
    "http://169.254.169.254/v1/../latest": 404, "ftp://h/v1/x": 404, "http://h//v1/x": 404,
}  # fmt: skip


@pytest.mark.parametrize("target", sorted(BAD_TARGETS))
async def test_path_tricks_are_unknown(patient: Server, target: str) -> None:
    client = await patient.client()
    await client.send(get(target))
    answer = await client.answer()
    assert (answer.status, answer.code) == (BAD_TARGETS[target], "unknown_url")
    assert patient.app.executed == []


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("GET http://169.254.169.254/v1/x?a=1", "/v1/x?a=1"),
        ("GET http://user@10.0.0.1:99/v1/x", "/v1/x"),
        ("GET HTTP://h", "/"),
        ("GET http://h?q=/v1", "/?q=/v1"),
        ("GET /v1/models/org%2Fname:tag?x=//..;%00", "/v1/models/org%2Fname:tag?x=//..;%00"),
        (
            "POST /v1beta/models/gemini-2.5:streamGenerateContent?alt=sse",
            "/v1beta/models/gemini-2.5:streamGenerateContent?alt=sse",
        ),
        ("GET /", "/"),
        ("GET /v1/models/", "/v1/models/"),
    ],
)
async def test_path_is_taken_from_the_target_and_kept(patient: Server, line: str, path: str) -> None:
    client = await patient.client()
    await client.send(f"{line} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert (await client.answer()).body.decode() == f"{path} 0"


@pytest.mark.parametrize(
    "line", ["CONNECT 169.254.169.254:80", "TRACE /v1/x", "OPTIONS *", "CONNECT h:443", "TRACE http://h/"]
)
async def test_tunnel_and_trace_are_not_allowed(patient: Server, line: str) -> None:
    client = await patient.client()
    await client.send(f"{line} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    answer = await client.answer()
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert patient.app.executed == []


async def test_expectation_is_answered_and_then_the_body_is_read(patient: Server) -> None:
    client = await patient.client()
    await client.send(post(b"", "Expect: 100-continue", length=5))
    assert (await client.head())[1] == 100
    await client.send(b"hello")
    assert (await client.answer()).status == 200
    assert patient.app.bodies == [b"hello"]


async def test_upload_that_passes_through_is_asked_for_and_streamed(patient: Server) -> None:
    client = await patient.client()
    size = SHORT.body_bytes * 8
    await client.send(post(b"", "Expect: 100-continue", path="/v1/through", length=size))
    assert (await client.head())[1] == 100
    await client.send(bytes(size))
    assert (await client.answer()).body == b"streamed %d" % size
    encoded = post(b"ab", "Content-Encoding: br", path="/v1/through")
    await client.send(post(b"ab", path="/v1/through") + get("/v1/through") + encoded)
    assert [(await client.answer()).body for _ in range(3)] == [b"b'ab'", b"None", b"streamed 2"]


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_upgrade_is_ignored(patient: Server, upgrade: str) -> None:
    client = await patient.client()
    await client.send(
        get("/v1/x", f"Upgrade: {upgrade}", "Connection: Upgrade", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
    )
    assert (await client.answer()).status == 200
    await client.send(post(b"abc"))
    assert (await client.answer()).status == 200


async def test_pipelined_requests_are_answered_in_order(patient: Server) -> None:
    client = await patient.client()
    requests = b"".join(post(b"x" * (i % 50), path=f"/v1/p{i}") for i in range(1000))
    sending = asyncio.create_task(client.send(requests))
    for i in range(1000):
        assert (await client.answer()).body == f"/v1/p{i} {i % 50}".encode()
    await sending


async def test_excess_connections_are_told_and_the_listener_recovers(patient: Server) -> None:
    clients = [await patient.client() for _ in range(SHORT.connections)]
    for client in clients:
        await client.send(get("/v1/x"))
        assert (await client.answer()).status == 200
    extra = await patient.client()
    answer = await extra.answer()
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
    assert await extra.rest() == b""
    for client in clients[:5]:
        client.close()
        await client.writer.wait_closed()
    again = await patient.client()
    await again.send(get("/v1/x"))
    assert (await again.answer()).status in (200, 503)


async def test_client_that_leaves_cancels_its_handler(patient: Server) -> None:
    for leave in (RawClient.close, RawClient.reset):
        patient.app.entered.clear()
        patient.app.cancelled.clear()
        client = await patient.client()
        await client.send(get("/v1/wait"))
        await patient.app.entered.wait()
        leave(client)
        await asyncio.wait_for(patient.app.cancelled.wait(), PATIENCE_S)


async def test_client_that_leaves_during_a_silent_stream_cancels_it(patient: Server) -> None:
    client = await patient.client()
    await client.send(get("/v1/stream"))
    assert (await client.head())[1] == 200
    client.close()
    await asyncio.wait_for(patient.app.cancelled.wait(), PATIENCE_S)


@pytest.mark.parametrize("path", ["/v1/wait", "/v1/stream", "/v1/quick"])
async def test_client_that_half_closes_is_answered(patient: Server, path: str) -> None:
    client = await patient.client()
    await client.send(get("/v1/first") + get(path))
    client.half_close()
    assert (await client.answer()).status == 200
    if path == "/v1/quick":
        assert (await client.answer()).body == b"/v1/quick 0"
    else:
        head = asyncio.create_task(client.head()) if path == "/v1/wait" else None
        if head is not None:
            assert (await head)[1] == 102
        for _ in range(10):  # several sweeps
            await asyncio.sleep(0.01)
        patient.app.go.set()
        assert (await client.answer()).body == (b"one,two" if path == "/v1/stream" else b"/v1/wait 0")
    assert await client.rest() == b""
    assert not patient.app.cancelled.is_set()


async def test_half_closing_inside_a_body_ends_the_request(patient: Server) -> None:
    client = await patient.client()
    await client.send(post(b"abc", length=100))
    await patient.app.entered.wait()
    client.half_close()
    await client.rest()
    assert patient.app.bodies == []


async def test_reader_that_stops_is_cut(short: Server) -> None:
    client = await short.client()
    client.writer.transport.pause_reading()
    await client.send(get("/v1/large"))
    await short.app.entered.wait()
    async with asyncio.timeout(PATIENCE_S):
        while short.listener.server.open_count:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)


async def test_failed_handler_says_nothing_of_its_inside(patient: Server) -> None:
    client = await patient.client()
    await client.send(get("/v1/broken"))
    answer = await client.answer()
    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"secret" not in answer.body


async def test_stop_finishes_what_is_under_way_and_takes_nothing_new(patient: Server) -> None:
    idle, busy = await patient.client(), await patient.client()
    await busy.send(get("/v1/wait"))
    await patient.app.entered.wait()
    stopping = asyncio.create_task(patient.listener.stop(drain_s=PATIENCE_S))
    assert await idle.rest() == b""
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await RawClient.connect(patient.listener.port if patient.listener.sockets[0].fileno() >= 0 else idle_port(idle))
    patient.app.go.set()
    assert (await busy.answer()).status == 200
    await stopping
    assert patient.listener.server.open_count == 0


def idle_port(client: RawClient) -> int:
    return client.writer.get_extra_info("peername")[1]  # type: ignore[no-any-return]


async def test_stop_cancels_what_outlasts_the_drain(patient: Server) -> None:
    client = await patient.client()
    await client.send(get("/v1/wait"))
    await patient.app.entered.wait()
    await patient.listener.stop(drain_s=0.05)
    assert patient.app.cancelled.is_set()
    await client.rest()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_full_descriptor_table_is_survived(loop: str) -> None:
    script = f"""
        import asyncio, resource, socket, uvloop
        from aiohttp import web
        import proxy.client.listener as listener
        from proxy.core.model import Limits
        async def handler(request): return web.Response(text="ok")
        def ask(sock):
            sock.settimeout(60); sock.sendall(b"GET /v1/x HTTP/1.1\\r\\nHost: h\\r\\n\\r\\n"); return sock.recv(15)
        async def main():
            listener.DESCRIPTORS_KEPT = -1000  # let the table fill
            running = await listener.start(handler, "127.0.0.1", 0, Limits())
            loop = asyncio.get_running_loop()
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            clients = []
            try:
                while True:
                    clients.append(socket.create_connection(("127.0.0.1", running.port)))
            except OSError:
                pass
            await asyncio.sleep(0.1)
            clients.pop().close()  # accepting can fail now: every descriptor the clients left is taken
            await asyncio.sleep(0.6)
            for client in clients: client.close()
            await asyncio.sleep(0.6)
            fresh = socket.create_connection(("127.0.0.1", running.port))
            print((await loop.run_in_executor(None, ask, fresh)).decode())
            await running.stop(0)
        {"uvloop" if loop == "uvloop" else "asyncio"}.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.strip() == "HTTP/1.1 200 OK", done.stderr
    assert "cannot accept" in done.stderr


async def test_admission_bounds_what_is_in_flight_and_what_waits() -> None:
    admission = Admission(in_flight=2, queued=1, timeout_s=PATIENCE_S)
    assert admission.try_enter()
    assert admission.try_enter()
    assert not admission.try_enter()
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    assert admission.queued == 1
    with pytest.raises(Busy) as full:
        await admission.enter()
    assert (full.value.status, full.value.code, full.value.retry_after_s) == (503, "overloaded", 1)
    admission.leave()
    await waiting
    assert not admission.try_enter()
    admission.leave()
    admission.leave()
    assert admission.free == 2


async def test_admission_gives_up_after_its_timeout_and_loses_no_place() -> None:
    admission = Admission(in_flight=1, queued=4, timeout_s=0.02)
    assert admission.try_enter()
    with pytest.raises(Busy):
        await admission.enter()
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    admission.leave()
    waiting.cancel()  # in the same moment as its turn
    await asyncio.gather(waiting, return_exceptions=True)
    assert (admission.free, admission.queued) == (1, 0)
