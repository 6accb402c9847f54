"""Habits of everyday clients that work without ibid and must work through it: pages in a browser, passwords, missing
names, programs that ask a server's root."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.edge.faults_app import BEARER, KEY, Running, ibid, question, request, serving, up
from tests.edge.faults_wire import DONE, ONE, ROLE, STOP, TWO, whole
from tests.upstream import Body, Chat, Json, Reply, ScriptedUpstream, Seen, Stream

__all__ = ["ibid", "up"]  # fixtures

# --- pages in a browser -------------------------------------------------------------------------------------------

PAGE = "http://localhost:5173"
ASKING = (f"Origin: {PAGE}", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
PATHS = [
    "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/models", "/api/chat", "/api/tags",
    "/v1beta/models/g:generateContent", "/v1/files", "/v1/batches", "/anything/else",
]  # fmt: skip


def allowing(origin: str) -> dict[str, str]:
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "x-ratelimit"}


def open_to(origin: str) -> object:
    """An upstream that lets this origin read it, or any: "*", or each that asks: ""."""

    def answer(seen: Seen) -> Reply:
        headers = allowing(origin or seen.header("origin") or "null")
        if seen.method == "OPTIONS":
            return Body(204, b"", headers=headers)
        if b'"stream": true' in seen.body:
            return Stream([ROLE, ONE, TWO, STOP, DONE], headers=headers)
        return Json(200, whole(), headers)

    return answer


@pytest.mark.parametrize("target", PATHS)
async def test_a_preflight_without_credential_reaches_the_upstream(ibid: Running, target: str) -> None:
    ibid.up.default = open_to("*")  # type: ignore[assignment]
    ibid.up.vectors = ibid.up.default
    ibid.up.script(ibid.up.default)
    reply = await ibid.ask(b"", *ASKING, method="OPTIONS", target=target, credential=None, content_type=None)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, "*")
    assert (ibid.up.requests[0].method, ibid.up.requests[0].path) == ("OPTIONS", target)
    assert ibid.up.requests[0].header("access-control-request-headers") == "authorization"


async def test_what_only_looks_like_a_preflight_still_needs_a_credential(ibid: Running) -> None:
    for lines in ((), ASKING[:1], ASKING[1:]):
        reply = await ibid.ask(b"", *lines, method="OPTIONS", target="/v1/models", credential=None, content_type=None)
        assert reply.status == 401
    reply = await ibid.ask(b"", *ASKING, method="GET", target="/v1/models", credential=None, content_type=None)
    assert reply.status == 401
    assert ibid.asked == 0


async def test_a_preflight_shows_an_upstream_no_key(tmp_path: Path, up: ScriptedUpstream) -> None:
    up.script(Body(204, b"", headers=allowing("*")))
    async with serving(tmp_path, up) as ibid:
        await ibid.ask(b"", *ASKING, method="OPTIONS", target="/v1/models", content_type=None)
        assert up.requests[0].header("authorization") is None


@pytest.mark.parametrize("origin", ["*", PAGE, ""])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_hit_and_an_error_of_ours_carry_what_the_miss_carried(ibid: Running, stream: bool, origin: str) -> None:
    ibid.up.default = open_to(origin)  # type: ignore[assignment]
    body, page = question(stream=stream), f"Origin: {PAGE}"
    missed = await ibid.ask(body, page)
    await ibid.settled()
    hit = await ibid.ask(body, page)
    refused = await ibid.ask(body, page, credential=None)
    assert (hit.is_hit, refused.status) == (True, 401)
    for reply in (missed, hit, refused):
        assert reply.headers["access-control-allow-origin"] == (origin or PAGE)
        assert reply.headers["access-control-expose-headers"] == "x-ratelimit"
    plain = await ibid.ask(body)
    assert plain.is_hit
    assert "access-control-allow-origin" not in plain.headers, "no page asked"


async def test_what_one_origin_may_read_another_may_not(ibid: Running) -> None:
    ibid.up.default = open_to("")  # type: ignore[assignment]
    await ibid.ask(None, f"Origin: {PAGE}")
    await ibid.settled()
    other = await ibid.ask(None, "Origin: http://evil.example")
    assert other.is_hit
    assert "access-control-allow-origin" not in other.headers
    asked = ("Origin: http://other.example", *ASKING[1:])
    ibid.up.script(ibid.up.default)
    await ibid.ask(b"", *asked, method="OPTIONS", credential=None, content_type=None)
    let = await ibid.ask(None, "Origin: http://other.example")
    assert (let.is_hit, let.headers["access-control-allow-origin"]) == (True, "http://other.example")


async def test_an_upstream_that_lets_nobody_is_left_to_it(ibid: Running) -> None:
    for _ in range(2):
        reply = await ibid.ask(None, f"Origin: {PAGE}")
        assert "access-control-allow-origin" not in reply.headers
        await ibid.settled()
    assert "access-control-allow-origin" not in (await ibid.ask(b"{", f"Origin: {PAGE}")).headers


async def test_origins_that_the_operator_names_read_everything(tmp_path: Path, up: ScriptedUpstream) -> None:
    toml = '[server]\ncors_origins = ["http://localhost:*", "https://app.example"]\n[cache]\nsemantic = false\n'
    async with serving(tmp_path, up, toml) as ibid:
        reply = await ibid.ask(b"", *ASKING, method="OPTIONS", credential=None, content_type=None)
        assert (reply.status, up.requests) == (204, [])
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert reply.headers["access-control-allow-headers"] == "authorization"
        assert reply.headers["access-control-allow-methods"] == "POST"
        up.default = Chat(headers=allowing("http://someone.else"))
        for stream in (False, True):
            for _ in range(2):
                answered = await ibid.ask(question(stream=stream), f"Origin: {PAGE}")
                assert [line for line in answered.lines if line.lower().startswith("access-control-allow-origin")] == [
                    f"Access-Control-Allow-Origin: {PAGE}"
                ]
                await ibid.settled()
        refused = await ibid.ask(None, f"Origin: {PAGE}", credential=None)
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        other = await ibid.ask(None, "Origin: http://evil.example")
        assert other.headers.get("access-control-allow-origin") != "http://evil.example"


# --- who asks, and for what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/models"])
@pytest.mark.parametrize("size", [4, 3000])
async def test_a_password_travels_and_is_a_tenant_of_its_own(ibid: Running, target: str, size: int) -> None:
    basic = "Authorization: Basic " + base64.b64encode(b"user:" + b"p" * size).decode()
    how = {} if target.endswith("completions") else {"body": b"", "method": "GET", "content_type": None}
    assert (await ibid.ask(credential=basic, target=target, **how)).status == 200  # type: ignore[arg-type]
    assert ibid.up.requests[-1].header("authorization") == basic.partition(": ")[2]
    if target.endswith("completions"):
        await ibid.settled()
        assert (await ibid.ask(credential=basic)).is_hit
        assert not (await ibid.ask()).is_hit


@pytest.mark.parametrize("size", [4_200, 8_100])
async def test_a_long_token_travels(ibid: Running, size: int) -> None:
    for line in (f"Authorization: Bearer {'e' * size}", f"api-key: {'e' * size}"):
        assert (await ibid.ask(credential=line)).status == 200


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("target", ["/", "/api/tags", "/api/version", "/api/ps"])
async def test_ollamas_root_and_lists_need_no_key(ibid: Running, method: str, target: str) -> None:
    ibid.up.script(Body(200, b"Ollama is running", "text/plain"))
    reply = await ibid.ask(b"", method=method, target=target, credential=None, content_type=None)
    assert reply.status == 200
    assert (await ibid.ask(b"", method="GET", target="/v1/models", credential=None, content_type=None)).status == 401


@pytest.mark.parametrize("target", ["/api/me", "/api/show", "/api/signout"])
async def test_so_do_its_posts_with_or_without_a_body(ibid: Running, target: str) -> None:
    for body in (b"", b'{"model":"m"}'):
        ibid.up.script(Json(200, {}))
        assert (await ibid.ask(body, target=target, credential=None, content_type=None)).status == 200


NAMELESS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Which river runs through Lyon?"}]},
    "/v1/completions": {"prompt": "Lyon lies on"},
    "/v1/embeddings": {"input": "Lyon"},
    "/v1/responses": {"input": "Lyon lies on", "store": False},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "Which river runs through Lyon?"}]},
}
ANSWERS = {
    "/v1/chat/completions": whole(),
    "/v1/completions": {"model": "m", "choices": [{"index": 0, "text": "one two", "finish_reason": "stop"}]},
    "/v1/embeddings": {"object": "list", "model": "m", "data": [{"index": 0, "embedding": [0.5]}]},
    "/v1/responses": {
        "status": "completed", "model": "m",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one two"}]}],
    },
    "/v1/messages": {
        "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "one two"}], "usage": {"input_tokens": 3, "output_tokens": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"model": ""}, {"model": None}])
@pytest.mark.parametrize("target", NAMELESS)
async def test_a_server_of_one_model_needs_no_name_and_is_found_exactly(
    ibid: Running, target: str, more: dict[str, str | None]
) -> None:
    body = json.dumps({**NAMELESS[target], **more}).encode()
    ibid.up.script(Json(200, ANSWERS[target]))
    assert (await ibid.ask(body, target=target)).status == 200
    assert json.loads(ibid.up.requests[0].body).get("model") == more.get("model")
    await ibid.settled()
    assert (await ibid.ask(body, target=target)).is_hit


# --- the way there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 2_000_000])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_behind_a_proxy_is_asked_through_it(
    tmp_path: Path, up: ScriptedUpstream, stream: bool, size: int
) -> None:
    address = up.url.replace("http://", "http://user:secret@")
    toml = f'[forward]\nproxy = "{address}"\n[cache]\nsemantic = false\n'
    body = question(stream=stream, filler="x" * size)
    async with serving(tmp_path, up, toml, url="http://llm-provider.test:8000") as ibid:
        assert (await ibid.ask(body)).status == 200
        (seen,) = up.requests
        assert (seen.header("host"), seen.path) == ("llm-provider.test:8000", "/v1/chat/completions")
        assert seen.header("proxy-authorization") == "Basic " + base64.b64encode(b"user:secret").decode()
        assert seen.header("authorization") == f"Bearer {KEY}"
        await ibid.settled()
        assert (await ibid.ask(body)).is_hit
        models = await ibid.ask(b"", method="GET", target="/v1/models", content_type=None)
        assert models.status == 200


async def test_a_proxy_that_is_not_there_is_an_upstream_that_is_not(tmp_path: Path, up: ScriptedUpstream) -> None:
    toml = '[forward]\nproxy = "http://127.0.0.1:9"\n[cache]\nsemantic = false\n'
    async with serving(tmp_path, up, toml, url="https://llm-provider.test") as ibid:
        reply = await ibid.ask()
        assert (reply.status, reply.code) == (502, "upstream_unreachable")


async def test_a_tunnel_that_is_refused_is_too(tmp_path: Path, up: ScriptedUpstream) -> None:
    toml = f'[forward]\nproxy = "{up.url}"\n[cache]\nsemantic = false\n'
    async with serving(tmp_path, up, toml, url="https://llm-provider.test") as ibid:
        up.script(Body(403, b"no"))
        reply = await ibid.ask()
        assert (reply.status, reply.code) == (502, "upstream_unreachable")
        assert up.requests[0].method == "CONNECT"


# --- names of models, cookies, search -------------------------------------------------------------------------------


async def test_a_deployment_answers_as_what_it_is(ibid: Running) -> None:
    ibid.up.default = Chat(model="gpt-4o-2024-08-06")
    target = "/openai/deployments/prod-chat/chat/completions?api-version=2024-06-01"
    await ibid.ask(target=target)
    await ibid.settled()
    assert (await ibid.ask(target=target)).is_hit


async def test_another_name_is_learnt_once_it_is_always_given(ibid: Running) -> None:
    ibid.up.default = Chat(model="vendor-large-v7")
    asked = [question(f"Question of an alias, number {n}?") for n in range(4)]
    for body in asked:
        await ibid.ask(body)
        await ibid.settled()
    assert not (await ibid.ask(asked[0])).is_hit, "once may be chance"
    assert (await ibid.ask(asked[1])).is_hit
    ibid.up.default = Chat(model="vendor-small-v2")
    other = question("And when it is routed elsewhere?")
    await ibid.ask(other)
    await ibid.settled()
    assert not (await ibid.ask(other)).is_hit, "another name is not that of the model asked"


COOKIES = [
    "AWSALB", "AWSELBCORS", "ARRAffinity", "__cf_bm", "INGRESSCOOKIE", "route", "SERVERID", "GCLB", "srv_id",
    "ApplicationGatewayAffinity", "ApplicationGatewayAffinityCORS", "BIGipServerpool_x", "NSC_abc", "acw_tc", "ROUTEID",
    "incap_ses_1_2", "DO-LB", "ASLBSA",
]  # fmt: skip


@pytest.mark.parametrize("name", COOKIES)
async def test_a_balancers_cookie_does_not_keep_an_answer_from_being_stored(ibid: Running, name: str) -> None:
    ibid.up.default = Chat(headers={"Set-Cookie": f"{name}=abc; Path=/; HttpOnly"})
    first = await ibid.ask()
    await ibid.settled()
    hit = await ibid.ask()
    assert hit.is_hit
    assert b"set-cookie" not in (first.raw + hit.raw).lower()


SEARCHING = {
    "options": {"web_search_options": {}}, "search model": {"model": "gpt-4o-search-preview"},
    "plugin": {"plugins": [{"id": "web"}]}, "online": {"model": "m:online"},
    "xAI": {"search_parameters": {"mode": "on"}},
    "Qwen": {"enable_search": True}, "Perplexity": {"model": "perplexity/sonar-pro"},
    "Azure": {"data_sources": [{"type": "azure_search"}]}, "browser": {"tools": [{"type": "browser_search"}]},
    "OpenRouter tool": {"tools": [{"type": "openrouter:web_search"}]}, "GLM": {"web_search": {"enable": True}},
    "Moonshot": {"tools": [{"type": "builtin_function", "function": {"name": "$web_search"}}]},
    "Groq": {"model": "groq/compound-mini"}, "Cohere": {"connectors": [{"id": "web-search"}]},
    "research": {"model": "o4-mini-deep-research"}, "Gemini by its own name": {"tools": [{"googleSearch": {}}]},
    "configured model": {"model": "house-oracle-7"}, "configured field": {"look_it_up": "yes"},
}  # fmt: skip
NOT_SEARCHING = {
    "xAI off": {"search_parameters": {"mode": "off"}}, "Qwen off": {"enable_search": False},
    "file parser": {"plugins": [{"id": "file-parser"}]}, "no plugin": {"plugins": []},
    "plugin off": {"plugins": [{"id": "web", "enabled": False}]}, "GLM off": {"web_search": {"enable": False}},
    "function": {"tools": [{"type": "function", "function": {"name": "web_search", "parameters": {}}}]},
    "nearly": {"model": "research-m"}, "null": {"web_search_options": None},
}  # fmt: skip
TABLES = '[cache]\nsemantic = false\nsearch_models = ["house-oracle-*"]\nsearch_fields = ["look_it_up"]\n'


@pytest.mark.parametrize("name", [*SEARCHING, *NOT_SEARCHING])
async def test_search_is_known_by_every_name(tmp_path: Path, up: ScriptedUpstream, name: str) -> None:
    async with serving(tmp_path, up, TABLES) as ibid:
        body = question(f"What do the papers say of {name}?", **(SEARCHING.get(name) or NOT_SEARCHING[name]))
        await ibid.ask(body)
        await ibid.settled()
        again = await ibid.ask(body)
        assert again.is_hit is (name in NOT_SEARCHING)
        if name in SEARCHING:
            assert again.headers["x-cache-reason"] == "web_search"


FOUND = {
    "annotations": {"message": {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://x"}}]}},
    "citations": {"citations": ["https://x"]},
    "search_results": {"search_results": [{"url": "https://x"}]},
}


@pytest.mark.parametrize("name", FOUND)
async def test_an_answer_that_cites_what_was_found_is_not_kept(ibid: Running, name: str) -> None:
    ibid.up.script(Json(200, whole(**FOUND[name])))
    await ibid.ask()
    await ibid.nothing_kept()


REMOTE = {
    "image": {"type": "image_url", "image_url": {"url": "https://cams.example/now"}},
    "video": {"type": "video_url", "video_url": {"url": "https://cams.example/now"}},
    "audio": {"type": "audio_url", "audio_url": {"url": "https://cams.example/now"}},
    "file": {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://cams.example/now"}},
    "bucket": {"type": "input_video", "source": {"uri": "gs://cams/now"}},
}


@pytest.mark.parametrize("name", REMOTE)
async def test_what_is_behind_an_address_is_not_kept(ibid: Running, name: str) -> None:
    parts = [{"type": "text", "text": "What is in it?"}, REMOTE[name]]
    body = question(messages=[{"role": "user", "content": parts}])
    await ibid.ask(body)
    await ibid.nothing_kept(body)


def test_the_credentials_are_what_they_are_called() -> None:
    assert KEY in BEARER
    assert request(b"")


# --- other methods on a path that is asked with POST ----------------------------------------------------------------

STORED = [
    ("GET", "/v1/chat/completions?limit=2"),  # stored completions
    ("GET", "/v1/responses"),
    ("DELETE", "/v1/responses"),
    ("HEAD", "/v1/messages"),
    ("GET", "/api/chat"),
    ("DELETE", "/v1/embeddings"),
    ("PATCH", "/v1beta/models/g:generateContent"),
    ("OPTIONS", "/v1/completions"),
]


@pytest.mark.parametrize(("method", "target"), STORED)
async def test_only_a_post_is_a_question_and_the_rest_passes(ibid: Running, method: str, target: str) -> None:
    ibid.up.default = ibid.up.vectors = Json(418, {"object": "list"})
    for _ in range(2):
        reply = await ibid.ask(b"", method=method, target=target)
        assert reply.status == 418
        assert not reply.is_hit
    assert [(seen.method, seen.path) for seen in ibid.up.requests] == [(method, target)] * 2
    assert ibid.up.requests[0].header("authorization") == BEARER.partition(": ")[2]
    assert await ibid.stored() == 0


async def test_a_question_is_still_answered_from_the_cache_on_that_path(ibid: Running) -> None:
    await ibid.ask()
    await ibid.settled()
    assert not (await ibid.ask(b"", method="GET")).is_hit
    assert (await ibid.ask()).is_hit


# --- a key alone in `Authorization` ---------------------------------------------------------------------------------


async def test_a_key_without_a_scheme_goes_on_as_it_came_and_is_a_tenant_like_others(ibid: Running) -> None:
    await ibid.ask(credential="Authorization: sk-alone-1")
    await ibid.settled()
    assert ibid.up.requests[0].header("authorization") == "sk-alone-1"
    assert (await ibid.ask(credential="Authorization: sk-alone-1")).is_hit
    assert not (await ibid.ask(credential="Authorization: sk-alone-2")).is_hit
    assert (await ibid.ask(credential="Authorization: Bearer")).status == 401
