"""Ollama's and Gemini's embeddings, as their own clients read them: input by input, like OpenAI's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import ollama
import pytest
from google import genai

from tests.flows.running import EMBEDDER, Ibid
from tests.upstream import Json, ScriptedUpstream, Vectors, inputs_in, tokens_in, vector_for

TEXTS = [f"passage number {i} of " + "many words " * (i % 7) + "a corpus" for i in range(100)]
KEY = "sk-a"
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")


class Spoken(NamedTuple):
    """What a client made of an answer: its vectors as float32, and all of it but times."""

    vectors: list[bytes]
    said: dict[str, Any]


def by_ollama(url: str, asked: str | Sequence[str]) -> Spoken:
    sdk = ollama.Client(host=url, headers={"Authorization": f"Bearer {KEY}"})
    with sdk._client:
        answer = sdk.embed(EMBEDDER, asked)
    vectors = [np.array(one, "<f4").tobytes() for one in answer.embeddings]
    return Spoken(vectors, answer.model_dump(exclude={"total_duration", "load_duration"}))


def by_gemini(url: str, asked: str | Sequence[str]) -> Spoken:
    retry = genai.types.HttpRetryOptions(attempts=1)
    options = genai.types.HttpOptions(base_url=url, retry_options=retry)
    with genai.Client(api_key=KEY, http_options=options) as sdk:
        answer = sdk.models.embed_content(model=EMBEDDER, contents=asked)
    vectors = [np.array(one.values, "<f4").tobytes() for one in answer.embeddings]
    return Spoken(vectors, answer.model_dump(exclude={"sdk_http_response"}))


Ask = Callable[[str, str | Sequence[str]], Spoken]
both = pytest.mark.parametrize("ask", [by_ollama, by_gemini], ids=["ollama", "gemini"])
GEMINI = f"/v1beta/models/{EMBEDDER}"


async def asking(ask: Ask, url: str, asked: str | Sequence[str]) -> Spoken:
    return await asyncio.to_thread(ask, url, asked)


def inputs(up: ScriptedUpstream) -> list[list[str]]:
    return [inputs_in(seen.json) for seen in up.requests]


async def post(served: Ibid, path: str, body: Any) -> tuple[int, Any, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with served.session.post(served.url + path, json=body, headers=headers) as reply:
        told = reply.headers.get("x-cache"), reply.headers.get("x-cache-partial"), reply.headers.get("x-cache-reason")
        await served.settled()
        return reply.status, told, json.loads(await reply.read())


@both
async def test_of_a_hundred_inputs_ninety_were_seen_and_ten_go_upstream_in_one_call(exact, up, ask):
    direct = await asking(ask, up.url, TEXTS)
    for part in (TEXTS[:45], TEXTS[55:]):
        await asking(ask, exact.url, part)
        await exact.settled()
    up.requests.clear()
    first = await asking(ask, exact.url, TEXTS)
    await exact.settled()
    again = await asking(ask, exact.url, TEXTS)
    assert inputs(up) == [TEXTS[45:55]]
    assert direct.vectors == [vector_for(text) for text in TEXTS]
    assert first == again == direct


@both
async def test_one_text_alone_and_one_twice(exact, up, ask):
    direct = await asking(ask, up.url, "alone")
    up.requests.clear()
    for _ in range(2):
        assert await asking(ask, exact.url, "alone") == direct
        await exact.settled()
    twice = await asking(ask, exact.url, ["new", "alone", "new"])
    assert twice.vectors == [vector_for(text) for text in ("new", "alone", "new")]
    assert inputs(up) == [["alone"], ["new"]]


async def test_ollama_and_openai_share_their_rows(exact, up):
    await asking(by_ollama, exact.url, ["one", "two"])
    await exact.settled()
    reply = await exact.embed(["two", "three", "one"], encoding_format="base64")
    assert (reply.cache, reply.headers["x-cache-partial"]) == ("MISS", "2/3")
    await exact.settled()
    up.requests.clear()
    hit = await asking(by_ollama, exact.url, ["three", "two"])
    assert hit.vectors == [vector_for("three"), vector_for("two")]
    assert up.requests == []


async def test_gemini_shares_between_its_two_operations_and_with_nobody_else(exact, up):
    one = {"content": {"parts": [{"text": "one"}]}}
    assert (await post(exact, f"{GEMINI}:embedContent", one))[1][0] == "MISS"
    named = {**one, "model": f"models/{EMBEDDER}"}
    _, told, batch = await post(exact, f"{GEMINI}:batchEmbedContents", {"requests": [named]})
    _, _, single = await post(exact, f"{GEMINI}:embedContent", named)
    assert told[0] == "HIT"
    assert batch == {"embeddings": [single["embedding"]]}
    assert (await exact.embed("one")).cache == "MISS"
    assert len(up.requests) == 2


async def test_what_a_gemini_request_says_beside_its_text_keeps_it_apart(exact, up):
    def asked(text: str, **more: Any) -> dict[str, Any]:
        return {"model": f"models/{EMBEDDER}", "content": {"parts": [{"text": text}]}, **more}

    path = f"{GEMINI}:batchEmbedContents"
    query, document = {"taskType": "RETRIEVAL_QUERY"}, {"taskType": "RETRIEVAL_DOCUMENT"}
    bodies = [
        [asked("one", **query)],
        [asked("one", **document)],
        [asked("one", **query, outputDimensionality=4)],
        [asked("one", **query), asked("one", **document)],
        [asked("one"), asked("two")],
        [{**asked("one"), "content": {"parts": [{"text": "one"}, {"text": "two"}]}}],
    ]
    for body in bodies:
        assert (await post(exact, path, {"requests": body}))[1][0] == "MISS", body
    assert len(up.requests) == len(bodies)
    for body in bodies:
        assert (await post(exact, path, {"requests": body}))[1][0] == "HIT", body
    mixed = [asked("new", **document), asked("one", **query)]
    status, told, said = await post(exact, path, {"requests": mixed})
    assert (status, told[1]) == (200, "1/2")
    assert up.requests[-1].json == {"requests": mixed[:1]}
    assert [np.array(one["values"], "<f4").tobytes() for one in said["embeddings"]] == [
        vector_for("new"),
        vector_for("one"),
    ]


async def test_what_ollama_counts_is_told_of_hits_and_of_parts(exact, up):
    whole = await post(exact, "/api/embed", {"model": EMBEDDER, "input": TEXTS[:6]})
    assert whole[2]["prompt_eval_count"] == sum(map(tokens_in, TEXTS[:6]))
    _, told, said = await post(exact, "/api/embed", {"model": EMBEDDER, "input": TEXTS[:6]})
    assert (told[0], said["prompt_eval_count"]) == ("HIT", sum(map(tokens_in, TEXTS[:6])))
    _, told, said = await post(exact, "/api/embed", {"model": EMBEDDER, "input": TEXTS[:7]})
    assert (told[1], said["prompt_eval_count"]) == ("6/7", sum(map(tokens_in, TEXTS[:7])))
    assert said["total_duration"] == 5_000  # of the call for the rest


async def test_ollamas_settings_are_part_of_the_scope_and_its_delivery_is_not(exact, up):
    body = {"model": EMBEDDER, "input": "one"}
    asked = [{}, {"dimensions": 4}, {"truncate": False}, {"options": {"num_ctx": 64}}, {"new_field": 1}]
    for more in asked:
        assert (await post(exact, "/api/embed", {**body, **more}))[1][0] == "MISS", more
    for more in ({"keep_alive": "5m"}, {"truncate": True}, {"options": {}}, {"input": ["one"]}):
        assert (await post(exact, "/api/embed", {**body, **more}))[1][0] == "HIT", more


async def test_ollama_without_an_input_loads_the_model(exact, up):
    up.vectors = Json(200, {"model": EMBEDDER, "embeddings": []})
    for asked in ("", []):
        status, told, said = await post(exact, "/api/embed", {"model": EMBEDDER, "input": asked})
        assert (status, told[0], told[2]) == (200, "BYPASS", "no_input")
        assert said == {"model": EMBEDDER, "embeddings": []}
    assert [seen.json["input"] for seen in up.requests] == ["", []]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/embed", {"model": 3, "input": "x"}, "model"),
        ("/api/embed", {"model": "m", "input": {"a": 1}}, "input"),
        ("/api/embed", {"model": "m", "input": ["a", 1]}, "input[1]"),
        ("/api/embed", {"model": "m", "input": "x", "truncate": "no"}, "truncate"),
        (f"{GEMINI}:embedContent", {}, "content"),
        (f"{GEMINI}:batchEmbedContents", {"requests": []}, "requests"),
        (f"{GEMINI}:batchEmbedContents", {"requests": [1]}, "requests[0]"),
        (f"{GEMINI}:batchEmbedContents", {"requests": [{"content": "x"}]}, "requests[0].content"),
    ],
)
async def test_a_bad_request_is_refused_in_the_dialects_own_words(exact, up, path, body, named):
    status, _, said = await post(exact, path, body)
    assert status == 400
    message = said["error"] if path.startswith("/api/") else said["error"]["message"]
    assert named in message
    assert path.startswith("/api/") or said["error"]["status"] == "INVALID_ARGUMENT"
    assert up.requests == []


@both
@pytest.mark.parametrize("bend", ["short", "uneven", "absent"])
async def test_an_answer_that_is_not_a_vector_for_each_input_is_passed_on_and_not_stored(exact, up, ask, bend):
    def bent(body: dict[str, Any]) -> dict[str, Any]:
        rows = body["embeddings"]
        if bend == "short":
            return {**body, "embeddings": rows[:-1]}
        last = rows[-1] if isinstance(rows[-1], list) else rows[-1]["values"]
        del last[-1 if bend == "uneven" else slice(None)]
        return body

    up.vectors = Vectors(bend=bent)
    direct = await asking(ask, up.url, ["one", "two"])
    assert (await asking(ask, exact.url, ["one", "two"])).said == direct.said
    await exact.settled()
    assert await exact.entries() == []


@both
async def test_an_upstreams_error_passes_and_is_told_of_the_clients_own_request(exact, up, ask):
    await asking(ask, exact.url, ["seen"])
    await exact.settled()
    up.requests.clear()
    error = {"error": {"code": 400, "message": "too long", "status": "INVALID_ARGUMENT"}}
    up.script(*[Json(400, error if ask is by_gemini else {"error": "too long"})] * 2)
    with pytest.raises((ollama.ResponseError, genai.errors.APIError), match="too long"):
        await asking(ask, exact.url, ["seen", "new"])
    assert inputs(up) == [["new"], ["seen", "new"]]
