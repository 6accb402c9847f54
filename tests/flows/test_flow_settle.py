"""Every request ends in exactly one settlement, whatever happened to it: one row, one line of the log, nothing held."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.core.model import Outcome
from proxy.money.books import Books
from tests.flows.batching import QUICK, ended, hand_in, line, sdk
from tests.flows.running import EXACT_ONLY, Ibid, chat_body, running, until
from tests.upstream import Chat, Json, Raw, ScriptedUpstream, Stream, event

ASKED = "What is the capital of France?"
OTHER = "Which bridge in Prague is the oldest one?"
PACED = {"x-cache-pace": "1000/s"}
SLOW = {"x-cache-pace": "1/s"}
LOADED: Mapping[str, Any] = {}

End = Callable[[Ibid, ScriptedUpstream, pytest.MonkeyPatch], Awaitable[None]]
ENDS: dict[str, tuple[End, Mapping[str, Any], list[str]]] = {}


def end(expected: str, sections: Mapping[str, Any] = EXACT_ONLY) -> Callable[[End], End]:
    """`expected`: what the rows say, "outcome/cache_status/reason" of each."""

    def add(asked: End) -> End:
        ENDS[asked.__name__] = (asked, sections, expected.split())
        return asked

    return add


@contextlib.contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Any:
    """A method of a part that waits; yields the event of its being called."""
    real, called, go = getattr(owner, name), asyncio.Event(), asyncio.Event()

    async def waiting(*places: Any, **named: Any) -> Any:
        called.set()
        await go.wait()
        return await real(*places, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        yield called


async def left(asking: asyncio.Task[Any]) -> None:
    """Its client goes, and hears nothing more."""
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


# --- from the cache --------------------------------------------------------------------------------------------------


@end("ok/MISS/semantic_off ok/HIT/hit")
async def exact_from_memory(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    assert (await ibid.ask(ASKED)).tier == "exact"


@end("ok/MISS/semantic_off ok/HIT/hit")
async def exact_from_sql(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    ibid.app.pipeline.hot.clear()
    assert (await ibid.ask(ASKED)).tier == "exact"


@end("ok/MISS/no_candidate ok/HIT/hit ok/HIT/hit", LOADED)
async def semantic_and_the_same_words_again(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill("Which planet of the solar system has the most moons?")
    for _again in range(2):
        reply = await ibid.ask("Please tell me: which planet of the solar system has the most moons?")
        assert reply.tier == "semantic"


@end("ok/MISS/semantic_off ok/HIT/hit")
async def paced(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    assert (await ibid.ask(ASKED, stream=True, headers=PACED)).tier == "exact"


@end("ok/MISS/semantic_off ok/HIT/hit")
async def paced_for_one_with_a_deadline(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    ibid.app.pipeline.hot.clear()
    assert (await ibid.ask(ASKED, stream=True, headers={**PACED, "x-deadline": "1h"})).tier == "exact"


@end("ok/MISS/semantic_off cancelled/HIT/hit")
async def paced_and_left(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    async with ibid.open(chat_body(ASKED, stream=True), headers=SLOW) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await until(lambda: not ibid.app.handler.streams)


@end("ok/MISS/semantic_off ok/MISS/collapsed ok/MISS/collapsed")
async def collapsed(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    up.default = Chat(pieces=4, gates={2: gate})
    async with asyncio.TaskGroup() as group:
        for stream in (True, True, False):
            group.create_task(ibid.ask(ASKED, stream=stream))
            await until(lambda: bool(ibid.app.pipeline.flights))
        await until(lambda: sum(len(f._seats) for f in ibid.app.pipeline.flights.values()) == 3)
        gate.set()


# --- from the upstream -----------------------------------------------------------------------------------------------


@end("ok/MISS/semantic_off ok/MISS/semantic_off")
async def missed(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    for text, stream in ((ASKED, False), (OTHER, True)):
        assert (await ibid.ask(text, stream=stream)).cache == "MISS"


@end("ok/BYPASS/no_store ok/REFRESH/refresh")
async def bypassed(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    for mode in ("off", "refresh"):
        assert (await ibid.ask(ASKED, headers={"x-cache-mode": mode})).status == 200


@end("error/MISS/semantic_off error/MISS/semantic_off error/MISS/semantic_off")
async def failed(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    """By a status, by silence, and in the middle of a stream."""
    up.script(Json(400, {"error": {"message": "no"}}))
    assert (await ibid.ask(ASKED)).status == 400
    up.script(Raw(b"", "fin"), Raw(b"", "fin"))
    assert (await ibid.ask(OTHER)).status == 502
    up.script(
        Stream(
            [event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []})],
            cut="rst",
        )
    )
    async with ibid.open(chat_body("Why is the sky blue?", stream=True)) as response:
        await response.read()


@end("error/MISS/semantic_off")
async def refused(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    assert (await ibid.ask(ASKED, headers={"Cache-Control": "only-if-cached"})).status == 504


@end("cancelled/MISS/unfinished")
async def left_while_looked_up(ibid: Ibid, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, ibid.app.store.entries, "find") as called:
        asking = asyncio.create_task(ibid.ask(ASKED))
        await called.wait()
        await left(asking)
        await until(lambda: ibid.app.store.ledger.waiting or ibid.app.store.ledger.written)


@end("cancelled/MISS/unfinished", LOADED)
async def left_while_compared(ibid: Ibid, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, ibid.app.pipeline.index, "search") as called:
        asking = asyncio.create_task(ibid.ask(ASKED))
        await called.wait()
        await left(asking)
        await until(lambda: ibid.app.store.ledger.waiting or ibid.app.store.ledger.written)


@end("cancelled/MISS/semantic_off")
async def left_before_the_head(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    up.script(Raw(b"", "stall"))
    asking = asyncio.create_task(ibid.ask(ASKED))
    await until(lambda: up.requests)
    await left(asking)
    await until(up.left.is_set)


@end("cancelled/MISS/semantic_off")
async def left_mid_stream(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    up.script(Chat(pieces=4, gates={2: asyncio.Event()}))
    async with ibid.open(chat_body(ASKED, stream=True)) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await until(up.left.is_set)


# --- vectors, what passes, batches -----------------------------------------------------------------------------------


@end("ok/MISS/unseen ok/HIT/hit ok/MISS/partial error/MISS/partial")
async def vectors(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    for asked in (["a", "b"], ["a"], ["a", "c"]):
        assert (await ibid.embed(asked)).status == 200
        await ibid.settled()
    assert (await ibid.embed(["a", "z"], headers={"Cache-Control": "only-if-cached"})).status == 504


@end("cancelled/MISS/unfinished")
async def vectors_left_while_looked_up(ibid: Ibid, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, ibid.app.store.entries, "find_many") as called:
        asking = asyncio.create_task(ibid.embed(["a", "b"]))
        await called.wait()
        await left(asking)
        await until(lambda: ibid.app.store.ledger.waiting or ibid.app.store.ledger.written)


@end("ok/BYPASS/pass_through error/BYPASS/pass_through cancelled/BYPASS/pass_through")
async def passed(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    url, key = f"{ibid.url}/v1/models", {"Authorization": "Bearer sk-a"}
    up.script(Json(200, {}), Json(404, {}), Raw(b"", "stall"))
    for status in (200, 404):
        async with ibid.session.get(url, headers=key) as response:
            assert response.status == status
    asking = asyncio.create_task(ibid.session.get(url, headers=key).__aenter__())
    await until(lambda: len(up.requests) == 3)
    await left(asking)
    await until(up.left.is_set)


@end("ok/MISS/semantic_off ok/HIT/hit ok/MISS/semantic_off ok/MISS/repeated", QUICK)
async def lines_of_a_batch(ibid: Ibid, up: ScriptedUpstream, _: pytest.MonkeyPatch) -> None:
    await ibid.fill(ASKED)
    async with sdk(ibid) as client:
        batch = await hand_in(client, [line("a", ASKED), line("b", OTHER), line("c", OTHER)])
        assert (await ended(client, batch)).status == "completed"


# --- each of them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of what was settled, in order."""
    ids: list[str] = []
    real = Books.settle

    def settle(books: Books, outcome: Outcome, *places: Any, **named: Any) -> None:
        ids.append(outcome.request_id)
        real(books, outcome, *places, **named)

    monkeypatch.setattr(Books, "settle", settle)
    return ids


@pytest.mark.parametrize("name", ENDS)
async def test_every_request_is_settled_once(
    data_dir: Path, up: ScriptedUpstream, settled: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ask, sections, expected = ENDS[name]
    async with running(data_dir, up.url, sections) as ibid:
        await ask(ibid, up, monkeypatch)
        await ibid.settled()
        await until(lambda: ibid.app.handler.admission.free == ibid.app.settings.limits.in_flight)
        rows = await ibid.sql("SELECT id, outcome, cache_status, reason FROM request")
        told = [f"{row['outcome']}/{row['cache_status']}/{row['reason']}" for row in rows]
        assert Counter(told) == Counter(expected)
        assert {one for one, times in Counter(settled).items() if times != 1} == set()
        assert {row["id"] for row in rows} == set(settled)
        held = [*ibid.app.keys.held, *ibid.app.pipeline.flights, *ibid.app.handler.streams]
        assert held == []
