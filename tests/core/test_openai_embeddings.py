"""What an embedding request says, which are refused, what of it goes upstream, and which answers are understood."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.openai_embeddings import (
    INPUT_LIMIT,
    OpenAIEmbeddings,
    has_base64,
    part_body,
    read,
    rows_of,
    shares,
    usage_in,
    usage_object,
)
from proxy.core.dialects.routes import Routes
from proxy.core.errors import BadRequest
from proxy.core.fingerprint import fingerprint_of, scope_of
from proxy.core.model import Controls, Level, Rules, Usage
from proxy.core.policy import classify


def ask(asked, **fields):
    return {"model": "text-embedding-3-small", "input": asked, **fields}


NO_CONTROLS = Controls()


def scope(body, tenant="t", controls=NO_CONTROLS):
    return scope_of(read(body), tenant=tenant, upstream="u", operation="embedding", controls=controls)


@pytest.mark.parametrize(
    ("asked", "inputs"),
    [
        ("a text", ("a text",)),
        (["a", "b", "a"], ("a", "b", "a")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["x"] * INPUT_LIMIT, ("x",) * INPUT_LIMIT),
        (list(range(INPUT_LIMIT + 1)), (tuple(range(INPUT_LIMIT + 1)),)),
    ],
    ids=["string", "strings", "tokens", "token arrays", "as many as may be", "a long token array is one input"],
)
def test_inputs_are_read_in_their_order(asked, inputs):
    assert read(ask(asked)).inputs == inputs


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (ask(""), "input", "invalid_value"),
        (ask([]), "input", "invalid_value"),
        (ask(["a", ""]), "input[1]", "invalid_value"),
        (ask([[1], []]), "input[1]", "invalid_value"),
        (ask(None), "input", "invalid_type"),
        (ask({"text": "a"}), "input", "invalid_type"),
        (ask([None]), "input[0]", "invalid_type"),
        (ask(["a", 1]), "input[1]", "invalid_type"),
        (ask(["a", [1]]), "input[1]", "invalid_type"),
        (ask([[1], "a"]), "input[1]", "invalid_type"),
        (ask([1, "a"]), "input[1]", "invalid_type"),
        (ask([1, True]), "input[1]", "invalid_type"),
        (ask([True]), "input[0]", "invalid_type"),
        (ask([1.5]), "input[0]", "invalid_type"),
        (ask([1, -1]), "input[1]", "invalid_type"),
        (ask([[1, 2.0]]), "input[0][1]", "invalid_type"),
        (ask(["a"] * (INPUT_LIMIT + 1)), "input", "invalid_value"),
        (ask([[1]] * (INPUT_LIMIT + 1)), "input", "invalid_value"),
        (ask("a", model=3), "model", "invalid_type"),
        (ask("a", dimensions=0), "dimensions", "invalid_value"),
        (ask("a", dimensions="8"), "dimensions", "invalid_value"),
        (ask("a", dimensions=True), "dimensions", "invalid_value"),
        (ask("a", user=1), "user", "invalid_type"),
        (ask("a", encoding_format=1), "encoding_format", "invalid_type"),
    ],
)
def test_what_no_server_could_understand_is_refused_by_name(body, param, code):
    with pytest.raises(BadRequest) as refused:
        read(body)
    assert (refused.value.param, refused.value.code, refused.value.status) == (param, code, 400)


def test_the_format_is_float_unless_said():
    assert read(ask("a")).encoding_format == "float"
    assert read(ask("a", encoding_format=None)).encoding_format == "float"
    assert read(ask("a", encoding_format="base64")).encoding_format == "base64"


def test_a_model_in_the_path_stands_for_the_bodys():
    assert OpenAIEmbeddings().read({"input": "a"}, model="deployed").model == "deployed"


def test_the_format_alone_changes_no_scope_and_everything_else_does():
    bodies = [
        ask("a"),
        ask("a", dimensions=8),
        ask("a", model="other"),
        ask("a", user="u1"),
        ask("a", input_type="query"),
        ask("a", input_type="query", encoding_format="base64"),
    ]
    scopes = [scope(body) for body in bodies]
    assert len(set(scopes)) == len(bodies)
    assert scope(ask("b", encoding_format="base64", cache={"ttl": 1})) == scopes[0]
    assert scope(bodies[0], tenant="other") != scopes[0]
    assert scope(bodies[0], controls=Controls(namespace="n")) != scopes[0]


def test_a_text_and_tokens_are_never_the_same_input():
    whole = scope(ask("a"))
    prints = [fingerprint_of(whole, asked) for asked in ("1", (1,), "[1]", (1, 1), (11,), "1,1", "[1,1]")]
    assert len(set(prints)) == len(prints)
    assert fingerprint_of(whole, read(ask([1])).inputs[0]) == fingerprint_of(whole, read(ask([[1]])).inputs[0])


@given(st.lists(st.text() | st.lists(st.integers(0, 200_000), min_size=1).map(tuple), unique=True, max_size=8))
def test_different_inputs_have_different_fingerprints(inputs):
    assert len({fingerprint_of(b"s" * 32, asked) for asked in inputs}) == len(inputs)


def test_it_is_looked_up_by_identity_only():
    assert classify(read(ask("my mail is ann@example.org")), Controls(), Rules()).level is Level.EXACT
    off = classify(read(ask("a")), Controls(read=False, write=False), Rules())
    assert (off.level, off.reason) == (Level.NONE, "no_store")
    unknown = classify(read(ask("a", encoding_format="ubinary")), Controls(), Rules())
    assert (unknown.level, unknown.reason) == (Level.NONE, "encoding_format")


@pytest.mark.parametrize(
    ("path", "goes_to", "model"),
    [
        ("/v1/embeddings", "/v1/embeddings", ""),
        ("/embeddings", "/v1/embeddings", ""),
        ("/v1/v1/embeddings", "/v1/embeddings", ""),
        ("/openai/v1/embeddings", "/openai/v1/embeddings", ""),
        ("/openai/deployments/ada/embeddings", "/openai/deployments/ada/embeddings", "ada"),
    ],
)
def test_every_spelling_of_the_path_is_one_operation(path, goes_to, model):
    route = Routes().find(path, "?api-version=1")
    assert route.dialect is not None
    assert (route.dialect.operation, route.path, route.model) == ("embedding", goes_to, model)
    assert route.scope_query == "?api-version=1"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings/x", "/openai/deployments/a/b/embeddings", "/api/embeddings", "/x/embeddings"]
)
def test_other_paths_pass_through(path):
    assert Routes().find(path).dialect is None


# -- upstream ----------------------------------------------------------------------------------------------------------


def test_a_part_changes_the_inputs_and_the_format_and_no_other_byte():
    raw = b'{ "input" : ["a", "b"],\n "x": 1.50, "model":"m" }'
    assert part_body(raw, None, None) == raw
    assert part_body(raw, ["é"], None) == '{ "input" : ["é"],\n "x": 1.50, "model":"m" }'.encode()
    assert part_body(raw, [(1, 2)], "base64") == (
        b'{ "input" : [[1,2]],\n "x": 1.50, "model":"m","encoding_format":"base64" }'
    )
    assert part_body(b'{"input":"a","encoding_format":"float"}', None, "base64") == (
        b'{"input":"a","encoding_format":"base64"}'
    )


def test_the_cache_twin_stays_here():
    raw = b'{"input":"a","cache":{"ttl":1},"model":"m"}'
    assert OpenAIEmbeddings().forward_body(raw, json.loads(raw)) == b'{"input":"a","model":"m"}'


def row(index, embedding="AACAPw==", **fields):
    return {"object": "embedding", "index": index, "embedding": embedding, **fields}


def test_rows_stand_in_the_order_of_their_indexes():
    said = {"data": [row(1, "b"), row(0, "a")], "model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    found = rows_of(said, 2)
    assert found is not None
    assert [one["embedding"] for one in found.rows] == ["a", "b"]
    assert (found.model, found.usage) == ("m", Usage(3, 0))


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"data": None},
        {"data": [row(0)]},
        {"data": [row(0), row(1), row(2)]},
        {"data": [row(0), row(0)]},
        {"data": [row(0), row(2)]},
        {"data": [row(0), row(-1)]},
        {"data": [row(0), row("1")]},
        {"data": [row(0), row(True)]},
        {"data": [row(0), {"embedding": "x"}]},
        {"data": [row(0), row(1, None)]},
        {"data": [row(0), row(1, 1.5)]},
        {"data": [row(0), "row"]},
        {"error": {"message": "x"}},
    ],
)
def test_rows_that_are_not_one_for_each_input_are_not_understood(said):
    assert rows_of(said, 2) is None


def test_base64_is_seen_in_any_row():
    assert has_base64({"data": [row(0, [1.0]), row(1, "x")]})
    assert not has_base64({"data": [row(0, [1.0]), "row"]})
    assert not any(has_base64(said) for said in (None, [], {}, {"data": 3}, "x"))


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        ({"prompt_tokens": 5, "total_tokens": 7}, Usage(5, 0)),
        ({"total_tokens": 7}, Usage(7, 0)),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": 1 << 63}, None),
        ({}, None),
        (None, None),
        ([], None),
    ],
)
def test_usage_is_whole_numbers_or_none(told, usage):
    assert usage_in(told) == usage
    assert OpenAIEmbeddings().find_usage(json.dumps({"usage": told}).encode()) == usage


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"{}"])
def test_a_body_without_usage_has_none(body):
    assert OpenAIEmbeddings().find_usage(body) is None


def test_the_usage_told_keeps_what_the_upstream_said_beyond_its_counters():
    assert usage_object(4) == {"prompt_tokens": 4, "total_tokens": 4}
    told = {"prompt_tokens": 1, "total_tokens": 1, "details": None}
    assert usage_object(4, told) == {"prompt_tokens": 4, "total_tokens": 4, "details": None}


# -- shares ------------------------------------------------------------------------------------------------------------


def test_shares_follow_length_and_the_rest_goes_to_the_largest_remainders():
    assert shares(10, ["aaaa", "bbbb", "cc"]) == [4, 4, 2]
    assert shares(2, ["a", "a", "a"]) == [1, 1, 0]
    assert shares(0, ["a", "b"]) == [0, 0]
    assert shares(6, [(1, 2), (3, 4, 5), (6,)]) == [2, 3, 1]
    assert shares(3, ["é", "a"]) == [2, 1]


@given(st.integers(0, 10**6), st.lists(st.text(min_size=1), min_size=1, max_size=40))
def test_shares_sum_to_the_total(total, inputs):
    parts = shares(total, inputs)
    assert sum(parts) == total
    assert min(parts) >= 0
    whole = sum(len(one.encode()) for one in inputs)
    for part, one in zip(parts, inputs, strict=True):
        assert abs(part - total * len(one.encode()) / whole) < 1
