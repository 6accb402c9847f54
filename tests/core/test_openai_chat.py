"""What a chat request says, which are refused, and what goes upstream."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.openai_chat import KNOWN_FIELDS, error_body, forward_body, read, stream_error
from proxy.core.errors import BadRequest, Busy, UpstreamError

USER = {"role": "user", "content": "hello there you"}


def ask(*messages, **fields):
    return {"model": "gpt-4o-mini", "messages": list(messages or [USER]), **fields}


def image(url):
    return {
        "role": "user",
        "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}],
    }


def test_a_plain_question_is_its_prompt():
    facts = read(ask({"role": "system", "content": "Be brief."}, USER, temperature=0, stream=True))
    assert facts.prompt == "hello there you"
    assert facts.context == ({"role": "system", "content": "Be brief."},)
    assert facts.settings == {"temperature": 0}
    assert (facts.model, facts.stream, facts.wants_usage, facts.temperature) == ("gpt-4o-mini", True, False, 0)
    assert (facts.first_turn, facts.user_turns, facts.n, facts.unknown) == (True, 1, 1, ())
    assert (facts.seed, facts.response_format, facts.end_user) == (None, None, "")


def test_a_lone_text_part_says_the_same_as_a_string():
    assert read(ask({"role": "user", "content": [{"type": "text", "text": "hello there you"}]})) == read(ask())


def test_other_fields_of_the_last_message_stay_in_the_context():
    facts = read(ask({**USER, "name": "ann"}))
    assert (facts.prompt, facts.context) == ("hello there you", ({"name": "ann"},))


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": "call 0"},
        {"role": "wizard", "content": "x"},
        image("data:image/png;base64,AA"),
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": []},
    ],
)
def test_without_plain_user_text_at_the_end_nothing_is_compared(last):
    facts = read(ask(USER, last))
    assert facts.prompt is None
    assert facts.context == (USER, last)


@pytest.mark.parametrize(
    ("fields", "fact", "value"),
    [
        ({"stream_options": {"include_usage": True}}, "wants_usage", True),
        ({"stream_options": None}, "wants_usage", False),
        ({"n": 3}, "n", 3),
        ({"n": None}, "n", 1),
        ({"seed": 0}, "seed", 0),
        ({"tools": [{"type": "function"}]}, "has_tools", True),
        ({"functions": [{"name": "f"}]}, "has_tools", True),
        ({"tools": []}, "has_tools", False),
        ({"logprobs": True}, "logprobs", True),
        ({"logprobs": False}, "logprobs", False),
        ({"top_logprobs": 2}, "logprobs", True),
        ({"store": True}, "store", True),
        ({"store": False}, "store", False),
        ({"tools": [{"type": "browser_search"}]}, "web_search", True),
        ({"modalities": ["text", "audio"]}, "audio_output", True),
        ({"modalities": ["text"]}, "audio_output", False),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"user": "ann"}, "end_user", "ann"),
        ({"safety_identifier": "ann"}, "end_user", "ann"),
        ({"metadata": {"user_id": "ann"}}, "end_user", "ann"),
        ({"user": "ann", "safety_identifier": "ann"}, "end_user", "ann"),
        ({"user": "ann", "safety_identifier": "bob"}, "end_user", '["ann", "bob"]'),
        ({"brand_new": 1, "another": 2}, "unknown", ("another", "brand_new")),
        ({"cache": {"ttl": 3}}, "unknown", ()),
    ],
)
def test_each_field_is_seen(fields, fact, value):
    assert getattr(read(ask(**fields)), fact) == value


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "tool_results"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_results"),
        (image("https://example.org/a.png"), "remote_urls"),
        (image("DATA:image/png;base64,AA"), "has_images"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "has_audio"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}, "has_files"),
    ],
)
def test_each_kind_of_content_is_seen(message, fact):
    assert getattr(read(ask(message, USER)), fact) is True
    assert getattr(read(ask()), fact) is False


def test_inline_images_are_not_remote():
    assert read(ask(image("data:image/png;base64,AA"))).remote_urls is False


def test_turns_are_counted():
    said = {"role": "assistant", "content": "x"}
    assert (read(ask(USER, said, USER)).first_turn, read(ask(USER, said, USER)).user_turns) == (False, 2)
    assert read(ask(USER, USER)).first_turn is False
    assert read(ask({"role": "developer", "content": "x"}, USER)).first_turn is True


def test_what_is_merely_unknown_is_named_not_refused():
    odd = {"role": "wizard", "content": [{"type": "hologram"}], "aura": 1}
    assert read(ask(odd, USER)).unknown == ("messages[0].role", "messages[0].aura", "messages[0].content[0]")


@pytest.mark.parametrize("field", ["stream", "stream_options", "metadata", "prompt_cache_key", "user", "cache"])
def test_delivery_is_not_a_setting(field):
    values = {"stream": True, "user": "a", "prompt_cache_key": "a"}
    assert read(ask(**{field: values.get(field, {})})).settings == {}


@given(name=st.text(min_size=1).filter(lambda name: name not in KNOWN_FIELDS), value=st.integers() | st.text())
def test_an_unknown_field_is_a_setting_and_named(name, value):
    facts = read(ask(**{name: value}))
    assert (facts.settings, facts.unknown) == ({name: value}, (name,))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (ask(model=3), "invalid_type", "model"),
        (ask(model=["m"]), "invalid_type", "model"),
        ({"model": "m"}, "invalid_type", "messages"),
        ({"model": "m", "messages": None}, "invalid_type", "messages"),
        ({"model": "m", "messages": "hi"}, "invalid_type", "messages"),
        ({"model": "m", "messages": []}, "invalid_type", "messages"),
        (ask(*[USER] * 2049), "invalid_type", "messages"),
        (ask("hi"), "invalid_type", "messages[0]"),
        (ask(USER, {"content": "x"}), "invalid_type", "messages[1].role"),
        (ask({"role": 1, "content": "x"}), "invalid_type", "messages[0].role"),
        (ask({"role": "user", "content": 1}), "invalid_type", "messages[0].content"),
        (ask({"role": "user", "content": None}), "invalid_type", "messages[0].content"),
        (ask({"role": "user"}), "invalid_type", "messages[0].content"),
        (ask({"role": "user", "content": ["x"]}), "invalid_type", "messages[0].content[0]"),
        (ask({"role": "user", "content": [{"text": "x"}]}), "invalid_type", "messages[0].content[0].type"),
        (ask({"role": "user", "content": [{"type": "text"}]}), "invalid_type", "messages[0].content[0].text"),
        (ask(stream="yes"), "invalid_type", "stream"),
        (ask(stream=1), "invalid_type", "stream"),
        (ask(stream_options=[]), "invalid_type", "stream_options"),
        (ask(temperature="0"), "invalid_type", "temperature"),
        (ask(temperature=True), "invalid_type", "temperature"),
        (ask(seed=1.5), "invalid_type", "seed"),
        (ask(tools={}), "invalid_type", "tools"),
        (ask(stop=1), "invalid_type", "stop"),
        (ask(response_format="json"), "invalid_type", "response_format"),
        (ask(n=0), "invalid_value", "n"),
        (ask(n=-1), "invalid_value", "n"),
        (ask(n=129), "invalid_value", "n"),
        (ask(n=10**6), "invalid_value", "n"),
        (ask(n=1.5), "invalid_value", "n"),
        (ask(n=True), "invalid_value", "n"),
        (ask(n="1"), "invalid_value", "n"),
    ],
)
def test_what_no_server_could_understand_is_refused_by_name(body, code, param):
    with pytest.raises(BadRequest) as caught:
        read(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_the_limits_themselves_are_allowed():
    assert read(ask(*[USER] * 2048, n=128)).user_turns == 2048


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "content"]), inner)
    ),
    max_leaves=8,
)


@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            name: json_values | st.just([USER])
            for name in (
                "model",
                "messages",
                "n",
                "stream_options",
                "metadata",
                "modalities",
                "tools",
                "response_format",
            )
        },
    )
)
def test_any_json_is_read_or_refused(body):
    with contextlib.suppress(BadRequest):
        assert isinstance(read({"model": "m", "messages": [USER], **body}).model, str)


@pytest.mark.parametrize("body", [{"messages": [USER]}, ask(model=None), ask(model="")])
def test_a_server_that_has_but_one_model_needs_no_name(body):
    facts = read(body)
    assert (facts.model, facts.unknown) == ("", ("model",))


def test_a_whole_number_may_be_spelled_with_a_point():
    facts = read(ask(n=1.0, max_tokens=100.0, seed=3.0, top_logprobs=0.0))
    assert (facts.n, facts.output_limit) == (1, 100)
    assert type(facts.output_limit) is int


@pytest.mark.parametrize("limits", [{"max_tokens": -1}, {"max_completion_tokens": -1}, {"max_tokens": -1.0}])
def test_a_limit_below_nothing_is_none(limits):
    assert read(ask(**limits)).output_limit is None
    assert read(ask(**limits)).settings == read(ask()).settings
    assert read(ask(**limits, max_output=1)).output_limit is None


# ---- upstream


def test_a_whole_request_goes_upstream_as_it_came():
    raw = b'{ "model":"m", "messages":[],\n"x": 1e0 }'
    assert forward_body(raw, json.loads(raw)) is raw


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", b',"stream_options":{"include_usage":true}'),
        (', "stream_options": null', b', "stream_options": {"include_usage":true}'),
        (', "stream_options": {}', b', "stream_options": {"include_usage":true}'),
        (
            ', "stream_options": {"include_usage": false, "x": 1}',
            b', "stream_options": {"include_usage": true, "x": 1}',
        ),
        (', "stream_options": { "x": 1 }', b', "stream_options": { "x": 1,"include_usage":true }'),
        (', "stream_options": {"include_usage": true}', b', "stream_options": {"include_usage": true}'),
    ],
)
def test_a_stream_asks_for_its_usage_and_changes_nothing_else(options, expected):
    raw = f'{{"model": "m\u00e9",  "stream": true{options}}}'.encode()
    assert forward_body(raw, json.loads(raw)) == '{"model": "m\u00e9",  "stream": true'.encode() + expected + b"}"


def test_the_cache_twin_stays_here():
    raw = b'{"model": "m", "cache": {"ttl": 1}, "x": 1}'
    assert forward_body(raw, json.loads(raw)) == b'{"model": "m", "x": 1}'
    raw = b'{"cache": {"ttl": 1}, "stream": true}'
    assert json.loads(forward_body(raw, json.loads(raw))) == {"stream": True, "stream_options": {"include_usage": True}}


# ---- errors


def test_an_error_has_all_four_keys():
    fault = BadRequest("no", code="invalid_type", param="n")
    expected = {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_type"}
    assert json.loads(error_body(fault)) == {"error": expected}
    assert json.loads(error_body(Busy("full")))["error"] == {
        "message": "full",
        "type": "server_error",
        "param": None,
        "code": "overloaded",
    }


def test_a_stream_error_is_one_event_without_an_end():
    raw = stream_error(UpstreamError("cut\n\nshort", code="upstream_incomplete"))
    assert raw.startswith(b'data: {"error":{')
    assert raw.count(b"\n\n") == 1
    assert raw.endswith(b"\n\n")
    assert json.loads(raw[6:])["error"]["code"] == "upstream_incomplete"
