"""Batches as a client of the official SDK hands them in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai

from tests.flows.running import EXACT_ONLY, Client, Ibid, chat_body
from tests.waiting import PATIENCE_S

QUICK = {**EXACT_ONLY, "batch": {"poll_interval_s": 0.02}}


def line(custom_id: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": chat_body(prompt, **fields),
    }


def jsonl(lines: list[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def sdk(ibid: Client, key: str = "sk-a", base: str = "/v1") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=ibid.url + base, api_key=key, max_retries=0, timeout=PATIENCE_S)


async def hand_in(client: openai.AsyncOpenAI, lines: list[Any] | bytes, **fields: Any) -> Any:
    raw = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await client.files.create(file=("lines.jsonl", raw), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
    return await client.batches.create(input_file_id=file.id, **asked)


async def ended(client: openai.AsyncOpenAI, batch: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
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


async def balanced(ibid: Ibid) -> bool:
    return bool((await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == [])
