"""A purge reaches what is under way: no answer begun before it is stored, joined or stands in after it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from tests.flows.running import EMBEDDER, MODEL, until
from tests.upstream import Chat, Vectors

ASKED = "What does document 42 say about the leave of absence?"
MARKED = {"cache": {"namespace": "red", "tags": ["doc:42"]}}
ONLY_IF_STORED = {"Cache-Control": "only-if-cached"}


class Held:
    """A scripted answer that is on its way until it is let go."""

    def __init__(self, up, reply=None):
        self.arrived, self.released = asyncio.Event(), asyncio.Event()
        self._reply = reply or Chat(text="the old text")
        up.script(self._answer)

    async def _answer(self, _seen):
        self.arrived.set()
        await self.released.wait()
        return self._reply


async def purge(ibid, how, reply=None):
    """One way to purge what was asked; how many entries it removed."""
    selectors = {
        "tag": {"tags": ["doc:42"]},
        "namespace": {"namespace": "red"},
        "model": {"model": MODEL},
        "age": {"older_than": (datetime.now(UTC) + timedelta(minutes=1)).isoformat()},
        "all of them": {"tags": ["doc:42"], "namespace": "red", "model": MODEL},
        "another tag": {"tags": ["doc:43"]},
        "another namespace": {"tags": ["doc:42"], "namespace": "blue"},
    }
    match how:
        case "flush":
            return (await ibid.admin("POST", "/cache/flush", {"confirm": "flush"}))["count"]
        case "flushall":
            return (await ibid.admin("POST", "/cache/flushall"))["deleted"]
        case "delete":
            return (await ibid.admin("DELETE", f"/cache/entries/{reply.entry}"))["count"]
        case "delete as LiteLLM spells it":
            return (await ibid.admin("POST", "/cache/delete", {"keys": [reply.entry]}))["deleted"]
        case "id":
            body = {"ids": [reply.entry], "dry_run": False}
            return (await ibid.admin("POST", "/cache/invalidate", body))["count"]
        case "wrong":
            body = {"entry_id": reply.entry, "verdict": "wrong"}
            return int((await ibid.admin("POST", "/cache/feedback", body))["quarantined"])
        case "tenant":
            (row,) = await ibid.entries()
            return (await ibid.admin("POST", "/cache/invalidate", {"writer": row["tenant"], "dry_run": False}))["count"]
    return (await ibid.admin("POST", "/cache/invalidate", {**selectors[how], "dry_run": False}))["count"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("how", ["tag", "namespace", "model", "age", "all of them", "flush", "flushall"])
async def test_an_answer_begun_before_a_purge_is_not_stored_after_it(exact, up, how, stream):
    held = Held(up)
    asking = asyncio.create_task(exact.ask(ASKED, stream=stream, **MARKED))
    await held.arrived.wait()
    assert await purge(exact, how) == 0
    held.released.set()
    assert (await asking).text == "the old text"  # the client gets what it asked for
    await exact.settled()
    assert await exact.entries() == []
    again = await exact.ask(ASKED, stream=stream, **MARKED)
    assert (again.cache, again.text == "the old text") == ("MISS", False)
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).text == again.text  # begun after it


@pytest.mark.parametrize("how", ["another tag", "another namespace"])
async def test_what_a_purge_does_not_name_is_stored(exact, up, how):
    held = Held(up)
    asking = asyncio.create_task(exact.ask(ASKED, **MARKED))
    await held.arrived.wait()
    assert await purge(exact, how) == 0
    held.released.set()
    await asking
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).tier == "exact"


@pytest.mark.parametrize("how", ["delete", "delete as LiteLLM spells it", "id", "wrong", "tenant", "tag", "flush"])
@pytest.mark.parametrize("unmarked", [False, True], ids=["marked", "unmarked"])
async def test_a_refetch_begun_before_a_purge_does_not_bring_the_entry_back(exact, up, how, unmarked):
    """Its own marks count, and those of the entry it would replace."""
    await exact.fill(ASKED, **MARKED)
    hit = await exact.ask(ASKED, **MARKED)
    held = Held(up)
    marks = {"cache": {"namespace": "red"}} if unmarked else MARKED
    asking = asyncio.create_task(exact.ask(ASKED, headers={"x-cache-mode": "refresh"}, **marks))
    await held.arrived.wait()
    assert await purge(exact, how, hit) == 1
    held.released.set()
    assert (await asking).text == "the old text"
    await exact.settled()
    again = await exact.ask(ASKED, **MARKED)
    assert (again.cache, again.text == "the old text") == ("MISS", False)


async def test_who_asks_after_a_purge_does_not_join_a_call_from_before_it(exact, up):
    held = Held(up)
    asking = [asyncio.create_task(exact.ask(ASKED, **MARKED))]
    await held.arrived.wait()
    asking.append(asyncio.create_task(exact.ask(ASKED, **MARKED)))
    (flight,) = exact.app.pipeline.flights.values()
    await until(lambda: len(flight._seats) == 2)
    await purge(exact, "tag")
    late = await exact.ask(ASKED, **MARKED)
    assert (late.cache, late.text == "the old text") == ("MISS", False)
    held.released.set()
    assert {(await one).text for one in asking} == {"the old text"}
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).text == late.text


@pytest.mark.parametrize("how", ["flush", "model"])
async def test_vectors_begun_before_a_purge_are_not_stored_after_it(exact, up, how):
    held = Held(up, Vectors())
    asking = asyncio.create_task(exact.embed(["one", "two"], encoding_format="float"))
    await held.arrived.wait()
    if how == "flush":
        await purge(exact, "flush")
    else:
        await exact.admin("POST", "/cache/invalidate", {"model": EMBEDDER, "dry_run": False})
    held.released.set()
    assert (await asking).status == 200
    await exact.settled()
    assert await exact.entries() == []
    assert (await exact.embed(["one", "two"])).cache == "MISS"
    await exact.settled()
    assert (await exact.embed(["one", "two"])).cache == "HIT"
