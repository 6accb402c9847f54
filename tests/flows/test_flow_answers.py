"""What is served from the cache, to whom, in which form, and what says why not."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.flows.running import CHAT, MODEL, chat_body, running, told_apart
from tests.upstream import Body, Chat
from tests.waiting import PATIENCE_S

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"


async def test_paraphrase_is_served_without_calling_upstream(ibid, up):
    first = await ibid.fill(ASKED)
    second = await ibid.ask(REWORDED)
    assert (second.cache, second.tier, second.text) == ("HIT", "semantic", first.text)
    assert float(second.headers["x-cache-similarity"]) > 0.95
    assert float(second.headers["x-cache-confidence"]) >= 0.99
    assert second.headers["Cache-Status"].startswith("ibid; hit; ttl=")
    assert up.meter.calls == 1
    again = await ibid.ask(REWORDED)
    assert (again.cache, again.tier, again.text, again.entry) == ("HIT", "semantic", first.text, second.entry)
    row = await ibid.row(again)
    assert (row["lane"], row["entry_id"], row["cache_status"]) == ("cache.semantic", second.entry, "HIT")


LOOKALIKES = [
    ("How do I return 2 pairs of shoes?", "How do I return 3 pairs of shoes?", "numbers"),
    ("How do I book a flight from Boston to Denver?", "How do I book a flight from Boston to Dallas?", "entities"),
    ("Is it safe to eat raw eggs?", "Is it not safe to eat raw eggs?", "negation"),
    ("Is it safe to eat raw eggs?", "Is it unsafe to eat raw eggs?", "antonyms"),
    ("How do I convert miles to kilometers?", "How do I convert kilometers to miles?", "direction"),
    ("How do I fly from Boston to Denver?", "How do I fly from Denver to Boston?", "direction"),
    (ASKED, "How do I replace a leaking garden hose?", "substitution"),
]


async def test_a_lookalike_is_no_hit_and_names_its_guard(ibid, up):
    for number, (asked, lookalike, guard) in enumerate(LOOKALIKES):
        key, calls = f"sk-{number}", up.meter.calls
        await ibid.fill(asked, key=key)
        other = await ibid.ask(lookalike, key=key)
        assert (other.status, other.cache, other.reason) == (200, "MISS", guard), lookalike
        assert lookalike in other.text
        assert up.meter.calls == calls + 2
        assert (await ibid.row(other))["reason"] == guard
        line = ibid.log.line(other)
        assert (line["verdict"], line["reason"]) == ("near-miss", guard)
    assert 'ibid_guard_veto_total{guard="numbers"} 1.0' in await ibid.admin("GET", "/metrics")
    assert 'ibid_guard_veto_total{guard="direction"} 2.0' in await ibid.admin("GET", "/metrics")


async def test_a_client_is_told_how_its_verdict_came_about_when_it_asks(ibid, up):
    explained = {"x-cache-explain": "1"}
    first = await ibid.ask(ASKED, headers=explained)
    await ibid.settled()
    told = json.loads(first.headers["x-cache-explain"])
    assert (told["level"], told["verdict"]) == ("full", "no_candidate")
    for prompt, tier in ((ASKED, "exact"), (REWORDED, "semantic"), (REWORDED, "semantic")):
        hit = await ibid.ask(prompt, headers=explained, stream=True)
        assert hit.tier == tier
    (candidate,) = json.loads(hit.headers["x-cache-explain"])["candidates"]
    assert (candidate["entry"], candidate["vetoes"], candidate["standing"]) == (hit.entry, [], "start")
    other = await ibid.ask("How do I repair 3 leaking garden hoses?", headers=explained)
    assert "numbers" in json.loads(other.headers["x-cache-explain"])["candidates"][0]["vetoes"]
    untold = await ibid.ask(ASKED)
    assert (untold.cache, "x-cache-explain" in untold.headers) == ("HIT", False)


async def test_other_tenant_never_sees_it(ibid, up):
    up.default = told_apart
    await ibid.fill(ASKED, key="sk-a")
    for prompt in (ASKED, REWORDED):
        other = await ibid.ask(prompt, key="sk-b")
        await ibid.settled()
        assert other.text.startswith("for sk-b: ")
    assert (await ibid.ask(REWORDED, key="sk-b")).text.startswith("for sk-b: ")
    assert (await ibid.ask(REWORDED, key="sk-a")).text.startswith("for sk-a: ")
    assert up.meter.calls == 2  # b's own first question; its rewording was a hit on that


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key", "x-goog-api-key"])
async def test_every_credential_header_is_a_tenant_of_its_own(exact, up, name):
    body = json.dumps(chat_body(ASKED))
    tenants = []
    for secret in ("k-one", "k-two", "k-one"):
        value = f"Bearer {secret}" if name == "authorization" else secret
        headers = {name: value, "Content-Type": "application/json"}
        async with exact.session.post(exact.url + CHAT, data=body, headers=headers) as response:
            assert response.status == 200
            tenants.append(response.headers["x-cache"])
        await exact.settled()
    assert tenants == ["MISS", "MISS", "HIT"]


async def test_the_end_user_and_the_namespace_partition_a_tenant(exact, up):
    await exact.fill(ASKED)
    for fields in ({"user": "u1"}, {"user": "u2"}, {"safety_identifier": "u3"}, {"metadata": {"user_id": "u4"}}):
        assert (await exact.ask(ASKED, **fields)).cache == "MISS", fields
        await exact.settled()
    for header in ({"x-cache-namespace": "red"}, {"x-cache-namespace": "blue"}, {"x-cache-user": "u1"}):
        assert (await exact.ask(ASKED, headers=header)).cache == "MISS", header
        await exact.settled()
        assert (await exact.ask(ASKED, headers=header)).cache == "HIT", header


@pytest.mark.parametrize("first_streams", [True, False])
async def test_one_entry_serves_stream_and_whole(ibid, up, first_streams):
    first = await ibid.fill(ASKED, stream=first_streams)
    replies = [await ibid.ask(p, stream=s) for p in (ASKED, REWORDED) for s in (True, False)]
    assert {(r.cache, r.text) for r in replies} == {("HIT", first.text)}
    assert [r.headers["Content-Type"].partition(";")[0] for r in replies] == [
        "text/event-stream",
        "application/json",
    ] * 2
    assert len({r.entry for r in replies}) == 1
    assert up.meter.calls == 1


async def test_a_replay_has_a_new_id_and_time_and_otherwise_the_same_fields(exact, up):
    first = (await exact.fill(ASKED)).json
    replies = [(await exact.ask(ASKED)).json for _ in range(2)]
    assert len({first["id"], *(r["id"] for r in replies)}) == 3
    for reply in replies:
        assert reply["created"] > first["created"]
        assert {**reply, "id": 0, "created": 0} == {**first, "id": 0, "created": 0}
    streams = [(await exact.ask(ASKED, stream=True)).chunks for _ in range(2)]
    assert len({chunk["id"] for stream in streams for chunk in stream}) == 2


async def test_the_stream_ends_at_once_after_done(exact, up):
    """Also on a connection that stays open: the body's end does not wait for anything."""
    await exact.fill(ASKED)
    body = json.dumps(chat_body(ASKED, stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", exact.app.port)
    for _ in range(2):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-a\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(PATIENCE_S):
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b"x-cache: hit" in answer
            if b"transfer-encoding: chunked" in answer:
                payload = await reader.readuntil(b"0\r\n\r\n")
                assert payload.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            else:
                length = int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0])
                assert (await reader.readexactly(length)).endswith(b"data: [DONE]\n\n")
    writer.close()
    await writer.wait_closed()


