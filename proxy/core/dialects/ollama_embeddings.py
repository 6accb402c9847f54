"""Ollama embeddings, `/api/embed`: read a request, ask for some of its inputs only, read the vectors that come back.

The server gives the same float32 numbers here as at its `/v1/embeddings`, so the two share their rows. The older
`/api/embeddings`, whose vectors are not of unit length, passes through. Fields as of the API description of 2026-08.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core.dialects.dialect import Loads
from proxy.core.dialects.fields import BOOLEAN, CACHE_TWIN, INTEGER, OBJECT, Types, mistyped, model_in
from proxy.core.dialects.ollama import Ollama
from proxy.core.dialects.openai_embeddings import OpenAIEmbeddings, Rows, counted, placed_lists
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.model import Input, Usage

DELIVERY_FIELDS = frozenset(
    {
        "keep_alive",  # how long the model stays in memory: time only
        CACHE_TWIN,
    }
)
_TYPES: Types = {
    "dimensions": INTEGER,
    "input": (str, list),
    "keep_alive": (str, int, float),
    "options": OBJECT,
    "truncate": BOOLEAN,
}
KNOWN_FIELDS = DELIVERY_FIELDS | _TYPES.keys() | {"model"}


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type) naming the parameter. Without an input it loads a model
    and asks for nothing."""
    model, said = model_in(body), body.get("input")
    if model is None:
        raise _invalid_type("model", "a string")
    if (wrong := mistyped(body, _TYPES)) is not None:
        raise _invalid_type(*wrong)
    inputs = [said] if isinstance(said, str) else said or []
    for i, asked in enumerate(inputs):
        if not isinstance(asked, str):
            raise _invalid_type(f"input[{i}]", "a string")
    settings = {k: v for k, v in body.items() if k not in DELIVERY_FIELDS | {"model", "input"} and v not in (None, {})}
    if settings.get("truncate") is True:  # what is done unless it is said
        del settings["truncate"]
    return Facts(
        model=model,
        prompt=None,
        context=(),
        settings=settings,
        unknown=(*([] if model else ["model"]), *sorted(body.keys() - KNOWN_FIELDS)),
        inputs=() if said == "" else tuple(inputs),
        encoding_format="float",
    )


def _invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"invalid {param}: expected {wanted}", code="invalid_type", param=param)


def usage_of(said: object) -> Usage | None:
    tokens = counted(said, "prompt_eval_count")
    return None if tokens is None else Usage(tokens, 0)


class OllamaEmbeddings(OpenAIEmbeddings):
    """`EmbeddingDialect` of `/api/embed`."""

    name = "ollama"
    recodes = False

    def __init__(self, loads: Loads = json.loads) -> None:
        super().__init__(loads)
        self._errors = Ollama("generate", loads)

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read(body)

    def rows_of(self, said: object, asked: Sequence[Input]) -> Rows | None:
        vectors = said.get("embeddings") if isinstance(said, dict) else None
        rows = placed_lists(vectors, len(asked))
        if rows is None or not isinstance(said, dict):
            return None
        model = said.get("model")
        return Rows(rows, model if isinstance(model, str) else "", usage_of(said))

    def usage_of(self, said: object) -> Usage | None:
        return usage_of(said)

    def whole(
        self, rows: Sequence[Mapping[str, Any]], model: str, tokens: int | None, told: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        times = {"total_duration": 0, "load_duration": 0} if told is None else told
        counters = {} if tokens is None else {"prompt_eval_count": tokens}
        return {"model": model, **times, "embeddings": [row["embedding"] for row in rows], **counters}

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return self._errors.error_body(error, request_id)
