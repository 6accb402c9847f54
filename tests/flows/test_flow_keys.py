"""Virtual keys: one project's entries and budget, whatever the SDK, the process or the moment of a restart."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from proxy.money.keys import KeyRing
from tests.edge.rawclient import RawClient
from tests.edge.rawclient import post as raw_post
from tests.flows.running import CHAT, KEYED, MODEL, ROOT, TOKEN, UPSTREAM_KEY, Client, Ibid, running, serving, until
from tests.providers import provider
from tests.upstream import Chat, Json, ScriptedUpstream
from tests.waiting import PATIENCE_S

SECRET = re.compile(r"ibid-[0-9a-f]{48}")


async def make(ibid: Client, project: str = "red", **wanted: Any) -> dict[str, Any]:
    return await ibid.admin("POST", "/cache/keys", {"project": project, **wanted})


async def shown(ibid: Client, made: dict[str, Any]) -> dict[str, Any]:
    return await ibid.admin("GET", f"/cache/keys/{made['id']}")


async def refusals(ibid: Client, code: str) -> int:
    """How often ibid refused with this code: how many requests the client really sent."""
    told = await ibid.admin("GET", "/metrics")
    found = re.search(rf'^ibid_refused_total\{{code="{code}"\}} (\d+)', told, re.MULTILINE)
    return 0 if found is None else int(found[1])


def price_of(nusd: int) -> str:
    return f"{nusd // 10**9}.{nusd % 10**9:09d}"


def ibid_keys(data_dir: Path, *arguments: str, admin: str | None = None, database: str | None = None) -> Any:
    """`ibid keys … --json`, as an operator runs it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
    command = [sys.executable, "-m", "proxy", "keys", *arguments, "--json", "--data-dir", str(data_dir)]
    if admin:
        command += ["--admin", admin]
        env["IBID_ADMIN_TOKEN"] = TOKEN
    if database:
        command += ["--database", database]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
async def keyed(data_dir, up):
    async with running(data_dir, up.url, KEYED) as ibid:
        yield ibid


# --- who may ask, and whose entries ---------------------------------------------------------------------------------


async def test_two_keys_of_a_project_share_entries_and_two_projects_never_do(keyed: Ibid, up):
    one, other, blue = [await make(keyed, project) for project in ("red", "red", "blue")]
    first = await keyed.ask("What is a hose?", key=one["secret"])
    assert (first.status, first.cache) == (200, "MISS")
    await keyed.settled()
    shared = await keyed.ask("What is a hose?", key=other["secret"])
    assert (shared.cache, shared.text) == ("HIT", first.text)
    for key in (blue["secret"], "sk-passed-through"):
        assert (await keyed.ask("What is a hose?", key=key)).cache == "MISS"
    await keyed.settled()
    assert len({entry["tenant"] for entry in await keyed.entries()}) == 3
    assert one["tenant"] == other["tenant"] != blue["tenant"]
    rows = await keyed.sql("SELECT key_id, team, lane, tenant FROM request ORDER BY ts, lane")
    assert [(row["key_id"], row["team"]) for row in rows] == [
        (one["id"], "red"), (other["id"], "red"), (blue["id"], "blue"), (None, "")
    ]  # fmt: skip
    spent = await keyed.sql("SELECT team, requests FROM savings_by_tenant ORDER BY team")
    assert [(row["team"], row["requests"]) for row in spent] == [("", 1), ("blue", 1), ("red", 2)]
    showback = (await keyed.admin("POST", "/savings/query", {"name": "showback"}))["rows"]
    assert {row[0]: row[1] for row in showback} == {"red": 2, "blue": 1, rows[3]["tenant"]: 1}


