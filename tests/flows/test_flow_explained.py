"""Every request that was answered can be asked about later: what became of it and why, in words and in numbers."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.flows.running import Ibid, Reply
from tests.flows.test_flow_collapse import seats
from tests.upstream import Chat, Json
from tests.waiting import until

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
LOOKALIKE = "How do I repair 3 leaking garden hoses?"


async def told(ibid: Ibid, reply: Reply) -> dict[str, Any]:
    await ibid.app.store.ledger.flush()
    found: dict[str, Any] = await ibid.admin("GET", f"/requests/{reply.headers['x-request-id']}")
    return found


async def test_each_way_to_end_has_its_story(ibid, up):
    first = await ibid.fill(ASKED)
    exact = await ibid.ask(ASKED)
    alike = await ibid.ask(REWORDED)
    near = await ibid.ask(LOOKALIKE)
    limited = await ibid.ask(ASKED, temperature=0.9)
    passed = await ibid.ask(ASKED, headers={"cache-control": "no-store"})
    stories = {
        name: await told(ibid, reply)
        for name, reply in [
            ("first", first),
            ("exact", exact),
            ("alike", alike),
            ("near", near),
            ("limited", limited),
            ("passed", passed),
        ]
    }
    said = {name: " ".join([*found["story"], *found["bill"]]) for name, found in stories.items()}
    assert "Not answered from the cache" in said["first"]
    assert "nothing was stored yet under these exact conditions" in said["first"]
    assert f"entry {exact.entry} had the answer" in said["exact"]
    assert stories["exact"]["lookup"] is None
    assert f"by meaning: entry {alike.entry}" in said["alike"]
    assert "served as start" in said["alike"]
    assert f"though entry {exact.entry} is alike" in said["near"]
    assert "(numbers)" in said["near"]
    assert "a temperature above" in said["limited"]
    assert "The cache was not used" in said["passed"]
    assert "Call to " in said["first"]
    assert "Call to " not in said["exact"]
    (candidate,) = stories["near"]["lookup"]["candidates"]
    assert (candidate["entry"], candidate["vetoes"][0]) == (exact.entry, "numbers")
    assert candidate["similarity"] == round(float(near.headers["x-cache-similarity"]), 4)


async def test_a_record_tells_the_verdict_of_then_when_the_cache_has_changed(ibid, up):
    first = await ibid.fill(ASKED)
    near = await ibid.ask(LOOKALIKE)
    await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
    for reply in (first, near):
        found = await told(ibid, reply)
        assert found["story"][0].startswith("Not answered from the cache")
    assert found["lookup"]["candidates"][0]["reason"] == "numbers"


async def test_no_text_of_a_prompt_or_an_answer_is_in_a_record(ibid, up):
    await ibid.fill(ASKED)
    await ibid.ask(LOOKALIKE)
    rows = await ibid.sql("SELECT record FROM lookup")
    assert len(rows) == 2
    for row in rows:
        assert not any(word in row["record"].lower() for word in ("hose", "leaking", "repair"))
        assert len(row["record"]) < 2000


async def test_who_joined_another_is_told_whose_answer_it_shared(ibid, up):
    gate = asyncio.Event()
    up.default = Chat(gates={2: gate})
    asking = [asyncio.create_task(ibid.ask(ASKED, stream=True)) for _ in range(2)]
    await until(lambda: seats(ibid) == 2)
    gate.set()
    leader, joined = sorted(await asyncio.gather(*asking), key=lambda reply: reply.tier or "")
    await ibid.settled()
    found = await told(ibid, joined)
    assert found["story"][0].endswith(f"under way, {leader.headers['x-request-id']}.")


async def test_why_an_answer_was_not_kept_is_told(ibid, up):
    up.script(Chat("It is a", finish_reason="length"))
    cut = await ibid.ask(ASKED)
    await ibid.settled()
    found = await told(ibid, cut)
    assert (
        "Its answer was not kept: the answer used up its token limit and may be cut (finish_length)." in found["story"]
    )


async def test_an_error_is_told_as_one(ibid, up):
    up.script(Json(401, {"error": {"message": "no such key", "type": "invalid_request_error"}}))
    refused = await ibid.ask(ASKED)
    assert refused.status == 401
    await ibid.settled()
    found = await told(ibid, refused)
    assert "It ended with an error, status 401." in found["story"]
