"""The official client reads a replay as it read the original."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from proxy.core.dialects.openai_chat import stream_error
from proxy.core.dialects.openai_record import Recorder, read_whole
from proxy.core.dialects.openai_replay import render_stream, render_whole
from proxy.core.errors import UpstreamError
from tests.upstream import Body, ScriptedUpstream, Stream
from tests.waiting import PATIENCE_S

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
TOKEN, CREATED = "000102030405060708090a0b0c0d0e", 1_800_000_000
ID = "chatcmpl-" + TOKEN
ASK = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
async def up():
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def client(up):
    async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="sk-x", max_retries=0, timeout=PATIENCE_S) as sdk:
        yield sdk


def recorded(stem):
    recorder = Recorder()
    recorder.feed((TRANSCRIPTS / f"{stem}.sse").read_bytes())
    return recorder.finish()


async def streamed(up, client, raw: bytes):
    up.script(Stream([raw]))
    return [chunk async for chunk in await client.chat.completions.create(**ASK, stream=True)]


@pytest.mark.parametrize("stem", ["whole", "usage", "reasoning", "annotations"])
async def test_a_streamed_replay_reads_as_the_original(up, client, stem):
    answer = recorded(stem)
    include_usage = stem == "usage"
    original = await streamed(up, client, (TRANSCRIPTS / f"{stem}.sse").read_bytes())
    replay = await streamed(up, client, render_stream(answer, include_usage).fill(TOKEN, CREATED))
    assert {(c.id, c.created, c.object) for c in replay} == {(ID, CREATED, "chat.completion.chunk")}
    if stem in ("whole", "usage"):
        same = [chunk.model_copy(update={"id": ID, "created": CREATED}).to_dict() for chunk in original]
        assert [chunk.to_dict() for chunk in replay] == same
    deltas = [c.choices[0].delta for c in replay if c.choices]
    assert "".join(d.content or "" for d in deltas) == answer.message["content"]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == answer.message.get(
        "reasoning_content", ""
    )
    assert [c.choices[0].finish_reason for c in replay if c.choices][-1] == "stop"
    assert [c.usage.total_tokens for c in replay if c.usage] == ([29] if include_usage else [])


async def test_a_whole_replay_reads_as_the_original(up, client):
    original = await client.chat.completions.create(**ASK)
    raw = await client.chat.completions.with_raw_response.create(**ASK)
    answer = read_whole(raw.http_response.content)
    up.script(Body(body=render_whole(answer).fill(TOKEN, CREATED)))
    replay = await client.chat.completions.create(**ASK)
    assert (replay.id, replay.created) == (ID, CREATED)
    expected = raw.parse().model_copy(update={"id": ID, "created": CREATED}).to_dict()
    assert replay.to_dict() == expected
    assert original.to_dict().keys() == replay.to_dict().keys()


async def test_one_entry_serves_both_forms(up, client):
    answer = recorded("usage")
    up.script(Body(body=render_whole(answer).fill(TOKEN, CREATED)))
    whole = await client.chat.completions.create(**ASK)
    assert whole.choices[0].message.content == answer.message["content"]
    assert whole.usage.prompt_tokens_details.cached_tokens == 4


async def test_an_error_event_after_some_text_raises_in_the_client(up, client):
    some = (TRANSCRIPTS / "cut_mid_event.sse").read_bytes().rpartition(b"data: ")[0]
    fault = UpstreamError("the model server broke off", code="upstream_incomplete")
    with pytest.raises(openai.APIError) as caught:
        await streamed(up, client, some + stream_error(fault))
    assert caught.value.code == "upstream_incomplete"
