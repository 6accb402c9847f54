"""The six strategies on real processes: ibid in one of its own, a real language model (llama.cpp) as the edge.

The cloud is a scripted server, because no stronger model comes in a package; it meters what it would bill, and in every
test the ledger must equal that meter to the nano-dollar.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.flows.batching import ended, hand_in, line
from tests.flows.batching import rows as rows_of
from tests.flows.running import MODEL, Process, serving, until
from tests.llm import LocalLlm, llm
from tests.upstream import Chat, Json, ScriptedUpstream, Seen

__all__ = ["llm"]

IN_NUSD, OUT_NUSD = 1_000, 4_000
EDGE_IN_NUSD, EDGE_OUT_NUSD = 10, 20
CAPITAL = "What is the capital of France? Answer in one word."
CITY = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def installation(llm: LocalLlm, **sections: Any) -> dict[str, Any]:
    return {
        "upstream.edge": {"base_url": llm.base_url},
        "lane.edge": {"upstream": "edge", "model": llm.model},
        'prices.override."edge/*"': {"input_usd_per_mtok": 0.01, "output_usd_per_mtok": 0.02},
        f'prices.override."openai/{MODEL}"': {"input_usd_per_mtok": 1, "output_usd_per_mtok": 4, "flex_factor": 0.5},
        **sections,
    }


async def sql(ibid: Process, statement: str) -> list[dict[str, Any]]:
    told = await ibid.admin("POST", "/savings/query", {"sql": statement})
    return [dict(zip(told["columns"], row, strict=True)) for row in told["rows"]]


async def booked(ibid: Process, requests: int) -> None:
    """Wait until that many requests stand in the ledger."""

    async def came() -> bool:
        return (await sql(ibid, "SELECT COUNT(*) AS n FROM request"))[0]["n"] >= requests

    await until(came)


async def shows(ibid: Process, metric: str) -> None:
    """Wait until this line is among the metrics."""

    async def shown() -> bool:
        return f"{metric}\n" in await ibid.admin("GET", "/metrics")

    await until(shown)


async def mechanisms(ibid: Process) -> dict[str, int]:
    found = await sql(ibid, "SELECT mechanism, COUNT(*) AS n FROM saving GROUP BY mechanism ORDER BY mechanism")
    return {row["mechanism"]: row["n"] for row in found}


async def assert_equal_to_the_meter(ibid: Process, up: ScriptedUpstream) -> None:
    (row,) = await sql(
        ibid,
        "SELECT COALESCE(SUM(cost_nusd), 0) AS nusd, COALESCE(SUM(in_tok), 0) AS i, COALESCE(SUM(out_tok), 0) AS o "
        "FROM upstream_call WHERE upstream = 'openai'",
    )
    metered = up.meter
    assert (row["i"], row["o"]) == (metered.input_tokens, metered.output_tokens)
    assert row["nusd"] == metered.input_tokens * IN_NUSD + metered.output_tokens * OUT_NUSD
    told = await ibid.admin("POST", "/savings/query", {"name": "balance"})
    assert told["rows"] == []


async def edge_nusd(ibid: Process) -> int:
    (row,) = await sql(ibid, "SELECT COALESCE(SUM(cost_nusd), 0) AS nusd FROM upstream_call WHERE upstream = 'edge'")
    return int(row["nusd"])


def spent_at_the_edge(usages: list[dict[str, Any]]) -> int:
    return sum(u["prompt_tokens"] * EDGE_IN_NUSD + u["completion_tokens"] * EDGE_OUT_NUSD for u in usages)


async def test_cached(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    policy = [{"plan": ["exact", "semantic", "stale-while-revalidate", "collapse"]}]
    sections = installation(llm, policy=policy, **{"lane.stale": {"while_revalidate_s": 600}})
    async with serving(data_dir, up.url, sections) as ibid:
        first = await ibid.ask("How do I get from Paris to Lyon in 2 hours?")
        assert first.cache == "MISS"
        await booked(ibid, 1)
        await shows(ibid, "ibid_vectors 1.0")
        exact = await ibid.ask("How do I get from Paris to Lyon in 2 hours?", stream=True)
        alike = await ibid.ask("How can I get from Paris to Lyon in 2 hours?")
        other = await ibid.ask("How do I get from Paris to Lyon in 3 hours?", headers={"x-cache-ttl": "1"})
        assert (exact.tier, alike.tier, other.reason) == ("exact", "semantic", "numbers")
        assert exact.text == alike.text == first.text
        await shows(ibid, "ibid_vectors 2.0")
        await asyncio.sleep(1.2)
        stale = await ibid.ask("How do I get from Paris to Lyon in 3 hours?")
        assert (stale.cache, stale.text) == ("STALE", other.text)
        await until(lambda: up.meter.completed == 3)
        await booked(ibid, 6)  # the refetch has a row of its own
        found = await mechanisms(ibid)
        assert found == {"cache.exact": 1, "cache.revalidate": 1, "cache.semantic": 1, "cache.stale": 1}
        await assert_equal_to_the_meter(ibid, up)


async def test_streaming(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    gate = asyncio.Event()
    up.default = Chat(pieces=8, gates={4: gate})
    async with serving(data_dir, up.url, installation(llm)) as ibid:
        asks = [asyncio.create_task(ibid.ask("Tell me a long story", stream=True)) for _ in range(50)]
        await shows(ibid, "ibid_in_flight 50.0")
        gate.set()
        replies = await asyncio.gather(*asks)
        assert len(up.requests) == 1
        assert {reply.text for reply in replies} == {"answer #1 to: Tell me a long story"}
        await booked(ibid, 50)
        assert (await mechanisms(ibid))["stream.coalesce"] >= 45
        assert sum((await mechanisms(ibid)).values()) == 49
        await assert_equal_to_the_meter(ibid, up)


async def test_batch(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    sections = installation(llm, batch={"poll_interval_s": 0.05}, cache={"semantic": False})
    async with serving(data_dir, up.url, sections) as ibid:
        await ibid.ask("question 0")
        client = openai.AsyncOpenAI(base_url=f"{ibid.url}/v1", api_key=ibid.key, max_retries=0)
        lines = [line(f"line-{number}", f"question {number % 10}") for number in range(40)]
        batch = await ended(client, await hand_in(client, lines))
        assert (batch.status, batch.request_counts.completed) == ("completed", 40)
        answers = await rows_of(client, batch.output_file_id)
        said = {row["response"]["body"]["choices"][0]["message"]["content"] for row in answers.values()}
        assert (len(answers), len(said)) == (40, 10)
        await client.close()
        assert up.meter.calls == 10
        await booked(ibid, 41)
        found = await mechanisms(ibid)
        assert found["cache.exact"] + found["batch.dedup"] == 31
        await assert_equal_to_the_meter(ibid, up)


async def test_flex(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    """The other half of batch: a cheaper tier, and back to the ordinary one before the client's deadline."""

    def busy_at_first(seen: Seen) -> Any:
        return Json(429, {"error": {"message": "no room"}}) if "service_tier" in seen.json else Chat()

    sections = installation(llm, **{"lane.tier": {"models": ["gpt-*"], "margin_s": 0.2}})
    async with serving(data_dir, up.url, sections) as ibid:
        up.script(busy_at_first)
        await ibid.ask("question one", headers={"x-deadline": "20s"})
        await ibid.ask("question two", headers={"x-deadline": "20s"})
        await booked(ibid, 2)
        (row,) = await sql(ibid, "SELECT SUM(cost_nusd) AS nusd FROM upstream_call WHERE tier = 'flex'")
        (step,) = await sql(ibid, "SELECT before_nusd, after_nusd FROM saving WHERE mechanism = 'batch.flex'")
        assert step["before_nusd"] == 2 * step["after_nusd"] == 2 * row["nusd"]
        assert [request.json.get("service_tier") for request in up.requests] == ["flex", None, "flex"]
        told = await ibid.admin("POST", "/savings/query", {"name": "balance"})
        assert told["rows"] == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_edge(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm, stream: bool) -> None:
    policy = [{"on_error": ["edge"]}]
    async with serving(data_dir, up.url, installation(llm, policy=policy)) as ibid:
        more = {"stream_options": {"include_usage": True}} if stream else {}
        local = await ibid.ask(CAPITAL, stream=stream, max_tokens=40, headers={"x-plan": "+edge"}, **more)
        assert (local.tier, local.headers["x-upstream"]) == ("edge", "edge")
        assert "Paris" in local.text
        up.default = Json(503, {"error": {"message": "down"}})
        spare = await ibid.ask("What is the capital of Italy?", stream=stream, max_tokens=40, **more)
        assert (spare.status, spare.tier) == (200, "edge")
        usages = [reply.chunks[-1]["usage"] if stream else reply.json["usage"] for reply in (local, spare)]
        await booked(ibid, 2)
        assert await edge_nusd(ibid) == spent_at_the_edge(usages)
        found = await sql(ibid, "SELECT mechanism, saved_nusd FROM saving ORDER BY mechanism")
        assert [row["mechanism"] for row in found] == ["edge.local", "edge.offline"]
        assert found[0]["saved_nusd"] > 0 > found[1]["saved_nusd"]
        await assert_equal_to_the_meter(ibid, up)


