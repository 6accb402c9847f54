"""Every input of an embedding request is a question of its own: only what was never seen goes upstream, in one call."""

from __future__ import annotations

import asyncio
import base64
import json

import numpy as np
import openai
import pytest

from proxy.core.errors import CacheFault
from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.flows.running import EMBEDDER, EMBEDDINGS, EXACT_ONLY, Ibid, running, until
from tests.upstream import Body, Json, Raw, Vectors, tokens_in, vector_for

TEXTS = [f"passage number {i} of " + "many words " * (i % 7) + "a corpus" for i in range(100)]


@pytest.fixture
async def client(exact):
    async with openai.AsyncOpenAI(base_url=f"{exact.url}/v1", api_key="sk-a", max_retries=0) as client:
        yield client


def floats(packed: bytes) -> list[float]:
    return [float(number) for number in np.frombuffer(packed, "<f4")]


def vectors(reply) -> list[bytes]:
    """The rows of a reply as float32, whatever their format; their indexes must count them."""
    rows = reply.json["data"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert {row["object"] for row in rows} == {"embedding"}
    return [
        base64.b64decode(one) if isinstance(one, str) else np.array(one, "<f4").tobytes()
        for one in (row["embedding"] for row in rows)
    ]


def asked_upstream(up) -> list[list]:
    return [seen.json["input"] for seen in up.requests]


async def fill(exact: Ibid, asked, **fields):
    reply = await exact.embed(asked, **fields)
    assert (reply.status, reply.cache) == (200, "MISS"), reply
    await exact.settled()
    return reply


# -- the official client -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding_format", [openai.omit, "float", "base64"], ids=["default", "float", "base64"])
async def test_of_a_hundred_inputs_ninety_were_seen_and_ten_go_upstream_in_one_call(exact, up, client, encoding_format):
    await fill(exact, TEXTS[:45])
    await fill(exact, TEXTS[55:], encoding_format="base64")
    up.requests.clear()
    raw = await client.embeddings.with_raw_response.create(model=EMBEDDER, input=TEXTS, encoding_format=encoding_format)
    assert (raw.headers["x-cache"], raw.headers["x-cache-partial"]) == ("MISS", "90/100")
    assert "detail=partial" in raw.headers["cache-status"]
    answer = raw.parse()
    assert asked_upstream(up) == [TEXTS[45:55]]
    assert up.requests[0].json["encoding_format"] == "base64"
    assert [row.index for row in answer.data] == list(range(100))
    if encoding_format == "base64":
        assert [base64.b64decode(row.embedding) for row in answer.data] == [vector_for(text) for text in TEXTS]
    else:
        assert [np.array(row.embedding, "<f4").tobytes() for row in answer.data] == [vector_for(t) for t in TEXTS]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(tokens_in, TEXTS))
    assert answer.model == EMBEDDER


async def test_what_was_seen_is_served_in_either_format_without_a_call(exact, up, client):
    direct = openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="sk-a")
    async with direct:
        for encoding_format in (openai.omit, "float", "base64"):
            fresh = await direct.embeddings.with_raw_response.create(
                model=EMBEDDER, input=TEXTS, encoding_format=encoding_format
            )
            if encoding_format is openai.omit:
                await fill(exact, TEXTS)
            up.requests.clear()
            raw = await client.embeddings.with_raw_response.create(
                model=EMBEDDER, input=TEXTS, encoding_format=encoding_format
            )
            assert (raw.headers["x-cache"], raw.headers["x-cache-tier"]) == ("HIT", "exact")
            assert json.loads(raw.text) == json.loads(fresh.text)
            assert up.requests == []