async def test_hits_of_two_keys_on_one_entry_are_booked_on_each(keyed: Ibid):
    one, other = await make(keyed), await make(keyed)
    await keyed.ask("What is a hose?", key=one["secret"])
    await keyed.settled()
    for made in (one, other, other, one, other):
        assert (await keyed.ask("What is a hose?", key=made["secret"])).cache == "HIT"
    rows = await keyed.sql("SELECT key_id, COUNT(*) AS n FROM request WHERE lane = 'cache.exact' GROUP BY key_id")
    assert {row["key_id"]: row["n"] for row in rows} == {one["id"]: 2, other["id"]: 3}


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key", "x-goog-api-key", "?key="])
async def test_a_key_opens_in_every_header_and_never_goes_upstream(keyed: Ibid, up, header):
    secret = (await make(keyed))["secret"]
    headers = {"Content-Type": "application/json"}
    target = CHAT
    if header == "?key=":
        target = f"{CHAT}?key={secret}"
    else:
        headers[header] = f"Bearer {secret}" if header == "Authorization" else secret
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is a hose?"}]}
    async with keyed.session.post(keyed.url + target, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
    async with keyed.session.get(keyed.url + target.replace("chat/completions", "models"), headers=headers) as response:
        assert response.status == 200, await response.text()
    assert len(up.requests) == 2
    for seen in up.requests:
        assert SECRET.search(f"{seen.path} {seen.headers} {seen.body!r}") is None
        sent = (seen.header("Authorization"), seen.header("x-goog-api-key"))
        assert sent in ((f"Bearer {UPSTREAM_KEY}", None), (None, UPSTREAM_KEY))


async def test_a_key_in_the_query_rules_even_beside_a_known_credential(keyed: Ibid, up):
    secret = (await make(keyed))["secret"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is a hose?"}]}
    headers = {"Authorization": "Bearer sk-known"}
    async with keyed.session.post(keyed.url + CHAT, json=body, headers=headers) as response:
        assert response.status == 200
    async with keyed.session.post(f"{keyed.url}{CHAT}?key={secret}", json=body, headers=headers) as response:
        assert (response.status, response.headers["x-cache"]) == (200, "MISS")
    assert SECRET.search(str([(seen.path, seen.headers) for seen in up.requests])) is None
    headers = {"x-goog-api-key": "other"}
    async with keyed.session.post(f"{keyed.url}{CHAT}?key={secret}", json=body, headers=headers) as response:
        assert response.status == 200
    teams = await keyed.sql("SELECT team FROM request ORDER BY ts")
    assert [row["team"] for row in teams] == ["", "red", "red"]


PATHS = {
    "openai": CHAT,
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/gemini-2.5-flash:generateContent",
    "ollama": "/api/chat",
    "passing": "/v1/files",
}


@pytest.mark.parametrize("dialect", PATHS)
async def test_an_unknown_key_is_401_in_every_dialect_and_not_worth_a_retry(keyed: Ibid, up, dialect):
    headers = {"Authorization": "Bearer ibid-" + "0" * 48}
    async with keyed.session.post(keyed.url + PATHS[dialect], json={"model": "m"}, headers=headers) as response:
        told = await response.json()
        assert (response.status, response.headers["x-should-retry"]) == (401, "false")
    error = told["error"]
    match dialect:
        case "anthropic":
            assert (told["type"], error["type"], error["code"]) == ("error", "authentication_error", "invalid_api_key")
        case "gemini":
            assert (error["code"], error["status"]) == (401, "UNAUTHENTICATED")
        case "ollama":
            assert (error, told["code"]) == ("No such ibid key.", "invalid_api_key")
        case _:
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert up.requests == []


async def test_an_upstream_without_a_key_of_its_own_is_not_opened(data_dir, up):
    async with running(data_dir, up.url, {"cache": {"semantic": False}}) as ibid:
        secret = (await make(ibid))["secret"]
        for ask in (ibid.ask("What is a hose?", key=secret), get(ibid, "/v1/models", secret)):
            reply = await ask
            status, body = (reply.status, reply.json) if not isinstance(reply, tuple) else reply
            assert (status, body["error"]["code"]) == (403, "upstream_without_key")
            assert "upstream.openai.key_env" in body["error"]["message"]
        assert up.requests == []
        assert (await ibid.ask("What is a hose?", key="sk-passed")).status == 200


async def test_where_only_keys_are_served_nothing_else_spends_the_upstreams_key(data_dir, up):
    async with running(data_dir, up.url, {**KEYED, "server": {"keys_only": True}}) as ibid:
        secret = (await make(ibid))["secret"]
        for key in ("sk-anything", secret + "0", "x"):
            assert (await ibid.ask("What is a hose?", key=key)).json["error"]["code"] == "invalid_api_key"
        assert (await get(ibid, "/v1/models", "sk-anything"))[0] == 401
        async with ibid.session.post(f"{ibid.url}/api/chat", json={"model": "m", "messages": []}) as response:
            assert response.status == 401
        assert up.requests == []
        assert (await ibid.ask("What is a hose?", key=secret)).status == 200


async def get(ibid: Client, path: str, key: str) -> tuple[int, Any]:
    async with ibid.session.get(ibid.url + path, headers={"Authorization": f"Bearer {key}"}) as response:
        return response.status, await response.json()


async def post(ibid: Client, path: str, key: str, body: Any, **headers: str) -> tuple[int, Any]:
    sent = {"Authorization": f"Bearer {key}", **headers}
    data = {"data": body} if isinstance(body, bytes) else {"json": body}
    async with ibid.session.post(ibid.url + path, headers=sent, **data) as response:
        return response.status, json.loads(await response.read() or b"null")


# --- what it may ask ------------------------------------------------------------------------------------------------


async def test_other_models_are_403_wherever_they_are_named(keyed: Ibid, up):
    secret = (await make(keyed, models=["gpt-4o*", "gemini-*-flash"]))["secret"]
    up.default = lambda seen: Json(200, {"ok": True}) if "/chat/" not in seen.path else Chat()
    assert (await keyed.ask("What is a hose?", key=secret)).status == 200
    allowed = [
        ("/v1/moderations", {"model": "gpt-4o-moderation", "input": "x"}),
        ("/v1beta/models/gemini-2.5-flash:countTokens", {"contents": []}),
    ]
    for path, body in allowed:
        assert (await post(keyed, path, secret, body))[0] == 200, path
    assert (await get(keyed, "/v1/models", secret))[0] == 200
    reached = len(up.requests)
    refused = [
        (CHAT, {"model": "gpt-5", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"}),
        ("/v1/moderations", {"model": "omni", "input": "x"}),
        ("/v1/moderations", {"input": "x"}),
        ("/v1/batches", {"model": "gpt-4o", "input_file_id": "file-1"}),
        ("/v1/batches/b1/cancel", {"model": "gpt-4o"}),
        ("/openai/deployments/gpt-5/images/generations", {"model": "gpt-4o", "prompt": "x"}),
        ("/v1beta/models/gemini-2.5-pro:countTokens", {"model": "gpt-4o"}),
    ]
    for path, body in refused:
        status, told = await post(keyed, path, secret, body)
        code = told["error"].get("code")
        assert (status, code in ("model_not_allowed", 403)) == (403, True), (path, told)
    status, told = await post(
        keyed, "/v1/audio/transcriptions", secret, b"--x", **{"Content-Type": "multipart/form-data"}
    )
    assert (status, told["error"]["code"]) == (403, "model_not_allowed")
    status, told = await post(keyed, "/v1/moderations", secret, b'{"model":"gpt-4o","model":"omni"}',
                              **{"Content-Type": "application/json"})  # fmt: skip
    assert status == 400
    assert len(up.requests) == reached


async def test_what_passes_through_for_a_held_key_arrives_as_it_was_sent(keyed: Ibid, up):
    secret = (await make(keyed, models=["gpt-4o*"]))["secret"]
    up.default = lambda seen: Json(200, {"model": "gpt-4o", "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
    raw = b'{ "model":"gpt-4o",\n "input" : "\\u00e9" }'
    status, _ = await post(keyed, "/v1/moderations", secret, raw, **{"Content-Type": "application/json"})
    assert status == 200
    assert up.requests[-1].body == raw


# --- what it may spend ----------------------------------------------------------------------------------------------


async def test_a_budget_ends_exactly_at_the_nano_dollar_and_hits_go_on(keyed: Ibid, up):
    questions = [f"How do I mend hose number {n}?" for n in range(4)]
    up.default = Chat(text="the same answer to each")
    free = await make(keyed, "white")
    for question in questions[:2]:
        await keyed.ask(question, key=free["secret"])
    paid = [row["actual_nusd"] for row in await keyed.sql("SELECT actual_nusd FROM request")]
    assert paid[0] == paid[1] > 0
    for project, extra, answered in (("red", 0, 2), ("blue", 1, 3)):
        made = await make(keyed, project, limit_usd=[f"{price_of(sum(paid) + extra)}/month"])
        statuses = []
        for question in questions:
            reply = await keyed.ask(question, key=made["secret"])
            statuses.append(reply.status)
            await keyed.settled()
        assert statuses == [200] * answered + [429] * (4 - answered)
        error = reply.json["error"]
        assert (error["code"], reply.headers["x-should-retry"]) == ("budget_exceeded", "false")
        assert "Retry-After" not in reply.headers
        assert f"{price_of(sum(paid) + extra).rstrip('0')} USD per month" in error["message"]
        assert made["secret"] not in str(reply)
        hit = await keyed.ask(questions[0], key=made["secret"])
        assert (hit.status, hit.cache) == (200, "HIT")  # costs nothing
        limit = (await shown(keyed, made))["limits"][0]
        assert limit["spent"] == price_of(paid[0] * answered)
        assert (limit["held"], limit["remaining"]) == ("0.000000000", "0.000000000")


async def test_an_exhausted_budget_is_told_to_the_openai_sdk_once(keyed: Ibid, up):
    made = await make(keyed, limit_usd=["0/day"])
    async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=made["secret"]) as client:  # 2 retries by default
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hose?"}])
        assert (caught.value.code, caught.value.type) == ("budget_exceeded", "insufficient_quota")
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model="text-embedding-3-small", input="hose")
        with pytest.raises(openai.RateLimitError):
            await client.moderations.create(model="omni", input="hose")
    assert await refusals(keyed, "budget_exceeded") == 3
    assert up.requests == []


async def test_an_exhausted_budget_is_told_to_the_anthropic_sdk_once(data_dir):
    async with ScriptedUpstream(default=provider) as up, running(data_dir, up.url, KEYED) as ibid:
        made = await make(ibid, limit_requests=["1/month"])
        async with anthropic.AsyncAnthropic(base_url=ibid.url, api_key=made["secret"]) as client:
            ask: dict[str, Any] = {"model": "claude-x", "max_tokens": 50}
            said = await client.messages.create(messages=[{"role": "user", "content": "What is a hose?"}], **ask)
            assert said.content[0].type == "text"
            with pytest.raises(anthropic.RateLimitError) as caught:
                await client.messages.create(messages=[{"role": "user", "content": "What is a tap?"}], **ask)
        error = caught.value.body["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "1 requests per month" in error["message"]
        assert await refusals(ibid, "rate_limit_exceeded") == 1
        (seen,) = up.requests
        assert (seen.header("x-api-key"), seen.header("Authorization")) == (UPSTREAM_KEY, None)


async def test_create_call_list_and_a_wrong_model_with_the_sdk(keyed: Ibid):
    made = await make(keyed, name="nightly", models=["gpt-4o*"], plan="+route,-semantic", expires="90d")
    async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=made["secret"]) as client:
        messages: Any = [{"role": "user", "content": "What is a hose?"}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages)
        assert whole.choices[0].message.content
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.chat.completions.create(model="gpt-5", messages=messages)
        assert caught.value.code == "model_not_allowed"
    assert await refusals(keyed, "model_not_allowed") == 1
    (listed,) = (await keyed.admin("GET", "/cache/keys"))["keys"]
    assert (listed["id"], listed["name"], listed["state"]) == (made["id"], "nightly", "active")
    assert (listed["plan"], listed["models"]) == ("+route,-semantic", ["gpt-4o*"])
    assert listed["expires_ms"] - listed["created_ms"] == 90 * 86_400_000


async def test_a_minutes_limit_says_when_to_come_back(keyed: Ibid, monkeypatch):
    moment = time.time()
    monkeypatch.setattr(keyed.app.keys, "_clock", lambda: moment)  # no minute ends in between
    made = await make(keyed, limit_requests=["2/minute"], limit_tokens=["1000000/minute"])
    replies = [await keyed.ask(f"hose {n}?", key=made["secret"]) for n in range(3)]
    last = replies[-1]
    assert (last.status, last.headers["x-should-retry"]) == (429, "true")
    assert 1 <= int(last.headers["Retry-After"]) <= 60
    assert last.json["error"]["code"] == "rate_limit_exceeded"


async def test_a_limit_of_money_opens_no_path_whose_cost_nobody_tells(keyed: Ibid, up):
    up.default = lambda seen: Json(200, {"ok": True})
    rich, plain = await make(keyed, limit_usd=["10/day"]), await make(keyed, limit_requests=["100/day"])
    theirs = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for path in ("/v1/batches", "/v1/images/generations", "/v1/audio/speech", "/v1/fine_tuning/jobs"):
        status, told = await post(keyed, path, rich["secret"], {"model": MODEL, **theirs})
        assert (status, told["error"]["code"]) == (403, "cost_not_told"), path
        assert (await post(keyed, path, plain["secret"], {"model": MODEL, **theirs}))[0] == 200
        assert (await get(keyed, path, rich["secret"]))[0] == 200
    for path in ("/v1/files", "/v1/moderations", "/v1/messages/count_tokens", "/v1/batches/b1/cancel"):
        assert (await post(keyed, path, rich["secret"], {"model": MODEL}))[0] == 200, path
    headers = {"Authorization": f"Bearer {rich['secret']}"}
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await keyed.session.ws_connect(keyed.url + "/v1/realtime?model=gpt-realtime", headers=headers)
    assert caught.value.status == 403


@pytest.mark.parametrize("media", ["multipart/form-data; boundary=b", "application/json", "audio/mpeg"])
@pytest.mark.parametrize(
    ("limit", "path", "code"),
    [
        ("limit_requests", "/v1/audio/transcriptions", "rate_limit_exceeded"),
        ("limit_usd", "/v1/images/edits", "cost_not_told"),
    ],
)
async def test_a_body_that_will_be_refused_whatever_it_says_is_not_waited_for(
    data_dir, up, limit: str, path: str, code: str, media: str
) -> None:
    """The key is held to some models, so that a form or JSON would be read for its model."""
    async with running(data_dir, up.url, {**KEYED, "limits": {"body_timeout_s": 2 * PATIENCE_S}}) as ibid:
        made = await make(ibid, models=["gpt-*"], **{limit: ["1/day"]})
        assert (await ibid.ask("hose?", key=made["secret"])).status == 200
        await ibid.settled()
        reached = len(up.requests)
        client = await RawClient.connect(int(ibid.url.rpartition(":")[2]))
        lines = (f"Authorization: Bearer {made['secret']}", f"Content-Type: {media}")
        await client.send(raw_post(b"--b", *lines, path=path, length=1_000_000))
        refusal = await client.answer()
        assert json.loads(refusal.body)["error"]["code"] == code, refusal
        client.close()
        assert len(up.requests) == reached


async def test_where_ibid_serves_no_batches_a_limit_of_money_opens_none(data_dir, up):
    up.default = lambda seen: Json(200, {"ok": True})
    async with running(data_dir, up.url, {**KEYED, "batch": {"serve": False}}) as ibid:
        rich = await make(ibid, limit_usd=["10/day"])
        for path in ("/v1/batches", "/v1/messages/batches"):
            status, told = await post(ibid, path, rich["secret"], {"model": MODEL})
            assert (status, told["error"].get("code", "cost_not_told")) == (403, "cost_not_told"), path
        assert up.requests == []


async def test_tokens_count_on_hits_too(keyed: Ibid):
    made = await make(keyed, limit_tokens=["1000000/month"])
    first = await keyed.ask("What is a hose?", key=made["secret"])
    await keyed.settled()
    tokens = first.json["usage"]["total_tokens"]
    assert (await shown(keyed, made))["limits"][0]["spent"] == tokens
    assert (await keyed.ask("What is a hose?", key=made["secret"])).cache == "HIT"
    assert (await shown(keyed, made))["limits"][0]["spent"] == 2 * tokens


async def test_those_in_flight_hold_money_so_that_the_rest_must_wait(keyed: Ibid, up):
    """20 at once on a budget of about 3 estimates: no more than those are let in, and nothing stays held."""
    gate = asyncio.Event()
    up.default = Chat(gates={1: gate})
    probe = await make(keyed, "white", limit_usd=["1000/month"])
    asking = asyncio.create_task(keyed.ask("hose 99?", key=probe["secret"], stream=True, max_tokens=1000))
    await until(lambda: len(up.requests) == 1)
    held = (await shown(keyed, probe))["limits"][0]["held"]
    nusd = round(float(held) * 1e9)
    assert nusd > 1000 * 600 / 10  # the longest output it allows, at least
    made = await make(keyed, limit_usd=[f"{price_of(nusd * 5 // 2)}/month"])
    asks = [asyncio.create_task(keyed.ask(f"hose {n}?", key=made["secret"], stream=True, max_tokens=1000))
            for n in range(20)]  # fmt: skip
    await until(lambda: sum(ask.done() for ask in asks) == 17)
    await until(lambda: len(up.requests) == 1 + 3)
    assert len(keyed.app.keys.held) == 1 + 3
    refused = [ask.result() for ask in asks if ask.done()]
    assert {(r.status, r.json["error"]["code"], r.headers["Retry-After"]) for r in refused} == {
        (429, "rate_limit_exceeded", "1")
    }
    gate.set()
    answered = [await ask for ask in asks if ask not in [a for a in asks if a.done() and a.result() in refused]]
    assert [reply.status for reply in answered] == [200] * 3
    await asking
    await keyed.settled()
    limit = (await shown(keyed, made))["limits"][0]
    paid = (await keyed.sql(f"SELECT SUM(actual_nusd) AS n FROM request WHERE key_id = '{made['id']}'"))[0]["n"]
    assert (limit["held"], limit["spent"]) == ("0.000000000", price_of(paid))
    assert keyed.app.keys.held == {}
    assert (await keyed.ask("hose 21?", key=made["secret"], max_tokens=1000)).status == 200


async def test_a_key_without_money_joins_a_call_in_flight_and_never_makes_one(keyed: Ibid, up):
    """Not even when what it waited for cannot be kept."""
    rich, poor = await make(keyed), await make(keyed, limit_usd=["0/day"])
    for finish_reason, status in (("stop", 200), ("content_filter", 429)):
        gate = asyncio.Event()
        up.script(Chat(gates={1: gate}, finish_reason=finish_reason))
        prompt = f"How do I {finish_reason} a hose?"
        leading = asyncio.create_task(keyed.ask(prompt, key=rich["secret"], stream=True))
        await until(lambda: len(keyed.app.pipeline.flights) == 1)
        joining = asyncio.create_task(keyed.ask(prompt, key=poor["secret"]))
        await until(lambda: sum(len(flight._seats) for flight in keyed.app.pipeline.flights.values()) == 2)
        gate.set()
        assert [reply.status for reply in await asyncio.gather(leading, joining)] == [200, status]
        await keyed.settled()
    assert len(up.requests) == 2
    assert (await shown(keyed, poor))["limits"][0]["spent"] == "0.000000000"


async def test_a_client_that_leaves_holds_nothing(keyed: Ibid, up):
    gate = asyncio.Event()
    up.default = Chat(gates={1: gate})
    made = await make(keyed, limit_usd=["10/month"], limit_requests=["10/month"])
    asking = asyncio.create_task(keyed.ask("hose?", key=made["secret"], stream=True))
    await until(lambda: len(up.requests) == 1)
    assert len(keyed.app.keys.held) == 1
    asking.cancel()
    await until(lambda: not keyed.app.keys.held)
    await keyed.settled()
    assert [limit["spent"] for limit in (await shown(keyed, made))["limits"]][1] == 1
    assert [float(limit["held"]) for limit in (await shown(keyed, made))["limits"]] == [0, 0]


# --- what was spent is what the ledger says -------------------------------------------------------------------------

ALL_LIMITS: dict[str, Any] = {
    f"limit_{kind}": [f"1000000/{window}" for window in ("minute", "hour", "day", "month")]
    for kind in ("usd", "requests", "tokens")
}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_what_is_counted_is_what_the_ledger_says(data_dir, up, request, database):
    """Misses, hits, joined and broken calls, vectors, audits, what passes through: two ways to one number."""
    url = request.getfixturevalue("pg_url") if database == "postgresql" else None
    sections = {**KEYED, "cache": {"semantic": True, "audit_share": 1.0}}
    async with running(data_dir, up.url, sections, url) as ibid:
        made = await make(ibid, **ALL_LIMITS)
        key = made["secret"]
        for n in range(3):
            await ibid.ask(f"How do I mend garden hose number {n}?", key=key, stream=n == 1)
            await ibid.settled()
            await ibid.ask(f"How do I mend garden hose number {n}?", key=key)
            await ibid.ask(f"How can I mend garden hose number {n}?", key=key)
            await ibid.settled()
        gate = asyncio.Event()
        up.script(Chat(gates={1: gate}))
        joined = [asyncio.create_task(ibid.ask("How do I join?", key=key, stream=True)) for _ in range(3)]
        await until(lambda: sum(len(flight._seats) for flight in ibid.app.pipeline.flights.values()) == 3)
        gate.set()
        await asyncio.gather(*joined)
        up.script(Json(500, {"error": {"message": "x"}}))
        assert (await ibid.ask("How do I fail?", key=key)).status == 500
        assert (await ibid.ask("Unheard of!", key=key, headers={"Cache-Control": "only-if-cached"})).status == 504
        held = asyncio.Event()
        up.script(Chat(gates={2: held}))
        leaving = asyncio.create_task(ibid.ask("How do I leave early?", key=key, stream=True))
        await until(lambda: up.requests[-1].json["messages"][-1]["content"] == "How do I leave early?")
        await asyncio.sleep(0)
        leaving.cancel()
        for asked in (["a", "b"], ["a", "b"], ["b", "c"]):
            assert (await ibid.embed(asked, key=key)).status == 200
        up.script(
            Json(200, {"model": MODEL, "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
        )
        assert (await post(ibid, "/v1/moderations", key, {"model": MODEL}))[0] == 200
        await ibid.settled()
        await until(lambda: not ibid.app.keys.held)
        counted = (await shown(ibid, made))["limits"]
        audits = await ibid.sql("SELECT COUNT(*) AS n FROM request WHERE lane = 'audit'")
        assert audits[0]["n"] > 0
        (row,) = await ibid.sql("SELECT SUM(actual_nusd) AS paid, SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END) AS n "
                                f"FROM request WHERE key_id = '{made['id']}'")  # fmt: skip
        assert counted[0]["spent"] == price_of(row["paid"]) != price_of(0)
        fresh = KeyRing(ibid.app.store.keys, ibid.app.keys._prices)
        await fresh.load()
        read = fresh.described(made["id"])
        assert read is not None
        assert [(limit["kind"], limit["window"], limit["spent"]) for limit in read["limits"]] == [
            (limit["kind"], limit["window"], limit["spent"]) for limit in counted
        ]
        assert {limit["spent"] for limit in counted if limit["kind"] == "requests"} == {row["n"]}


async def test_a_restart_keeps_what_was_spent(data_dir, up):
    async with serving(data_dir, up.url, KEYED, forked=True) as first:
        made = await make(first, limit_usd=["10/month"], limit_requests=["3/month"], limit_tokens=["1000000/month"])
        for n in range(2):
            assert (await first.ask(f"hose {n}?", key=made["secret"])).status == 200
        before = await shown(first, made)
        first.child.send_signal(15)
        assert await first.stopped() == 0
    async with serving(data_dir, up.url, KEYED, forked=True) as second:
        after = await shown(second, made)
        assert after == before
        assert after["limits"][1] == {**after["limits"][1], "spent": 2, "remaining": 1}
        assert (await second.ask("hose 3?", key=made["secret"])).status == 200
        assert (await second.ask("hose 4?", key=made["secret"])).status == 429


# --- the shell, other processes -------------------------------------------------------------------------------------


async def test_the_shell_makes_shows_rotates_and_revokes_on_a_running_server(data_dir, up):
    async with serving(data_dir, up.url, KEYED, forked=True) as ibid:
        admin = ibid.admin_url.removeprefix("http://")

        def keys(*arguments: str) -> Any:
            return ibid_keys(data_dir, *arguments, admin=admin)

        made = await asyncio.to_thread(keys, "create", "--project", "red", "--limit-usd", "10/day", "--models", "gpt-*")
        assert SECRET.fullmatch(made["secret"])
        assert (await ibid.ask("hose?", key=made["secret"])).status == 200
        seen = await asyncio.to_thread(keys, "show", made["id"])
        assert (seen["limits"][0]["amount"], seen["models"]) == ("10.000000000", ["gpt-*"])
        assert seen["limits"][0]["spent"] != "0.000000000"
        rotated = await asyncio.to_thread(keys, "rotate", made["id"])
        assert (await ibid.ask("hose?", key=made["secret"])).json["error"]["code"] == "invalid_api_key"
        assert (await ibid.ask("hose?", key=rotated["secret"])).cache == "HIT"
        await asyncio.to_thread(keys, "revoke", made["id"])
        refused = await ibid.ask("hose?", key=rotated["secret"])
        assert (refused.status, refused.json["error"]["code"]) == (401, "key_revoked")
        assert [key["state"] for key in (await asyncio.to_thread(keys, "list"))["keys"]] == ["revoked"]


async def test_the_shell_works_on_the_database_when_nothing_runs(data_dir, up):
    made = await asyncio.to_thread(ibid_keys, data_dir, "create", "--project", "red", "--limit-requests", "5/hour")
    async with running(data_dir, up.url, KEYED) as ibid:
        assert (await ibid.ask("hose?", key=made["secret"])).status == 200
    seen = await asyncio.to_thread(ibid_keys, data_dir, "show", made["id"])
    assert (seen["limits"][0]["spent"], seen["limits"][0]["remaining"]) == (1, 4)
    await asyncio.to_thread(ibid_keys, data_dir, "revoke", made["id"])
    async with running(data_dir, up.url, KEYED) as ibid:
        assert (await ibid.ask("hose?", key=made["secret"])).status == 401


def test_the_shell_tells_people_what_they_need(data_dir):
    def run(*arguments: str) -> tuple[int, str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
        command = [sys.executable, "-m", "proxy", "keys", *arguments, "--data-dir", str(data_dir)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode, done.stdout, done.stderr

    code, made, _ = run("create", "--project", "red", "--limit-usd", "0.25/hour", "--limit-usd", "2/day")
    (secret,) = SECRET.findall(made)
    assert code == 0
    assert "told this once" in made
    code, listed, _ = run("list")
    assert code == 0
    assert "0.25 usd/hour,2 usd/day" in listed
    assert secret not in listed
    code, seen, _ = run("show", re.findall(r"key_[0-9a-f]{12}", made)[0])
    assert code == 0
    assert re.search(r"^0\.25 usd/hour +0\.000000000 +0\.000000000 +0\.250000000 +20\d\d-", seen, re.MULTILINE)
    for arguments, said in (
        (("show", "key_nobody"), "there is no key key_nobody"),
        (("create", "--project", "red", "--limit-usd", "10"), "limit_usd: must be an amount per minute"),
        (
            ("create", "--project", "red", "--limit-requests", "5/day", "--limit-requests", "6/day"),
            "one limit of a kind",
        ),
        (("create", "--project", "red", "--expires", "yesterday"), "expires: must be"),
        (("create", "--project", "red", "--plan", "a b"), "plan: is none"),
        (("create", "--project", "\x1b[0m"), "project: must"),
        (("create",), "--project"),
        ((), "ACTION"),
    ):
        code, _, error = run(*arguments)
        assert (code, said in error) == (2, True), (arguments, error)


async def test_a_key_revoked_in_the_table_by_another_process_ends_too(keyed: Ibid, data_dir):
    made = await make(keyed)
    assert (await keyed.ask("hose?", key=made["secret"])).status == 200

    def revoke() -> None:
        with sqlite3.connect(data_dir / "ibid.db", timeout=PATIENCE_S) as connection:
            connection.execute("UPDATE api_key SET revoked_ms = 1 WHERE id = ?", (made["id"],))
        connection.close()

    await asyncio.to_thread(revoke)
    await eventually(keyed, made["secret"], 401)


async def eventually(ibid: Client, secret: str, status: int) -> None:
    async def told() -> bool:
        return (await ibid.ask("hose?", key=secret)).status == status

    await until(told)


async def test_replicas_share_keys_their_end_and_what_is_spent(tmp_path, data_dir, up, pg_url):
    other_dir = tmp_path / "other"
    async with running(data_dir, up.url, KEYED, pg_url) as one, running(other_dir, up.url, KEYED, pg_url) as other:
        made = await make(one, limit_requests=["4/month"], limit_usd=["10/month"])
        await eventually(other, made["secret"], 200)
        for n in range(2):
            assert (await one.ask(f"hose {n}?", key=made["secret"])).status == 200

        async def agree() -> bool:
            seen = [(await shown(ibid, made))["limits"] for ibid in (one, other)]
            return seen[0] == seen[1] and seen[0][1]["spent"] == 3

        await until(agree)
        assert (await other.ask("hose 7?", key=made["secret"])).status == 200
        assert (await other.ask("hose 8?", key=made["secret"])).status == 429
        await eventually(one, made["secret"], 429)
        tenants = await one.sql("SELECT DISTINCT tenant FROM request")
        assert [row["tenant"] for row in tenants] == [made["tenant"]]  # whatever installation
        await asyncio.to_thread(ibid_keys, tmp_path / "shell", "revoke", made["id"], database=pg_url)
        await eventually(other, made["secret"], 401)
        await eventually(one, made["secret"], 401)


# --- the secret -----------------------------------------------------------------------------------------------------


async def test_the_secret_is_in_no_log_table_file_or_answer(data_dir, up):
    """Told once, at creation. Then used rightly and wrongly, in headers, queries and texts of errors."""
    async with serving(data_dir, up.url, {**KEYED, "log": {"level": "DEBUG"}}, forked=True) as ibid:
        made = await make(ibid, limit_usd=["0/day"], models=["gpt-*"])
        other = await make(ibid)
        told = []
        for secret in (made["secret"], other["secret"]):
            for path in (CHAT, "/v1/messages", "/v1/models", f"{CHAT}?key={secret}", f"/v1/files?key={secret}"):
                for header in ("Authorization", "x-api-key", "x-goog-api-key"):
                    headers = {header: f"Bearer {secret}" if header == "Authorization" else secret}
                    body = {"model": MODEL, "messages": [{"role": "user", "content": "hose?"}], "max_tokens": 5}
                    async with ibid.session.post(ibid.url + path, json=body, headers=headers) as response:
                        told.append(f"{response.headers} {await response.text()}")
        told += [json.dumps(await ibid.admin("GET", path)) for path in ("/cache/keys", f"/cache/keys/{made['id']}",
                                                                        "/requests", "/cache/stats")]  # fmt: skip
        told.append(await ibid.admin("GET", "/metrics"))
        await ibid.admin("POST", f"/cache/keys/{made['id']}/revoke")
        ibid.child.send_signal(15)
        assert await ibid.stopped() == 0
    secrets = [made["secret"], other["secret"]]
    for text in told:
        assert not any(secret in text for secret in secrets)
    files = [path for path in data_dir.rglob("*") if path.is_file() and "models" not in path.parts]
    files.append(data_dir.with_suffix(".log"))
    assert {path.suffix for path in files} >= {".db", ".log"}
    for path in files:
        raw = path.read_bytes()
        assert not any(secret.encode() in raw or secret[5:].encode() in raw for secret in secrets), path
    assert SECRET.search(str([(seen.path, seen.headers, seen.body) for seen in up.requests])) is None