async def test_usage_is_asked_of_the_upstream_and_kept_from_who_did_not_ask(exact, up):
    plain = await exact.fill(ASKED, stream=True)
    assert up.requests[-1].json["stream_options"] == {"include_usage": True}
    assert all(chunk.get("usage") is None and chunk["choices"] for chunk in plain.chunks)
    with_usage = await exact.ask(ASKED, stream=True, stream_options={"include_usage": True})
    assert with_usage.cache == "HIT"
    *chunks, last = with_usage.chunks
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], up.meter.input_tokens + up.meter.output_tokens)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in (await exact.ask(ASKED, stream=True)).chunks)
    row = (await exact.sql("SELECT in_tok, out_tok, usage_basis FROM upstream_call"))[0]
    assert row == {"in_tok": up.meter.input_tokens, "out_tok": up.meter.output_tokens, "usage_basis": "measured"}
    asked = await exact.ask("and this?", stream=True, stream_options={"include_usage": True})
    assert (asked.cache, asked.chunks[-1]["choices"]) == ("MISS", [])


async def test_unknown_fields_are_forwarded_byte_for_byte_and_never_matched_by_meaning(ibid, up):
    def body(prompt: str) -> bytes:
        return (
            f'{{ "model":"{MODEL}",\n "x_new" : [1.50, 1e2, {{"\\u00e9":"\\/"}}], "messages":'
            f'[{{"role":"user","content":"{prompt}"}}] , "temperature":0.10}}'
        ).encode()

    first = await ibid.send(body(ASKED))
    await ibid.settled()
    assert up.requests[-1].body == body(ASKED)
    assert (first.cache, first.reason) == ("MISS", "unknown_field")
    reworded = await ibid.send(body(REWORDED))
    assert (reworded.cache, reworded.reason, up.requests[-1].body) == ("MISS", "unknown_field", body(REWORDED))
    assert (await ibid.send(body(ASKED))).cache == "HIT"
    assert up.meter.calls == 2


