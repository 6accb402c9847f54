"""Forwarding against a scripted upstream on a raw socket: what leaves, what comes back, and how it may break."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.core.dialects.routes import family_of
from proxy.core.errors import BadRequest, ConfigError, UpstreamError
from proxy.upstreams.address import Address, UpstreamAddress
from proxy.upstreams.breaker import Breaker
from proxy.upstreams.response import OpenResponse
from proxy.upstreams.upstream import UpstreamLimits, Upstreams
from tests.waiting import PATIENCE_S, until

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
PATIENT = UpstreamLimits(connect_s=PATIENCE_S, first_byte_s=PATIENCE_S, idle_s=PATIENCE_S)
HURRIED = UpstreamLimits(connect_s=PATIENCE_S, first_byte_s=0.15, idle_s=0.15)  # where silence is what is asked for


def everything_at(base_url: str) -> tuple[UpstreamAddress, ...]:
    return (UpstreamAddress("upstream", base_url, "openai"),)


class Mock:
    """Reads one request at a time, notes it, and lets the script answer it. A script that returns is asked again."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.lost = asyncio.Event()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                self.bodies.append(await self._body(head, reader))
                await self.script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.lost.set()
            writer.close()

    @staticmethod
    async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return await reader.readexactly(int(line.partition(b":")[2]))
            if line.startswith(b"transfer-encoding:"):
                pieces = []
                while size := int(await reader.readline(), 16):
                    pieces.append(await reader.readexactly(size))
                    await reader.readexactly(2)
                await reader.readexactly(2)
                return b"".join(pieces)
        return b""

    def names(self, at: int = -1) -> dict[str, str]:
        lines = self.heads[at].decode("latin-1").split("\r\n")[1:-2]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def says(*pieces: bytes, then: str = "stay") -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if then == "close":
            writer.close()
        if then == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        if then == "hang":
            await reader.read()

    return script


class Case:
    def __init__(self, mock: Mock, upstreams: Upstreams) -> None:
        self.mock = mock
        self.upstreams = upstreams

    async def open(
        self,
        body: bytes | AsyncIterator[bytes] | None = b"{}",
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        path: str = "/v1/chat/completions",
        method: str = "POST",
    ) -> OpenResponse:
        async with asyncio.timeout(PATIENCE_S):
            return await self.upstreams.open("upstream", method, path, headers, body)

    async def ask(self) -> tuple[OpenResponse, bytes]:
        response = await self.open()
        return response, await read(response)


async def read(response: OpenResponse) -> bytes:
    pieces = []
    async with asyncio.timeout(PATIENCE_S):
        while piece := await response.read_some():
            pieces.append(piece)
    response.release()
    return b"".join(pieces)


Play = Callable[..., Awaitable[Case]]


@pytest.fixture
async def play() -> AsyncIterator[Play]:
    cases: list[Case] = []

    async def begin(script: Script, limits: UpstreamLimits = PATIENT) -> Case:
        mock = Mock(script)
        await mock.start()
        upstreams = Upstreams(everything_at(f"http://127.0.0.1:{mock.port}/v1"), limits, tick_s=0.02)
        await upstreams.start()
        cases.append(Case(mock, upstreams))
        return cases[-1]

    yield begin
    for case in cases:
        await case.upstreams.close()
        await case.mock.stop()


