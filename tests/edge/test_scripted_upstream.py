"""The scripted upstream and the fault proxy do what tests rely on."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from proxy.core.dialects.openai_record import Recorder, read_whole
from proxy.core.model import Usage
from tests.faultproxy import Fault, FaultProxy
from tests.upstream import Body, Chat, Json, Raw, ScriptedUpstream, Seen, Stream, event
from tests.waiting import A_WHILE_S, PATIENCE_S

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "two words"}]}


@pytest.fixture
async def up():
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def client():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


async def test_each_answer_carries_its_number_and_is_metered(up, client):
    for number in (1, 2):
        async with client.post(f"{up.url}/v1/chat/completions", json=ASK, headers={"X-Test": "1"}) as response:
            answer = read_whole(await response.read())
            assert answer.message["content"] == f"answer #{number} to: two words"
            assert answer.usage == Usage(6, 5)
    assert (up.meter.calls, up.meter.completed, up.meter.input_tokens, up.meter.output_tokens) == (2, 2, 12, 10)
    async with client.get(f"{up.url}/__meter") as response:
        assert (await response.json())["output_tokens"] == 10
    seen = up.requests[0]
    assert (seen.method, seen.path, seen.header("x-test"), seen.json) == ("POST", "/v1/chat/completions", "1", ASK)


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_is_whole_and_counts_only_when_asked(up, client, include_usage):
    body = {**ASK, "stream": True, "stream_options": {"include_usage": include_usage}}
    recorder = Recorder()
    async with client.post(f"{up.url}/v1/chat/completions", json=body) as response:
        async for chunk in response.content.iter_any():
            recorder.feed(chunk)
    answer = recorder.finish()
    assert answer.message["content"] == "answer #1 to: two words"
    assert len(answer.pieces) == 4
    assert answer.usage == (Usage(6, 5) if include_usage else None)


async def test_a_gate_holds_the_stream(up, client):
    gate = asyncio.Event()
    up.script(Chat(gates={2: gate}))
    async with client.post(f"{up.url}/v1/chat/completions", json={**ASK, "stream": True}) as response:
        first = await response.content.readuntil(b"\n\n")
        second = await response.content.readuntil(b"\n\n")
        assert (b'"role"' in first, b"answer" in second) == (True, True)
        third = asyncio.ensure_future(response.content.readuntil(b"\n\n"))
        await asyncio.wait([third], timeout=A_WHILE_S)
        assert not third.done()
        gate.set()
        assert b'"content"' in await third
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_is_noticed(up, client):
    up.script(Chat(gates={2: asyncio.Event()}))
    response = await client.post(f"{up.url}/v1/chat/completions", json={**ASK, "stream": True})
    await response.content.readuntil(b"\n\n")
    response.close()
    await asyncio.wait_for(up.left.wait(), PATIENCE_S)
    assert (up.meter.cancelled, up.meter.completed) == (1, 0)


async def test_scripts_answer_in_order_then_the_default_does(up, client):
    def echo(seen: Seen) -> Json:
        return Json(418, {"path": seen.path})

    up.script(Json(429, {"error": {}}, {"Retry-After": "3"}), echo, Body(body=b"x" * 50, gzipped=True))
    async with client.get(f"{up.url}/a") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
    async with client.get(f"{up.url}/b?c=1") as response:
        assert (response.status, await response.json()) == (418, {"path": "/b?c=1"})
    async with client.get(f"{up.url}/c") as response:
        assert (response.headers["Content-Encoding"], await response.read()) == ("gzip", b"x" * 50)
    async with client.get(f"{up.url}/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["gpt-4o-mini", "gpt-4o"]


@pytest.mark.parametrize("cut", ["fin", "rst"])
async def test_a_cut_stream_is_an_error_for_the_reader(up, client, cut):
    gate = asyncio.Event()
    up.script(Stream([event({"a": 1}), b"data: half"], gates={2: gate}, cut=cut))
    async with client.get(f"{up.url}/x") as response:
        assert await response.content.readuntil(b"\n\n") == b'data: {"a":1}\n\n'
        gate.set()
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_raw_bytes_stand_alone_on_the_socket(up, client):
    up.script(Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort"), Raw(b"", then="rst"))
    async with client.get(f"{up.url}/x") as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.post(f"{up.url}/x")


async def test_a_stall_ends_when_released(up, client):
    stall = Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhalf", then="stall")
    up.script(stall)
    async with client.get(f"{up.url}/x") as response:
        assert await response.read() == b"half"
    stall.release.set()


async def get(client, fp):
    async with client.get(f"{fp.url}/v1/models", headers={"Connection": "close"}) as response:
        return await response.read()


async def test_the_fault_proxy_is_transparent_without_faults_and_in_slices(up, client):
    async with FaultProxy("127.0.0.1", up.port) as fp:
        whole = await get(client, fp)
        fp.downstream = fp.upstream = Fault(slice_bytes=7)
        assert await get(client, fp) == whole == await get(client, fp)
        assert json.loads(whole)["object"] == "list"
        assert fp.connections == 3


@pytest.mark.parametrize("how", ["fin", "rst", "half"])
@pytest.mark.parametrize("cut_at", [0, 20, 250])
async def test_the_fault_proxy_cuts_where_it_is_told(up, client, how, cut_at):
    async with FaultProxy("127.0.0.1", up.port) as fp:
        fp.downstream = Fault(cut_at=cut_at, how=how)
        with pytest.raises(aiohttp.ClientError):
            await get(client, fp)


@pytest.mark.parametrize("fault", [Fault(blackhole=True), Fault(cut_at=30, how="stall")])
async def test_the_fault_proxy_can_go_silent(up, client, fault):
    async with FaultProxy("127.0.0.1", up.port) as fp:
        fp.downstream = fault
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(get(client, fp), A_WHILE_S)


async def test_the_fault_proxy_can_refuse(up, client):
    async with FaultProxy("127.0.0.1", up.port) as fp:
        fp.refuse = True
        with pytest.raises(aiohttp.ClientConnectionError):
            await get(client, fp)
