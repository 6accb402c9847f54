"""Whether an answer can be proven to fail, and whether this one does: what lets a small model go first.

Only a check that a machine can make counts: JSON that was asked for, and its schema; the operator's pattern; the
model's own certainty. A question without one is not tried at the edge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import orjson

from proxy.core.facts import Facts
from proxy.core.model import Answer
from proxy.core.policy import FINISHED
from proxy.settings.lanes import CascadeLane

SCHEMA_BYTES = 64 * 1024


class Proof:
    """The checks that one request allows. Empty: nothing can be proven."""

    def __init__(self, facts: Facts, lane: CascadeLane) -> None:
        self.wants_json = facts.response_format in ("json_object", "json_schema")
        self.schema = _schema_of(facts.settings.get("response_format"))
        self.pattern = re.compile(lane.pattern) if lane.pattern is not None and not self.wants_json else None
        self.min_logprob = lane.min_logprob
        self._is_apt = not (facts.has_tools or facts.n > 1 or facts.logprobs or facts.audio_output)
        limit = facts.output_limit
        self._is_apt = self._is_apt and (limit is None or limit <= lane.max_output_tokens)
        if facts.response_format == "json_schema" and self.schema is None:
            self._is_apt = False  # a schema that cannot be checked proves nothing

    def __bool__(self) -> bool:
        return self._is_apt and (self.wants_json or self.pattern is not None or self.min_logprob is not None)

    def failure(self, answer: Answer) -> str:
        """Why this answer fails, or ""."""
        content = answer.message.get("content")
        if answer.finish_reason not in FINISHED or answer.message.get("refusal"):
            return "finish"
        if not isinstance(content, str) or not content.strip():
            return "empty"
        if self.wants_json and (reason := self._json_failure(content)):
            return reason
        if self.pattern is not None and self.pattern.fullmatch(content.strip()) is None:
            return "pattern"
        if self.min_logprob is not None:
            mean = mean_logprob(answer)
            if mean is None or mean < self.min_logprob:
                return "logprob"
        return ""

    def _json_failure(self, content: str) -> str:
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError:
            return "json"
        if self.schema is None:
            return "" if isinstance(value, dict) else "json"
        return "" if self.schema.is_valid(value) else "schema"


def mean_logprob(answer: Answer) -> float | None:
    """Mean log-probability of the content's tokens, where the upstream told them."""
    told = answer.choice.get("logprobs")
    tokens = told.get("content") if isinstance(told, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    try:
        return sum(float(token["logprob"]) for token in tokens) / len(tokens)
    except (KeyError, TypeError, ValueError):
        return None


def _schema_of(response_format: object) -> Any:
    """A validator, or None where there is no schema, or none that can be used."""
    if not isinstance(response_format, Mapping) or response_format.get("type") != "json_schema":
        return None
    named = response_format.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, dict) or len(orjson.dumps(schema)) > SCHEMA_BYTES:
        return None
    try:
        return jsonschema_rs.validator_for(schema, retriever=_refuse_to_fetch)
    except (ValueError, jsonschema_rs.ReferencingError):
        return None


def _refuse_to_fetch(uri: str) -> Any:
    raise ValueError(f"nothing is fetched: {uri[:80]}")
