"""JSON as bytes: what is refused, what edits leave alone, what one spelling means."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import BadRequest
from proxy.core.jsontext import _read_strictly, canonical, drop_member, members, parse, set_member

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=6
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=6)
BLANKS = st.text(" \t\r\n", max_size=3)


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """One of the many ways to write a value: order of members, blanks, escapes and numbers as drawn."""

    def blank() -> str:
        return draw(BLANKS)

    if isinstance(value, dict):
        items = draw(st.permutations(list(value.items())))
        inner = ",".join(f"{blank()}{draw(spelled(k))}{blank()}:{blank()}{draw(spelled(v))}{blank()}" for k, v in items)
        return "{" + (inner or blank()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(blank() + draw(spelled(item)) + blank() for item in value) or blank()) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=draw(st.booleans()))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        ways = [str(value), f"{value}.0", f"{value}e0", f"{value}.000E+0", f"{value}0e-1"]
        return draw(st.sampled_from(ways if value else ways[:-1]))  # 00e-1 is no number
    return json.dumps(value)


def refusal(raw: bytes, depth_limit: int = 64) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(raw, depth_limit)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("raw", "offset"),
    [
        (b"", 0),
        (b"   ", 3),
        (b"\xef\xbb\xbf{}", 0),
        (b"{} x", 3),
        (b'{"a":1}{}', 7),
        (b"[1]", 0),
        (b'"a"', 0),
        (b"1", 0),
        (b"null", 0),
        (b'{"a":}', 5),
        ('{"ä":}'.encode(), 6),
        (b"{'a':1}", 1),
        (b'{"a":1,}', 7),
        (b'{"a":01}', 6),
        (b'{"a":"\n"}', 6),
        (b'{"a":tru}', 5),
        (b"\x00", 0),
    ],
)
def test_what_is_not_a_json_object_is_refused_with_its_byte_offset(raw: bytes, offset: int) -> None:
    error = refusal(raw)
    assert error.code == "invalid_json"
    assert f"at byte {offset}." in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":"\xff"}',
        b'{"a":"\xc0\xaf"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\uDC00\\uD800"}',
        b'{"\\udfff":1}',
        b'{"a":["x",{"b":"\\ud83d!"}]}',
    ],
)
def test_text_that_is_not_unicode_is_refused(raw: bytes) -> None:
    assert refusal(raw).code == "invalid_utf8"


def test_escaped_pairs_and_escaped_backslashes_are_not_lone_surrogates() -> None:
    assert parse(rb'{"a":"\ud83d\ude00","b":"\\ud800"}') == {"a": "\U0001f600", "b": "\\ud800"}


@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1" * 5000,
        "-" + "9" * 310,
        "2" + "0" * 308,
        "1" * 4000 + ".5",
    ],
)
def test_numbers_outside_a_double_are_refused(number: str) -> None:
    error = refusal(f'{{"a":[{number}]}}'.encode())
    assert error.code == "invalid_number"
    assert len(error.message) < 120


def test_numbers_inside_a_double_stay_exact() -> None:
    assert parse(b'{"a":%d,"b":-%d,"c":1e-999,"d":1.0}' % (10**308, 10**308)) == {
        "a": 10**308,
        "b": -(10**308),
        "c": 0.0,
        "d": 1.0,
    }
    assert isinstance(parse(b'{"n":1.0}')["n"], float)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        b"[" * 2000 + b"]" * 2000,
        b"[" * 100_000 + b"]" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"p":"' + b"x" * 40_000 + b'","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"p":[' + b"[]," * 20_000 + b"[" * 64 + b"]" * 64 + b"]}",
    ],
)
def test_deep_nesting_is_refused_quickly(raw: bytes) -> None:
    started = time.thread_time()
    assert refusal(raw).code == "json_too_deep"
    assert time.thread_time() - started < 0.5


def test_nesting_up_to_the_limit_and_brackets_in_strings_are_read() -> None:
    assert parse(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert parse(b'{"a":"' + b'[{\\"' * 5000 + b'"}')
    assert parse(b'{"p":[' + b"[]," * 20_000 + b"[" * 62 + b"]" * 62 + b"]}")
    assert refusal(b'{"a":' * 3 + b"1" + b"}" * 3, depth_limit=2).code == "json_too_deep"


@given(st.lists(st.sampled_from(["[", "]", "{", "}", '"', "\\", '"a":', "1", ","]), max_size=60), st.integers(1, 6))
def test_any_bracket_soup_ends_in_an_answer_or_a_refusal(soup: list[str], limit: int) -> None:
    def height(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(height, inner), default=0)

    raw = "".join(soup).encode()
    try:
        code, value = "", parse(raw, limit)
    except BadRequest as refused:
        code, value = refused.code, {}
    if code:
        assert code in {"invalid_json", "json_too_deep", "duplicate_key"}
        with contextlib.suppress(ValueError):
            loose = json.loads(raw)
            assert code == "duplicate_key" or not isinstance(loose, dict) or height(loose) > limit
    else:
        assert height(value) <= limit


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'{"model":"a","model":"b"}', "model"),
        (b'{"m":[{"x":1,"\\u0078":1}]}', "x"),
        ('{"é":1,"é":1}'.encode(), "\\xe9"),
    ],
)
def test_a_key_that_appears_twice_is_refused_and_named(raw: bytes, name: str) -> None:
    error = refusal(raw)
    assert error.code == "duplicate_key"
    assert error.param == name


@given(st.data(), OBJECTS)
def test_parse_reads_what_any_spelling_says(data: st.DataObject, value: dict[str, Any]) -> None:
    assert parse(data.draw(spelled(value)).encode()) == value


@given(st.data(), OBJECTS)
def test_members_point_at_names_and_values(data: st.DataObject, value: dict[str, Any]) -> None:
    raw = data.draw(spelled(value)).encode()
    spans = members(raw)
    assert set(spans) == set(value)
    for name, (start, value_start, value_end) in spans.items():
        assert json.loads(raw[value_start:value_end]) == value[name]
        assert json.loads(raw[start:value_start].rstrip(b" \t\r\n").removesuffix(b":")) == name


@given(st.data(), OBJECTS, TEXT, VALUES)
def test_setting_a_member_is_the_edit_of_the_dict_and_leaves_other_bytes(
    data: st.DataObject, value: dict[str, Any], name: str, new: Any
) -> None:
    if value and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(value)))
    raw = data.draw(spelled(value)).encode()
    piece = json.dumps(new).encode()
    edited = set_member(raw, name, piece)
    assert parse(edited) == {**value, name: new}
    if name in value:
        _, start, end = members(raw)[name]
        assert edited == raw[:start] + piece + raw[end:]
    else:
        spans = members(edited)
        for other, (start, _, end) in members(raw).items():
            assert edited[spans[other][0] : spans[other][2]] == raw[start:end]


@given(st.data(), OBJECTS)
def test_dropping_a_member_is_the_edit_of_the_dict_and_leaves_other_bytes(
    data: st.DataObject, value: dict[str, Any]
) -> None:
    raw = data.draw(spelled(value)).encode()
    name = data.draw(st.sampled_from([*sorted(value), "absent-from-all"]))
    edited = drop_member(raw, name)
    assert edited == set_member(raw, name, None)
    assert parse(edited) == {k: v for k, v in value.items() if k != name}
    if name not in value:
        assert edited == raw
    start, _, end = members(raw).get(name, (0, 0, 0))
    assert len(edited) >= len(raw) - (end - start) - 9  # a comma and the blanks around it
    for other, (start, _, end) in members(edited).items():
        was = members(raw)[other]
        assert edited[start:end] == raw[was[0] : was[2]]


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1 "b":2}', b"{1:2}", b'{"a":x}'])
def test_members_of_what_is_not_an_object_are_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="not a JSON object"):
        members(raw)


@given(st.data(), VALUES)
def test_spelling_does_not_change_the_canonical_bytes(data: st.DataObject, value: Any) -> None:
    once = parse(f'{{"v":{data.draw(spelled(value))}}}'.encode())
    again = parse(f'{{"v":{data.draw(spelled(value))}}}'.encode())
    assert canonical(once) == canonical(again) == canonical({"v": value})


def same(a: Any, b: Any) -> bool:
    """JSON equality: unlike Python's, true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(VALUES, VALUES)
