"""Batches: with the official SDKs, against an upstream with a batch API of its own and against one without."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import openai
import pytest

from proxy.core.model import Usage
from proxy.prices import Prices
from tests.batch_upstream import BatchUpstream
from tests.flows.running import EXACT_ONLY, MODEL, chat_body, running

QUICK = {**EXACT_ONLY, "batch": {"poll_interval_s": 0.02}}


def line(custom_id: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": chat_body(prompt, **fields)}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def sdk(ibid, key: str = "sk-a", base: str = "/v1") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=ibid.url + base, api_key=key, max_retries=0, timeout=20)


async def hand_in(client: openai.AsyncOpenAI, lines: list[Any] | bytes, **fields: Any) -> Any:
    raw = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await client.files.create(file=("lines.jsonl", raw), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
    return await client.batches.create(input_file_id=file.id, **asked)


async def ended(client: openai.AsyncOpenAI, batch: Any, within_s: float = 10.0) -> Any:
    async with asyncio.timeout(within_s):
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def rows(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """Lines of an output by custom id."""
    if file_id is None:
        return {}
    raw = (await client.files.content(file_id)).content
    found = [json.loads(one) for one in raw.splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


def text(row: Any) -> str:
    return str(row["response"]["body"]["choices"][0]["message"]["content"])


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_cached_line_is_not_sent_and_a_repeated_one_is_sent_once(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        cached = await ibid.fill("What is a hinge?")
        calls = up.meter.calls
        lines = [line("a", "What is a hinge?"), line("b", "What is a latch?"), line("c", "What is a latch?")]
        batch = await ended(client, await hand_in(client, lines, metadata={"team": "doors"}))
        assert (batch.status, batch.metadata) == ("completed", {"team": "doors"})
        assert (batch.request_counts.total, batch.request_counts.completed) == (3, 3)
        found = await rows(client, batch.output_file_id)
        assert text(found["a"]) == cached.text
        assert text(found["b"]) == text(found["c"])
        assert "What is a latch?" in text(found["b"])
        ids = {row["response"]["body"]["id"] for row in found.values()}
        assert len(ids) == 3
        assert up.meter.calls - calls == (0 if has_api else 1)
        if theirs is not None:
            assert [len(one.requests) for one in theirs.batches.values()] == [1]
        assert (await ibid.ask("What is a latch?")).text == text(found["b"])  # the live client gets it too
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []


async def balanced(ibid) -> bool:
    return bool((await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == [])


def ten_thousand() -> list[Any]:
    """6,000 of 10,000 lines repeat one of the 4,000 others."""
    chance = random.Random(7)
    prompts = [f"What is part number {n} of the great machine for?" for n in range(4000)]
    asked = prompts + [chance.choice(prompts) for _ in range(6000)]
    chance.shuffle(asked)
    return [line(f"line-{n}", prompt) for n, prompt in enumerate(asked)]


@pytest.mark.parametrize("has_api", [True, False])
async def test_ten_thousand_lines_of_which_six_thousand_repeat_send_four_thousand(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    lines = ten_thousand()
    began = time.monotonic()
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        batch = await ended(client, await hand_in(client, lines), 25)
        took_s = time.monotonic() - began
        assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 10_000, None)
        found = await rows(client, batch.output_file_id)
        assert len(found) == 10_000
        for one in lines:
            assert text(found[one["custom_id"]]).endswith(one["body"]["messages"][0]["content"])
        assert len({row["response"]["body"]["id"] for row in found.values()}) == 10_000
        await ibid.settled()
        if theirs is None:
            sent, tokens = up.meter.calls, Usage(up.meter.input_tokens, up.meter.output_tokens)
        else:
            sent, tokens = theirs.lines, Usage(theirs.input_tokens, theirs.output_tokens)
            assert up.meter.calls == 0
        assert sent == 4000
        tier = "batch" if theirs else "default"
        cost = Prices().price("openai", MODEL, tokens, tier, int(time.time() * 1000)).nusd
        paid = (await ibid.sql("SELECT SUM(actual_nusd) AS n, COUNT(*) AS requests FROM request"))[0]
        assert paid == {"n": cost, "requests": 10_000}
        calls = (await ibid.sql("SELECT SUM(cost_nusd) AS n, COUNT(*) AS calls, MIN(tier) AS tier FROM upstream_call"))[0]
        assert calls == {"n": cost, "calls": 4000, "tier": tier}
        steps = await ibid.sql("SELECT mechanism, COUNT(*) AS n, SUM(saved_nusd) AS saved FROM saving GROUP BY mechanism")
        counted = {step["mechanism"]: step["n"] for step in steps}
        assert counted == {"batch.dedup": 6000, **({"batch.provider": 4000} if theirs else {})}
        if theirs:
            assert {step["mechanism"]: step["saved"] for step in steps}["batch.provider"] == cost
        assert await balanced(ibid)
    assert took_s < 25, took_s
