"""Labelled questions from files, plain or gzip: streams to replay in their order, and pairs to judge alone.

- a *stream* row has `query` and `answer_id`; a cached answer is right when the ids are equal. A row whose `context` is
  not empty is a later turn. `answer`, the text, is what labels come from where they come from answers.
- a *pair* row has `a`, `b` and `label` (1: one answer serves both), and perhaps `kind`; a and b are texts, or
  conversations.
- a *reading* has `a`, `b` and `same`: what a reader found of a pair that the labels call wrong.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from proxy.core.errors import BadRequest

SCOPE = bytes(32)
DIGEST = "sha256:"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a stream."""

    text: str
    answer: str
    is_first_turn: bool = True
    scope: bytes = SCOPE
    told: str = ""  # the answer's text; "" where there is none


@dataclass(frozen=True, slots=True)
class Pair:
    a: str
    b: str
    same: bool
    kind: str
    is_first_turn: bool = True


class Readings:
    """What a reader found of pairs of texts, in either order."""

    def __init__(self, found: Iterable[tuple[str, str, bool]] = ()) -> None:
        """A text may be given by its digest, "sha256:…", where it may not be handed on."""
        self._found = {_unordered(a, b): same for a, b, same in found}

    def __len__(self) -> int:
        return len(self._found)

    def same(self, a: str, b: str) -> bool | None:
        """Whether one answer serves both; None when nobody read the pair."""
        return self._found.get(_unordered(a, b))


def digest(text: str) -> str:
    return text if text.startswith(DIGEST) else DIGEST + sha256(text.encode()).hexdigest()


def _unordered(a: str, b: str) -> tuple[str, str]:
    one, other = sorted((digest(a), digest(b)))
    return one, other


def read(path: Path) -> tuple[list[Asked], list[Pair]]:
    """The rows of a file: one of the lists is empty. Raises BadRequest naming the line."""
    streams: list[Asked] = []
    pairs: list[Pair] = []
    for number, row in _rows(path):
        try:
            if "query" in row:
                told = _text(row.get("answer") or "")
                streams.append(Asked(_text(row["query"]), _text(row["answer_id"]), not row.get("context"), told=told))
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


def read_readings(path: Path) -> Readings:
    """Rows of a, b (texts, or their digests as "sha256:…") and same. Raises BadRequest naming the line."""
    found = []
    for number, row in _rows(path):
        a, b, same = row.get("a"), row.get("b"), row.get("same")
        if not isinstance(a, str) or not isinstance(b, str) or not isinstance(same, bool):
            raise BadRequest(f"{path}:{number}: a reading has a, b and same", code="bad_file")
        found.append((a, b, same))
    return Readings(found)


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
