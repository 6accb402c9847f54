"""What a kept answer's id stands for: nothing but what was said, to nobody but who was told it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxy.core.chains import Chains
from proxy.core.model import Answer

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = Answer(
    {"role": "assistant", "content": "Goethe."}, "stop", "m", None, None, {"id": "resp_1"}, dialect="responses"
)
CALLS = replace(SAID, message={"role": "assistant", "content": None, "tool_calls": [CALL]})


def digest(answer: Answer, fingerprint: bytes = b"q" * 32) -> bytes | None:
    chains = Chains()
    chains.learn("t", "openai", fingerprint, answer)
    return chains.find("t", "openai", "resp_1")


def test_it_is_known_by_the_question_and_the_answer_and_not_by_its_id() -> None:
    other = replace(SAID, extra={"id": "resp_2"})
    chains = Chains()
    for answer in (SAID, other):
        chains.learn("t", "openai", b"q" * 32, answer)
    assert chains.find("t", "openai", "resp_1") == chains.find("t", "openai", "resp_2") == digest(SAID) is not None
    assert digest(SAID, b"p" * 32) != digest(SAID)
    assert digest(replace(SAID, message={"role": "assistant", "content": "Marlowe."})) != digest(SAID)
    named = {**CALLS.message, "tool_calls": [{**CALL, "id": "call_2"}]}
    assert digest(replace(CALLS, message=named)) != digest(CALLS), "the next request names its calls"


@pytest.mark.parametrize("who", [("u", "openai", "resp_1"), ("t", "other", "resp_1"), ("t", "openai", "resp_9")])
def test_to_anybody_else_it_stands_for_nothing(who: Any) -> None:
    chains = Chains()
    chains.learn("t", "openai", b"q" * 32, SAID)
    assert chains.find(*who) is None


@pytest.mark.parametrize(
    "answer", [replace(SAID, extra={}), replace(SAID, extra={"id": 7}), replace(SAID, dialect="x")]
)
def test_what_no_provider_keeps_is_not_learned(answer: Answer) -> None:
    assert digest(answer) is None
    assert digest(SAID, b"") is None


def test_the_memory_is_bounded_and_forgets_what_was_not_continued() -> None:
    chains = Chains(limit=3)
    for number in range(9):
        chains.learn("t", "openai", b"q" * 32, replace(SAID, extra={"id": f"resp_{number}"}))
        assert chains.find("t", "openai", "resp_0") is not None
    assert [number for number in range(9) if chains.find("t", "openai", f"resp_{number}")] == [0, 7, 8]