def test_canonical_bytes_are_equal_only_for_equal_values(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) == same(a, b)


@given(st.integers())
def test_integers_stay_exact(number: int) -> None:
    assert canonical(number) == str(number).encode()
    if abs(number) > 2**53:
        assert canonical(number) != canonical(number + 1)


def test_canonical_spelling_by_example() -> None:
    assert (
        canonical({"b": [1.0, -0.0, 1e16, 0.5], "a": "é\u2028"})
        == '{"a":"é\u2028","b":[1,0,10000000000000000,0.5]}'.encode()
    )
    assert canonical("e\u0301") != canonical("\u00e9")
    assert canonical({"temperature": 1}) == canonical({"temperature": 1.0})
    assert canonical(True) != canonical(1)
    assert canonical("version 3.0") == b'"version 3.0"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(math.nan)


# -- two readers -------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'"a":', b'"a"', b'"\\u0061":', b"0", b"-", b"-0", b"01",
        b"1.", b".5", b"1e5", b"1E+400", b"1e-400", b"1e0000400", b"1" * 199, b"1" * 200, b"9" * 308, b"9" * 309,
        b"1.7976931348623158e308", b"1.7976931348623159e308", b"4.9e-324", b"NaN", b"Infinity", b"true", b"nul", b" ",
        b"\n", b"\x0b", b"\x00", b"\x7f", b"\xef\xbb\xbf", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
        "é😀\u2028".encode(), b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\u00", b"\\x", b"\\/", b"/**/", b"'a'",
        b"+1", b"1" * 5000,
    ]
)  # fmt: skip
NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,320})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,5})?", fullmatch=True)