async def test_answer_comes_back_and_the_connection_is_used_again(play: Play) -> None:
    case = await play(says(OK))
    for _ in range(3):
        response, body = await case.ask()
        assert (response.status, response.content_type, response.content_length, body) == (
            200,
            "application/json",
            2,
            b"{}",
        )
    assert case.mock.connections == 1
    assert case.mock.heads[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert case.mock.bodies == [b"{}"] * 3


async def test_large_body_arrives_whole_with_its_length(play: Play) -> None:
    case = await play(says(OK))
    body = bytes(range(256)) * 16_000
    await read(await case.open(body))
    assert case.mock.bodies == [body]
    assert case.mock.names()["content-length"] == str(len(body))


async def test_only_the_allow_list_leaves(play: Play) -> None:
    case = await play(says(OK))
    sent = (
        (b"Authorization", b"Bearer sk-1"),
        (b"Content-Type", b"application/json"),
        (b"Accept-Encoding", b"gzip, zstd"),
        (b"Host", b"evil.example"),
        (b"Cookie", b"a=b"),
        (b"Connection", b"keep-alive, X-Api-Key"),
        (b"x-api-key", b"sk-2"),
        (b"TE", b"trailers"),
        (b"Proxy-Authorization", b"Basic x"),
        (b"X-Forwarded-Host", b"evil.example"),
        (b"Forwarded", b"host=evil.example"),
        (b"X-Portkey-Custom-Host", b"http://169.254.169.254"),
        (b"x-cache-mode", b"off"),
    )
    await read(await case.open(headers=sent))
    names = case.mock.names()
    assert names["authorization"] == "Bearer sk-1"
    assert names["accept-encoding"] == "identity"
    assert names["host"] == f"127.0.0.1:{case.mock.port}"
    for name in (
        "cookie",
        "x-api-key",
        "te",
        "proxy-authorization",
        "x-forwarded-host",
        "forwarded",
        "x-portkey-custom-host",
    ):
        assert name not in names
    assert "x-cache-mode" not in names


async def test_only_end_to_end_headers_come_back(play: Play) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nDate: x\r\nServer: x\r\nSet-Cookie: a=b\r\nConnection: X-Private\r\n"
        b"X-Private: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: x\r\nAlt-Svc: h3\r\nUpgrade: h2c\r\n"
        b"x-request-id: r1\r\nopenai-processing-ms: 5\r\nx-ratelimit-remaining-tokens: 9\r\nRetry-After-Ms: 7\r\n"
        b"Warning: a\r\nWarning: b\r\nCache-Control: no-store\r\n\r\n{}"
    )
    case = await play(says(head))
    response, _ = await case.ask()
    assert sorted((name.lower(), value) for name, value in response.headers) == [
        ("cache-control", "no-store"),
        ("openai-processing-ms", "5"),
        ("retry-after-ms", "7"),
        ("warning", "a"),
        ("warning", "b"),
        ("x-ratelimit-remaining-tokens", "9"),
        ("x-upstream-request-id", "r1"),
    ]
    assert response.header("cache-control") == "no-store"


async def test_coding_sent_in_spite_of_identity_stays_on_its_body(play: Play) -> None:
    body = gzip.compress(bytes(1 << 20))
    case = await play(
        says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    )
    response, received = await case.ask()
    assert received == body
    assert ("Content-Encoding", "gzip") in response.headers


@pytest.mark.parametrize("status", [200, 204, 304, 400, 401, 404, 422, 429, 500, 529])
async def test_every_status_passes_through(play: Play, status: int) -> None:
    length = b"" if status in (204, 304) else b"Content-Length: 2\r\n"
    body = b"" if status in (204, 304) else b"{}"
    case = await play(says(b"HTTP/1.1 %d X\r\nRetry-After: soon\r\n" % status + length + b"\r\n" + body))
    response, received = await case.ask()
    assert (response.status, received, response.header("retry-after")) == (status, body, "soon")
    assert len(case.mock.heads) == 1


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
async def test_redirect_is_never_followed(play: Play, status: int) -> None:
    location = b"Location: http://169.254.169.254/latest\r\nContent-Length: 0\r\n\r\n"
    case = await play(says(b"HTTP/1.1 %d X\r\n" % status + location))
    with pytest.raises(UpstreamError) as caught:
        await case.open()
    assert (caught.value.status, caught.value.code) == (502, "upstream_redirect")
    assert len(case.mock.heads) == 1


