"""Upstreams that name their models are sent nothing else, whatever carries the model's name, or none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import pytest

from proxy.request.reading import Caller
from tests.flows.batching import QUICK, ended, hand_in, line, rows, sdk
from tests.flows.running import CHAT, KEY_ENV, Ibid, running, until
from tests.upstream import Body, ScriptedUpstream, Seen

ASKED = [{"role": "user", "content": "What is a hose?"}]
SAID = [{"role": "user", "parts": [{"text": "What is a hose?"}]}]
NAMES = ("gpt-x", "my-x")


class Carrier(NamedTuple):
    """A request that names a model in its own way: `MODEL` stands for it in the path, and in the body."""

    path: str
    body: Any = None
    headers: Mapping[str, str] = {}
    dialect: str = "openai"


def form(*parts: tuple[str, bytes]) -> Any:
    """A multipart form, its parts in this order."""
    made = aiohttp.FormData(quote_fields=False)
    for name, value in parts:
        if name in ("file", "image[]"):
            made.add_field(name, value * 40_000, filename="x.bin", content_type="application/octet-stream")
        else:
            made.add_field(name, value.decode())
    return made


VERSION = {"anthropic-version": "2023-06-01"}
CARRIERS = {
    "chat": Carrier(CHAT, {"model": "MODEL", "messages": ASKED}),
    "chat, streamed": Carrier(CHAT, {"model": "MODEL", "messages": ASKED, "stream": True}),
    "chat, under an alias": Carrier(CHAT, {"model": "MODEL@exact", "messages": ASKED}),
    "chat, never stored": Carrier(CHAT, {"model": "MODEL", "messages": ASKED}, {"Cache-Control": "no-store"}),
    "chat, hedged": Carrier(CHAT, {"model": "MODEL", "messages": ASKED}, {"x-plan": "+hedge,+prefix"}),
    "completions": Carrier("/v1/completions", {"model": "MODEL", "prompt": "What is a hose?"}),
    "responses": Carrier("/v1/responses", {"model": "MODEL", "input": "What is a hose?"}),
    "embeddings": Carrier("/v1/embeddings", {"model": "MODEL", "input": ["a hose"]}),
    "deployment": Carrier("/openai/deployments/MODEL/chat/completions?api-version=1", {"messages": ASKED}),
    "deployment, embeddings": Carrier("/openai/deployments/MODEL/embeddings", {"input": "a hose"}),
    "deployment, passed": Carrier("/openai/deployments/MODEL/images/generations", {"prompt": "a hose"}),
    "images, passed": Carrier("/v1/images/generations", {"model": "MODEL", "prompt": "a hose"}),
    "form, model first": Carrier("/v1/audio/transcriptions", [("model", b"MODEL"), ("file", b"ab")]),
    "form, model last": Carrier("/v1/audio/transcriptions", [("file", b"ab"), ("model", b"MODEL")]),
    "form, other files": Carrier("/v1/images/edits", [("image[]", b"ab"), ("image[]", b"cd"), ("model", b"MODEL")]),
    "messages": Carrier("/v1/messages", {"model": "MODEL", "messages": ASKED, "max_tokens": 9}, VERSION, "anthropic"),
    "count_tokens, passed": Carrier(
        "/v1/messages/count_tokens", {"model": "MODEL", "messages": ASKED}, VERSION, "anthropic"
    ),
    "gemini": Carrier("/v1beta/models/MODEL:generateContent", {"contents": SAID}, {}, "gemini"),
    "gemini, embeddings": Carrier(
        "/v1beta/models/MODEL:embedContent", {"content": {"parts": [{"text": "a hose"}]}}, {}, "gemini"
    ),
    "gemini, passed": Carrier("/v1beta/models/MODEL:countTokens", {"contents": SAID}, {}, "gemini"),
    "ollama": Carrier("/api/chat", {"model": "MODEL", "messages": ASKED, "stream": False}, {}, "ollama"),
    "ollama, passed": Carrier("/api/show", {"model": "MODEL"}, {}, "ollama"),
}
NAMELESS = {
    "chat without model": Carrier(CHAT, {"messages": ASKED}),
    "chat, empty": Carrier(CHAT, {"model": "", "messages": ASKED}),
    "images without model": Carrier("/v1/images/generations", {"prompt": "a hose"}),
    "form without model": Carrier("/v1/audio/transcriptions", [("file", b"ab")]),
    "a file": Carrier("/v1/files", [("purpose", b"fine-tune"), ("file", b"{}")]),
    "a batch of the provider": Carrier("/v1/batches", {"input_file_id": "file-theirs", "endpoint": CHAT}),
    "somebody's JSON under another name": Carrier("/v1/images/generations", b'{"model":"gpt-x","prompt":"a hose"}'),
    "embeddings of a whole model": Carrier("/api/pull", {"name": "mistral-large"}, {}, "ollama"),
}


class World(NamedTuple):
    ibid: Ibid
    gpt: ScriptedUpstream
    my: ScriptedUpstream

    async def send(self, carrier: Carrier, model: str, **headers: str) -> tuple[int, str]:
        path = carrier.path.replace("MODEL", model)
        asked = {"Authorization": "Bearer sk-client", **carrier.headers, **headers}
        match carrier.body:
            case list():
                parts = [(name, value.replace(b"MODEL", model.encode())) for name, value in carrier.body]
                body: dict[str, Any] = {"data": form(*parts)}
            case bytes():
                body = {"data": carrier.body}
            case _:
                body = {"json": json.loads(json.dumps(carrier.body).replace("MODEL", model))}
        async with self.ibid.session.post(self.ibid.url + path, headers=asked, **body) as reply:
            return reply.status, await reply.text()


@asynccontextmanager
async def divided(tmp_path, *, lab: str = "my-*", **more: Mapping[str, Any]) -> AsyncIterator[World]:
    """Of each dialect one upstream for `gpt-*` and one for `my-*`, both with a key of the operator's."""
    dialects = ("openai", "anthropic", "gemini", "ollama")
    async with ScriptedUpstream(lambda seen: echo(seen)) as gpt, ScriptedUpstream(lambda seen: echo(seen)) as my:
        gpt.vectors = my.vectors = lambda seen: echo(seen)
        own = {f"upstream.{name}": {"models": ["gpt-*"], "key_env": KEY_ENV} for name in dialects}
        labs = {
            f"upstream.lab-{name}": {"base_url": my.url, "dialect": name, "models": [lab], "key_env": KEY_ENV}
            for name in dialects
        }
        async with running(tmp_path / "data", gpt.url, {**QUICK, **own, **labs, **more}) as ibid:
            yield World(ibid, gpt, my)


