"""What an answer cost is known also when it may not be stored."""

import json

from proxy.core.dialects.openai_record import find_usage, record
from proxy.core.model import Usage

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def chat(finish: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "cut"}, "finish_reason": finish}
    return json.dumps({"model": "m", "choices": [choice], "usage": USAGE}).encode()


def test_a_truncated_answer_is_not_storable_and_still_priced():
    found = record(chat("length"), is_stream=False)
    assert found == (None, "finish_length", Usage(7, 3))


def test_a_cut_stream_has_the_usage_it_reached():
    events = b'data: {"choices":[],"usage":' + json.dumps(USAGE).encode() + b"}\n\n"
    assert find_usage(b'data: {"usage":null}\n\n' + events + b'data: {"usage":null,"choi') == Usage(7, 3)


def test_text_that_looks_like_usage_is_not_taken_for_it():
    assert find_usage(b'{"content":"\\"usage\\": {}"}') is None
    assert find_usage(b"") is None


def test_a_storable_answer_is_given_with_its_usage():
    found = record(chat("stop"), is_stream=False)
    assert found.answer is not None
    assert found.answer.message["content"] == "cut"
    assert found.usage == Usage(7, 3)
