"""The real LLM server behind the demo and the flows: what ibid may expect of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.local_llm import DidNotStart, running
from tests.llm import WEIGHTS, LocalLlm, llm
from tests.waiting import PATIENCE_S

__all__ = ["llm"]

QUESTION = "Name one primary colour."


@pytest.fixture
def ask(llm: LocalLlm) -> Any:
    client = openai.OpenAI(base_url=llm.base_url, api_key="sk-test")

    def send(**more: Any) -> Any:
        body = {"model": llm.model, "temperature": 0, "max_tokens": 12, **more}
        return client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **body)

    return send


def test_temperature_zero_gives_the_same_answer_each_time_streamed_or_not(ask: Any) -> None:
    whole = ask()
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    assert ask().choices[0].message.content == text
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices]
    assert "".join(streamed) == text
    assert len(streamed) > 5  # token by token, not at once


def test_a_stream_carries_usage_only_when_asked(ask: Any) -> None:
    with_usage = list(ask(stream=True, stream_options={"include_usage": True}))
    assert with_usage[-1].usage.completion_tokens == 12
    assert with_usage[-1].choices == []
    assert all(chunk.usage is None for chunk in ask(stream=True))


def test_a_stream_ends_with_done(llm: LocalLlm) -> None:
    body = {"model": llm.model, "max_tokens": 2, "stream": True, "messages": [{"role": "user", "content": QUESTION}]}
    request = urllib.request.Request(
        f"{llm.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_the_server_is_gone_after_use(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        with running(WEIGHTS, log) as address:
            assert urllib.request.urlopen(f"{address}/health", timeout=PATIENCE_S).status == 200
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(f"{address}/health", timeout=PATIENCE_S)


def test_a_file_that_is_no_model_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with (tmp_path / "log").open("w") as log, pytest.raises(DidNotStart), running(tmp_path / "bad.gguf", log):
        raise AssertionError("started")