def echo(seen: Seen) -> Body:
    return Body(body=b'{"object": "whatever"}')


@pytest.mark.parametrize("carrier", [*CARRIERS.values()], ids=[*CARRIERS])
async def test_a_model_goes_where_it_is_named_and_nowhere_else(tmp_path, carrier: Carrier) -> None:
    async with divided(tmp_path) as world:
        for _ in range(2):  # the second time from what was remembered
            status, body = await world.send(carrier, "mistral-large")
            assert (status, "model_not_served" in body) == (404, True), (status, body[:300], world.gpt.requests)
        assert world.gpt.requests == world.my.requests == []
        assert (await world.send(carrier, "my-x"))[0] == 200
        assert (len(world.gpt.requests), len(world.my.requests)) == (0, 1)
        assert (await world.send(carrier, "gpt-x"))[0] == 200
        assert (len(world.gpt.requests), len(world.my.requests)) == (1, 1)
        for server, model in ((world.gpt, b"gpt-x"), (world.my, b"my-x")):
            (seen,) = server.requests
            assert model in seen.path.encode() + seen.body, "what was read on the way is sent whole"


@pytest.mark.parametrize("carrier", [*NAMELESS.values()], ids=[*NAMELESS])
async def test_what_names_no_model_goes_to_no_upstream_that_names_its_models(tmp_path, carrier: Carrier) -> None:
    async with divided(tmp_path) as world:
        status, body = await world.send(carrier, "")
        assert status in (400, 404), (status, body[:300])
        assert any(code in body for code in ("model_not_served", "invalid_type")), body[:300]
        assert world.gpt.requests == world.my.requests == []


async def test_reading_and_deleting_name_no_model_and_are_served(tmp_path) -> None:
    async with divided(tmp_path) as world:
        for method, path in (("GET", "/v1/models"), ("DELETE", "/v1/files/file-x")):
            headers = {"Authorization": "Bearer sk-a"}
            async with world.ibid.session.request(method, world.ibid.url + path, headers=headers) as reply:
                assert reply.status == 200
        assert (len(world.gpt.requests), world.my.requests) == (2, [])


async def test_an_open_upstream_takes_what_no_other_names_also_of_what_passes_through(tmp_path) -> None:
    openai = {"models": [], "key_env": KEY_ENV}
    async with divided(tmp_path, **{"upstream.openai": openai}) as world:
        for name in ("chat", "images, passed", "form, model last"):
            carrier = CARRIERS[name]
            before = len(world.gpt.requests), len(world.my.requests)
            assert [(await world.send(carrier, model))[0] for model in ("mistral-large", "my-x")] == [200, 200]
            assert (len(world.gpt.requests), len(world.my.requests)) == (before[0] + 1, before[1] + 1), name
        assert (await world.send(NAMELESS["a file"], ""))[0] == 200
        assert b"fine-tune" in world.gpt.requests[-1].body


