"""Members of a body: which has another type than it must, and the one that is meant for ibid."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from proxy.core.jsontext import drop_member

Types = Mapping[str, tuple[type, ...]]

CACHE_TWIN: Final = "cache"
"""Cache controls in a body, whatever its dialect; never reaches an upstream."""

NUMBER, INTEGER, BOOLEAN, STRING, ARRAY, OBJECT = (float, int), (int,), (bool,), (str,), (list,), (dict,)
_NAMES: Final = {float: "number", int: "integer", bool: "boolean", str: "string", list: "array", dict: "object"}


def mistyped(body: Mapping[str, Any], known: Types) -> tuple[str, str] | None:
    """The first member that is of none of its types, and what it must be; null always passes, and what is unknown."""
    for name, value in body.items():
        types = known.get(name)
        if types is None or value is None:
            continue
        if int in types and whole(value) is not None:
            continue
        if not isinstance(value, types) or (type(value) is bool and bool not in types):
            return name, " or ".join(_NAMES[t] for t in types if not (t is int and float in types))
    return None


def model_in(body: Mapping[str, Any]) -> str | None:
    """The model a body names; "" where it leaves that to a server that has but one, None for what is no name."""
    model = body.get("model")
    return model if isinstance(model, str) else "" if model is None else None


_SESSION = re.compile(r"[_\-:.]session(?:_id)?[_\-:=.].*", re.DOTALL)


def person_in(user: str) -> str:
    """Whom an end user's id names, less the session that agents write into it: Claude Code's
    `user_…_account_…_session_…`, and its later spelling as an object."""
    if user.startswith("{"):
        try:
            told = json.loads(user)
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict) and any(["session" in name for name in told]):
            kept = {name: value for name, value in told.items() if "session" not in name}
            return json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return user[: found.start()] if (found := _SESSION.search(user)) and found.start() else user


SESSION_FIELDS: Final = frozenset(
    {"client_metadata", "session_id", "trace", "trace_id", "turn_id", "request_id", "litellm_session_id",
     "litellm_trace_id"}
)  # fmt: skip
"""Fields that only name a session, a turn or a trace: Codex's, OpenRouter's, LiteLLM's."""


def whole(value: Any) -> int | None:
    """A whole number, also one that is spelled 3.0, as languages with one kind of number do; else None."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def limit_of(*told: Any) -> int | None:
    """The least output limit of a request; one below 0 is none, as it is to LM Studio and llama.cpp."""
    limits = [limit for value in told if (limit := whole(value)) is not None and limit >= 0]
    return min(limits, default=None)


def without_twin(raw: bytes, parsed: Mapping[str, Any]) -> bytes:
    """The body without its cache controls; the very same bytes when it has none."""
    return drop_member(raw, CACHE_TWIN) if CACHE_TWIN in parsed else raw
