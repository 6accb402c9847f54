"""Gemini embedContent and batchEmbedContents: read a request, ask for some of its contents only, read the vectors.

An input is the text of a content; a content that is more than one text is compared as it stands, all of it. What all
requests of a batch say beside their contents is their scope; where they say different things, each is compared whole.
Rows are shared between the two operations and with no other dialect: whether the provider's OpenAI endpoint gives the
same numbers is nowhere said. Fields as of the API description of 2026-08.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core.dialects.dialect import Loads
from proxy.core.dialects.fields import CACHE_TWIN
from proxy.core.dialects.gemini import Gemini
from proxy.core.dialects.openai_embeddings import OpenAIEmbeddings, Rows, counted, placed_lists
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.jsontext import canonical, set_member
from proxy.core.model import Input, Usage

REQUEST_LIMIT = 2048
KNOWN_FIELDS = frozenset({"content", "model", "taskType", "title", "outputDimensionality", CACHE_TWIN})


def read(body: Mapping[str, Any], model: str, *, batch: bool) -> Facts:
    """What the request says. Raises BadRequest (invalid_type, invalid_value) naming the parameter."""
    asked = requests_of(body) if batch else [dict(body)]
    for i, one in enumerate(asked):
        if not isinstance(one.get("content"), dict):
            raise _invalid(f"requests[{i}].content" if batch else "content", "an object with parts")
    around = {k: v for k, v in body.items() if k not in ("requests", CACHE_TWIN)} if batch else {}
    said = [_settings(one, model) for one in asked]
    is_mixed = any([one != said[0] for one in said])
    unknown = {name for one in asked for name in one.keys() - KNOWN_FIELDS} | around.keys()
    return Facts(
        model=model,
        prompt=None,
        context=(),
        settings={"gemini": "mixed" if is_mixed else said[0], **around},
        unknown=tuple(sorted(unknown)),
        remote_urls=any([_is_remote(one["content"]) for one in asked]),
        inputs=tuple(inputs_of(asked, model)),
        encoding_format="float",
    )


def requests_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = body.get("requests")
    if not isinstance(asked, list) or not asked:
        raise _invalid("requests", "a non-empty array")
    if len(asked) > REQUEST_LIMIT:
        raise BadRequest(f"'requests' has more than {REQUEST_LIMIT} elements.", code="invalid_value", param="requests")
    for i, one in enumerate(asked):
        if not isinstance(one, dict):
            raise _invalid(f"requests[{i}]", "an object")
    return asked


def inputs_of(asked: Sequence[Mapping[str, Any]], model: str) -> list[Input]:
    """What each request asks for, in their order. Bytes of JSON, where it is more than a text, can be no text."""
    said = [_settings(one, model) for one in asked]
    if any([one != said[0] for one in said]):
        return [tuple(canonical([settings, one["content"]])) for settings, one in zip(said, asked, strict=True)]
    return [_input(one["content"]) for one in asked]


def _input(content: Mapping[str, Any]) -> Input:
    parts = content.get("parts")
    if isinstance(parts, list) and len(parts) == 1 and content.get("role", "user") == "user":
        (part,) = parts
        is_text = isinstance(part, dict) and part.keys() == {"text"} and isinstance(part["text"], str)
        if is_text and content.keys() <= {"parts", "role"}:
            return str(part["text"])
    return tuple(canonical(content))


def _settings(one: Mapping[str, Any], model: str) -> dict[str, Any]:
    settings = {k: v for k, v in one.items() if k not in ("content", CACHE_TWIN) and v is not None}
    if settings.get("model") in (model, f"models/{model}"):
        del settings["model"]
    return settings


def _is_remote(content: Mapping[str, Any]) -> bool:
    parts = content.get("parts")
    return isinstance(parts, list) and any(
        [isinstance(p, dict) and ("fileData" in p or "file_data" in p) for p in parts]
    )


def _invalid(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"Invalid value for '{param}': expected {wanted}.", code="invalid_type", param=param)


def usage_of(said: object) -> Usage | None:
    tokens = counted(said.get("usageMetadata"), "promptTokenCount") if isinstance(said, dict) else None
    return None if tokens is None else Usage(tokens, 0)


class GeminiEmbeddings(OpenAIEmbeddings):
    """`EmbeddingDialect` of `:batchEmbedContents`, or of `:embedContent`."""

    name = "gemini"
    recodes = False

    def __init__(self, loads: Loads = json.loads, *, batch: bool) -> None:
        super().__init__(loads)
        self._batch = batch
        self._errors = Gemini(loads)

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read(body, model, batch=self._batch)

    def part_body(self, raw: bytes, model: str, asked: Sequence[Input] | None, encoding_format: str | None) -> bytes:
        if asked is None:
            return raw
        requests = requests_of(self._loads(raw))
        first = {one: i for i, one in reversed([*enumerate(inputs_of(requests, model))])}
        kept = [requests[first[one]] for one in asked]
        return set_member(raw, "requests", json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode())

    def rows_of(self, said: object, asked: Sequence[Input]) -> Rows | None:
        if not isinstance(said, dict):
            return None
        told = said.get("embeddings") if self._batch else [said.get("embedding")]
        if not isinstance(told, list) or not all([isinstance(one, dict) for one in told]):
            return None
        rows = placed_lists([one.get("values") for one in told], len(asked))
        if rows is None:
            return None
        return Rows([{**one, **row} for one, row in zip(told, rows, strict=True)], "", usage_of(said))

    def usage_of(self, said: object) -> Usage | None:
        return usage_of(said)

    def whole(
        self, rows: Sequence[Mapping[str, Any]], model: str, tokens: int | None, told: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        ours = ("object", "index", "embedding", "values")
        said = [{"values": row["embedding"], **{k: v for k, v in row.items() if k not in ours}} for row in rows]
        counters = {"usageMetadata": {"promptTokenCount": tokens}} if tokens and told is None else {}
        if told is not None and isinstance(told.get("usageMetadata"), dict) and tokens is not None:
            counters = {"usageMetadata": {**told["usageMetadata"], "promptTokenCount": tokens}}
        return {**(told or {}), **({"embeddings": said} if self._batch else {"embedding": said[0]}), **counters}

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return self._errors.error_body(error, request_id)
