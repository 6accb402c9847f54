"""OpenAI embeddings: read a request, ask for some of its inputs only, read the rows that come back.

An input is a string or the ids of its tokens; a request asks for one or for up to INPUT_LIMIT of one kind. Fields as of
the API description of 2026-08. Each input is a question of its own: what the request says beyond its inputs is their
scope, save the format, which only spells the same float32 numbers in another way.

With a field that this program does not know the format may mean something else (8-bit components in base64), so it is
part of the scope then, and nobody but the client chooses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from proxy.core.dialects.fields import CACHE_TWIN, model_in, whole, without_twin
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.errors import BadRequest
from proxy.core.facts import Facts
from proxy.core.jsontext import set_member
from proxy.core.model import Input, Usage

INPUT_LIMIT = 2048
DELIVERY_FIELDS = frozenset(
    {
        "encoding_format",  # spells the same numbers; but see the module on unknown fields
        "user",  # in `end_user`
        CACHE_TWIN,
    }
)
KNOWN_FIELDS = DELIVERY_FIELDS | {"input", "model", "dimensions"}


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type, invalid_value) naming the parameter."""
    model, user, dimensions = model_in(body), body.get("user"), body.get("dimensions")
    encoding_format = body.get("encoding_format")
    if model is None:
        raise _invalid_type("model", "a string")
    if not isinstance(user, str | None):
        raise _invalid_type("user", "string")
    if dimensions is not None and (whole(dimensions) or 0) < 1:
        raise BadRequest("'dimensions' must be a positive integer.", code="invalid_value", param="dimensions")
    if not isinstance(encoding_format, str | None):
        raise _invalid_type("encoding_format", "string")
    inputs = read_inputs(body.get("input"))
    unknown = (*([] if model else ["model"]), *sorted(body.keys() - KNOWN_FIELDS))
    settings = {name: value for name, value in body.items() if name not in DELIVERY_FIELDS | {"input", "model"}}
    encoding_format = encoding_format or "float"
    if unknown:
        settings["encoding_format"] = encoding_format
    return Facts(
        model=model,
        prompt=None,
        context=(),
        settings=settings,
        unknown=unknown,
        end_user=user or "",
        inputs=inputs,
        encoding_format=encoding_format,
    )


def read_inputs(said: object) -> tuple[Input, ...]:
    """The inputs in their order, repeats included. Raises BadRequest naming the first one that is none."""
    if isinstance(said, str):
        return (_checked(said, "input"),)
    if not isinstance(said, list):
        raise _invalid_type("input", "a string, an array of strings, of token ids, or of arrays of token ids")
    if not said:
        raise _empty("input")
    if type(said[0]) is int:
        return (_checked(said, "input"),)
    if len(said) > INPUT_LIMIT:
        raise BadRequest(f"'input' has more than {INPUT_LIMIT} elements.", code="invalid_value", param="input")
    kind = type(said[0])
    for i, element in enumerate(said):
        if type(element) is not kind:
            raise _invalid_type(f"input[{i}]", "what the elements before it are")
    return tuple([_checked(element, f"input[{i}]") for i, element in enumerate(said)])


def _checked(element: object, path: str) -> Input:
    if isinstance(element, str):
        if not element:
            raise _empty(path)
        return element
    if not isinstance(element, list):
        raise _invalid_type(path, "a string or an array of token ids")
    if not element:
        raise _empty(path)
    for i, token in enumerate(element):
        if type(token) is not int or token < 0:
            raise _invalid_type(f"{path}[{i}]", "a token id")
    return tuple(element)


def _empty(path: str) -> BadRequest:
    return BadRequest(f"'{path}' is empty.", code="invalid_value", param=path)


def _invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"Invalid type for '{param}': expected {wanted}.", code="invalid_type", param=param)


def part_body(raw: bytes, inputs: Sequence[Input] | None, encoding_format: str | None) -> bytes:
    """The same request for other inputs and in another format, where they are given; every other byte as it was."""
    if inputs is not None:
        raw = set_member(raw, "input", json.dumps(inputs, ensure_ascii=False, separators=(",", ":")).encode())
    if encoding_format is not None:
        raw = set_member(raw, "encoding_format", json.dumps(encoding_format).encode())
    return raw


# -- what comes back ---------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """An upstream's answer, its rows in the order of the inputs. What stands in a row's `embedding` is not read yet."""

    rows: Sequence[Mapping[str, Any]]
    model: str  # "" when not said
    usage: Usage | None


