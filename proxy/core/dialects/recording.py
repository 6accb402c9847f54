"""What the recorders of all dialects share: one JSON object read, counters found in any bytes, what comes of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.dialect import Loads, Recording
from proxy.core.dialects.lines import LINE_LIMIT_BYTES
from proxy.core.model import Answer, Usage

_DECODER = json.JSONDecoder()


def recorded(answer: Answer | str, body: bytes, find_usage: Callable[[bytes], Usage | None]) -> Recording:
    """An Answer, or the reason why there is none and what the body says it used."""
    if isinstance(answer, Answer):
        return Recording(answer, "", answer.usage)
    return Recording(None, answer, find_usage(body))


def read_object(raw: bytes, loads: Loads, limit_bytes: int = LINE_LIMIT_BYTES) -> dict[str, Any] | str:
    """The object of a JSON body, or the reason why it is not storable."""
    if len(raw) > limit_bytes:
        return "too_large"
    try:
        body = loads(raw)
    except (ValueError, RecursionError):
        return "garbage"
    return body if isinstance(body, dict) else "garbage"


def is_neutral(value: object) -> bool:
    """Whether a value says nothing: null, false, an empty text, list or object, or one that holds no more than such.

    Gateways put such members of fields they know into every chunk.
    """
    if isinstance(value, dict):
        return all([is_neutral(inner) for inner in value.values()])
    if isinstance(value, list):
        return all([is_neutral(inner) for inner in value])
    return value is None or value is False or value == ""


def is_sayable(loads: Loads, *read: object) -> bool:
    """Whether JSON can say what these bytes were read as; the standard library reads lone surrogates and NaN too."""
    if loads is not json.loads:
        return True
    try:
        to_json(read)
    except ValueError:
        return False
    return True


def objects_under(body: bytes, name: bytes, *, last_first: bool) -> Iterator[dict[str, Any]]:
    """Objects under a member of this name (with its quotes), streamed or whole, complete or cut; each within 4 KiB."""
    at = len(body) if last_first else -1
    while (at := body.rfind(name, 0, at) if last_first else body.find(name, at + 1)) >= 0:
        start = body.find(b"{", at, at + len(name) + 5)
        if start < 0:
            continue
        try:
            raw, _end = _DECODER.raw_decode(body[start : start + 4096].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        yield raw


def details_of(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object of details, which may be left out."""
    details = raw.get(name)
    return details if isinstance(details, dict) else {}


_READ = ("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens", "cacheReadInputTokens",
         "cacheReadInputTokenCount", "cache_read_tokens")  # fmt: skip
_WRITTEN = ("cache_write_tokens", "cache_creation_input_tokens", "cacheWriteInputTokens", "cacheWriteInputTokenCount",
            "cache_creation_tokens")  # fmt: skip


def cached_in(raw: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[int, int]:
    """Input tokens read from and written to the provider's prompt cache, wherever they are told.

    OpenAI tells them in details of the prompt; DeepSeek (`prompt_cache_hit_tokens`), Moonshot (`cached_tokens`),
    Anthropic and what is made of it (`cache_read_input_tokens`), and Bedrock in camel case tell them beside the totals.
    """
    return _first_count(_READ, details, raw), _first_count(_WRITTEN, details, raw)


def _first_count(names: tuple[str, ...], *places: Mapping[str, Any]) -> int:
    told = (place.get(name) for place in places for name in names)
    return next((count for count in told if type(count) is int and count > 0), 0)


def usage_of(*counts: Any) -> Usage | None:
    """Counters in the order of `Usage`; None unless all are whole numbers, not below 0."""
    return Usage(*counts) if all([type(count) is int and count >= 0 for count in counts]) else None


def last_usage(body: bytes, name: bytes, read: Callable[[object], Usage | None]) -> Usage | None:
    """What the last object of this name counted; None when none is readable."""
    found = (read(raw) for raw in objects_under(body, name, last_first=True))
    return next((usage for usage in found if usage is not None), None)