PARTS = [
    {"type": "text", "text": ASKED},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
]
REMOTE = [{"type": "text", "text": ASKED}, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TURNS = [{"role": "user", "content": "Hello there, garden people"}, {"role": "assistant", "content": "Hello"}]


UNMATCHED = [
    ({"temperature": 0.31}, "temperature", "HIT"),
    ({"seed": 7}, "seed", "BYPASS"),
    ({"tools": [TOOL]}, "tools", "HIT"),
    ({"n": 2}, "n", "BYPASS"),
    ({"logprobs": True}, "logprobs", "BYPASS"),
    ({"store": True}, "store", "BYPASS"),
    ({"content": PARTS}, "images", "HIT"),
    ({"content": REMOTE}, "remote_urls", "BYPASS"),
    ({"before": TURNS}, "multi_turn", "HIT"),
    ({"content": "What is the weather in Paris like today?"}, "time_words", "HIT"),
    ({"content": "Write to jane.doe@example.org for me"}, "pii", "BYPASS"),
    ({"content": "Garden?"}, "short", "HIT"),
    ({"content": "How do I repair\u200b a leaking garden hose?"}, "invisible", "HIT"),
]


async def test_what_may_not_be_matched_says_why_everywhere(ibid, up):
    """Exact at most, or not at all: reference table (c); its reason reaches header, log, metric and ledger."""
    for fields, reason, second in UNMATCHED:
        key, extra = f"sk-{reason}", dict(fields)
        content, before = extra.pop("content", ASKED), extra.pop("before", [])
        messages = [*before, {"role": "user", "content": content}]
        await ibid.fill(REWORDED, key=key)  # alike, and served but for the fields
        first = await ibid.ask(messages, key=key, **extra)
        await ibid.settled()
        word = "BYPASS" if second == "BYPASS" else "MISS"
        assert (first.status, first.cache, first.reason) == (200, word, reason)
        assert f"detail={reason}" in first.headers["Cache-Status"]
        assert ("fwd=bypass" in first.headers["Cache-Status"]) == (word == "BYPASS")
        row, line = await ibid.row(first), ibid.log.line(first)
        assert (row["reason"], row["cache_status"]) == (reason, word)
        assert (line["reason"], line["verdict"]) == (reason, word.lower())
        label = f'ibid_requests_total{{cache="{word}",reason="{reason}",status="200",tier=""}} 1.0'
        assert label in await ibid.admin("GET", "/metrics")
        calls = up.meter.calls
        assert (await ibid.ask(messages, key=key, **extra)).cache == second, reason
        assert up.meter.calls - calls == (0 if second == "HIT" else 1)


async def test_seeded_requests_are_served_exactly_when_the_operator_says_so(data_dir, up):
    async with running(data_dir, up.url, {"cache": {"cache_seeded": True}}) as ibid:
        first = await ibid.fill(ASKED, seed=12)
        assert first.reason == "seed"
        assert (await ibid.ask(ASKED, seed=12)).text == first.text
        assert (await ibid.ask(ASKED, seed=13)).cache == "MISS"
        assert (await ibid.ask(REWORDED, seed=12)).cache == "MISS"


async def test_any_setting_that_changes_the_answer_is_part_of_the_identity(exact, up):
    await exact.fill(ASKED)
    for fields in (
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"stop": ["x"]},
        {"top_p": 0.5},
        {"temperature": 0},
        {"presence_penalty": 0.1},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "text"}},
        {"reasoning_effort": "low"},
        {"service_tier": "flex"},
        {"model": "gpt-4o"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}]},
    ):
        reply = await exact.send({**chat_body(ASKED), **fields})
        assert reply.cache == "MISS", fields
        await exact.settled()
    assert (await exact.ask(ASKED, stream=True)).cache == "HIT"