async def test_hybrid(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    up.default = Chat(text='{"city": "Rome"}')
    sections = installation(llm, policy=[{"plan": ["exact", "cascade"]}], **{"lane.cascade": {"pattern": "[0-9]+"}})
    async with serving(data_dir, up.url, sections) as ibid:
        proven = await ibid.ask("Name the capital of France as JSON.", response_format=CITY, max_tokens=60)
        assert proven.headers["x-upstream"] == "edge"
        assert json.loads(proven.text).keys() == {"city"}
        failed = await ibid.ask("Write one short sentence about the sea.", max_tokens=40)
        assert failed.headers["x-upstream"] == "openai"
        await booked(ibid, 2)
        found = await sql(ibid, "SELECT mechanism, saved_nusd FROM saving ORDER BY saved_nusd")
        assert [row["mechanism"] for row in found] == ["hybrid.cascade", "hybrid.cascade"]
        assert found[0]["saved_nusd"] < 0 < found[1]["saved_nusd"]
        calls = await sql(ibid, "SELECT upstream, purpose, won FROM upstream_call ORDER BY won, upstream")
        assert calls[0] == {"upstream": "edge", "purpose": "cascade", "won": 0}
        await assert_equal_to_the_meter(ibid, up)


async def test_speculative(data_dir: Path, up: ScriptedUpstream, llm: LocalLlm) -> None:
    """A slow tail is hedged within the budget. The scripted meter bills a call that was left for its input."""
    count = 0

    def tail(seen: Seen) -> Chat:
        nonlocal count
        count += 1
        return Chat(delay_s=2.0 if count > 30 and count % 20 == 0 else 0.0, bills_at_once=True)

    up.default = tail
    limits = {"min_samples": 20, "min_delay_s": 0.5, "max_extra_load": 0.05}
    sections = installation(llm, policy=[{"plan": ["exact", "hedge"]}], **{"lane.hedge": limits})
    async with serving(data_dir, up.url, sections) as ibid:
        for number in range(100):
            reply = await ibid.ask(f"Question number {number}")
            assert reply.status == 200
        await booked(ibid, 100)
        extra = len(up.requests) - 100
        assert 1 <= extra <= 5
        purposes = await sql(ibid, "SELECT purpose, won, COUNT(*) AS n FROM upstream_call "
                                   "WHERE usage_basis <> 'none' GROUP BY purpose, won")  # fmt: skip
        counts = {(row["purpose"], row["won"]): row["n"] for row in purposes}  # but for what was given up unsent
        assert counts == {("answer", 1): 100, ("hedge", 0): extra}
        (lost,) = await sql(ibid, "SELECT SUM(in_tok) AS i, SUM(out_tok) AS o FROM upstream_call WHERE won = 0")
        assert (lost["i"] > 0, lost["o"]) == (True, 0)
        (steps,) = await sql(ibid, "SELECT SUM(saved_nusd) AS nusd FROM saving")
        assert steps["nusd"] == -lost["i"] * IN_NUSD
        await assert_equal_to_the_meter(ibid, up)
