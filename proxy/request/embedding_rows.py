"""The rows of an embedding answer: an upstream's, read and checked; stored ones, written in the client's format.

A vector is kept as base64 of float32, little endian, the form in which the API itself can send it.
"""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson

from proxy.core.dialects.openai_embeddings import OpenAIEmbeddings, shares
from proxy.core.model import Answer, Input, Usage
from proxy.core.query import Batch

ROWS_A_TURN = 64  # read or written before the loop gets its turn: 1 to 2 ms at 1536 dimensions

T = TypeVar("T")


class Answered(NamedTuple):
    """An upstream's answer, understood: one row for each input it was asked for."""

    said: Mapping[str, Any]  # as parsed
    rows: Sequence[Mapping[str, Any]]
    vectors: Sequence[str]  # base64 of float32, equally long
    tokens: Sequence[int] | None  # each row's share of the usage
    model: str
    usage: Usage | None


def vector_of(embedding: str | list[Any]) -> str | None:
    """What stands in a row's `embedding` as base64 of little-endian float32; None for anything but finite floats.

    Whole numbers throughout are no such vector: they are components of another type, asked for by a field of its own.
    """
    if isinstance(embedding, str):
        try:
            raw = b64decode(embedding, validate=True)
        except (binascii.Error, ValueError):
            return None
        if not raw or len(raw) % 4:
            return None
        vector = np.frombuffer(raw, "<f4")
    else:
        try:
            wide = np.asarray(embedding)
        except (ValueError, OverflowError):
            return None
        if wide.dtype.kind != "f" or wide.ndim != 1 or not wide.size:
            return None
        with np.errstate(over="ignore"):
            vector = wide.astype("<f4")
    return b64encode(vector.tobytes()).decode("ascii") if np.isfinite(vector).all() else None


def spell(vector: str, encoding_format: str) -> bytes:
    """A vector as JSON: the base64 it is kept as, or the shortest decimals that read back as the same float32."""
    if encoding_format == "base64":
        return b'"%b"' % vector.encode("ascii")
    return orjson.dumps(np.frombuffer(b64decode(vector), np.float32), option=orjson.OPT_SERIALIZE_NUMPY)


async def spelled(
    batch: Batch, vectors: Mapping[bytes, str], rows: Mapping[bytes, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each input of the request, in its order; `rows` are those an upstream sent, whose other fields stay."""
    texts: dict[bytes, orjson.Fragment] = {}
    async for fingerprint, vector in in_turns(vectors.items()):
        texts[fingerprint] = orjson.Fragment(spell(vector, batch.encoding_format))
    return [
        {**rows.get(fingerprint, {"object": "embedding"}), "index": i, "embedding": texts[fingerprint]}
        for i, fingerprint in enumerate(batch.fingerprints)
    ]


async def understood(said: object, asked: Sequence[Input], model: str, dialect: OpenAIEmbeddings) -> Answered | None:
    """An answer whose rows are one vector for each input, all of one length; None for any other.

    `model` is the one asked, for upstreams that do not name what answered.
    """
    rows = dialect.rows_of(said, asked)
    if rows is None or not isinstance(said, dict):
        return None
    vectors: list[str] = []
    async for row in in_turns(rows.rows):
        vector = vector_of(row["embedding"])
        if vector is None or (vectors and len(vector) != len(vectors[0])):
            return None
        vectors.append(vector)
    tokens = None if rows.usage is None else shares(rows.usage.input_tokens, asked)
    return Answered(said, rows.rows, vectors, tokens, rows.model or model, rows.usage)


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items, with a turn of the loop for others after every ROWS_A_TURN."""
    for number, item in enumerate(items, start=1):
        yield item
        if not number % ROWS_A_TURN:
            await asyncio.sleep(0)


def answers_in(answered: Answered) -> Iterator[Answer]:
    """Each row as it is stored."""
    for i, vector in enumerate(answered.vectors):
        usage = None if answered.tokens is None else Usage(answered.tokens[i], 0)
        yield Answer({"embedding": vector}, "stop", answered.model, usage, None)


def vector_in(answer: Answer) -> str:
    vector: str = answer.message["embedding"]
    return vector


def are_alike(answers: Iterable[Answer]) -> bool:
    """One model's, of one length: only such vectors can be compared, so only such ones stand in one answer."""
    return len({(answer.model, len(vector_in(answer))) for answer in answers}) <= 1
