"""One stored answer, byte for byte as each dialect replays it; what changes here changes what every client sees.

After a change that is meant: IBID_WRITE_GOLDEN=1 python -m pytest tests/core/test_golden.py, and read the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proxy.core.dialects.routes import CHAT_PATH, Routes
from proxy.core.model import Answer, Usage

GOLDEN = Path(__file__).parents[1] / "transcripts" / "golden"
PATHS = {
    "openai": CHAT_PATH,
    "responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/m:streamGenerateContent",
    "ollama": "/api/chat",
}
TOKEN, CREATED = "0123456789abcdef0123456789abcdef", 1_800_000_000
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
USAGE = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27, "prompt_tokens_details": {"cached_tokens": 4}}
TEXT = "Paris is the capital of France. \U0001f5fc e\u0301t\u2028end"


def answer_of(kind: str) -> Answer:
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    if kind == "call":
        message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return Answer(
        message=message,
        finish_reason="tool_calls" if kind == "call" else "stop",
        model="gpt-4o-mini-2024-07-18",
        usage=Usage(20, 7, 4),
        raw_usage=USAGE,
        extra={"system_fingerprint": "fp_44709d6fcb"},
        pieces=() if kind == "call" else (5, 3, len(TEXT) - 8),
    )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["text", "call"])
@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_stored_answer_is_replayed_byte_for_byte(name: str, kind: str, stream: bool) -> None:
    dialect = Routes().find(PATHS[name], "?alt=sse").dialect
    assert dialect is not None
    answer = answer_of(kind)
    assert dialect.expresses(answer, has_stops=False)
    template = dialect.render(answer, stream=stream, wants_usage=True, usage_mode="original")
    body = template.fill(TOKEN, CREATED)
    suffix = ("ndjson" if name == "ollama" else "sse") if stream else "json"
    path = GOLDEN / f"{name}_{kind}.{suffix}"
    if os.environ.get("IBID_WRITE_GOLDEN"):
        path.write_bytes(body)
    assert body == path.read_bytes()
    if not stream:
        json.loads(body)