async def test_token_arrays_are_inputs_too(exact, up, client):
    one = await client.embeddings.create(model=EMBEDDER, input=[5, 6, 7])
    many = await client.embeddings.create(model=EMBEDDER, input=[[1, 2], [3]])
    await exact.settled()
    assert one.data[0].embedding == floats(vector_for([5, 6, 7]))
    assert [row.embedding for row in many.data] == [floats(vector_for([1, 2])), floats(vector_for([3]))]
    mixed = await client.embeddings.create(model=EMBEDDER, input=[[3], [5, 6, 7], [9], [1, 2]])
    assert [row.embedding for row in mixed.data] == [floats(vector_for(t)) for t in ([3], [5, 6, 7], [9], [1, 2])]
    assert mixed.usage.prompt_tokens == 7
    assert asked_upstream(up) == [[5, 6, 7], [[1, 2], [3]], [[9]]]


async def test_the_client_raises_the_upstreams_error(exact, up, client):
    error = {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}}
    up.script(Json(429, error, {"Retry-After": "7"}))
    with pytest.raises(openai.RateLimitError) as refused:
        await client.embeddings.create(model=EMBEDDER, input="a")
    assert (refused.value.body, refused.value.response.headers["retry-after"]) == (error["error"], "7")


# -- what is served ----------------------------------------------------------------------------------------------------


async def test_decimals_are_float32s_shortest_and_base64_its_very_bytes(exact, up):
    await fill(exact, "a text", dimensions=64)
    as_floats = await exact.embed("a text", dimensions=64, encoding_format="float")
    as_base64 = await exact.embed("a text", dimensions=64, encoding_format="base64")
    packed = vector_for("a text", 64)
    assert (as_floats.cache, as_base64.cache) == ("HIT", "HIT")
    assert as_base64.json["data"][0]["embedding"] == base64.b64encode(packed).decode()
    shortest = [float(str(number)) for number in np.frombuffer(packed, "<f4")]
    assert as_floats.json["data"][0]["embedding"] == shortest
    assert len(up.requests) == 1


async def test_the_vector_is_the_same_bytes_when_the_upstream_answers_in_floats(exact, up):
    up.vectors = Vectors(base64=False)
    missed = await fill(exact, ["one", "two"])
    assert up.requests[0].json["encoding_format"] == "base64"
    hit = await exact.embed(["two", "one"], encoding_format="base64")
    assert vectors(missed) == [vector_for("one"), vector_for("two")]
    assert (hit.cache, vectors(hit)) == ("HIT", [vector_for("two"), vector_for("one")])


async def test_an_answer_that_nothing_was_changed_in_is_passed_on_byte_for_byte(exact, up):
    data = [{"object": "embedding", "index": 0, "embedding": base64.b64encode(vector_for("a")).decode(), "own": 1}]
    said = {"id": "e-1", "object": "list", "data": data, "model": EMBEDDER, "usage": {"prompt_tokens": 1}}
    body = json.dumps(said, indent=3).encode()
    up.script(Body(200, body))
    raw = b'{ "model": "%s", "encoding_format":"base64","input":"a"}' % EMBEDDER.encode()
    async with exact.session.post(
        exact.url + EMBEDDINGS, data=raw, headers={"Authorization": "Bearer sk-a", "Content-Type": "application/json"}
    ) as response:
        assert await response.read() == body
    assert up.requests[0].body == raw
    await exact.settled()
    assert (await exact.embed("a")).cache == "HIT"


async def test_other_fields_of_the_upstream_stay_when_the_format_is_turned(exact, up):
    up.vectors = Vectors(bend=lambda b: {**b, "id": "e-1", "data": [{**row, "own": row["index"]} for row in b["data"]]})
    reply = await exact.embed(["a", "b"])
    assert reply.json["id"] == "e-1"
    assert [row["own"] for row in reply.json["data"]] == [0, 1]
    assert vectors(reply) == [vector_for("a"), vector_for("b")]