async def test_interim_responses_are_dropped(play: Play) -> None:
    case = await play(
        says(b"HTTP/1.1 102 Processing\r\n\r\n" * 500, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", OK)
    )
    response, body = await case.ask()
    assert (response.status, body, response.header("link")) == (200, b"{}", None)


async def test_refused_connection_is_unreachable_after_one_retry() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    upstreams = Upstreams(everything_at(f"http://127.0.0.1:{port}"), PATIENT)
    await upstreams.start()
    with pytest.raises(UpstreamError) as caught:
        await upstreams.open("upstream", "POST", "/v1/x", (), b"{}")
    assert (caught.value.status, caught.value.code) == (502, "upstream_unreachable")
    await upstreams.close()


async def test_silence_before_the_head_times_out_and_the_connection_is_discarded(play: Play) -> None:
    case = await play(says(then="hang"), HURRIED)
    with pytest.raises(UpstreamError) as caught:
        await case.open()
    assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
    await asyncio.wait_for(case.mock.lost.wait(), PATIENCE_S)
    assert len(case.mock.heads) == 1


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(("pieces", "then", "code"), [
    ((), "reset", "upstream_reset"),
    ((), "close", "upstream_reset"),
    ((HEAD,), "reset", "upstream_reset"),
    ((HEAD,), "close", "upstream_reset"),
    ((b"SSH-2.0-x\r\n\r\n",), "stay", "upstream_incomplete"),
    ((OK + b"more than was declared",), "close", "upstream_incomplete"),
])  # fmt: skip
async def test_failure_before_the_head_is_named_and_not_retried(
    play: Play, pieces: tuple[bytes, ...], then: str, code: str
) -> None:
    case = await play(says(*pieces, then=then))
    with pytest.raises(UpstreamError) as caught:
        await case.open()
    assert (caught.value.status, caught.value.code) == (502, code)
    assert len(case.mock.heads) == 1


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = HEAD + b"Content-Length: 100\r\n\r\n"


@pytest.mark.parametrize(("pieces", "then", "code"), [
    ((CHUNKED, b"3\r\nabc\r\n", b"5\r\nab"), "close", "upstream_incomplete"),
    ((CHUNKED, b"3\r\nabc\r\n"), "close", "upstream_incomplete"),
    ((CHUNKED, b"3\r\nabc\r\n", b"zz\r\n"), "stay", "upstream_incomplete"),
    ((LENGTH, b"abc"), "close", "upstream_incomplete"),
    ((CHUNKED, b"3\r\nabc\r\n"), "reset", "upstream_reset"),
    ((LENGTH, b"abc"), "reset", "upstream_reset"),
    ((HEAD + b"\r\n", b"abc"), "reset", "upstream_reset"),
    ((CHUNKED, b"3\r\nabc\r\n"), "hang", "upstream_idle_timeout"),
])  # fmt: skip
async def test_body_that_breaks_gives_what_came_and_then_its_fault(
    play: Play, pieces: tuple[bytes, ...], then: str, code: str
) -> None:
    case = await play(says(*pieces, then=then))
    response = await case.open()
    received: list[bytes] = []

    async def read_on() -> None:
        while piece := await response.read_some():
            received.append(piece)
            case.upstreams._limits = HURRIED if then == "hang" else PATIENT

    with pytest.raises(UpstreamError) as caught:
        await asyncio.wait_for(read_on(), PATIENCE_S)
    assert caught.value.code == code
    assert b"".join(received)[:3] == b"abc" or then == "reset"
    await asyncio.wait_for(case.mock.lost.wait(), PATIENCE_S)


async def test_body_that_ends_with_the_connection_is_whole(play: Play) -> None:
    case = await play(says(HEAD + b"\r\n", b"abc", then="close"))
    assert (await case.ask())[1] == b"abc"


async def test_slow_reader_is_not_an_idle_upstream(play: Play) -> None:
    case = await play(says(CHUNKED, b"3\r\nabc\r\n0\r\n\r\n"))
    response = await case.open()
    await until(response._content.is_eof)
    response.inspect(case.upstreams.loop.time() + 10 * PATIENCE_S, PATIENCE_S)
    assert await read(response) == b"abc"


async def test_cancelled_read_is_taken_up_again(play: Play) -> None:
    case = await play(says(CHUNKED, b"", b"", b"", b"3\r\nabc\r\n0\r\n\r\n"))
    response = await case.open()
    reading = asyncio.ensure_future(response.read_some())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await read(response) == b"abc"


async def test_leaving_before_the_head_aborts_the_upstream(play: Play) -> None:
    case = await play(says(then="hang"))
    opening = asyncio.ensure_future(case.open())
    while not case.mock.heads:  # noqa: ASYNC110 - the other side of a socket
        await asyncio.sleep(0.001)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await asyncio.wait_for(case.mock.lost.wait(), PATIENCE_S)


async def test_abort_inside_a_stream_reaches_the_upstream(play: Play) -> None:
    case = await play(says(CHUNKED, b"3\r\nabc\r\n", then="hang"))
    response = await case.open()
    assert await response.read_some() == b"abc"
    response.abort()
    await asyncio.wait_for(case.mock.lost.wait(), PATIENCE_S)


async def test_huge_body_is_not_read_ahead(play: Play) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        while sent < 64 << 20:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    case = await play(flood)
    response = await case.open()
    await response.read_some()
    await asyncio.sleep(0.2)
    buffered = response._content._size
    assert buffered <= 1 << 20
    assert sent < 64 << 20
    response.abort()


async def test_upload_is_streamed_with_its_declared_length(play: Play) -> None:
    case = await play(says(OK))

    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    await read(
        await case.open(
            body(), path="/v1/files", headers=((b"content-length", b"10000"), (b"Content-Encoding", b"zstd"))
        )
    )
    await read(await case.open(body(), path="/v1/files"))
    assert case.mock.bodies == [b"x" * 10_000] * 2
    assert case.mock.names(0)["content-length"] == "10000"
    assert case.mock.names(0)["content-encoding"] == "zstd"
    assert case.mock.names(1)["transfer-encoding"] == "chunked"


async def test_fault_of_the_client_inside_an_upload_stays_the_clients(play: Play) -> None:
    case = await play(says(OK))

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise BadRequest("slow", code="request_timeout", status=408)

    with pytest.raises(BadRequest) as caught:
        await case.open(body())
    assert caught.value.code == "request_timeout"
    assert not case.upstreams.breaker("upstream").is_open


async def test_request_that_was_not_written_is_sent_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    case = await play(says(OK))
    await case.ask()
    session = case.upstreams._session
    assert session is not None
    connect = session.connector.connect  # type: ignore[union-attr]

    class Closing:
        """A transport whose FIN arrived between the pool and the write."""

        def __init__(self, transport: asyncio.Transport) -> None:
            self.close = self.abort = transport.abort

        def is_closing(self) -> bool:
            return True

    async def connect_to_closing(*args: object, **kwargs: object) -> object:
        connection = await connect(*args, **kwargs)  # type: ignore[arg-type]
        monkeypatch.undo()
        connection.protocol.transport = Closing(connection.protocol.transport)
        return connection

    monkeypatch.setattr(session.connector, "connect", connect_to_closing)
    assert (await case.ask())[1] == b"{}"
    assert len(case.mock.heads) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_only_what_may_be_repeated_is_asked_again_when_its_connection_ended(play: Play, method: str) -> None:
    asked = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            writer.close()
        else:
            writer.write(OK)

    case = await play(script)
    body = None if method == "GET" else b"{}"
    assert await read(await case.open(body, method=method)) == b"{}"
    if method == "GET":
        assert await read(await case.open(body, method=method)) == b"{}"
    else:
        with pytest.raises(UpstreamError) as caught:
            await case.open(body, method=method)
        assert caught.value.code == "upstream_reset"
    assert asked == (3 if method == "GET" else 2)


async def test_connection_is_not_kept_when_the_answer_came_before_the_body_was_taken() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):  # of the second body nothing is read before the answer
            await reader.readuntil(b"\r\n\r\n{")
            writer.write(OK)
        await asyncio.sleep(0.1)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        ended.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=4096)
    upstreams = Upstreams(everything_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    await upstreams.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            first = await upstreams.open("upstream", "POST", "/v1/chat/completions", (), b"{")
            assert first._connection is not None
            assert first._connection.transport is not None
            sock = first._connection.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that the system does not take all of it
            await read(first)
            await read(await upstreams.open("upstream", "POST", "/v1/chat/completions", (), b"{" + b" " * (1 << 19)))
            await ended.wait()
    finally:
        await upstreams.close()
        server.close()


def pooled(case: Case) -> list[Any]:
    """Protocols of the connections that wait to be used again."""
    assert case.upstreams._session is not None
    pools = case.upstreams._session.connector._conns.values()  # type: ignore[union-attr]
    return [protocol for pool in pools for protocol, _ in pool]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_closed_connection_is_not_used_again(play: Play, method: str) -> None:
    case = await play(says(OK, then="close"))
    for _ in range(3):
        assert await read(await case.open(None if method == "GET" else b"{}", method=method)) == b"{}"
        await until(lambda: not any(held.is_connected() for held in pooled(case)))  # its FIN was seen
    assert case.mock.connections == len(case.mock.heads) == 3


async def test_breaker_answers_for_an_upstream_that_keeps_failing(play: Play) -> None:
    case = await play(says(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"))
    for _ in range(20):
        assert (await case.ask())[0].status == 503
    with pytest.raises(UpstreamError) as caught:
        await case.open()
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "circuit_open", 5)
    assert len(case.mock.heads) == 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    """One that has just opened."""
    breaker = Breaker("u", clock)
    for i in range(20):
        assert not breaker.admit()
        breaker.succeeded(False) if i < 10 else breaker.failed(False)
    assert breaker.is_open
    return breaker


def is_let_in(breaker: Breaker) -> bool:
    try:
        return breaker.admit()
    except UpstreamError as error:
        told = (error.status, error.code)
        wait_s = error.retry_after_s or 0
    assert told == (503, "circuit_open")
    assert 1 <= wait_s <= 5
    return False


def test_breaker_lets_one_probe_through_in_five_seconds() -> None:
    clock = Clock()
    breaker = opened(clock)
    for expected in (5, 1):
        with pytest.raises(UpstreamError) as caught:
            breaker.admit()
        assert caught.value.retry_after_s == expected
        clock.now += 4.5
    assert breaker.admit()
    assert not is_let_in(breaker)
    breaker.failed(True)
    assert not is_let_in(breaker)
    clock.now += 5
    assert is_let_in(breaker)
    breaker.succeeded(True)
    assert not breaker.is_open
    assert not breaker.admit()


@given(st.lists(st.sampled_from(["hangs", "fails", "is late to fail"]), max_size=6), st.floats(0.01, 4.99))
def test_whatever_becomes_of_probes_the_next_goes_within_five_seconds(before: list[str], late_s: float) -> None:
    """An upstream that answers again is found within 5 s, however many probes still hang or fail just then."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 5
    late = False
    for outcome in before:
        assert is_let_in(breaker)
        if outcome == "fails":
            breaker.failed(True)
        clock.now += late_s
        if late:
            breaker.failed(True)
        late = outcome == "is late to fail"
        assert not is_let_in(breaker)
        clock.now += 5 - late_s + 1e-6
    assert is_let_in(breaker)
    breaker.succeeded(True)
    for _ in range(25):  # those that hung end at last: no news of what answers now
        breaker.failed(True)
    assert not breaker.is_open


async def test_a_hanging_probe_keeps_no_caller_out_of_an_upstream_that_healed() -> None:
    """Row 39. The first probe is still waiting for its head when the second one closes the circuit."""
    clock, patient = Clock(), UpstreamLimits(first_byte_s=600.0)
    mock = Mock(says(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"))
    await mock.start()
    upstreams = Upstreams(everything_at(f"http://127.0.0.1:{mock.port}"), patient, now=clock)
    await upstreams.start()
    case = Case(mock, upstreams)
    try:
        for _ in range(20):
            await case.ask()
        arrived = asyncio.Event()

        async def hangs(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            arrived.set()
            await reader.read()

        mock.script = hangs
        clock.now += 5
        probe = asyncio.ensure_future(upstreams.open("upstream", "POST", "/v1/chat/completions", (), b"{}"))
        await arrived.wait()
        mock.script = says(OK)
        clock.now += 5
        for _ in range(37):
            assert (await case.ask())[0].status == 200
        assert not probe.done()
        probe.cancel()
        await asyncio.wait([probe])
        assert not upstreams.breaker("upstream").is_open
    finally:
        await upstreams.close()
        await mock.stop()


def test_breaker_stays_closed_below_its_bounds() -> None:
    clock = Clock()
    breaker = Breaker("u", clock)
    for _ in range(19):
        breaker.failed(False)
    assert not breaker.is_open
    clock.now += 11  # the window has moved on
    for _ in range(19):
        breaker.failed(False)
    assert not breaker.is_open
    for _ in range(100):
        breaker.succeeded(False)
    breaker.failed(False)
    assert not breaker.is_open


def address(base: str) -> Address:
    return Address(UpstreamAddress("u", base, "openai"), Breaker("u", Clock()))


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("https://api.openai.com", "/v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/", "/chat/completions", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1", "/v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/", "/models?limit=2", "https://api.openai.com/v1/models?limit=2"),
        ("https://api.openai.com/v1", "/v1/v1/models", "https://api.openai.com/v1/models"),
        ("https://openrouter.ai/api/v1", "/v1/chat/completions", "https://openrouter.ai/api/v1/chat/completions"),
        ("https://h/v1beta/openai", "/v1/chat/completions", "https://h/v1beta/openai/chat/completions"),
        ("https://h/api/paas/v4/", "/chat/completions", "https://h/api/paas/v4/chat/completions"),
        ("https://x.azure.com/openai", "/openai/deployments/d/x?api-version=1", "https://x.azure.com/openai/deployments/d/x?api-version=1"),
        ("http://127.0.0.1:11434/v1", "/api/chat", "http://127.0.0.1:11434/api/chat"),
        ("http://127.0.0.1:8000", "/v1beta/models/g:generateContent", "http://127.0.0.1:8000/v1beta/models/g:generateContent"),
        ("http://[::1]:8000", "/v1/models/a%2Fb", "http://[::1]:8000/v1/models/a%2Fb"),
    ],
)  # fmt: skip
def test_base_is_joined_without_doubling(base: str, path: str, url: str) -> None:
    assert str(address(base).url_of(path)) == url


@given(
    path=st.one_of(st.text(), st.text(alphabet="/@:.\\#?%v1[]e").map(lambda t: "/" + t), st.just("//evil.example/x"))
)
def test_no_path_leads_to_another_host(path: str) -> None:
    for base in ("http://h.example:8000/v1", "https://h.example"):
        try:
            url = address(base).url_of(path)
        except BadRequest:
            continue
        assert url.origin() == URL(base).origin()
        assert url.raw_user is None


@pytest.mark.parametrize(
    "base", ["", "api.openai.com", "ftp://h", "http://", "http://u:p@h", "http://h?x=1", "http://h#x", "http://h:99999"]
)
def test_base_that_is_not_plain_http_is_refused(base: str) -> None:
    with pytest.raises(ConfigError):
        address(base)


@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        ("/v1/chat/completions", {}, "openai"),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, "anthropic"),
        ("/v1/models", {}, "openai"),
        ("/v1/messages", {}, "anthropic"),
        ("/v1/models/g:generateContent", {}, "gemini"),
        ("/v1beta/models", {}, "gemini"),
        ("/v1/models", {"x-goog-api-key": "k"}, "gemini"),
        ("/api/chat", {}, "ollama"),
        ("/api/other", {}, "openai"),
        ("/openai/deployments/d/chat/completions", {}, "openai"),
    ],
)
def test_dialect_follows_path_and_version_header(path: str, headers: dict[str, str], dialect: str) -> None:
    assert family_of(path, headers) == dialect


async def test_of_one_dialect_the_upstream_that_names_the_model_serves_it() -> None:
    upstreams = Upstreams(
        (
            UpstreamAddress("cloud", "http://cloud", "openai"),
            UpstreamAddress("small", "http://small", "openai", ("llama-*", "qwen?")),
            UpstreamAddress("claude", "http://claude", "anthropic"),
        )
    )
    asked = {"gpt-5": "cloud", "llama-3": "small", "qwen3": "small", "qwen30": "cloud", "": "cloud"}
    assert {model: upstreams.route("/v1/chat/completions", {}, model) for model in asked} == asked
    assert upstreams.route("/v1/messages", {}, "llama-3") == "claude"
    assert upstreams.route("/v1/models", {}, None) == "cloud"
    assert (upstreams.is_divided("/v1/models", {}), upstreams.is_divided("/v1/messages", {})) == (True, False)
    assert [upstreams.serves("small", model) for model in ("llama-3", "gpt-5", "")] == [True, False, False]
    assert upstreams.serves("cloud", "llama-3")
    assert (upstreams.place("cloud"), upstreams.place("small")) == ("http://cloud", "http://small")


@pytest.mark.parametrize("model", ["mistral-large", "GPT-5", "gpt", "", "x" * 1_000_000])
async def test_what_no_upstream_names_is_nobodys_where_all_name_theirs(model: str) -> None:
    upstreams = Upstreams(
        (
            UpstreamAddress("cloud", "http://cloud", "openai", ("gpt-*",)),
            UpstreamAddress("small", "http://small", "openai", ("my-*",)),
        )
    )
    for path, code in (("/v1/chat/completions", "model_not_served"), ("/v1/messages", "dialect_not_served")):
        for _ in range(2):
            with pytest.raises(BadRequest) as caught:
                upstreams.route(path, {}, model)
            assert (caught.value.status, caught.value.code) == (404, code)
            assert len(caught.value.message) < 200
    assert upstreams.route("/v1/models", {}, None) == "cloud"
    assert not [asked for _, asked in upstreams._routes if asked is not None], "nothing refused is remembered"


@pytest.mark.parametrize(
    ("dialect", "name", "value"),
    [
        ("openai", "authorization", "Bearer sk-ours"),
        ("anthropic", "x-api-key", "sk-ours"),
        ("gemini", "x-goog-api-key", "sk-ours"),
        ("ollama", "authorization", "Bearer sk-ours"),
    ],
)
async def test_an_upstream_with_a_key_of_its_own_never_sees_the_clients(dialect: str, name: str, value: str) -> None:
    mock = Mock(says(OK))
    await mock.start()
    address = UpstreamAddress("own", f"http://127.0.0.1:{mock.port}", dialect, key="sk-ours")
    assert "sk-ours" not in repr(address)
    upstreams = Upstreams((address,))
    await upstreams.start()
    try:
        brought = ((b"Authorization", b"Bearer theirs"), (b"x-api-key", b"theirs"), (b"x-goog-api-key", b"theirs"))
        response = await upstreams.open("own", "POST", "/v1/x?key=theirs&alt=sse", brought, b"{}")
        assert await read(response) == b"{}"
    finally:
        await upstreams.close()
        await mock.stop()
    assert b"theirs" not in mock.heads[0]
    assert mock.names()[name] == value
    assert mock.heads[0].startswith(b"POST /v1/x?alt=sse ")


async def test_route_names_the_configured_upstream() -> None:
    defaults = Upstreams()
    assert defaults.route("/v1/messages", {}, "") == "anthropic"
    assert defaults.route("/v1/chat/completions", {}, "") == "openai"
    with pytest.raises(ConfigError):
        Upstreams((UpstreamAddress("a", "http://h", "openai"),) * 2)