async def test_a_socket_goes_where_its_model_is_named(tmp_path) -> None:
    async with divided(tmp_path) as world:
        for query, status in (("?model=mistral-large", 404), ("", 404)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await world.ibid.session.ws_connect(
                    world.ibid.url + "/v1/realtime" + query, headers={"Authorization": "Bearer sk-a"}
                )
            assert refused.value.status == status
        assert world.gpt.requests == world.my.requests == []
        with pytest.raises(aiohttp.WSServerHandshakeError):  # the scripted server shakes no hands
            await world.ibid.session.ws_connect(
                world.ibid.url + "/v1/realtime?model=my-x", headers={"Authorization": "Bearer sk-a"}
            )
        assert (len(world.gpt.requests), len(world.my.requests)) == (0, 1)


async def test_two_models_in_one_form_are_refused(tmp_path) -> None:
    async with divided(tmp_path) as world:
        twice = Carrier("/v1/audio/transcriptions", [("model", b"my-x"), ("file", b"ab"), ("model", b"gpt-x")])
        status, body = await world.send(twice, "")
        assert (status, "duplicate_key" in body) == (400, True), body
        assert world.gpt.requests == world.my.requests == []


async def test_a_batch_line_of_an_unserved_model_is_an_error_line_and_the_others_are_answered(tmp_path) -> None:
    async with divided(tmp_path) as world:
        for server in (world.gpt, world.my):
            server.default = lambda seen: Body(body=b'{"object": "whatever"}') if "chat" in seen.path else Body(404)
        async with sdk(world.ibid) as client:
            lines = [line(model, "What is a hose?", model=model) for model in (*NAMES, "mistral-large")]
            batch = await ended(client, await hand_in(client, lines))
            refused = (await rows(client, batch.error_file_id))["mistral-large"]["response"]
        assert (refused["status_code"], refused["body"]["error"]["code"]) == (404, "model_not_served")
        for server, model in ((world.gpt, "gpt-x"), (world.my, "my-x")):
            assert [seen.json["model"] for seen in server.requests if "chat" in seen.path] == [model]


async def test_a_virtual_key_opens_no_more_models_than_the_upstreams_name(tmp_path) -> None:
    async with divided(tmp_path) as world:
        for held in ({}, {"models": ["*"]}, {"models": ["mistral-*", "my-*"]}):
            made = await world.ibid.admin("POST", "/cache/keys", {"project": "red", **held})
            for name in ("chat", "images, passed", "form, model last"):
                refused = await world.send(CARRIERS[name], "mistral-large", Authorization=f"Bearer {made['secret']}")
                assert (refused[0], "model_not_served" in refused[1]) == (404, True), (name, refused)
                taken = await world.send(CARRIERS[name], "my-x", Authorization=f"Bearer {made['secret']}")
                assert taken[0] == 200, (name, taken)
        assert world.gpt.requests == []


async def test_the_judges_model_is_asked_of_no_upstream_that_does_not_name_it(tmp_path) -> None:
    """`cache.judge_model` is a model of the upstream that answered; where that does not name it, nobody judges."""
    async with divided(tmp_path, cache={**QUICK["cache"], "judge_model": "gpt-judge"}) as world:
        pipeline = world.ibid.app.pipeline
        arbiter, reader = pipeline.auditor._arbiter, pipeline.errands.router._reader
        assert arbiter is not None
        caller = Caller("t", (), (), is_json=True, is_retry=False)
        for model in ("my-x", "gpt-x"):
            query = reader.read(reader.target(CHAT), caller, json.dumps({"model": model, "messages": ASKED}).encode())
            verdict = await arbiter.compare(query, (), "r", answer="a", kept_prompt="b", kept_answer="c")
            assert verdict is None
        assert (len(world.gpt.requests), len(world.my.requests)) == (1, 0)


async def test_an_explained_request_of_an_unserved_model_is_refused_too(tmp_path) -> None:
    async with divided(tmp_path) as world:
        headers = {"Authorization": "Bearer flow-tests-admin-token-0123456789abcdef"}
        asked = world.ibid.session.post(
            world.ibid.admin_url + "/cache/explain", json={"model": "mistral-large", "messages": ASKED}, headers=headers
        )
        async with asked as reply:
            assert (reply.status, "model_not_served" in await reply.text()) == (404, True)
        await until(lambda: world.gpt.requests == world.my.requests == [])