def rows_of(said: object, count: int) -> Rows | None:
    """The rows of a parsed body; None unless there is exactly one for each of `count` inputs."""
    if not isinstance(said, dict) or not isinstance(data := said.get("data"), list) or len(data) != count:
        return None
    placed: list[Mapping[str, Any] | None] = [None] * count
    for row in data:
        if not isinstance(row, dict) or not isinstance(row.get("embedding"), str | list):
            return None
        index = row.get("index")
        if type(index) is not int or not 0 <= index < count or placed[index] is not None:
            return None
        placed[index] = row
    model = said.get("model")
    rows = [row for row in placed if row is not None]
    return Rows(rows, model if isinstance(model, str) else "", usage_in(said.get("usage")))


def has_base64(said: object) -> bool:
    """Whether any row of a parsed body is spelled in base64."""
    data = said.get("data") if isinstance(said, dict) else None
    rows = data if isinstance(data, list) else ()
    return any([isinstance(row, dict) and isinstance(row.get("embedding"), str) for row in rows])


def usage_in(usage: object) -> Usage | None:
    """Counters of a `usage` object. Some servers tell only the total, which here is the same."""
    if not isinstance(usage, dict):
        return None
    told = [usage.get(name) for name in ("prompt_tokens", "total_tokens")]
    return next((Usage(tokens, 0) for tokens in told if _is_count(tokens)), None)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def usage_object(tokens: int, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `usage` of an answer, over what an upstream `told` of its part."""
    return {**(told or {}), "prompt_tokens": tokens, "total_tokens": tokens}


# -- shares ------------------------------------------------------------------------------------------------------------


def shares(total: int, inputs: Sequence[Input]) -> list[int]:
    """Each input's part of `total` tokens, which they sum to exactly.

    In proportion to length: an estimate for texts (UTF-8 bytes), exact for token ids where the upstream counts those.
    What does not divide goes to the largest remainders, the earlier input first.
    """
    weights = [len(asked.encode()) if isinstance(asked, str) else len(asked) for asked in inputs]
    if not any(weights):  # empty texts, which other dialects take
        weights = [1] * len(inputs)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def counted(said: object, name: str) -> int | None:
    """A counter of an object; None where it has none."""
    value = said.get(name) if isinstance(said, dict) else None
    return value if _is_count(value) else None


def placed_lists(vectors: object, count: int) -> list[Mapping[str, Any]] | None:
    """Rows of an answer that names no places; None unless there is exactly one list for each of `count` inputs."""
    if not isinstance(vectors, list) or len(vectors) != count or not all([isinstance(one, list) for one in vectors]):
        return None
    return [{"embedding": one} for one in vectors]


class OpenAIEmbeddings(OpenAIChat):
    """`Dialect` of OpenAI embeddings: chat's errors, and reading of its own. `proxy.request.embeddings` answers what it
    reads; recording, filtering and rendering of whole answers are never asked of it. Other dialects'
    embeddings are made of it: they override what a body says."""

    name = "openai"
    operation = "embedding"
    recodes = True  # the upstream may be asked in another format than the client's

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        """See `read`; a model in the path (Azure's deployments) stands for the body's."""
        return read({**body, "model": model} if model else body)

    def forward_body(self, raw: bytes, parsed: Mapping[str, Any]) -> bytes:
        return without_twin(raw, parsed)

    def find_usage(self, body: bytes) -> Usage | None:
        try:
            said = self._loads(body)
        except (ValueError, RecursionError):
            return None
        return self.usage_of(said)

    def part_body(self, raw: bytes, model: str, asked: Sequence[Input] | None, encoding_format: str | None) -> bytes:
        """See `part_body`."""
        return part_body(raw, asked, encoding_format)

    def rows_of(self, said: object, asked: Sequence[Input]) -> Rows | None:
        """See `rows_of`."""
        return rows_of(said, len(asked))

    def usage_of(self, said: object) -> Usage | None:
        """What a parsed body counted."""
        return usage_in(said.get("usage")) if isinstance(said, dict) else None

    def whole(
        self, rows: Sequence[Mapping[str, Any]], model: str, tokens: int | None, told: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The body with these rows. `told`: what an upstream said of its part; `tokens` None leaves its counters."""
        if told is None:
            return {"object": "list", "data": rows, "model": model, "usage": usage_object(tokens or 0)}
        usage = told.get("usage")
        counters = {} if tokens is None else {"usage": usage_object(tokens, usage if isinstance(usage, dict) else None)}
        return {**told, "data": rows, **counters}