def told(read: Callable[[bytes, int], dict[str, Any]], raw: bytes, limit: int) -> str:
    """All that a reader says of these bytes; `repr` tells 1 from 1.0 and True, 0.0 from -0.0, and the order of keys."""
    try:
        return repr(read(raw, limit))
    except BadRequest as error:
        return repr((error.status, error.code, error.param, error.message))


def check_alike(raw: bytes, limit: int = 64) -> None:
    assert told(parse, raw, limit) == told(_read_strictly, raw, limit)


@given(st.data(), OBJECTS, st.lists(st.tuples(st.integers(0), st.integers(0, 3), PIECES), max_size=3))
def test_both_readers_say_the_same_of_a_body_and_of_what_is_left_when_it_is_broken(
    data: st.DataObject, value: dict[str, Any], breaks: list[tuple[int, int, bytes]]
) -> None:
    raw = data.draw(spelled(value)).encode()
    for place, cut, piece in breaks:
        at = place % (len(raw) + 1)
        raw = raw[:at] + piece + raw[at + cut :]
    check_alike(raw)


@given(st.lists(PIECES, max_size=12), st.integers(1, 4))
def test_both_readers_say_the_same_of_any_soup(pieces: list[bytes], limit: int) -> None:
    soup = b"".join(pieces)
    for raw in (soup, b'{"a":' + soup + b"}", b'{"a":"' + soup + b'"}'):
        check_alike(raw, limit)


@given(NUMBERS, NUMBERS)
def test_both_readers_say_the_same_of_numbers(number: str, other: str) -> None:
    check_alike(f'{{"a":{number},"b":[{other}]}}'.encode())


@pytest.mark.parametrize("depth", [1, 63, 64, 65, 190, 200, 201, 300, 3000])
def test_both_readers_stop_at_the_same_depth(depth: int) -> None:
    for limit in (64, 1000):
        check_alike(b'{"a":' * depth + b"1" + b"}" * depth, limit)
        check_alike(b'{"a":' + b"[" * (depth - 1) + b"[]" + b"]" * (depth - 1) + b"}", limit)


def test_a_plain_body_is_read_by_the_fast_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.core.jsontext._read_strictly", None)
    assert parse(b'{"temperature":0.25,"messages":[{"role":"user","content":"Hi \\ud83d\\ude00 at 1e5"}]}')
    assert parse(b'{"messages":[' + b'{"content":[{}]},' * 200 + b"{}]}")
