"""JSON as bytes: strict reading, edits that splice, and one canonical spelling.

What two parsers may read differently is refused: duplicate keys, NaN, numbers outside a double, lone surrogates. What
is accepted, any upstream reads the same way. The standard library's scanner can be made to refuse all of it, and with
the words, codes and byte offsets that are promised, so it decides; jiter, the one package that the core imports, reads
what is not in doubt in half the time or less. A test holds that both read alike.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from json.decoder import JSONDecoder
from typing import Any, NoReturn

import jiter

from proxy.core.errors import BadRequest

_STRING = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL
)  # possessive: linear on unterminated input too
_BLANK = re.compile(r"[ \t\n\r]*")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")
_LONG_NUMBER, _LARGE_EXPONENT = b"0" * 200, b"0e000"
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NOT_OPENERS = bytes(set(range(256)) - set(b"[{"))
_FIRST_LOOK_BYTES = 16 * 1024
_DIGITS_ALWAYS_IN_RANGE = 308  # 10^308 < the largest double
_DIGITS_NEVER_IN_RANGE = 309  # 10^309 > the largest double


def _refuse_number(text: str) -> NoReturn:
    shown = text if len(text) <= 24 else f"{text[:21]}..."
    raise BadRequest(f"The number {shown} has no value that every JSON reader agrees on.", code="invalid_number")


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse_number(text)
    return value


def _read_int(text: str) -> int:
    if len(text) > _DIGITS_ALWAYS_IN_RANGE:
        if len(text) > _DIGITS_NEVER_IN_RANGE + 1 or math.isinf(float(text)):  # + 1 for the sign
            _refuse_number(text)
    return int(text)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = name[:64].encode("ascii", "backslashreplace").decode("ascii")
                raise BadRequest(f"The key {shown!r} appears twice in one object.", code="duplicate_key", param=shown)
            seen.add(name)
    return value


_STRICT = JSONDecoder(
    object_pairs_hook=_read_object, parse_float=_read_float, parse_int=_read_int, parse_constant=_refuse_number
)
_LOOSE = JSONDecoder(parse_float=str, parse_int=str)  # for spans only: values are thrown away


def parse(raw: bytes, depth_limit: int = 64) -> dict[str, Any]:
    """The object these bytes spell, in the one way every reader agrees on.

    Raises BadRequest: `invalid_json` (with the byte offset), `invalid_utf8`, `invalid_number`, `json_too_deep`,
    `duplicate_key` (naming it). Linear in the body; never recurses past `depth_limit`.
    """
    value = _read_plain(raw, depth_limit)
    return _read_strictly(raw, depth_limit) if value is None else value


def _read_plain(raw: bytes, depth_limit: int) -> dict[str, Any] | None:
    """What the strict reader would give, or None where only that one can tell."""
    if not _are_numbers_small(raw):
        return None
    try:
        value = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError:  # it stops below 200 levels by itself
        return None
    if not isinstance(value, dict) or (_openers(raw) > depth_limit and _is_higher(value, depth_limit)):
        return None
    return value


def _are_numbers_small(raw: bytes) -> bool:
    """No number here reaches 1e300: fewer than 200 digits in a row, and exponents below 100, where jiter reads inf."""
    shape = raw.translate(_DIGITS, b"+")
    return _LARGE_EXPONENT not in shape and _LONG_NUMBER not in shape


def _openers(raw: bytes) -> int:
    return len(raw.translate(None, _NOT_OPENERS))


def _is_higher(value: dict[str, Any], limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        inner = [item for one in level for item in (one.values() if type(one) is dict else one)]
        level = [item for item in inner if type(item) is dict or type(item) is list]
        if not level:
            return False
    return True


def _read_strictly(raw: bytes, depth_limit: int) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8 at byte {error.start}.", code="invalid_utf8") from None
    if _openers(raw) > depth_limit and _is_deeper(raw, depth_limit):
        _refuse_depth(depth_limit)
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        raise BadRequest(f"The body is not JSON: {error.msg} at byte {offset}.", code="invalid_json") from None
    except RecursionError:  # only if the caller's own stack was nearly full
        _refuse_depth(depth_limit)
    if not isinstance(value, dict):
        raise BadRequest("The body is not a JSON object at byte 0.", code="invalid_json")
    if _SURROGATE_ESCAPE.search(raw) is not None:
        _refuse_lone_surrogates(value)
    return value


def _refuse_depth(depth_limit: int) -> NoReturn:
    raise BadRequest(f"The body nests deeper than {depth_limit} levels.", code="json_too_deep")


def _is_deeper(raw: bytes, limit: int) -> bool:
    """Whether any reader would go deeper than `limit`; malformed text that stays shallow is left to the reader.

    Only brackets outside strings are kept, and a first look at the beginning settles most. Then each round removes the
    innermost pairs, so round k removes pairs of height k; `limit` + 1 openers in a row are too deep at once. What no
    round can remove is unbalanced, and the reader stops there.
    """
    head = _brackets_of(raw[:_FIRST_LOOK_BYTES])
    if max(accumulate(92 - mark for mark in head), default=0) > limit:  # "[" is 91, "]" is 93
        return True
    if len(raw) <= _FIRST_LOOK_BYTES:
        return False
    brackets, run = _brackets_of(raw), b"[" * (limit + 1)
    for _ in range(limit):
        if run in brackets:
            return True
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            return False
        brackets = inner
    return b"[]" in brackets or run in brackets


def _brackets_of(raw: bytes) -> bytes:
    return _STRING.sub(b"", raw).translate(_TO_SQUARE, _NOT_BRACKETS)


def _refuse_lone_surrogates(value: object) -> None:
    """An escape like \\ud800 alone is a str that cannot be written as UTF-8 again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest("A string holds half of a surrogate pair.", code="invalid_utf8") from None