async def test_an_input_asked_twice_goes_upstream_once(exact, up):
    missed = await fill(exact, ["a b", "c", "a b"])
    assert asked_upstream(up) == [["a b", "c"]]
    assert vectors(missed) == [vector_for("a b"), vector_for("c"), vector_for("a b")]
    assert missed.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    hit = await exact.embed(["c", "a b", "a b", "c"])
    assert (hit.cache, hit.json["usage"]["prompt_tokens"]) == ("HIT", 3)
    assert vectors(hit) == [vector_for("c"), vector_for("a b"), vector_for("a b"), vector_for("c")]
    partial = await exact.embed(["c", "c", "new"])
    assert partial.headers["x-cache-partial"] == "1/2"


async def test_a_large_batch_comes_back_whole(exact, up):
    texts = [f"text {i}" for i in range(2048)]
    missed = await fill(exact, texts, dimensions=256)
    up.requests.clear()
    hit = await exact.embed(texts, dimensions=256, encoding_format="base64")
    partial = await exact.embed([*texts[:1000], "new", *texts[1000:2000]], dimensions=256)
    assert (hit.cache, partial.headers["x-cache-partial"]) == ("HIT", "2000/2001")
    expected = [vector_for(text, 256) for text in texts]
    assert vectors(missed) == vectors(hit) == expected
    assert vectors(partial) == [*expected[:1000], vector_for("new", 256), *expected[1000:2000]]
    assert asked_upstream(up) == [["new"]]
    assert exact.app.pipeline.hot.size_bytes < 1_000_000, "a corpus does not sweep out what is served often"


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings", "/v1/v1/embeddings", "/openai/v1/embeddings"])
async def test_every_spelling_of_the_path_is_the_same_question(exact, up, path):
    await fill(exact, "a text")
    assert (await exact.embed("a text", path=path)).cache == "HIT"
    assert up.requests[0].path == "/v1/embeddings"


async def test_azures_deployment_is_the_model(exact, up):
    path = "/openai/deployments/ada/embeddings?api-version=2024-10-21"
    missed = await exact.embed(["a", "b"], path=path, model=None)
    assert (missed.status, missed.cache) == (200, "MISS")
    await exact.settled()
    assert up.requests[0].path == path
    partial = await exact.embed(["b", "c"], path=path, model=None)
    assert (partial.headers["x-cache-partial"], vectors(partial)) == ("1/2", [vector_for("b"), vector_for("c")])


# -- sharing and controls ----------------------------------------------------------------------------------------------


async def test_two_tenants_never_share(exact, up):
    await fill(exact, TEXTS[:5])
    other = await exact.embed(TEXTS[:5], key="sk-b")
    assert (other.cache, other.reason, "x-cache-partial" in other.headers) == ("MISS", "unseen", False)
    assert asked_upstream(up) == [TEXTS[:5]] * 2
    await exact.settled()
    assert (await exact.embed(TEXTS[:5])).cache == (await exact.embed(TEXTS[:5], key="sk-b")).cache == "HIT"


@pytest.mark.parametrize(
    "other",
    [
        {"user": "u2"},
        {"dimensions": 16},
        {"model": "text-embedding-3-large"},
        {"input_type": "query"},
        {"headers": {"x-cache-namespace": "n"}},
        {"headers": {"x-cache-user": "u"}},
        {"headers": {"OpenAI-Organization": "o"}},
    ],
    ids=str,
)
async def test_whatever_may_change_a_vector_keeps_requests_apart(exact, up, other):
    await fill(exact, "a text")
    assert (await exact.embed("a text", **other)).cache == "MISS"
    await exact.settled()
    assert (await exact.embed("a text", **other)).cache == "HIT"
    assert len(up.requests) == 2


async def test_with_an_unknown_field_the_client_alone_chooses_the_format(exact, up):
    """Who knows what `output_dtype` makes of base64: eight-bit components are no float32."""
    signed = [{"object": "embedding", "index": 0, "embedding": [1, -2, 3]}]
    up.script(Json(200, {"object": "list", "data": signed, "model": EMBEDDER}))
    first = await exact.embed("a", output_dtype="int8")
    assert "encoding_format" not in up.requests[0].json
    assert first.json["data"] == signed
    await exact.settled()
    assert await exact.entries() == []
    up.script(Vectors())
    await fill(exact, "a", output_dtype="float")
    assert (await exact.embed("a", output_dtype="float")).cache == "HIT"
    assert (await exact.embed("a", output_dtype="float", encoding_format="base64")).cache == "MISS"


