"""Streams in every dialect: shared, left and finished, replayed at a pace; and what the ledger says of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import aiohttp
import openai
import pytest

from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.flows.running import EXACT_ONLY, MODEL, Client, Ibid, chat_body, running, serving, until
from tests.flows.test_flow_responses import Model
from tests.providers import provider
from tests.upstream import Chat, Seen, Stream
from tests.waiting import PATIENCE_S

ASKED = "How do I repair a leaking garden hose?"
CALLS = "SELECT won, usage_basis, status, COUNT(*) AS n FROM upstream_call GROUP BY won, usage_basis, status"
OFF_BALANCE = "SELECT SUM(baseline_nusd - actual_nusd) - (SELECT SUM(saved_nusd) FROM saving) AS off FROM request"


class Form(NamedTuple):
    """How one dialect asks for a stream."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = {}
    mark: bytes = b"\n\n"  # what ends an event


SAID = {"messages": [{"role": "user", "content": ASKED}]}
FORMS: Mapping[str, Form] = {
    "chat": Form("/v1/chat/completions", {"model": "m-1", "stream": True, **SAID}),
    "completions": Form("/v1/completions", {"model": "m-1", "stream": True, "prompt": ASKED}),
    "responses": Form("/v1/responses", {"model": "m-1", "stream": True, "store": False, "input": ASKED}),
    "anthropic": Form(
        "/v1/messages", {"model": "m-1", "stream": True, "max_tokens": 512, **SAID}, {"anthropic-version": "2023-06-01"}
    ),
    "gemini": Form(
        "/v1beta/models/m-1:streamGenerateContent?alt=sse", {"contents": [{"role": "user", "parts": [{"text": ASKED}]}]}
    ),
    "ollama chat": Form("/api/chat", {"model": "m-1", **SAID}, mark=b"\n"),
    "ollama generate": Form("/api/generate", {"model": "m-1", "prompt": ASKED}, mark=b"\n"),
}
every = pytest.mark.parametrize("name", sorted(FORMS))


