"""Fault catalogue, clients: who leaves, half-closes, reads slowly or shares a forward leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.watch.memory import resident_bytes
from tests.edge.faults_app import (
    ADMIN_TOKEN,
    BEARER,
    EXACT_ONLY,
    Running,
    ibid,
    parse,
    question,
    request,
    send,
    serving,
    until,
    up,
)
from tests.edge.rawclient import RawClient
from tests.upstream import Chat, Json, Raw, ScriptedUpstream, Stream, event
from tests.waiting import PATIENCE_S

__all__ = ["ibid", "up"]  # fixtures

FORMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def nothing_left_behind(ibid: Running) -> AsyncIterator[None]:
    """Tasks, descriptors, places, flights and live streams are afterwards what they were before."""
    await ibid.ask(question("A question that warms every pool up?"))
    await ibid.settled()
    tasks, files = len(asyncio.all_tasks()), open_files()
    yield
    await ibid.settled()
    handler = ibid.handlers[0]
    await until(lambda: len(asyncio.all_tasks()) <= tasks and open_files() <= files and not ibid.pipeline.flights)
    assert handler.admission.free == ibid.app.settings.limits.in_flight
    assert not handler.streams


async def left(up: ScriptedUpstream) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await up.left.wait()


# --- leaving --------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_before_the_first_byte_cancels_the_upstream(ibid: Running, stream: bool, how: str) -> None:
    async with nothing_left_behind(ibid):
        ibid.up.arrived.clear()
        ibid.up.script(Raw(b"", "stall"))
        client = await RawClient.connect(ibid.port)
        await client.send(request(question(stream=stream)))
        await ibid.up.arrived.wait()
        getattr(client, how)()
        await left(ibid.up)
    assert await ibid.stored() == 1, "the warming question alone"


@pytest.mark.parametrize("events", [1, 3, 6], ids=["after the role", "mid text", "before [DONE]"])
async def test_leaving_a_stream_cancels_the_upstream_and_keeps_nothing(ibid: Running, events: int) -> None:
    async with nothing_left_behind(ibid):
        ibid.up.script(Chat(gates={events: asyncio.Event()}))
        client = await RawClient.connect(ibid.port)
        await client.send(request(question(stream=True)))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head
        seen = b""
        while seen.count(b"data: ") < min(events, 6):
            seen += await client.reader.read(4096)
        client.close()
        await left(ibid.up)
    assert await ibid.stored() == 1
    asked = ibid.asked
    assert not (await ibid.ask(question(stream=True))).is_hit
    assert ibid.asked == asked + 1
    rows = await ibid.app.store.database.rows("SELECT outcome FROM request")
    assert "cancelled" in [row[0] for row in rows]


async def test_leaving_a_passed_through_answer_cancels_the_upstream(ibid: Running) -> None:
    async with nothing_left_behind(ibid):
        ibid.up.script(Stream([b"x" * 100] * 3, gates={1: asyncio.Event()}, content_type="text/plain"))
        client = await RawClient.connect(ibid.port)
        await client.send(request(b"", method="GET", target="/v1/files/f/content"))
        await client.reader.readuntil(b"x" * 100)
        client.close()
        await left(ibid.up)


async def test_thirty_clients_that_leave_at_once_leave_nothing(ibid: Running) -> None:
    async with nothing_left_behind(ibid):
        ibid.up.default = Chat(gates={2: asyncio.Event()})
        clients = [await RawClient.connect(ibid.port) for _ in range(30)]
        for number, client in enumerate(clients):
            await client.send(request(question(f"Question of leaver number {number}?", stream=True)))
        for client in clients:
            await client.reader.readuntil(b"data: ")
            client.reset()
        await until(lambda: ibid.up.meter.cancelled >= 30)


@FORMS
async def test_half_closing_after_the_request_is_answered(ibid: Running, stream: bool) -> None:
    client = await RawClient.connect(ibid.port)
    await client.send(request(question(stream=stream)))
    client.half_close()
    raw = await client.rest()
    reply = parse(raw)
    assert reply.status == 200
    assert "answer #1" in reply.text
    client.close()


async def test_a_client_that_stops_reading_is_cut_and_nothing_is_kept(tmp_path: Path, up: ScriptedUpstream) -> None:
    async with serving(tmp_path, up, EXACT_ONLY + "[limits]\nwrite_stall_s = 0.5\n") as ibid:
        async with nothing_left_behind(ibid):
            ibid.up.script(Stream([event({"pad": "x" * 60_000})] * 900))
            client = await RawClient.connect(ibid.port)
            client.writer.transport.pause_reading()
            await client.send(request(question(stream=True)))
            async with asyncio.timeout(PATIENCE_S):
                await up.left.wait()
            client.reset()
        assert await ibid.stored() == 1


# --- sharing one forward --------------------------------------------------------------------------------------------


def seats(ibid: Running) -> int:
    return sum(len(flight._seats) for flight in ibid.pipeline.flights.values())


async def joined(ibid: Running, count: int) -> None:
    """So many clients sit in the one flight."""
    await until(lambda: seats(ibid) >= count)


@pytest.mark.parametrize("events", [0, 3], ids=["before the head", "mid stream"])
async def test_followers_go_on_when_the_first_client_leaves(ibid: Running, events: int) -> None:
    gate = asyncio.Event()

    async def held(seen: object) -> Chat:
        if not events:
            await gate.wait()
        return Chat(gates={events: gate} if events else {})

    async with nothing_left_behind(ibid):
        ibid.up.arrived.clear()
        ibid.up.script(held)
        first = await RawClient.connect(ibid.port)
        await first.send(request(question(stream=True)))
        await ibid.up.arrived.wait()
        followers = [asyncio.create_task(ibid.ask(question(stream=True))) for _ in range(20)]
        await joined(ibid, 21)
        first.reset()
        await until(lambda: seats(ibid) == 20)
        gate.set()
        replies = await asyncio.gather(*followers)
    assert ibid.asked == 2, "the warming question and one forward"
    assert {reply.text for reply in replies} == {f"answer #2 to: {json.loads(question())['messages'][0]['content']}"}
    assert all(reply.whole and "[DONE]" in reply.events for reply in replies)
    assert (await ibid.ask()).is_hit


@pytest.mark.parametrize("form", ["whole", "stream", "mixed"])
async def test_five_hundred_at_once_cost_one_call(ibid: Running, form: str) -> None:
    gate = asyncio.Event()

    async def held(seen: object) -> Chat:
        await gate.wait()
        return Chat()

    ibid.up.script(held)
    forms = {"whole": [False], "stream": [True], "mixed": [False, True]}[form]
    asking = [asyncio.create_task(ibid.ask(question(stream=forms[i % len(forms)]))) for i in range(500)]
    await joined(ibid, 500)
    gate.set()
    replies = await asyncio.gather(*asking)
    assert ibid.asked == 1
    assert {reply.status for reply in replies} == {200}
    assert len({reply.text for reply in replies}) == 1
    assert len({reply.headers["x-request-id"] for reply in replies}) == 500


@FORMS
async def test_a_failure_reaches_each_follower_and_is_not_kept(ibid: Running, stream: bool) -> None:
    gate = asyncio.Event()
    body = {"error": {"message": "oops", "type": "server_error", "param": None, "code": "the_upstreams_own"}}

    async def held(seen: object) -> Json:
        await gate.wait()
        return Json(500, body)

    ibid.up.script(held)
    asking = [asyncio.create_task(ibid.ask(question(stream=stream))) for _ in range(50)]
    await joined(ibid, 50)
    gate.set()
    for reply in await asyncio.gather(*asking):
        assert (reply.status, json.loads(reply.body)) == (500, body)
    assert ibid.asked == 1
    await ibid.nothing_kept(question(stream=stream))


async def test_followers_of_the_other_form_get_an_attempt_of_their_own(ibid: Running) -> None:
    gate = asyncio.Event()

    async def held(seen: object) -> Json:
        await gate.wait()
        return Json(429, {"error": {"message": "slow", "type": "t", "param": None, "code": "c"}})

    ibid.up.script(held)
    first = asyncio.create_task(ibid.ask(question(stream=True)))
    await joined(ibid, 1)
    others = [asyncio.create_task(ibid.ask(question())) for _ in range(10)]
    await joined(ibid, 11)
    gate.set()
    assert (await first).status == 429
    replies = await asyncio.gather(*others)
    assert {reply.status for reply in replies} == {200}
    assert ibid.asked == 2, "one attempt, shared by the ten"


async def test_a_stream_that_breaks_breaks_for_all(ibid: Running) -> None:
    gate = asyncio.Event()
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]})
    ibid.up.script(Stream([role, role], gates={1: gate}, cut="fin"))
    asking = [asyncio.create_task(ibid.ask(question(stream=True))) for _ in range(20)]
    await joined(ibid, 20)
    gate.set()
    for reply in await asyncio.gather(*asking):
        assert reply.body.startswith(role + role)
        assert reply.stream_error == "upstream_incomplete"
    await ibid.nothing_kept(question(stream=True))


async def test_two_credentials_never_share_a_forward(ibid: Running) -> None:
    replies = await asyncio.gather(
        *(ibid.ask(credential=f"Authorization: Bearer sk-tenant-{i}") for i in range(20) for _ in range(2))
    )
    assert ibid.asked == 20
    texts = [reply.text for reply in replies]
    assert len(set(texts)) == 20
    keys = {seen.header("authorization"): n for n, seen in enumerate(ibid.up.requests)}
    assert len(keys) == 20


# --- stopping -------------------------------------------------------------------------------------------------------


async def start(folder: Path, up: ScriptedUpstream) -> tuple[asyncio.subprocess.Process, int, int]:
    """A real process; its client and admin ports as its banner names them."""
    config = folder / "config.toml"
    config.write_text(EXACT_ONLY)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "--config", str(config), "--listen", "127.0.0.1:0",
        "--admin", "127.0.0.1:0", "--upstream", up.url, "--data-dir", str(folder / "data"),
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "IBID_ADMIN_TOKEN": ADMIN_TOKEN},
    )  # fmt: skip
    assert process.stderr is not None
    ports: dict[str, int] = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(ports) < 2:
            line = (await process.stderr.readline()).decode()
            assert line, "the process ended"
            for word, name in (("ibid serves", "client"), ("admin  ", "admin")):
                if line.startswith(word):
                    ports[name] = int(line.partition("http://127.0.0.1:")[2].partition("/")[0].split()[0])
    return process, ports["client"], ports["admin"]


async def test_sigterm_lets_a_stream_end_takes_nothing_new_and_loses_no_ledger_row(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    process, port, admin_port = await start(tmp_path, up)
    try:
        gate = asyncio.Event()
        up.script(Chat(gates={2: gate}))
        client = await RawClient.connect(port)
        await client.send(request(question(stream=True)))
        begun = await client.reader.readuntil(b"data: ")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(ConnectionError):
                    (await RawClient.connect(port)).close()
                    await asyncio.sleep(0.01)
                    continue
                break
        ready = await send(admin_port, request(b"", method="GET", target="/readyz"))
        assert ready.status == 503
        gate.set()
        reply = parse(begun + await client.rest())
        client.close()
        assert reply.whole
        assert reply.events[-1] == "[DONE]"
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    async with serving(tmp_path, up) as again:
        ((rows,),) = await again.app.store.database.rows("SELECT count(*) FROM request")
        assert rows == 1
        assert (await again.ask(question(stream=True))).is_hit, "stored before the end"


async def test_a_second_sigterm_ends_it_at_once(tmp_path: Path, up: ScriptedUpstream) -> None:
    process, port, _ = await start(tmp_path, up)
    try:
        up.script(Chat(gates={2: asyncio.Event()}))
        client = await RawClient.connect(port)
        await client.send(request(question(stream=True), BEARER.replace("Authorization", "x-note")))
        await client.reader.readuntil(b"data: ")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(ConnectionError):
                    (await RawClient.connect(port)).close()
                    await asyncio.sleep(0.01)
                    continue
                break
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 1
        assert b"[DONE]" not in await client.rest()
        client.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def gated(words: int, gate: asyncio.Event) -> Stream:
    """An answer that stops before its last words until the gate opens."""
    chunks = [
        event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})
        for choice in [
            *({"index": 0, "delta": {"content": f"word {number} "}, "finish_reason": None} for number in range(words)),
            {"index": 0, "delta": {}, "finish_reason": "stop"},
        ]
    ]
    return Stream([*chunks, event("[DONE]")], gates={words: gate})


@pytest.mark.parametrize("share", [0.9, 1.0], ids=["it is stored no more", "it is cut"])
async def test_what_is_under_way_gives_way_to_memory(tmp_path: Path, up: ScriptedUpstream, share: float) -> None:
    """First what is kept of answers for those who come later, then the answers."""
    bound, gate = resident_bytes() + (256 << 20), asyncio.Event()
    async with serving(tmp_path, up, f"{EXACT_ONLY}[server]\nmemory_bytes = {bound}\n") as ibid:
        up.script(gated(20, gate))
        client = await RawClient.connect(ibid.port)
        await client.send(request(question(stream=True)))
        await until(lambda: len(ibid.pipeline.flights) == 1)
        (flight,) = ibid.pipeline.flights.values()
        await until(lambda: b"word 19" in flight.body)
        ballast: list[bytearray] = []

        def is_there() -> bool:
            if ibid.app.memory.used_share < share:
                ballast.append(bytearray(b"\x01") * (4 << 20))
            return flight.trimmed if share < 0.95 else flight.ended

        await until(is_there)
        assert flight.held_bytes == 0
        ballast.clear()
        gate.set()
        reply = await client.answer()
        client.close()
        assert b"word 19" in reply.body
        assert (b"[DONE]" in reply.body, b"overloaded" in reply.body) == (share < 0.95, share > 0.95)
        await until(lambda: not ibid.app.memory.is_short)
        await ibid.settled()
        assert await ibid.stored() == 0
        assert (await ibid.ask(question("Something else?"))).status == 200


async def test_requests_are_refused_while_memory_is_short_and_health_is_answered(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    bound = resident_bytes() + (256 << 20)
    async with serving(tmp_path, up, f"{EXACT_ONLY}[server]\nmemory_bytes = {bound}\n") as ibid:
        assert (await ibid.ask()).status == 200
        await ibid.settled()
        assert len(ibid.pipeline.hot) == 1
        ballast: list[bytearray] = []

        def is_short() -> bool:  # real memory, as many bodies would take; caches that go meanwhile make room for more
            ballast.append(bytearray(b"\x01") * (16 << 20))
            return ibid.app.memory.is_short or len(ballast) == 256

        await until(is_short)
        assert ibid.app.memory.is_short
        assert len(ibid.pipeline.hot) == 0
        refused = await ibid.ask()
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        for target in ("/healthz", "/readyz", "/metrics"):
            assert (await ibid.admin(target)).status == 200
        ballast.clear()
        await until(lambda: not ibid.app.memory.is_short)
        assert (await ibid.ask()).is_hit
