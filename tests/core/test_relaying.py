"""What every dialect relays: events of any length, and ends that its own server's clients are content with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.routes import Routes
from proxy.core.eventstream import HELD_BYTES

PATHS = {
    "anthropic": "/v1/messages",
    "completions": "/v1/completions",
    "gemini": "/v1beta/models/m:streamGenerateContent",
    "ollama": "/api/chat",
    "openai": "/v1/chat/completions",
    "responses": "/v1/responses",
}
NAMED = pytest.mark.parametrize("name", PATHS)


def dialect(name: str) -> Dialect:
    found = Routes(orjson.loads).find(PATHS[name], "?alt=sse").dialect
    assert found is not None
    return found


def data(said: Mapping[str, Any], name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(said).encode() + b"\n\n"


def finished(name: str, text: str) -> bytes:
    """The event that finishes an answer, which also says this text."""
    match name:
        case "anthropic":
            return data(
                {
                    "type": "message_delta",
                    "usage": {"output_tokens": 3},
                    "note": text,
                    "delta": {"stop_reason": "end_turn"},
                },
                "message_delta",
            )
        case "completions":
            return data({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})
        case "gemini":
            return data({"candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": "STOP"}]})
        case "ollama":
            return json.dumps({"message": {"content": text}, "done": True, "done_reason": "stop"}).encode() + b"\n"
        case "openai":
            return data({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]})
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    return data(
        {"type": "response.completed", "sequence_number": 7, "response": {"output": output}}, "response.completed"
    )


ENDS = {"anthropic": data({"type": "message_stop"}, "message_stop"), "completions": b"data: [DONE]\n\n"}
ENDS["openai"] = ENDS["completions"]
QUOTING = json.dumps({"finish_reason": "stop", "finishReason": "STOP", "stop_reason": "x", "done": True})
"""What a text may quote of the marks themselves."""


def relayed(name: str, raw: bytes, size: int, *, n: int = 1) -> tuple[bytes, bool, list[bool]]:
    """What a client gets of a body that comes in pieces of this size, whether that is whole, and after which pieces
    nothing may be said in between."""
    relay = dialect(name).filter(wants_usage=True, n=n)
    passed, within = [], []
    for at in range(0, len(raw), size):
        passed.append(relay.feed(raw[at : at + size]))
        within.append(relay.is_within)
    passed.append(relay.end())
    return b"".join(passed), relay.complete, within


@NAMED
@pytest.mark.parametrize("size", [60_001, 1 << 20, 1 << 24])
@pytest.mark.parametrize("mib", [1, 5])
def test_an_event_of_any_length_passes_and_its_marks_are_seen(name: str, size: int, mib: int) -> None:
    raw = finished(name, QUOTING + "x" * (mib << 20)) + ENDS.get(name, b"")
    passed, complete, within = relayed(name, raw, size)
    assert passed == raw
    assert complete
    assert not within[-1]


@NAMED
def test_a_long_event_that_is_cut_is_not_whole_whatever_it_quotes(name: str) -> None:
    raw = finished(name, QUOTING + "x" * (3 << 20))
    passed, complete, within = relayed(name, raw[: raw.rindex(b"xxx")], 60_001)
    assert not complete
    assert any(within), "nobody may speak inside of it"
    assert raw.startswith(passed)


@NAMED
def test_a_long_event_is_not_held(name: str) -> None:
    relay = dialect(name).filter(wants_usage=True, n=1)
    for _ in range(64):
        relay.feed(b"x" * (HELD_BYTES // 16))
    assert sum(len(relay.feed(b"x" * 1000)) for _ in range(100)) == 100_000


@NAMED
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_clean_end_behind_the_finish_needs_no_mark(name: str, size: int) -> None:
    raw = finished(name, "Lyon")
    assert relayed(name, raw, size)[:2] == (raw, True)


@NAMED
@pytest.mark.parametrize("lost", [1, 2])
def test_nor_does_it_need_the_last_blank_line(name: str, lost: int) -> None:
    raw = (finished(name, "Lyon"))[:-lost]
    if name != "ollama" or lost == 1:
        assert relayed(name, raw, 10_000)[:2] == (raw, True)


@NAMED
def test_an_end_inside_an_event_is_none(name: str) -> None:
    raw = finished(name, "Lyon")
    for cut in (5, len(raw) // 2, len(raw) - 4):
        assert not relayed(name, raw[:cut], 10_000)[1]
    if name in ENDS:
        assert not relayed(name, raw + b'data: {"usage": {"prompt', 10_000)[1], "the finish was there, and half of more"


@pytest.mark.parametrize("name", ["openai", "completions"])
@pytest.mark.parametrize("mark", [b"data: [DONE] \n\n", b"data:[DONE]\n\n", b"data:  [DONE]\t\n\n", b"data: [DONE]"])
def test_blanks_around_the_mark_are_none_of_it(name: str, mark: bytes) -> None:
    raw = finished(name, "Lyon") + mark
    assert relayed(name, raw, 10_000)[:2] == (raw, True)
    recording = dialect(name).record(raw.replace(b'"choices"', b'"model": "m", "choices"'), is_stream=True, n=1)
    assert recording.answer is not None, recording.refusal_reason


@pytest.mark.parametrize("name", ["openai", "completions"])
def test_without_the_mark_every_choice_has_to_be_finished(name: str) -> None:
    raw = finished(name, "Lyon")
    assert not relayed(name, raw, 10_000, n=2)[1]
    assert relayed(name, raw + raw.replace(b'"index": 0', b'"index": 1'), 10_000, n=2)[1]
    open_one = raw.replace(b'"index": 0', b'"index": 1').replace(b'"stop"', b'""')
    assert not relayed(name, raw + open_one, 10_000, n=2)[1], "an empty reason is none"


@NAMED
def test_what_is_too_long_is_not_kept_and_says_so(name: str) -> None:
    raw = finished(name, "x" * (3 << 20)) + ENDS.get(name, b"")
    assert dialect(name).record(raw, is_stream=True, n=1).refusal_reason == "too_large"