async def test_a_format_nobody_can_read_passes_untouched(exact, up):
    reply = await exact.embed("a", encoding_format="ubinary")
    assert (reply.status, reply.cache, reply.reason) == (200, "BYPASS", "encoding_format")
    assert up.requests[0].json["encoding_format"] == "ubinary"


async def test_cache_controls_are_kept(exact, up):
    await fill(exact, ["a", "b"], headers={"x-cache-namespace": "n"})
    assert {entry["namespace"] for entry in await exact.entries()} == {"n"}
    space = {"x-cache-namespace": "n"}
    refreshed = await exact.embed("a", headers={**space, "Cache-Control": "no-cache"})
    assert (refreshed.cache, len(up.requests)) == ("REFRESH", 2)
    await exact.settled()
    for off in ({"Cache-Control": "no-store"}, {"x-cache-mode": "off"}):
        assert (await exact.embed(["a", "c"], headers={**space, **off})).cache == "BYPASS"
    assert asked_upstream(up)[-1] == ["a", "c"], "whole"
    only_read = await exact.embed(["a", "d"], headers={**space, "x-cache-mode": "read"})
    assert only_read.headers["x-cache-partial"] == "1/2"
    await exact.settled()
    assert len(await exact.entries()) == 2
    only_write = await exact.embed("a", headers={**space, "x-cache-mode": "write"})
    assert (only_write.cache, only_write.reason) == ("BYPASS", "no_cache")
    shadow = await exact.embed(["a", "b"], headers={**space, "x-cache-mode": "shadow"})
    assert (shadow.cache, shadow.reason) == ("SHADOW", "would_exact")
    await exact.settled()
    assert (await exact.embed("a", headers={**space, "Cache-Control": "max-age=0"})).reason == "expired"
    short = await fill(exact, "e", headers={**space, "x-cache-ttl": "0"})
    assert short.status == 200
    assert len(await exact.entries()) == 2


async def test_tags_are_kept_with_every_input(exact, up):
    await fill(exact, ["a", "b"], headers={"x-cache-tags": "doc:1"})
    await fill(exact, ["c"], headers={"x-cache-tags": "doc:2"})
    await exact.admin("POST", "/cache/invalidate", {"tags": ["doc:1"], "dry_run": False})
    assert (await exact.embed(["a", "b", "c"])).headers["x-cache-partial"] == "1/3"


async def test_the_bodys_twin_of_the_controls_stays_here(exact, up):
    await fill(exact, "a", cache={"namespace": "n"})
    assert "cache" not in up.requests[0].json
    assert (await exact.embed("a", headers={"x-cache-namespace": "n"})).cache == "HIT"


async def test_a_verdicts_making_is_told_where_it_is_asked_for(exact, up):
    await fill(exact, "a")
    for asked, verdict in (("a", "hit"), (["a", "b"], "partial"), ("c", "unseen")):
        reply = await exact.embed(asked, headers={"x-cache-explain": "1"})
        said = json.loads(reply.headers["x-cache-explain"])
        assert (said["verdict"], said["level"]) == (verdict, "exact")


async def test_only_if_cached_is_all_or_nothing(exact, up):
    await fill(exact, "a")
    only = {"Cache-Control": "only-if-cached"}
    refused = await exact.embed(["a", "b"], headers=only)
    assert (refused.status, refused.json["error"]["code"]) == (504, "not_cached")
    assert (await exact.embed(["a", "a"], headers=only)).cache == "HIT"
    assert len(up.requests) == 1


async def test_bad_requests_are_refused_here(exact, up):
    for asked, param in (("", "input"), ([], "input"), (["a", 1], "input[1]"), (["x"] * 2049, "input")):
        reply = await exact.embed(asked)
        assert (reply.status, reply.json["error"]["param"]) == (400, param)
    assert up.requests == []


