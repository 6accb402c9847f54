"""A real model server (llama.cpp) that itself speaks OpenAI and Anthropic: its answers in whichever dialect asks."""

from __future__ import annotations

import anthropic
import openai
import pytest

from tests.flows.running import EXACT_ONLY, running
from tests.llm import LocalLlm, llm

__all__ = ["llm"]

ASKED = "What is the capital of France? Answer in one word."  # one that a model of this size answers and ends
KEY = "sk-llm"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_real_answer_is_stored_in_one_dialect_and_served_in_the_other(
    llm: LocalLlm, tmp_path, stream: bool
) -> None:
    upstream = llm.base_url.removesuffix("/v1")
    ask = {"model": llm.model, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 60}
    steady = {"extra_body": {"temperature": 0}}
    async with (
        running(tmp_path / "data", upstream, EXACT_ONLY) as ibid,
        anthropic.AsyncAnthropic(base_url=ibid.url, api_key=KEY, max_retries=0) as claude,
        openai.AsyncOpenAI(base_url=f"{ibid.url}/v1", api_key=KEY, max_retries=0) as gpt,
    ):

        async def by_anthropic() -> tuple[str, str, int]:
            if not stream:
                raw = await claude.messages.with_raw_response.create(**ask, **steady)
                message = await raw.parse()
                cache = raw.headers["x-cache"]
            else:
                async with claude.messages.stream(**ask, **steady) as events:
                    message = await events.get_final_message()
                    cache = events.response.headers["x-cache"]
            assert message.stop_reason == "end_turn"
            return cache, message.content[0].text, message.usage.output_tokens

        async def by_openai() -> tuple[str, str, int]:
            raw = await gpt.chat.completions.with_raw_response.create(**ask, **steady)
            completion = raw.parse()
            assert completion.choices[0].finish_reason == "stop"
            return raw.headers["x-cache"], completion.choices[0].message.content, completion.usage.completion_tokens

        first = await by_anthropic()
        await ibid.settled()
        second = await by_openai()
        third = await by_anthropic()
        assert [said[0] for said in (first, second, third)] == ["MISS", "HIT", "HIT"]
        assert first[1:] == second[1:] == third[1:]
        assert "Paris" in first[1]
        ask["messages"] = [{"role": "user", "content": "How many days are in a week?"}]
        first = await by_openai()
        await ibid.settled()
        second = await by_anthropic()
        assert (first[0], second[0]) == ("MISS", "HIT")
        assert first[1:] == second[1:]


async def test_a_real_servers_error_reaches_the_anthropic_client_as_it_is(llm: LocalLlm, tmp_path) -> None:
    upstream = llm.base_url.removesuffix("/v1")
    async with running(tmp_path / "data", upstream, EXACT_ONLY) as ibid:
        caught = []
        for url in (upstream, ibid.url):
            async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as claude:
                with pytest.raises(anthropic.APIStatusError) as raised:
                    await claude.messages.create(
                        model=llm.model, max_tokens=5, messages=[{"role": "user", "content": "word " * 40_000}]
                    )
            caught.append((raised.value.status_code, raised.value.body))
        assert caught[0] == caught[1]
