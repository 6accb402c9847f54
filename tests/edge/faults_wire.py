"""What a scripted model server says, event by event, for the tests of the fault catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.upstream import event

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FORMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
HEAD = {"id": "chatcmpl-m1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> bytes:
    return event({**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


ROLE, ONE, TWO = chunk({"role": "assistant", "content": ""}), chunk({"content": "one "}), chunk({"content": "two"})
STOP, DONE = chunk({}, "stop"), event("[DONE]")


def whole(content: Any = "one two", finish: Any = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE, **more}