def members(raw: bytes) -> dict[str, tuple[int, int, int]]:
    """Where each top-level member stands: name → (start of its name, start and end of its value), byte offsets.

    In the order of the text. `raw` has passed `parse`; anything else raises BadRequest(`invalid_json`).
    """
    text = raw.decode("latin-1")  # one character per byte, so that offsets are byte offsets
    spans: dict[str, tuple[int, int, int]] = {}
    try:
        at = _skip(text, _expect(text, _skip(text, 0), "{"))
        while text[at] != "}":
            if spans:
                at = _skip(text, _expect(text, at, ","))
            start = at
            _expect(text, at, '"')
            name, end = _LOOSE.raw_decode(text, at)
            if not text[start:end].isascii():
                name = json.loads(raw[start:end])
            at = _skip(text, _expect(text, _skip(text, end), ":"))
            _, value_end = _LOOSE.raw_decode(text, at)
            spans[name] = (start, at, value_end)
            at = _skip(text, value_end)
    except (ValueError, IndexError, RecursionError):
        raise BadRequest("The body is not a JSON object.", code="invalid_json") from None
    return spans


def items(raw: bytes) -> list[tuple[int, int]]:
    """Where each item of an array stands: byte offsets of its start and end. As `members`."""
    text = raw.decode("latin-1")
    spans: list[tuple[int, int]] = []
    try:
        at = _skip(text, _expect(text, _skip(text, 0), "["))
        while text[at] != "]":
            if spans:
                at = _skip(text, _expect(text, at, ","))
            _, end = _LOOSE.raw_decode(text, at)
            spans.append((at, end))
            at = _skip(text, end)
    except (ValueError, IndexError, RecursionError):
        raise BadRequest("The value is not a JSON array.", code="invalid_json") from None
    return spans


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(mark)
    return at + 1


def set_member(raw: bytes, name: str, value: bytes | None) -> bytes:
    """The same text with one top-level member replaced, or added at the end; every other byte as it was.

    None drops the member.
    """
    if value is None:
        return drop_member(raw, name)
    spans = members(raw)
    if name in spans:
        _, start, end = spans[name]
        return raw[:start] + value + raw[end:]
    member = json.dumps(name).encode("ascii") + b":" + value
    if not spans:
        at = raw.index(b"{") + 1
        return raw[:at] + member + raw[at:]
    at = next(reversed(spans.values()))[2]
    return raw[:at] + b"," + member + raw[at:]


def add_member(raw: bytes, name: str, value: bytes) -> bytes:
    """As `set_member`, for a name that is known to be absent from an object that is known not to be empty."""
    at = len(raw[: raw.rindex(b"}")].rstrip(b" \t\n\r"))
    return b"%b,%b:%b%b" % (raw[:at], json.dumps(name).encode("ascii"), value, raw[at:])


def drop_member(raw: bytes, name: str) -> bytes:
    """The same text without one top-level member and its comma; unchanged when it is absent."""
    spans = members(raw)
    if name not in spans:
        return raw
    names = list(spans)
    place = names.index(name)
    start, _, end = spans[name]
    if place + 1 < len(names):
        end = spans[names[place + 1]][0]
    elif place > 0:
        start = spans[names[place - 1]][2]
    return raw[:start] + raw[end:]


_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical(value: object) -> bytes:
    """One spelling per JSON value: members sorted, no blanks, 1, 1.0 and 1e0 alike, strings as they are.

    After RFC 8785, with two differences that keep more apart: integers beyond 2^53 stay exact, and members sort by
    code point. Strings are not normalised (NFC and NFD differ). Raises ValueError for what JSON cannot spell.
    """
    text = _encode(value)
    if ".0" in text or "e+" in text:  # a whole float may be inside: repr writes it as 3.0 or 1e+16
        text = _encode(_whole_floats_as_ints(value))
    return text.encode("utf-8")


def _whole_floats_as_ints(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {name: _whole_floats_as_ints(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_floats_as_ints(item) for item in value]
    return value
