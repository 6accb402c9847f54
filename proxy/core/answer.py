"""An Answer as bytes for SQL: JSON, stable (encoding what was decoded gives the same bytes)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from proxy.core.model import Answer, Usage

FORMAT = 3
READABLE = (1, 2, FORMAT)


def encode_answer(answer: Answer, dumps: Callable[[Any], bytes] | None = None) -> bytes:
    """UTF-8 JSON. `dumps`: a faster writer of compact JSON, for answers that a strict reader has read.

    Raises ValueError for what JSON cannot say: lone surrogates, NaN, absurd nesting.
    """
    usage = answer.usage
    record: dict[str, Any] = {
        "v": FORMAT,
        "model": answer.model,
        "message": dict(answer.message),
        "finish_reason": answer.finish_reason,
        "usage": None
        if usage is None
        else [usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens],
        "raw_usage": None if answer.raw_usage is None else dict(answer.raw_usage),
        "choice": dict(answer.choice),
        "extra": dict(answer.extra),
        "pieces": answer.pieces,
        "dialect": answer.dialect,
        "limit": answer.limit,
        "opaque": answer.opaque,
        "runs": answer.runs,
    }
    return (dumps or to_json)(record)


def decode_answer(raw: bytes, loads: Callable[[bytes], Any] = json.loads) -> Answer:
    """The Answer these bytes say. Raises ValueError when they are not of `encode_answer`."""
    try:
        record = loads(raw)
        if record["v"] not in READABLE:
            raise ValueError(f"answer format {record['v']!r} is none of {READABLE}")
        usage = record["usage"]
        return Answer(
            message=record["message"],
            finish_reason=record["finish_reason"],
            model=record["model"],
            usage=None if usage is None else Usage(*usage),
            raw_usage=record["raw_usage"],
            extra=record["extra"],
            pieces=tuple(record["pieces"]),
            choice=record["choice"],
            dialect=record.get("dialect", "openai"),
            limit=record.get("limit"),
            opaque=record.get("opaque", False),
            runs=tuple(record.get("runs", ())),
        )
    except (KeyError, TypeError, RecursionError) as fault:
        raise ValueError("not an encoded answer") from fault


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON, members in their order. Raises ValueError for what JSON cannot say."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault
