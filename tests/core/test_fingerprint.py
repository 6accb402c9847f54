"""Which requests ask the same thing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects import openai_chat
from proxy.core.facts import Facts
from proxy.core.fingerprint import fingerprint_of, scope_of
from proxy.core.jsontext import parse
from proxy.core.model import Controls

BODY: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
}
WHERE: dict[str, Any] = {"tenant": "a" * 64, "upstream": "openai", "operation": "chat"}


def scope_of_body(body: dict[str, Any], **where: Any) -> bytes:
    return scope_of(openai_chat.read(body), **{**WHERE, **where})


def fingerprint_of_body(body: dict[str, Any]) -> bytes:
    facts = openai_chat.read(body)
    return fingerprint_of(scope_of(facts, **WHERE), facts.prompt)


FIELDS: dict[str, tuple[Any, Any]] = {
    "audio": ({"voice": "a", "format": "wav"}, {"voice": "b", "format": "wav"}),
    "frequency_penalty": (0.1, 0.2),
    "function_call": ("none", "auto"),
    "functions": ([{"name": "f"}], [{"name": "g"}]),
    "logit_bias": ({"50256": -100}, {"50256": -99}),
    "logprobs": (True, False),
    "modalities": (["text"], ["text", "audio"]),
    "model": ("gpt-4o", "gpt-4o-2024-08-06"),
    "moderation": ({"a": 1}, {"a": 2}),
    "n": (1, 2),
    "parallel_tool_calls": (True, False),
    "prediction": ({"type": "content", "content": "a"}, {"type": "content", "content": "b"}),
    "presence_penalty": (0.1, 0.2),
    "reasoning_effort": ("low", "high"),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}),
    "safety_identifier": ("u1", "u2"),
    "seed": (1, 2),
    "service_tier": ("auto", "flex"),
    "stop": ("\n", ["\n", "."]),
    "store": (True, False),
    "temperature": (0, 0.1),
    "tool_choice": ("auto", "required"),
    "tools": ([{"type": "function", "function": {"name": "f"}}], [{"type": "function", "function": {"name": "g"}}]),
    "top_logprobs": (1, 2),
    "top_p": (0.9, 1),
    "user": ("u1", "u2"),
    "verbosity": ("low", "high"),
    "web_search_options": ({}, {"search_context_size": "low"}),
    "top_k": (1, 2),
    "min_p": (0.1, 0.2),
    "repetition_penalty": (1.1, 1.2),
    "guided_json": ({"a": 1}, {"a": 2}),
    "chat_template_kwargs": ({"enable_thinking": True}, {"enable_thinking": False}),
    "provider": ({"order": ["a"]}, {"order": ["b"]}),
    "transforms": (["middle-out"], []),
    "extra_body": ({"a": None}, {"a": 0}),
    "never_heard_of": ("x", "y"),
    "metadata": ({"user_id": "u1"}, {"user_id": "u2"}),
}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_that_may_change_an_answer_keeps_requests_apart(name: str) -> None:
    """Forty fields; absent, one value and another are three scopes."""
    one, other = FIELDS[name]
    bodies = [BODY, {**BODY, name: one}, {**BODY, name: other}]
    assert len({scope_of_body(body) for body in bodies}) == 3


def test_the_matrix_names_forty_fields_and_all_that_the_dialect_knows() -> None:
    assert len(FIELDS) >= 38
    limits = {"max_tokens", "max_completion_tokens"}  # see policy.unfit
    assert openai_chat.KNOWN_FIELDS - openai_chat.DELIVERY_FIELDS - {"messages"} - limits <= set(FIELDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream", True),
        ("stream_options", {"include_usage": True}),
        ("prompt_cache_key", "k"),
        ("prompt_cache_retention", "24h"),
        ("max_tokens", 100),
        ("max_completion_tokens", 100),
        ("cache", {"ttl": 60}),
    ],
)
def test_what_only_changes_delivery_is_shared(name: str, value: Any) -> None:
    assert fingerprint_of_body({**BODY, name: value}) == fingerprint_of_body(BODY)


MESSAGES = {
    "system": [{"role": "system", "content": "Be brief"}, BODY["messages"][1]],
    "role": [{"role": "developer", "content": "Be brief."}, BODY["messages"][1]],
    "name": [BODY["messages"][0], {**BODY["messages"][1], "name": "bob"}],
    "no system": [BODY["messages"][1]],
    "turn": [*BODY["messages"], {"role": "assistant", "content": "Paris"}, BODY["messages"][1]],
    "other turn": [*BODY["messages"], {"role": "assistant", "content": "Paris."}, BODY["messages"][1]],
    "last is assistant": [*BODY["messages"], {"role": "assistant", "content": ""}],
    "moved": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Be brief.What is the capital of France?"},
    ],
}


def test_every_difference_around_the_prompt_is_another_scope() -> None:
    scopes = [scope_of_body({**BODY, "messages": messages}) for messages in (BODY["messages"], *MESSAGES.values())]
    assert len(set(scopes)) == len(scopes)


def test_the_prompt_is_the_fingerprint_and_not_the_scope() -> None:
    other = {**BODY, "messages": [BODY["messages"][0], {"role": "user", "content": "What is the capital of Spain?"}]}
    assert scope_of_body(other) == scope_of_body(BODY)
    assert fingerprint_of_body(other) != fingerprint_of_body(BODY)
    parts = {
        **BODY,
        "messages": [
            BODY["messages"][0],
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
        ],
    }
    assert fingerprint_of_body(parts) == fingerprint_of_body(BODY)


TWINS = [
    "caf\u00e9",
    "cafe\u0301",
    "CAF\u00c9",
    "caf\u00e9\u200b",
    "\u202ecaf\u00e9",
    "c\u0430f\u00e9",
    "\uff43afé",
    "café ",
]


def test_texts_that_look_alike_have_fingerprints_of_their_own() -> None:
    assert len({fingerprint_of(b"s" * 32, text) for text in TWINS}) == len(TWINS)
    assert fingerprint_of(b"s" * 32, None) != fingerprint_of(b"s" * 32, "null")
    assert fingerprint_of(b"s" * 32, None) != fingerprint_of(b"s" * 32, "")


def test_place_and_person_are_part_of_the_scope() -> None:
    scopes = [
        scope_of_body(BODY),
        scope_of_body(BODY, tenant="b" * 64),
        scope_of_body(BODY, upstream="azure"),
        scope_of_body(BODY, operation="completion"),
        scope_of_body(BODY, controls=Controls(namespace="n")),
        scope_of_body(BODY, controls=Controls(user="n")),
        scope_of_body({**BODY, "user": "n"}),
        scope_of_body(BODY, headers=(("openai-beta", "x"),)),
        scope_of_body(BODY, headers=(("openai-beta", "y"),)),
        scope_of_body(BODY, query="?api-version=1"),
    ]
    assert len(set(scopes)) == len(scopes)
    assert scope_of_body(BODY, controls=Controls(ttl_s=5, tags=("a",), exact_only=True)) == scopes[0]


@given(
    st.permutations(list(BODY.items())),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.sampled_from(["1", "1.0", "1e0", "10e-1"]),
)
def test_order_blanks_escapes_and_number_spelling_do_not_matter(
    items: list[tuple[str, Any]], indent: int | None, escape: bool, number: str
) -> None:
    body = dict(items) | {"temperature": "HERE", "user": "Zo\u00eb"}
    text = json.dumps(body, indent=indent, ensure_ascii=escape).replace('"HERE"', number)
    plain = {**BODY, "user": "Zo\u00eb", "temperature": 1}
    assert fingerprint_of_body(parse(text.encode())) == fingerprint_of_body(plain)


NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.encode("utf-8", "ignore").decode() == name)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES
    | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(NAMES, VALUES, max_size=4), NAMES, VALUES)
def test_any_change_of_settings_is_another_scope(settings: dict[str, Any], name: str, value: Any) -> None:
    before = Facts(model="m", prompt="p", context=(), settings=settings)
    after = replace(before, settings={**settings, name: value})
    unchanged = name in settings and json.dumps(settings[name]) == json.dumps(value)
    if unchanged:
        assert scope_of(before, **WHERE) == scope_of(after, **WHERE)
    elif name not in settings or settings[name] != value or isinstance(settings[name], bool) != isinstance(value, bool):
        assert scope_of(before, **WHERE) != scope_of(after, **WHERE)


SHORT = st.text('ab:,[]"\\', max_size=3)


@given(st.lists(st.tuples(SHORT, SHORT, SHORT, SHORT, SHORT, SHORT), min_size=2, max_size=6, unique=True))
def test_no_two_places_share_a_scope_however_their_parts_are_cut(places: list[tuple[str, ...]]) -> None:
    facts = Facts(model="m", prompt="p", context=(), settings={})

    def scope(place: tuple[str, ...]) -> bytes:
        tenant, end_user, user, upstream, namespace, query = place
        return scope_of(
            replace(facts, end_user=end_user), tenant=tenant, upstream=upstream, operation="chat",
            controls=Controls(user=user, namespace=namespace), query=query,
        )  # fmt: skip

    for one, other in itertools.combinations(places, 2):
        assert scope(one) != scope(other)


@given(
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.text(max_size=20),
)
def test_two_tenants_share_neither_scope_nor_fingerprint(one: str, other: str, prompt: str) -> None:
    if one == other:
        return
    scopes = [scope_of_body(BODY, tenant=tenant) for tenant in (one, other)]
    assert scopes[0] != scopes[1]
    prompt = prompt.encode("utf-8", "ignore").decode()
    assert fingerprint_of(scopes[0], prompt) != fingerprint_of(scopes[1], prompt)
    assert len(scopes[0]) == len(fingerprint_of(scopes[0], prompt)) == 32


def test_digests_do_not_change_between_versions_unnoticed() -> None:
    """Raise KEY_VERSION when this must change: stored entries are found by these digests."""
    assert fingerprint_of_body(BODY).hex() == "3e585c382349e7e5fd0f2014567f6e9801610c79ce3af095eb2e248ecf894eb1"
