"""Labelled questions from files, plain or gzip: streams to replay in their order, and pairs to judge alone.

- a *stream* row has `query` and `answer_id`; a cached answer is right when the ids are equal. A row whose `context` is
  not empty is a later turn.
- a *pair* row has `a`, `b` and `label` (1: one answer serves both), and perhaps `kind`; a and b are texts, or
  conversations.
- a *reading* has `a`, `b` and `same`: what a person found who read a pair that the labels call wrong.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from proxy.core.errors import BadRequest

SCOPE = bytes(32)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a stream."""

    text: str
    answer: str
    is_first_turn: bool = True
    scope: bytes = SCOPE


@dataclass(frozen=True, slots=True)
class Pair:
    a: str
    b: str
    same: bool
    kind: str
    is_first_turn: bool = True


Readings = Mapping[tuple[str, str], bool]


def read(path: Path) -> tuple[list[Asked], list[Pair]]:
    """The rows of a file: one of the lists is empty. Raises BadRequest naming the line."""
    streams: list[Asked] = []
    pairs: list[Pair] = []
    for number, row in _rows(path):
        try:
            if "query" in row:
                streams.append(Asked(_text(row["query"]), _text(row["answer_id"]), not row.get("context")))
            else:
                pairs.append(_pair(row))
        except (KeyError, TypeError, IndexError) as fault:
            raise BadRequest(
                f"{path}:{number}: neither query and answer_id nor a, b and label ({fault})", code="bad_file"
            ) from fault
    if not streams and not pairs:
        raise BadRequest(f"{path}: no rows", code="bad_file")
    if streams and pairs:
        raise BadRequest(f"{path}: streams and pairs in one file", code="bad_file")
    return streams, pairs


def read_readings(path: Path) -> dict[tuple[str, str], bool]:
    """What a reader found, in either order of the texts. Raises BadRequest naming the line."""
    found: dict[tuple[str, str], bool] = {}
    for number, row in _rows(path):
        try:
            a, b, same = row["a"], row["b"], row["same"]
        except KeyError as fault:
            raise BadRequest(f"{path}:{number}: a reading has a, b and same", code="bad_file") from fault
        found[a, b] = found[b, a] = bool(same)
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as fault:
        raise BadRequest(f"{path}: cannot be read ({type(fault).__name__})", code="bad_file") from fault
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as fault:
            raise BadRequest(f"{path}:{number}: not JSON", code="bad_file") from fault
        if not isinstance(row, dict):
            raise BadRequest(f"{path}:{number}: not an object", code="bad_file")
        yield number, row


def _text(value: Any) -> str:
    """Answers may be named by any JSON value; texts are texts."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _pair(row: Mapping[str, Any]) -> Pair:
    a, b = row["a"], row["b"]
    same = row["label"] in (1, True, "1")
    kind = str(row.get("kind") or ("same" if same else "different"))
    if isinstance(a, list):  # conversations: what counts is the last turn after all before it
        return Pair(_content(a[-1]), _content(b[-1]), same, kind, is_first_turn=len(a) == 1 and len(b) == 1)
    if not isinstance(a, str) or not isinstance(b, str):
        raise TypeError("a and b must be texts")
    return Pair(a, b, same, kind)


def _content(message: Any) -> str:
    return str(message["content"]) if isinstance(message, Mapping) else str(message)
