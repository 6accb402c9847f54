"""OpenAI legacy completions: record an upstream's answer, and write it again, whole or as a stream.

As with chat, a stream is storable only when its one choice has its finish_reason and `[DONE]` came last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.dialect import Loads, Recording, Template, UsageMode
from proxy.core.dialects.openai_record import find_usage, read_usage
from proxy.core.dialects.openai_replay import counted, split, to_text
from proxy.core.dialects.recording import is_neutral, is_sayable, read_object, recorded
from proxy.core.errors import UpstreamError
from proxy.core.eventstream import EventDecoder, is_done
from proxy.core.model import Answer

SEAM = '"id":"cmpl-{id}","created":{created}'
_TOP_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage", "error", "obfuscation"})
_CHOICE_FIELDS = frozenset({"index", "text", "finish_reason"})
_FINISHES = {"length": "finish_length", "content_filter": "finish_content_filter"}


def record(body: bytes, *, is_stream: bool, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly, streamed or whole."""
    answer = _read_stream(body, loads) if is_stream else _read_whole(body, loads)
    return recorded(answer, body, find_usage)


def _read_whole(body: bytes, loads: Loads) -> Answer | str:
    whole = read_object(body, loads)
    if isinstance(whole, str):
        return whole
    if whole.get("error") is not None:
        return "error_object"
    choice = _only_choice(whole.get("choices"))
    if choice is None:
        return "choices"
    return _storable(whole, choice, [choice.get("text")], loads)


def _only_choice(choices: object) -> dict[str, Any] | None:
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    return choices[0] if choices[0].get("index") in (None, 0) else None


def _read_stream(body: bytes, loads: Loads) -> Answer | str:
    decoder = EventDecoder()
    said: dict[str, Any] = {}  # what the chunks say, the last word of each field
    last: dict[str, Any] = {}  # likewise of the choice
    texts: list[Any] = []
    has_ended = False
    try:
        for data in [*decoder.feed(body), *decoder.end()]:
            if has_ended:
                return "data_after_done"
            if is_done(data):
                has_ended = True
                continue
            chunk = loads(data)
            if not isinstance(chunk, dict):
                return "garbage"
            if chunk.get("error") is not None:
                return "error_event"
            said |= {name: value for name, value in chunk.items() if value is not None or name not in said}
            if chunk.get("choices") == [] or (chunk.get("choices") is None and isinstance(chunk.get("usage"), dict)):
                continue
            choice = _only_choice(chunk.get("choices"))
            if choice is None:
                return "choices"
            last |= {name: value for name, value in choice.items() if not is_neutral(value) or name not in last}
            texts.append(choice.get("text") or "")
    except UpstreamError:
        return "too_large"
    except (ValueError, RecursionError):
        return "garbage"
    if decoder.names - {b"message"}:
        return "unknown_event"
    return _storable(said, last, texts, loads) if has_ended else "truncated"


def _storable(whole: Mapping[str, Any], choice: Mapping[str, Any], texts: list[Any], loads: Loads) -> Answer | str:
    finish, model, usage = choice.get("finish_reason"), whole.get("model"), whole.get("usage")
    if choice.get("logprobs"):
        return "logprobs"
    if finish is None:
        return "truncated"
    if finish != "stop":
        return _FINISHES.get(finish, "finish_other") if isinstance(finish, str) else "garbage"
    if not all([isinstance(text, str) for text in texts]) or not isinstance(model, str):
        return "garbage"
    text = "".join(texts)
    if not text.strip():
        return "empty"
    if not isinstance(usage, dict | None):
        return "garbage"
    extra = {name: value for name, value in whole.items() if name not in _TOP_FIELDS}
    others = {name: value for name, value in choice.items() if name not in _CHOICE_FIELDS}
    if not is_sayable(loads, text, model, usage, extra, others):
        return "garbage"
    lengths = tuple([len(piece) for piece in texts if piece])
    return Answer(
        message={"role": "assistant", "content": text},
        finish_reason=finish,
        model=model,
        usage=read_usage(usage),
        raw_usage=usage,
        extra=extra,
        pieces=lengths if len(lengths) > 1 else (),
        choice=others,
        dialect="completions",
    )


def render_whole(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as one JSON body. Raises ValueError for what JSON cannot say."""
    choice = {"text": answer.message["content"], "index": 0, **answer.choice, "finish_reason": answer.finish_reason}
    body: dict[str, Any] = {"object": "text_completion", "model": answer.model, "choices": [choice]}
    if answer.raw_usage is not None:
        body["usage"] = counted(answer.raw_usage, usage_mode)
    return Template((b"{", b"," + to_json({**body, **answer.extra})[1:]), SEAM)


def render_stream(answer: Answer, include_usage: bool, usage_mode: UsageMode = "original") -> Template:
    """The answer as an event stream, `[DONE]` included. Raises ValueError for what JSON cannot say."""
    small = {name: value for name, value in answer.extra.items() if not isinstance(value, dict | list)}
    large = {name: value for name, value in answer.extra.items() if isinstance(value, dict | list)}
    head = {"object": "text_completion", "model": answer.model, **small}
    usage = {"usage": None} if include_usage else {}

    def chunk(text: str, finish: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, **answer.choice, "finish_reason": finish}
        return {**head, "choices": [choice], **usage}

    chunks = [chunk(piece, None) for piece in split(answer.message["content"], answer.pieces)]
    chunks.append({**chunk("", answer.finish_reason), **large})
    if include_usage and answer.raw_usage is not None:
        chunks.append({**head, "choices": [], "usage": counted(answer.raw_usage, usage_mode)})
    events = [b"," + to_text(said)[1:].encode() + b"\n\n" for said in chunks]
    return Template(
        (b"data: {", *(event + b"data: {" for event in events[:-1]), events[-1] + b"data: [DONE]\n\n"), SEAM
    )
