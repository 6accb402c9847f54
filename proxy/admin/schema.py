"""Parameters of the admin routes: declared once, checked strictly, described in OpenAPI from the same declaration.

A parameter that is unknown, repeated, of another type, out of range or carries control characters is a 400 that names
it. Values are only ever compared or bound, never made part of SQL text.

Read by hand. Tried on 30 November 2026: msgspec 0.23 takes "1e3" and "5.0" of a query string for whole numbers and "1"
for true, refuses a null where a value has a default, lets a line end follow what a pattern ends with, and knows neither
control characters nor ages. With `proxy.settings.file` this shares only two questions, whether a value is true or false
or one of some words: there a mistake is one of an operator's, said with a line and a bound; here it is a request's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from proxy.core.errors import BadRequest
from proxy.core.units import LAST_MS, instant_ms

if TYPE_CHECKING:
    from aiohttp import web

MAX_LIMIT = 1000
MAX_ID = 2**63 - 1
BODY_LIMIT_BYTES = 4 * 1024 * 1024

Values = dict[str, Any]

_FORBIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, lone surrogates, line and paragraph separators
_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "id": {"type": "integer", "minimum": 1, "maximum": MAX_ID},
    "boolean": {"type": "boolean"},
    "shares": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}},
    "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "time": {"type": "string", "description": "ISO 8601 date or time, or an age such as 30d, 12h, 15m"},
    "choices": {"type": "string"},
    "ids": {"type": "array", "items": {"type": ["integer", "string"]}},
    "texts": {"type": "array", "items": {"type": "string"}},
}


@dataclass(frozen=True, slots=True)
class Param:
    """One query parameter or body field. `kind` is a key of _SCHEMAS; times come out as epoch milliseconds.

    `low` and `high` bound a number, or how many a list has.
    """

    name: str
    kind: str
    about: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    low: int = 1
    high: int = MAX_LIMIT
    length: int = 200
    pattern: str = ""
    is_private: bool = False  # a text of somebody's: written down nowhere

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        out: dict[str, Any] = {"description": self.about, **_SCHEMAS[self.kind]}
        if self.kind == "integer":
            out |= {"minimum": self.low, "maximum": self.high}
        if self.kind == "text":
            out |= {"maxLength": self.length} | ({"pattern": self.pattern} if self.pattern else {})
        if self.kind in ("ids", "texts", "shares"):
            out |= {"minItems": self.low, "maxItems": self.high}
        if self.kind == "texts" and self.pattern:
            out["items"] = {**out["items"], "pattern": self.pattern}
        if self.kind == "text" and self.choices:
            out |= {"enum": list(self.choices)}
        if self.kind == "choices":
            out |= {"description": f"{self.about}: comma-separated, of {', '.join(self.choices)}"}
        if self.default is not None:
            out |= {"default": self.default}
        return out


def invalid(name: str, message: str) -> BadRequest:
    """A 400 that names the parameter."""
    return BadRequest(f"{name}: {message}", code="invalid_value", param=name)


def read_query(request: web.Request, params: Sequence[Param], now_ms: int) -> Values:
    """The query string's values by name, defaults filled in. Raises BadRequest naming the parameter."""
    raw: dict[str, Any] = {}
    for name, value in request.query.items():
        if name in raw:
            raise invalid(_shown(name), "given twice")
        raw[name] = value
    return read_values(raw, params, now_ms, from_text=True)


