"""What no dialect claims goes through untouched, WebSockets included, and is priced where it tells its usage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tests.flows.running import EXACT_ONLY, Ibid, running, until
from tests.upstream import Body, ScriptedUpstream, Stream

KEY = {"Authorization": "Bearer sk-pass"}


async def fetched(ibid: Ibid, path: str, **more: Any) -> bytes:
    async with ibid.session.post(ibid.url + path, headers=KEY, **more) as response:
        assert (response.status, response.headers["x-cache"]) == (200, "BYPASS")
        return await response.read()


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (
            "/v1/audio/transcriptions",
            {"text": "Hi.", "model": "gpt-4o-mini-transcribe",
             "usage": {"input_tokens": 14, "output_tokens": 45, "total_tokens": 59}},
            (14, 45),
        ),
        (
            "/v1/messages/batches/x/results",
            {"model": "claude-3-5-haiku-latest",
             "usage": {"input_tokens": 10, "output_tokens": 7, "cache_read_input_tokens": 5}},
            (15, 7),
        ),
        (
            "/v1beta/models/gemini-2.5-flash:countTokens",
            {"modelVersion": "gemini-2.5-flash", "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 3}},
            (9, 3),
        ),
    ],
)  # fmt: skip
async def test_what_an_answer_tells_of_its_usage_is_priced(tmp_path, path, body, tokens) -> None:
    async with ScriptedUpstream() as up, running(tmp_path / "data", up.url, EXACT_ONLY) as ibid:
        raw = json.dumps(body).encode()
        up.script(Body(body=raw))
        assert await fetched(ibid, path, data=b"\x00\xffany bytes") == raw
        assert up.requests[0].body == b"\x00\xffany bytes"
        rows = await ibid.sql("SELECT in_tok, out_tok, cost_nusd, usage_basis, model FROM upstream_call")
        assert [(row["in_tok"], row["out_tok"], row["usage_basis"]) for row in rows] == [(*tokens, "measured")]
        (request,) = await ibid.sql("SELECT baseline_nusd, actual_nusd FROM request")
        assert request["baseline_nusd"] == request["actual_nusd"] == rows[0]["cost_nusd"]


async def test_a_long_stream_passes_piece_by_piece_and_its_last_words_are_priced(tmp_path) -> None:
    async with ScriptedUpstream() as up, running(tmp_path / "data", up.url, EXACT_ONLY) as ibid:
        pieces = [b'data: {"type":"delta","text":"%b"}\n\n' % (b"x" * 10_000) for _ in range(50)]
        end = {"type": "done", "model": "gpt-4o-mini-tts", "usage": {"input_tokens": 3, "output_tokens": 1000}}
        pieces.append(b"data: " + json.dumps(end).encode() + b"\n\n")
        up.script(Stream(pieces))
        assert await fetched(ibid, "/v1/audio/speech", json={"input": "hello"}) == b"".join(pieces)
        (row,) = await ibid.sql("SELECT in_tok, out_tok, model FROM upstream_call")
        assert (row["in_tok"], row["out_tok"], row["model"]) == (3, 1000, "gpt-4o-mini-tts")


async def test_an_answer_that_tells_nothing_costs_nothing(tmp_path) -> None:
    async with ScriptedUpstream() as up, running(tmp_path / "data", up.url, EXACT_ONLY) as ibid:
        up.script(Body(body=b'{"results":[]}'), Body(body=b'"usage": {', content_type="audio/mpeg"))
        for _ in range(2):
            await fetched(ibid, "/v1/moderations", json={"input": "hello"})
        rows = await ibid.sql("SELECT usage_basis, cost_nusd FROM upstream_call")
        assert rows == [{"usage_basis": "none", "cost_nusd": 0}] * 2


# -- WebSockets -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def far_end(seen: list[Any]) -> AsyncIterator[str]:
    """A server that says every message back, and notes handshake and close."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.path_qs, dict(request.headers)))
        if "refuse" in request.path_qs:
            return web.Response(status=403)
        socket = web.WebSocketResponse(protocols=("realtime",), autoping=False)
        await socket.prepare(request)
        while (message := await socket.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING):
            if message.type is WSMsgType.TEXT and message.data == "bye":
                await socket.close(code=4001, message=b"enough")
                break
            if message.type is WSMsgType.PING:
                await socket.pong(message.data)
            else:
                send = socket.send_str if message.type is WSMsgType.TEXT else socket.send_bytes
                await send(message.data)
        seen.append(socket.close_code)
        return socket

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def joined(tmp_path) -> AsyncIterator[tuple[Ibid, list[Any]]]:
    seen: list[Any] = []
    async with far_end(seen) as url, running(tmp_path / "data", url, EXACT_ONLY) as ibid:
        yield ibid, seen