async def test_a_purge_is_effective_at_once(exact, up):
    await fill(exact, ["a", "b"])
    assert (await exact.embed(["a", "b"])).cache == "HIT"
    assert len(exact.app.pipeline.hot) == 2
    (entry, _other) = await exact.entries()
    await exact.admin("POST", "/cache/invalidate", {"ids": [entry["id"]], "dry_run": False})
    assert (await exact.embed(["a", "b"])).headers["x-cache-partial"] == "1/2"


async def test_the_admin_listener_shows_an_entry(exact):
    await fill(exact, "a text")
    (listed,) = await exact.entries()
    shown = await exact.admin("GET", f"/cache/entries/{listed['id']}")
    assert (shown["operation"], shown["model"], shown["prompt"]) == ("embedding", EMBEDDER, "")
    assert base64.b64decode(shown["answer"]["message"]["embedding"]) == vector_for("a text")


# -- the upstream's faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 413, 429, 500, 503])
async def test_an_upstreams_error_passes_byte_for_byte_and_nothing_is_stored(exact, up, status):
    await fill(exact, "a")
    body = b'{ "error" : {"message":"no \\u00e9","type":"t","param":null,"code":"c"} }\n'
    up.script(Body(status, body), Body(status, body))
    for asked in ("b", ["a", "b"]):
        reply = await exact.embed(asked)
        assert (reply.status, reply.body, reply.cache) == (status, body, "MISS")
        assert "x-cache-partial" not in reply.headers
    await exact.settled()
    assert len(await exact.entries()) == 1


@pytest.mark.parametrize("status", [400, 422])
async def test_a_refusal_is_told_for_the_request_the_client_sent(exact, up, status):
    """The upstream may name an input by its place, or may not know base64: it is asked again with the client's body."""
    await fill(exact, "a")
    mine = {"error": {"message": "input[1] is too long", "type": "t", "param": "input[1]", "code": "c"}}
    up.script(Json(status, {"error": {"message": "input[0] is too long"}}), Json(status, mine))
    reply = await exact.embed(["a", "b"])
    assert (reply.status, reply.json, reply.reason) == (status, mine, "asked_whole")
    assert asked_upstream(up)[1:] == [["b"], ["a", "b"]]
    up.script(Json(status, mine))
    assert (await exact.embed("b", encoding_format="base64")).json == mine, "the client's own request is sent once"
    assert len(up.requests) == 4


async def test_an_upstream_without_base64_is_remembered(exact, up):
    def answer(seen):
        if seen.json.get("encoding_format") == "base64":
            return Json(400, {"error": {"message": "encoding_format"}})
        return Vectors()

    up.vectors = answer
    first = await exact.embed("a")
    assert (first.status, first.reason, vectors(first)) == (200, "asked_whole", [vector_for("a")])
    assert len(up.requests) == 2
    await fill(exact, ["b", "c"])
    partial = await exact.embed(["c", "d"])
    assert (partial.headers["x-cache-partial"], vectors(partial)) == ("1/2", [vector_for("c"), vector_for("d")])
    assert len(up.requests) == 4


def cut_short(body):
    return {**body, "data": body["data"][:-1]}


def misnumbered(body):
    return {**body, "data": [{**row, "index": 7} for row in body["data"]]}


def uneven(body):
    return {**body, "data": [{**row, "embedding": [1.5] * (row["index"] + 1)} for row in body["data"]]}


def other_length(body):
    return {**body, "data": [{**row, "embedding": [1.5, 2.5]} for row in body["data"]]}