@pytest.mark.parametrize(
    ("headers", "twin"),
    [
        ({"Cache-Control": "no-store"}, {"no-store": True}),
        ({"x-cache-mode": "off"}, {"use-cache": False}),
    ],
)
async def test_no_store_neither_reads_nor_writes(exact, up, headers, twin):
    await exact.fill(ASKED)
    for reply in (await exact.ask(ASKED, headers=headers), await exact.ask(ASKED, cache=twin)):
        assert (reply.cache, reply.reason) == ("BYPASS", "no_store")
    await exact.ask("Something never asked before", headers=headers)
    await exact.settled()
    assert (await exact.ask("Something never asked before")).cache == "MISS"


@pytest.mark.parametrize("fields", [{"headers": {"Cache-Control": "no-cache"}}, {"cache": {"no-cache": True}}])
async def test_no_cache_asks_again_and_replaces_the_entry(exact, up, fields):
    first = await exact.fill(ASKED)
    fresh = await exact.ask(ASKED, **fields)
    assert fresh.cache == "REFRESH"
    assert fresh.text != first.text
    await exact.settled()
    assert (await exact.ask(ASKED)).text == fresh.text
    assert len(await exact.entries()) == 1


async def test_read_mode_stores_nothing_and_write_mode_serves_nothing(exact, up):
    assert (await exact.ask(ASKED, headers={"x-cache-mode": "read"})).cache == "MISS"
    await exact.settled()
    assert await exact.entries() == []
    await exact.fill(ASKED)
    assert (await exact.ask(ASKED, headers={"x-cache-mode": "read"})).cache == "HIT"
    assert (await exact.ask(ASKED, headers={"x-cache-mode": "write"})).cache == "BYPASS"
    assert up.meter.calls == 3


async def test_max_age_and_ttl_are_kept(exact, up):
    await exact.fill(ASKED, cache={"ttl": 1000})
    assert (await exact.ask(ASKED, headers={"Cache-Control": "max-age=500"})).cache == "HIT"
    reply = await exact.ask(ASKED)
    assert 700 <= int(reply.headers["Cache-Status"].partition("ttl=")[2].partition(";")[0]) <= 1000
    assert int(reply.headers["Age"]) <= 300
    refused = await exact.ask(ASKED, headers={"Cache-Control": "max-age=0"})
    assert (refused.cache, refused.reason) == ("MISS", "expired")
    assert "fwd=stale" in refused.headers["Cache-Status"]


async def test_only_if_cached_is_a_504_in_the_dialect_and_asks_nobody(ibid, up):
    headers = {"Cache-Control": "only-if-cached"}
    reply = await ibid.ask(ASKED, headers=headers)
    assert reply.status == 504
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert reply.json["error"]["code"] == "not_cached"
    assert up.requests == []
    await ibid.fill(ASKED)
    assert [(await ibid.ask(p, headers=headers)).tier for p in (ASKED, REWORDED)] == ["exact", "semantic"]


async def test_exact_mode_never_answers_by_meaning_and_a_client_may_tighten_the_budget(ibid, up):
    first = await ibid.fill(ASKED)
    assert (await ibid.ask(REWORDED, headers={"x-cache-mode": "exact"})).cache == "MISS"
    await ibid.settled()
    await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
    await ibid.fill(ASKED)
    assert (await ibid.ask(REWORDED)).cache == "HIT"
    strict = await ibid.ask(REWORDED, headers={"x-cache-max-error": "0.0001"})  # also not from memory
    assert (strict.cache, strict.reason) == ("MISS", "budget_spent")
    assert first.text != strict.text


async def test_shadow_looks_and_forwards(ibid, up):
    first = await ibid.fill(ASKED)
    shadow = await ibid.ask(REWORDED, headers={"x-cache-mode": "shadow"})
    assert shadow.cache == "SHADOW"
    assert shadow.text != first.text
    assert float(shadow.headers["x-cache-similarity"]) > 0.95