async def test_websocket_messages_pass_either_way_as_they_are(tmp_path) -> None:
    async with joined(tmp_path) as (ibid, seen):
        headers = {**KEY, "OpenAI-Beta": "realtime=v1"}
        target = ibid.url + "/v1/realtime?model=gpt-realtime"
        async with ibid.session.ws_connect(target, headers=headers, protocols=("realtime", "x")) as socket:
            assert socket.protocol == "realtime"
            await socket.send_str('{"type":"response.create"} \u2028')
            assert await socket.receive_str() == '{"type":"response.create"} \u2028'
            large = bytes(range(256)) * 4096
            await socket.send_bytes(large)
            assert await socket.receive_bytes() == large
        await until(lambda: len(seen) == 2)
        (path, sent), code = seen
        assert (path, sent["OpenAI-Beta"], sent["Authorization"]) == (
            "/v1/realtime?model=gpt-realtime",
            "realtime=v1",
            "Bearer sk-pass",
        )
        assert code == 1000
        said = "SELECT status, cache_status, reason, outcome FROM request"
        await until(lambda: ibid.sql(said))  # a session is booked when both sides are closed
        (row,) = await ibid.sql(said)
        assert row == {"status": 101, "cache_status": "BYPASS", "reason": "pass_through", "outcome": "ok"}


async def test_a_close_of_the_provider_reaches_the_client_with_its_code(tmp_path) -> None:
    async with joined(tmp_path) as (ibid, _):
        async with ibid.session.ws_connect(ibid.url + "/v1/realtime", headers=KEY) as socket:
            await socket.send_str("bye")
            message = await socket.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4001, "enough")


async def test_a_client_that_is_gone_ends_the_providers_side(tmp_path) -> None:
    async with joined(tmp_path) as (ibid, seen):
        socket = await ibid.session.ws_connect(ibid.url + "/v1/realtime", headers=KEY)
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"
        assert socket._response.connection is not None
        transport = socket._response.connection.transport
        assert transport is not None
        transport.abort()
        await until(lambda: len(seen) == 2)
        await socket.close()


async def test_a_refused_handshake_is_an_answer_with_its_status(tmp_path) -> None:
    async with joined(tmp_path) as (ibid, _):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await ibid.session.ws_connect(ibid.url + "/v1/realtime?refuse=1", headers=KEY)
        assert caught.value.status == 403
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await ibid.session.ws_connect(ibid.url + "/v1/realtime")
        assert caught.value.status == 401


async def test_a_stop_does_not_wait_for_open_sockets_for_ever(tmp_path) -> None:
    seen: list[Any] = []
    async with far_end(seen) as url:
        settings = {**EXACT_ONLY, "server": {"drain_timeout_s": 0.5}}
        async with running(tmp_path / "data", url, settings) as ibid:
            socket = await ibid.session.ws_connect(ibid.url + "/v1/realtime", headers=KEY)
            await socket.send_str("hello")
            await socket.receive_str()
        await until(lambda: len(seen) == 2)