@pytest.mark.parametrize("bend", [cut_short, misnumbered, uneven, lambda _: {"odd": 1}, lambda _: [1]])
async def test_an_answer_that_is_not_understood_is_passed_on_and_not_stored(exact, up, bend):
    said = []
    up.script(Vectors(base64=False, bend=lambda body: said.append(bend(body)) or said[-1]))
    reply = await exact.embed(["a", "b"])
    assert (reply.status, reply.json, len(up.requests)) == (200, said[0], 1)
    await exact.settled()
    assert await exact.entries() == []


async def test_base64_that_is_not_understood_is_never_given_to_who_asked_for_floats(exact, up):
    up.script(Vectors(bend=cut_short), Vectors(bend=cut_short))
    reply = await exact.embed(["a", "b"])
    assert (reply.json["data"][0]["embedding"], reply.reason) == (floats_of("a"), "asked_whole")
    assert "encoding_format" not in up.requests[1].json
    kept = await exact.embed(["a", "b"], encoding_format="base64")
    assert (kept.cache, len(up.requests)) == ("MISS", 3)


def floats_of(text: str) -> list[float]:
    return [float(str(number)) for number in np.frombuffer(vector_for(text), "<f4")]


@pytest.mark.parametrize("bend", [misnumbered, lambda _: {"odd": 1}, lambda body: {**body, "data": []}])
async def test_where_rows_do_not_fit_the_clients_own_request_is_forwarded_whole(exact, up, bend):
    await fill(exact, "a")
    up.script(Vectors(bend=bend))
    reply = await exact.embed(["a", "b"])
    assert (reply.status, reply.cache, reply.reason) == (200, "MISS", "asked_whole")
    assert asked_upstream(up)[1:] == [["b"], ["a", "b"]]
    assert up.requests[2].json == {"model": EMBEDDER, "input": ["a", "b"]}
    assert vectors(reply) == [vector_for("a"), vector_for("b")]
    row = await exact.row(reply)
    calls = await exact.sql(f"SELECT won, in_tok FROM upstream_call WHERE request_id = '{row['id']}' ORDER BY won")
    assert [call["won"] for call in calls] == [0, 1]
    assert await balance(exact) == []


@pytest.mark.parametrize("changed", [{"model": "text-embedding-3-small-0002"}, {"dimension": 16}])
async def test_vectors_of_two_models_never_stand_in_one_answer(exact, up, changed):
    """What is stored was made by another snapshot, or of another length: all of it is asked for again, and stored."""
    await fill(exact, ["a", "b"])
    up.vectors = Vectors(**changed)
    length = changed.get("dimension", 8)
    reply = await exact.embed(["a", "c"])
    assert (reply.reason, vectors(reply)) == ("asked_whole", [vector_for("a", length), vector_for("c", length)])
    await exact.settled()
    assert asked_upstream(up)[1:] == [["c"], ["a", "c"]]
    again = await exact.embed(["c", "a"])
    assert (again.cache, vectors(again)) == ("HIT", [vector_for("c", length), vector_for("a", length)])
    old_and_new = await exact.embed(["a", "b"])
    assert (old_and_new.reason, vectors(old_and_new)) == ("asked_whole", [vector_for(t, length) for t in "ab"])
    await exact.settled()
    assert (await exact.embed(["a", "b", "c"])).cache == "HIT"
    assert await balance(exact) == []


async def test_another_models_answer_is_not_stored(exact, up):
    up.vectors = Vectors(model="some-other-model")
    assert (await exact.embed("a")).status == 200
    await exact.settled()
    assert await exact.entries() == []


async def test_what_the_upstream_forbids_to_store_is_merged_and_not_stored(exact, up):
    await fill(exact, "a")
    up.vectors = Vectors(headers={"Cache-Control": "no-store"})
    reply = await exact.embed(["a", "b"])
    assert (reply.headers["x-cache-partial"], vectors(reply)) == ("1/2", [vector_for("a"), vector_for("b")])
    await exact.settled()
    assert len(await exact.entries()) == 1