async def test_controls_do_not_reach_the_upstream(exact, up):
    headers = {
        "Cache-Control": "max-age=60, no-cache",
        "x-cache-mode": "semantic",
        "x-cache-ttl": "60",
        "x-cache-namespace": "red",
        "x-cache-tags": "doc:1,team:a",
        "x-cache-max-error": "0.001",
        "x-cache-user": "u1",
        "x-cache-explain": "1",
        "Cookie": "secret=1",
        "OpenAI-Organization": "org-1",
        "X-Stainless-Lang": "python",
    }
    body = chat_body(ASKED)
    twin = json.dumps(body)[:-1].encode() + b' , "cache": {"ttl": 60, "namespace": "red", "tags": ["doc:2"]}}'
    assert (await exact.send(twin, headers=headers)).status == 200
    seen = up.requests[-1]
    names = {name.lower() for name, _ in seen.headers}
    assert not {name for name in names if name.startswith("x-cache")} | (names & {"cache-control", "cookie"})
    assert seen.header("OpenAI-Organization") == "org-1"
    assert seen.header("Authorization") == "Bearer sk-a"
    assert seen.json == body
    assert seen.body.startswith(json.dumps(body)[:-1].encode())
    await exact.settled()
    [entry] = await exact.entries()
    assert (entry["namespace"], sorted(entry["tags"])) == ("red", ["doc:1", "doc:2", "team:a"])


async def test_other_paths_pass_through_untouched(exact, up):
    async with exact.session.get(exact.url + "/v1/models", headers={"Authorization": "Bearer sk-a"}) as response:
        assert response.headers["x-cache"] == "BYPASS"
        assert [model["id"] for model in (await response.json())["data"]] == ["gpt-4o-mini", "gpt-4o"]
    sent, answered = bytes(range(256)) * 4096, bytes(reversed(range(256))) * 8192
    up.script(Body(201, answered, "application/octet-stream", {"X-Own": "1"}))
    headers = {"Authorization": "Bearer sk-a", "Content-Type": "application/octet-stream"}
    async with exact.session.put(exact.url + "/v1/files/f%20x?a=1&a=2", data=sent, headers=headers) as response:
        assert (response.status, await response.read(), response.headers["X-Own"]) == (201, answered, "1")
    seen = up.requests[-1]
    assert (seen.method, seen.path, seen.body) == ("PUT", "/v1/files/f%20x?a=1&a=2", sent)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Chat(finish_reason="length"), "length"),
        (Chat(text=" "), "empty"),
        (Chat(message={"refusal": "no"}), "refusal"),
        (Chat(headers={"Cache-Control": "no-store"}), "no-store"),
        (Chat(headers={"Cache-Control": "private"}), "private"),
        (Chat(headers={"Vary": "*"}), "vary"),
        (Chat(headers={"Set-Cookie": "session=1"}), "cookie"),
        (Chat(model="another-model"), "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_may_not_be_stored_is_relayed_and_asked_again(exact, up, reply, why, stream):
    up.script(reply)
    assert (await exact.ask(ASKED, stream=stream)).status == 200
    await exact.settled()
    assert await exact.entries() == []
    assert (await exact.ask(ASKED, stream=stream)).cache == "MISS"
    assert up.meter.calls == 2


async def test_every_kind_of_reply_names_ibid_and_no_version_of_what_it_is_made_of(exact, up):
    """Miss, stream, hit, refusal of ours, and a path that passes through."""
    replies = [await exact.ask(ASKED), await exact.ask("Another one, streamed?", stream=True), await exact.fill(ASKED)]
    replies += [await exact.ask(ASKED), await exact.ask([]), await exact.ask("x", headers={"x-cache-mode": "?"})]
    servers = {reply.headers["Server"] for reply in replies}
    async with exact.session.get(exact.url + "/v1/models", headers={"Authorization": "Bearer sk-a"}) as response:
        servers.add(response.headers["Server"])
    assert servers == {"ibid"}
    assert {reply.cache for reply in replies} >= {"MISS", "HIT"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("finish", ["function_call", "stop"])
async def test_a_function_called_as_before_there_were_tools_is_paid_for_once(exact, up, stream, finish):
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    up.default = Chat(text="Let me look.", message={"function_call": call}, finish_reason=finish)
    body = chat_body("Weather in Paris?", functions=[{"name": "weather", "parameters": {"type": "object"}}])
    first = await exact.send(body)
    await exact.settled()
    again = await exact.send({**body, "stream": stream})
    assert (first.cache, again.cache, len(up.requests)) == ("MISS", "HIT", 1)
    if not stream:
        assert again.json["choices"] == first.json["choices"]
        return
    parts = [chunk["choices"][0]["delta"].get("function_call", {}) for chunk in again.chunks if chunk["choices"]]
    assert {name: "".join(part.get(name, "") for part in parts) for name in call} == call
    assert again.chunks[-1]["choices"][0]["finish_reason"] == finish