async def read_body(request: web.Request, params: Sequence[Param], now_ms: int) -> Values:
    """The JSON body's values by name, defaults filled in; no body reads as {}. Raises BadRequest."""
    raw = await read_json(request)
    return read_values(raw, params, now_ms, from_text=False)


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as one JSON object; no body at all reads as {}. Raises BadRequest 400, 413, 415."""
    body = await read_bytes(request)
    if not body:
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error.msg}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_type")
    return value


async def read_bytes(request: web.Request) -> bytes:
    """The body of a POST whose type is JSON; b"" when there is none. Raises BadRequest 413, 415."""
    bare = "application/octet-stream" if not request.body_exists else None  # what no type at all reads as
    if request.content_type not in ("application/json", bare):
        raise BadRequest("send application/json", code="unsupported_media_type", status=415)
    from aiohttp import web  # here: the command line reads this module, and aiohttp is half a second

    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise BadRequest("the body is too large", code="body_too_large", status=413) from error


def read_values(raw: Mapping[str, Any], params: Sequence[Param], now_ms: int, *, from_text: bool) -> Values:
    """Checked values by name. `from_text`: all of `raw` are strings, as in a query string."""
    known = {param.name: param for param in params}
    for name in raw:
        if name not in known:
            raise BadRequest(
                f"unknown parameter {_shown(name)}; known: {', '.join(known) or 'none'}",
                code="unknown_parameter",
                param=_shown(name),
            )
    values: Values = {}
    for param in params:
        value = raw.get(param.name)
        if value is None or (from_text and value == ""):
            if param.required:
                raise BadRequest(f"{param.name} is required", code="missing_parameter", param=param.name)
            values[param.name] = param.default
        else:
            values[param.name] = _read(param, value, now_ms, from_text)
    return values


def _read(param: Param, value: Any, now_ms: int, from_text: bool) -> Any:
    match param.kind:
        case "text":
            return _text(param, value)
        case "integer" | "id":
            low, high = (1, MAX_ID) if param.kind == "id" else (param.low, param.high)
            return _integer(param.name, value, low, high, from_text)
        case "boolean":
            if from_text and value in ("true", "false"):
                return value == "true"
            if isinstance(value, bool):
                return value
            raise invalid(param.name, "must be true or false")
        case "share":
            return _share(param.name, value)
        case "shares":
            return tuple(_share(param.name, item) for item in _items(param, value))
        case "time":
            return read_time(param.name, _text(param, value), now_ms)
        case "choices":
            chosen = _text(param, value).split(",")
            if len(set(chosen)) != len(chosen) or not set(chosen) <= set(param.choices):
                raise invalid(param.name, f"must be different words of {', '.join(param.choices)}")
            return tuple(chosen)
        case "ids":
            items = _items(param, value.split(",") if from_text and isinstance(value, str) else value)
            return tuple(_integer(param.name, item, 1, MAX_ID, isinstance(item, str)) for item in items)
        case _:
            return tuple(_text(param, item) for item in _items(param, value))


def _items(param: Param, value: Any) -> Iterable[Any]:
    if not isinstance(value, list) or not param.low <= len(value) <= param.high:
        raise invalid(param.name, f"must be a list of {param.low} to {param.high}")
    return value


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise invalid(name, "must be a number between 0 and 1")
    return float(value)


def _text(param: Param, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(param.name, "must be a string")
    if not 1 <= len(value) <= param.length:
        raise invalid(param.name, f"must have 1 to {param.length} characters")
    if any(unicodedata.category(c) in _FORBIDDEN and c not in "\t\n" for c in value):
        raise invalid(param.name, "must not contain control characters")
    if param.kind == "text" and param.choices and value not in param.choices:
        raise invalid(param.name, f"must be one of {', '.join(param.choices)}")
    if param.pattern and not re.fullmatch(param.pattern, value):
        raise invalid(param.name, f"must match {param.pattern}")
    return value


def _integer(name: str, value: Any, low: int, high: int, from_text: bool) -> int:
    if from_text and isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(name, f"must be a whole number from {low} to {high}")
    return value


def read_time(name: str, text: str, now_ms: int) -> int:
    """Epoch milliseconds of an ISO 8601 date or time (UTC when it names no zone), or of an age before now.

    Between 1970 and 9999, so that it can be turned back into a date everywhere. Raises BadRequest naming `name`.
    """
    try:
        return min(max(instant_ms(text, now_ms, past=True), 0), LAST_MS)
    except ValueError as error:
        raise invalid(name, "must be an ISO 8601 date or time, or an age such as 30d") from error


def _shown(name: str) -> str:
    """A client's spelling, short and printable enough to be quoted back."""
    return "".join(c if c.isprintable() else "?" for c in name[:64])
