"""An Answer survives its bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.answer import decode_answer, encode_answer
from proxy.core.model import Answer
from tests.core.test_replay_openai import answers


@given(answer=answers(), runs=st.lists(st.integers(0, 2**40)).map(tuple))
def test_decoding_gives_the_answer_that_was_encoded(answer, runs):
    answer = replace(answer, runs=runs)
    raw = encode_answer(answer)
    assert decode_answer(raw) == answer
    assert encode_answer(decode_answer(raw)) == raw


@pytest.mark.parametrize("version", [1, 2])
def test_an_answer_of_an_earlier_format_is_read(version):
    record = json.loads(encode_answer(Answer({"role": "assistant", "content": "x"}, "stop", "m", None, None)))
    old = {name: value for name, value in record.items() if name != "runs"}
    assert decode_answer(json.dumps({**old, "v": version}).encode()).runs == ()


def test_an_answer_without_usage_keeps_that():
    answer = Answer({"role": "assistant", "content": "x"}, "stop", "m", None, None)
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize("content", ["\ud800", float("nan")])
def test_what_json_cannot_say_is_refused(content):
    with pytest.raises(ValueError, match=r"surrogates|JSON"):
        encode_answer(Answer({"content": content}, "stop", "m", None, None))


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b'{"v":3}', b'{"v":4}', b'{"v":2}', b'{"v":1}', b"\xff", b"[" * 100_000]
)
def test_other_bytes_are_refused(raw):
    with pytest.raises(ValueError, match=r".+"):
        decode_answer(raw)