class Gated:
    """Every provider in its own words, event by event; `gate` stands before the third event from the end."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self._openai = Model()

    def __call__(self, seen: Seen) -> Stream:
        is_openai = seen.path.endswith(("/responses", "/v1/completions"))
        native = self._openai(seen) if is_openai else provider(seen)
        assert isinstance(native, Stream)
        whole = b"".join(native.chunks)
        mark = b"\n\n" if native.content_type == "text/event-stream" else b"\n"
        events = [event + mark for event in whole.split(mark)[:-1]]
        assert len(events) > 3
        return Stream(events, {len(events) - 3: self.gate}, content_type=native.content_type, headers=native.headers)


@contextlib.asynccontextmanager
async def opened(ibid: Ibid, form: Form, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
    sent = {"Authorization": "Bearer sk-a", "Content-Type": "application/json", **form.headers, **headers}
    async with ibid.session.post(ibid.url + form.path, json=form.body, headers=sent) as response:
        assert response.status == 200, await response.text()
        yield response


async def whole(ibid: Ibid, form: Form, **headers: str) -> tuple[Mapping[str, str], bytes]:
    async with opened(ibid, form, **headers) as response:
        return response.headers, await response.read()


def seats(ibid: Ibid) -> int:
    """Clients on forwards in flight."""
    flights = ibid.app.pipeline.flights.values()
    return sum(seat.is_client for flight in flights for seat in flight._seats)


def on_leave(policy: str, **server: Any) -> dict[str, Mapping[str, Any]]:
    return {**EXACT_ONLY, "stream": {"on_leave": policy}, "server": {"drain_timeout_s": PATIENCE_S, **server}}


# -- shared -----------------------------------------------------------------------------------------------------------


@every
async def test_fifty_identical_streams_and_a_late_one_are_one_call(exact, up, name):
    form, up.default = FORMS[name], Gated()
    early = [asyncio.create_task(whole(exact, form)) for _ in range(49)]
    await until(lambda: seats(exact) == 49)
    async with opened(exact, form) as late:
        begun = await late.content.readuntil(form.mark)
        assert late.headers["x-cache-tier"] == "collapsed"
        up.default.gate.set()
        rest = await late.content.read()
    bodies = {body for _, body in await asyncio.gather(*early)}
    assert bodies == {begun + rest}
    assert len(up.requests) == 1
    await exact.settled()
    headers, _ = await whole(exact, form)
    assert headers["x-cache"] == "HIT"
    lanes = await exact.sql("SELECT lane, COUNT(*) AS n FROM request GROUP BY lane ORDER BY lane")
    assert {row["lane"]: row["n"] for row in lanes} == {"cache.exact": 1, "forward": 1, "stream.coalesce": 49}


@every
async def test_the_leader_leaves_and_its_followers_have_every_byte(exact, up, name):
    form, up.default = FORMS[name], Gated()
    async with opened(exact, form) as leader:
        begun = await leader.content.readuntil(form.mark)
        followers = [asyncio.create_task(whole(exact, form)) for _ in range(3)]
        await until(lambda: seats(exact) == 4)
        leader.close()
    await until(lambda: seats(exact) == 3)
    up.default.gate.set()
    (body,) = {body for _, body in await asyncio.gather(*followers)}
    assert body.startswith(begun)
    assert len(up.requests) == 1


async def test_a_stream_the_client_tries_again_joins_its_first_try(exact, up):
    gate = asyncio.Event()
    up.default = Chat(gates={2: gate})
    async with exact.open(chat_body(ASKED, stream=True)) as first:
        await first.content.readuntil(b"\n\n")
        retry = asyncio.create_task(exact.ask(ASKED, stream=True, headers={"x-stainless-retry-count": "1"}))
        await until(lambda: seats(exact) == 2)
        first.close()
    await until(lambda: seats(exact) == 1)
    gate.set()
    reply = await retry
    assert (reply.tier, up.meter.calls, up.meter.completed) == ("collapsed", 1, 1)
    rows = {row["id"]: row for row in await exact.sql("SELECT id, retry_of, outcome, actual_nusd FROM request")}
    mine = rows[reply.headers["x-request-id"]]
    assert mine["actual_nusd"] == 0
    assert rows[mine["retry_of"]]["outcome"] == "cancelled"


async def test_a_client_that_does_not_read_slows_no_other(exact, up):
    """Three megabytes: more than sockets hold, less than ibid keeps for who is late."""
    text = "word " * 600_000
    gate = asyncio.Event()
    up.default = Chat(text=text, pieces=3000, gates={2: gate})
    async with exact.open(chat_body(ASKED, stream=True)) as slow:
        begun = await slow.content.readuntil(b"\n\n")
        others = [asyncio.create_task(exact.ask(ASKED, stream=True)) for _ in range(3)]
        await until(lambda: seats(exact) == 4)
        gate.set()
        async with asyncio.timeout(PATIENCE_S):
            fast = await asyncio.gather(*others)
        assert seats(exact) == 1 or not exact.app.pipeline.flights
        assert {reply.tier for reply in fast} == {"collapsed"}
        assert {reply.body for reply in fast} == {begun + await slow.content.read()}
    assert fast[0].text == text
    assert up.meter.calls == 1


# -- left -------------------------------------------------------------------------------------------------------------


async def leave(ibid: Ibid, prompt: str = ASKED, **fields: Any) -> None:
    """Ask for a stream, read its first event and go."""
    async with ibid.open(chat_body(prompt, stream=True, **fields)) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await until(lambda: seats(ibid) == 0)


async def test_a_call_that_was_left_is_read_to_its_end_and_the_next_one_hits(data_dir, up):
    gate = asyncio.Event()
    up.default = Chat(gates={2: gate})
    async with running(data_dir, up.url, on_leave("finish")) as ibid:
        await leave(ibid)
        assert len(ibid.app.pipeline.flights) == 1
        gate.set()
        await ibid.settled()
        hit = await ibid.ask(ASKED, stream=True)
        assert (hit.cache, up.meter.calls, up.meter.completed, up.meter.cancelled) == ("HIT", 1, 1, 0)
        rows = await ibid.sql("SELECT outcome, lane, actual_nusd, baseline_nusd FROM request ORDER BY ts")
        cost = Prices().price("openai", MODEL, metered(up), "default", 1_790_000_000_000).nusd
        assert [tuple(row.values()) for row in rows] == [
            ("cancelled", "forward", cost, cost),
            ("ok", "cache.exact", 0, cost),
        ]
        assert await ibid.sql(CALLS) == [{"won": 0, "usage_basis": "measured", "status": 200, "n": 1}]
        assert await ibid.sql(OFF_BALANCE) == [{"off": 0}]


def metered(up) -> Usage:
    return Usage(up.meter.input_tokens, up.meter.output_tokens)


@pytest.mark.parametrize("at", [0, 2], ids=["before the head", "mid stream"])
async def test_who_comes_back_joins_the_call_that_is_being_finished(data_dir, up, at):
    gate = asyncio.Event()

    async def reply(_seen: Seen) -> Chat:
        if not at:
            await gate.wait()
        return Chat(gates={2: gate})

    up.default = reply
    async with running(data_dir, up.url, on_leave("finish")) as ibid:
        if at:
            await leave(ibid)
        else:
            first = asyncio.create_task(ibid.ask(ASKED, stream=True))
            await until(lambda: len(up.requests) == 1)
            first.cancel()
            await until(lambda: seats(ibid) == 0)
        again = asyncio.create_task(ibid.ask(ASKED, stream=True, headers={"x-stainless-retry-count": "1"}))
        await until(lambda: seats(ibid) == 1)
        gate.set()
        reply_ = await again
        assert (reply_.tier, reply_.chunks[-1]["choices"][0]["finish_reason"]) == ("collapsed", "stop")
        assert (len(up.requests), up.meter.completed) == (1, 1)
        await ibid.settled()
        assert await ibid.sql(CALLS) == [{"won": 1, "usage_basis": "measured", "status": 200, "n": 1}]
        assert await ibid.sql(OFF_BALANCE) == [{"off": 0}]


async def test_half_an_answer_is_finished_and_less_is_cut(data_dir, up):
    words = "one two three four five six seven eight"
    async with running(data_dir, up.url, on_leave("finish_half")) as ibid:

        async def left_at(piece: int, prompt: str) -> None:
            gate = asyncio.Event()
            up.default = Chat(text=words, pieces=8, gates={piece: gate})
            async with ibid.open(chat_body(prompt, stream=True)) as response:
                for _ in range(piece):
                    await response.content.readuntil(b"\n\n")
                response.close()
            await until(lambda: seats(ibid) == 0)
            gate.set()
            await ibid.settled()

        await left_at(8, "How long is an answer before any was seen?")
        assert await ibid.entries() == []
        up.default = Chat(text=words, pieces=8)
        for n in range(3):
            await ibid.fill(f"How do I learn the length of answer {n}?", stream=True)
        await left_at(2, "How do I leave early?")
        assert len(await ibid.entries()) == 3
        await left_at(8, "How do I leave late?")
        assert len(await ibid.entries()) == 4
        assert await ibid.sql(f"{CALLS} ORDER BY won, usage_basis") == [
            {"won": 0, "usage_basis": "estimated", "status": 200, "n": 2},
            {"won": 0, "usage_basis": "measured", "status": 200, "n": 1},
            {"won": 1, "usage_basis": "measured", "status": 200, "n": 3},
        ]
        assert (await ibid.ask("How do I leave late?")).cache == "HIT"


async def test_what_may_not_be_stored_is_not_finished(data_dir, up):
    gate = asyncio.Event()
    up.default = Chat(gates={2: gate})
    async with running(data_dir, up.url, on_leave("finish")) as ibid:
        for prompt, headers in ((ASKED, {"x-cache-mode": "read"}), ("Cache-Control!", {"Cache-Control": "no-store"})):
            up.left.clear()
            async with ibid.open(chat_body(prompt, stream=True), headers=headers) as response:
                await response.content.readuntil(b"\n\n")
                response.close()
            async with asyncio.timeout(PATIENCE_S):
                await up.left.wait()
        gate.set()
        assert up.meter.completed == 0


async def test_no_more_calls_are_finished_at_once_than_there_may_be(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.request.leaving.FINISHING_MAX", 2)
    gate = asyncio.Event()
    up.default = Chat(gates={2: gate})
    async with running(data_dir, up.url, on_leave("finish")) as ibid:
        for n in range(3):
            await leave(ibid, f"How do I leave call {n}?")
        async with asyncio.timeout(PATIENCE_S):
            await up.left.wait()
        gate.set()
        await ibid.settled()
        assert len(await ibid.entries()) == 2
        assert await ibid.sql(f"{CALLS} ORDER BY usage_basis") == [
            {"won": 0, "usage_basis": "estimated", "status": 200, "n": 1},
            {"won": 0, "usage_basis": "measured", "status": 200, "n": 2},
        ]


async def test_an_upstream_that_breaks_while_it_is_finished_is_booked_as_what_came(data_dir, up):
    gate = asyncio.Event()
    up.default = lambda seen: Stream(Gated()(seen).chunks[:3], {2: gate}, cut="rst")
    async with running(data_dir, up.url, on_leave("finish")) as ibid:
        await leave(ibid)
        gate.set()
        await ibid.settled()
        assert await ibid.entries() == []
        assert await ibid.sql(CALLS) == [{"won": 0, "usage_basis": "estimated", "status": 200, "n": 1}]


async def test_a_stop_waits_for_what_is_being_finished_and_no_longer_than_it_may(data_dir, up):
    gates = [asyncio.Event(), asyncio.Event()]
    up.script(Chat(gates={2: gates[0]}), Chat(gates={2: gates[1]}))
    async with running(data_dir, up.url, on_leave("finish", drain_timeout_s=3.0)) as ibid:
        await leave(ibid, "How do I finish in time?")
        await leave(ibid, "How do I never finish?")
        asyncio.get_running_loop().call_later(0.2, gates[0].set)
        stopping_s = time.monotonic()
    assert time.monotonic() - stopping_s > 2.9
    async with asyncio.timeout(PATIENCE_S):
        await up.left.wait()
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        assert (await ibid.ask("How do I finish in time?", stream=True)).cache == "HIT"
        rows = await ibid.sql("SELECT usage_basis, status, won FROM upstream_call ORDER BY usage_basis")
        assert [tuple(row.values()) for row in rows] == [("estimated", 200, 0), ("measured", 200, 0)]


# -- replayed at a pace -----------------------------------------------------------------------------------------------


async def timed(ibid: Ibid, form: Form, **headers: str) -> tuple[list[tuple[float, bytes]], Mapping[str, str]]:
    """What came, and when, in seconds since the request."""
    came = []
    asked_s = time.perf_counter()
    async with opened(ibid, form, **headers) as response:
        async for piece in response.content.iter_any():
            came.append((time.perf_counter() - asked_s, piece))
        return came, response.headers


@every
async def test_a_hit_comes_in_whole_events_as_its_original_came(exact, up, name):
    form, up.default = FORMS[name], Gated()
    first = asyncio.create_task(timed(exact, form))
    await until(lambda: any(flight.size_bytes for flight in exact.app.pipeline.flights.values()))
    await asyncio.sleep(1.0)
    up.default.gate.set()
    original, _ = await first
    await exact.settled()
    paced, headers = await timed(exact, form, **{"x-cache-pace": "recorded"})
    at_once, _ = await timed(exact, form)
    assert headers["x-cache"] == "HIT"
    assert all(piece.endswith(form.mark) for _, piece in paced)
    shape = [len(event) for event in b"".join(piece for _, piece in at_once).split(form.mark)]
    assert [len(event) for event in b"".join(piece for _, piece in paced).split(form.mark)] == shape
    span = original[-1][0] - original[0][0]
    assert span > 0.5
    assert paced[-1][0] - paced[0][0] < 10 * span
    assert at_once[-1][0] - at_once[0][0] < span / 2
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(paced)]
    assert max(gaps) > 0.5  # the silence, not an average of it; less than it was where its beginning came late
    assert await exact.sql("SELECT COUNT(*) AS n FROM request WHERE outcome = 'ok'") == [{"n": 3}]


async def test_tokens_a_second_from_the_operator_or_the_client(data_dir, up):
    up.default = Chat(text=" ".join(["word"] * 40), pieces=20)
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        await ibid.fill(ASKED, stream=True)
    instant = {"x-cache-pace": "instant"}
    for tokens_per_s, headers, seconds in ((80, {}, 0.5), (1, {"x-cache-pace": "160/s"}, 0.25), (1, instant, 0.0)):
        sections = {**EXACT_ONLY, "stream": {"replay_pace": "tokens", "replay_tokens_per_s": tokens_per_s}}
        slow_s = 40.0  # one token a second
        async with running(data_dir, up.url, sections) as ibid:
            asked_s = time.perf_counter()
            reply = await ibid.ask(ASKED, stream=True, headers=headers)
            assert seconds <= time.perf_counter() - asked_s < slow_s
            row = await ibid.row(reply)
            assert (reply.cache, row["lane"], row["outcome"]) == ("HIT", "cache.exact", "ok")
            assert row["total_ms"] >= seconds * 1000
            assert row["total_ms"] - row["ttft_ms"] >= seconds * 1000 / 2
            asked_s = time.perf_counter()
            assert (await ibid.ask(ASKED)).cache == "HIT"
            assert tokens_per_s > 1 or time.perf_counter() - asked_s < slow_s  # whole: nothing to pace


async def test_a_slow_replay_is_kept_alive_and_ends_at_once_when_its_client_leaves(exact, up, monkeypatch):
    monkeypatch.setattr("proxy.client.delivery.HEARTBEAT_S", 0.1)
    up.default = Chat(text=" ".join(["word"] * 40), pieces=20)
    await exact.fill(ASKED, stream=True)
    async with exact.open(chat_body(ASKED, stream=True), headers={"x-cache-pace": "1"}) as response:
        await response.content.readuntil(b"\n\n")
        assert exact.app.telemetry.count() == 1  # of the fill
        assert await response.content.readuntil(b"\n") == b": ping\n"
        response.close()
    await until(lambda: exact.app.telemetry.count() == 2)
    (row,) = await exact.sql("SELECT outcome, lane, total_ms FROM request WHERE cache_status = 'HIT'")
    assert (row["outcome"], row["lane"], row["total_ms"] < 10_000) == ("cancelled", "cache.exact", True)


async def test_a_pace_that_cannot_be_read_is_refused_by_its_name(exact, up):
    reply = await exact.ask(ASKED, stream=True, headers={"x-cache-pace": "soon"})
    assert (reply.status, reply.json["error"]["param"]) == (400, "x-cache-pace")
    assert not up.requests


# -- the bill ---------------------------------------------------------------------------------------------------------


async def stored(ibid: Client, count: int) -> None:
    """Wait until there are so many entries."""

    async def are_there() -> bool:
        return len(await ibid.entries()) == count

    await until(are_there)


async def answering(ibid: Client, count: int) -> None:
    """Wait until ibid answers so many clients, those that left not counted."""

    async def are_there() -> bool:
        return f"ibid_in_flight {count}.0\n" in await ibid.admin("GET", "/metrics")

    await until(are_there)


async def test_fifty_streams_of_the_official_client_cost_what_the_meter_says(data_dir, up):
    """A process of its own, the official client on real sockets: some leave, some try again; the ledger is the bill."""
    gate = asyncio.Event()
    up.default = Chat(text=" ".join(["word"] * 200), pieces=50, gates={25: gate})
    async with serving(data_dir, up.url, on_leave("finish")) as ibid:
        async with openai.AsyncOpenAI(base_url=ibid.url + "/v1", api_key="sk-a", max_retries=0) as sdk:

            async def ask(prompt: str, *, leaves: bool = False, **headers: str) -> str:
                stream = await sdk.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": prompt}], stream=True, extra_headers=headers
                )
                text = ""
                async for chunk in stream:
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    if leaves:
                        await stream.close()
                        break
                return text

            retry = {"x-stainless-retry-count": "1"}
            stay = [asyncio.create_task(ask(ASKED, **headers)) for headers in [{}] * 40 + [retry] * 5]
            await asyncio.gather(*(ask(ASKED, leaves=True) for _ in range(5)))
            await asyncio.gather(*(ask(f"What of question {n}?", leaves=True) for n in range(10)))
            await answering(ibid, 45)
            assert (up.meter.calls, up.meter.completed) == (11, 0)
            gate.set()
            assert set(await asyncio.gather(*stay)) == {up.default.text}
            await stored(ibid, 11)
            again = await asyncio.gather(*(ask(f"What of question {n}?") for n in range(10)))
            assert set(again) == {up.default.text}
        assert up.meter.calls == 11
        bill = Prices().price("openai", MODEL, metered(up), "default", 1_790_000_000_000).nusd

        async def sql(statement: str) -> list[dict[str, Any]]:
            found = await ibid.admin("POST", "/savings/query", {"sql": statement})
            return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]

        async def are_booked() -> bool:
            return (await sql("SELECT COUNT(*) AS n FROM request"))[0]["n"] == 70

        await until(are_booked)
        totals = await sql(
            "SELECT SUM(actual_nusd) AS paid, SUM(baseline_nusd) AS base, SUM(outcome = 'cancelled') AS gone "
            "FROM request"
        )
        saved = await sql("SELECT SUM(saved_nusd) AS n FROM saving")
        calls = await sql("SELECT SUM(cost_nusd) AS cost, SUM(1 - won) AS unread, COUNT(*) AS n FROM upstream_call")
        assert totals[0]["paid"] == calls[0]["cost"] == bill > 0
        assert totals[0]["base"] - totals[0]["paid"] == saved[0]["n"] > 0
        assert (calls[0]["n"], calls[0]["unread"], totals[0]["gone"]) == (11, 10, 15)
