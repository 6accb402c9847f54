"""What a language model's word on two answers is taken for."""

from __future__ import annotations

import json

import pytest

from proxy.judging.arbiter import TEXT_CHARS, _case, read_verdict


def completion(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ("same", "same"),
        ("Different.", "different"),
        ("**Same**\n", "same"),
        ("The first says 30 days, the second 14. Verdict: different", "different"),
        ("They are not the same thing", None),
        ("same or different", "different"),
        ("", None),
        ("  ", None),
        (None, None),
        (["same"], None),
    ],
)
def test_the_last_word_counts(content: object, verdict: str | None) -> None:
    assert read_verdict(completion(content)) == verdict


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"choices":[]}', b'{"choices":[{"message":null}]}'])
def test_what_is_no_completion_is_no_verdict(body: bytes) -> None:
    assert read_verdict(body) is None


def test_a_case_holds_all_four_texts_and_not_all_of_a_long_one() -> None:
    case = _case("first?", "one", "second?", "x" * (TEXT_CHARS + 1))
    assert [case.index(text) for text in ("first?", "one", "second?")] == sorted(
        case.index(text) for text in ("first?", "one", "second?")
    )
    assert case.endswith("x" * TEXT_CHARS)
    assert "x" * (TEXT_CHARS + 1) not in case