async def test_an_upstream_that_breaks_off_is_an_error_in_the_dialect(exact, up):
    await fill(exact, "a")
    up.script(Raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"))
    reply = await exact.embed(["a", "b"])
    assert (reply.status, reply.json["error"]["type"]) == (502, "server_error")
    (row,) = await exact.sql("SELECT * FROM request WHERE outcome = 'error'")
    assert (row["status"], row["reason"]) == (502, "partial")
    assert await balance(exact) == []


async def test_a_client_that_leaves_ends_its_call(exact, up):
    held = Raw(b"", then="stall")
    up.script(held)
    asking = asyncio.create_task(exact.embed("a"))
    await until(lambda: up.requests)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(up.left.is_set)
    await until(lambda: exact.app.store.ledger.waiting or exact.app.store.ledger.written)
    (row,) = await exact.sql("SELECT * FROM request")
    assert row["outcome"] == "cancelled"


async def test_an_idempotency_key_goes_with_the_clients_own_body_only(exact, up):
    await fill(exact, "a")
    key = {"Idempotency-Key": "k"}
    await exact.embed(["a", "b"], headers=key)
    await exact.embed("c", encoding_format="base64", headers=key)
    assert [seen.header("Idempotency-Key") for seen in up.requests[1:]] == [None, "k"]


# -- ibid's own faults -------------------------------------------------------------------------------------------------


async def test_a_database_that_does_not_answer_means_a_plain_forward(exact, up, monkeypatch):
    await fill(exact, ["a", "b"])
    assert (await exact.embed(["a"])).cache == "HIT"

    async def down(_fingerprints):
        raise CacheFault("gone", code="store_down")

    monkeypatch.setattr(exact.app.store.entries, "find_many", down)
    assert (await exact.embed("a")).cache == "HIT", "from memory"
    reply = await exact.embed(["a", "b"])
    assert (reply.status, reply.cache, reply.reason) == (200, "BYPASS", "store_down")
    assert up.requests[-1].json == {"model": EMBEDDER, "input": ["a", "b"]}
    assert vectors(reply) == [vector_for("a"), vector_for("b")]


async def test_a_row_that_cannot_be_stored_costs_the_client_nothing(exact, up, monkeypatch):
    async def full(_draft, _began):
        raise CacheFault("full", code="store_full")

    monkeypatch.setattr(exact.app.store.entries, "put", full)
    assert vectors(await exact.embed(["a", "b"])) == [vector_for("a"), vector_for("b")]
    await exact.settled()
    assert 'reason="store_full"' in await exact.admin("GET", "/metrics")


async def test_all_inputs_are_looked_up_by_one_query(exact, up, monkeypatch):
    await fill(exact, TEXTS)
    database = exact.app.store.entries._database
    asked = []
    rows = database.rows

    async def counted(statement, parameters=()):
        asked.append(statement)
        return await rows(statement, parameters)

    monkeypatch.setattr(database, "rows", counted)
    assert (await exact.embed(TEXTS)).cache == "HIT"
    assert len(asked) == 1
    assert (await exact.embed(TEXTS)).cache == "HIT"
    assert len(asked) == 1, "the second time from memory"


# -- the ledger --------------------------------------------------------------------------------------------------------


async def balance(exact) -> list:
    return (await exact.admin("POST", "/savings/query", {"name": "balance"}))["rows"]


def price(tokens: int) -> int:
    return Prices().price("openai", EMBEDDER, Usage(tokens, 0), "default", 1_790_000_000_000).nusd


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_the_ledger_balances_to_the_nano_dollar(data_dir, up, request, database):
    url = request.getfixturevalue("pg_url") if database == "postgresql" else None
    async with running(data_dir, up.url, EXACT_ONLY, database=url) as ibid:
        await fill(ibid, TEXTS[:90])
        partial = await ibid.embed(TEXTS)
        await ibid.settled()
        hit = await ibid.embed(TEXTS)
        tokens, old, new = (sum(map(tokens_in, texts)) for texts in (TEXTS, TEXTS[:90], TEXTS[90:]))
        row = await ibid.row(partial)
        assert (row["lane"], row["cache_status"], row["reason"], row["usage_basis"]) == (
            "forward", "MISS", "partial", "measured",
        )  # fmt: skip
        assert (row["in_tok"], row["out_tok"]) == (tokens, 0)
        assert (row["baseline_nusd"], row["actual_nusd"]) == (price(tokens), price(new))
        calls = await ibid.sql(f"SELECT * FROM upstream_call WHERE request_id = '{row['id']}'")
        assert [(call["in_tok"], call["cost_nusd"], call["usage_basis"]) for call in calls] == [
            (new, price(new), "measured")
        ]
        steps = await ibid.sql(f"SELECT * FROM saving WHERE request_id = '{row['id']}'")
        assert [(step["mechanism"], step["before_nusd"], step["after_nusd"], step["saved_nusd"]) for step in steps] == [
            ("cache.exact", price(tokens), price(new), price(old))
        ]
        assert round(float(partial.headers["x-cost-usd"]) * 1e9) == price(new)
        assert round(float(partial.headers["x-cache-saved-usd"]) * 1e9) == price(old)
        row = await ibid.row(hit)
        assert (row["lane"], row["in_tok"], row["baseline_nusd"], row["actual_nusd"], row["entry_id"]) == (
            "cache.exact", tokens, price(tokens), 0, None,
        )  # fmt: skip
        assert row["baseline_ms"] > 0
        assert hit.json["usage"] == partial.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert "x-cache-entry" not in hit.headers
        one = await ibid.embed(TEXTS[0])
        assert (await ibid.row(one))["entry_id"] == one.entry
        up.script(Json(500, {"error": {"message": "x"}}))
        assert (await ibid.embed("unheard of")).status == 500
        assert await balance(ibid) == []
        total = (await ibid.sql("SELECT SUM(cost_nusd) AS n, SUM(in_tok) AS i FROM upstream_call"))[0]
        assert (total["n"], total["i"]) == (price(up.meter.input_tokens), up.meter.input_tokens)
        paid = (await ibid.sql("SELECT SUM(baseline_nusd - actual_nusd) AS n FROM request"))[0]["n"]
        assert paid == (await ibid.sql("SELECT SUM(saved_nusd) AS n FROM saving"))[0]["n"] > 0
        assert 'lane="exact"' in (metrics := await ibid.admin("GET", "/metrics"))
        assert 'ibid_saved_usd_total{lane="forward"}' in metrics


async def test_tokens_nobody_told_are_estimated_for_the_call_and_not_claimed_as_saved(exact, up):
    up.vectors = Vectors(usage=False)
    await fill(exact, "one two three")
    partial = await exact.embed(["one two three", "four"])
    assert partial.json["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    row = await exact.row(partial)
    assert row["baseline_nusd"] == row["actual_nusd"] > 0
    (call,) = await exact.sql(f"SELECT * FROM upstream_call WHERE request_id = '{row['id']}'")
    assert (call["usage_basis"], call["out_tok"]) == ("estimated", 0)
    up.vectors = Vectors()
    await exact.settled()
    known = await exact.embed(["one two three", "five six"])
    assert known.json["usage"]["prompt_tokens"] == 2
    assert await balance(exact) == []


async def test_usage_on_a_hit_may_be_zero(data_dir, up):
    async with running(data_dir, up.url, {"cache": {"semantic": False, "usage_on_hit": "zero"}}) as ibid:
        await fill(ibid, "one two")
        assert (await ibid.embed("one two")).json["usage"]["prompt_tokens"] == 0
        assert (await ibid.embed(["one two", "three"])).json["usage"]["prompt_tokens"] == 1


async def test_what_is_used_is_not_evicted(exact):
    await fill(exact, ["a", "b"])
    entries = exact.app.store.entries
    entries._used.clear()
    await exact.embed(["a", "b"])
    assert len(entries._used) == 2
    entries._used.clear()
    await exact.embed(["a", "c"])
    assert len(entries._used) == 1
