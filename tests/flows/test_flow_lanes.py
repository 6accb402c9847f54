"""What a plan does to a request: who is asked, in which order, what the client gets, and what the books say of it.

The cloud and the edge are scripted servers with meters of their own; the edge is the real language model in
`test_flow_strategies.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from tests.flows.running import EXACT_ONLY, MODEL, Ibid, chat_body, running, until
from tests.upstream import Chat, Json, Raw, ScriptedUpstream
from tests.waiting import PATIENCE_S

EDGE_MODEL = "edge-1b"
DOWN = Json(503, {"error": {"message": "down", "type": "server_error", "param": None, "code": None}})


@pytest.fixture
async def edge() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


def lanes(edge: ScriptedUpstream, **sections: Any) -> dict[str, Any]:
    """An installation with a local model, priced by the token, and a cloud with round prices."""
    return {
        "upstream.edge": {"base_url": edge.url},
        "lane.edge": {"upstream": "edge", "model": EDGE_MODEL, "timeout_s": PATIENCE_S},
        'prices.override."edge/*"': {"input_usd_per_mtok": 0.01, "output_usd_per_mtok": 0.02},
        f'prices.override."openai/{MODEL}"': {"input_usd_per_mtok": 1, "output_usd_per_mtok": 4, "flex_factor": 0.5},
        **EXACT_ONLY,
        **sections,
    }


async def steps(ibid: Ibid, reply: Any) -> list[tuple[str, int]]:
    found = await ibid.sql(
        f"SELECT mechanism, saved_nusd FROM saving WHERE request_id = '{reply.headers['x-request-id']}' ORDER BY step"
    )
    return [(row["mechanism"], row["saved_nusd"]) for row in found]


async def balanced(ibid: Ibid) -> bool:
    rows = await ibid.sql(
        "SELECT r.id FROM request r LEFT JOIN "
        "(SELECT request_id, SUM(saved_nusd) AS s FROM saving GROUP BY request_id) x "
        "ON x.request_id = r.id WHERE r.baseline_nusd - r.actual_nusd <> COALESCE(x.s, 0) OR r.baseline_basis = ''"
    )
    return rows == []


async def billed(ibid: Ibid, upstream: str) -> tuple[int, int, int]:
    """Calls, input and output tokens that the ledger has for an upstream."""
    (row,) = await ibid.sql(
        "SELECT COUNT(*) AS calls, COALESCE(SUM(in_tok), 0) AS i, COALESCE(SUM(out_tok), 0) AS o FROM upstream_call "
        f"WHERE upstream = '{upstream}' AND usage_basis <> 'none'"
    )
    return row["calls"], row["i"], row["o"]


def metered(server: ScriptedUpstream) -> tuple[int, int, int]:
    meter = server.meter
    return meter.calls, meter.input_tokens, meter.output_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_the_edge_lane_asks_the_local_model_and_keeps_the_clients_key(data_dir, up, edge, stream):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        reply = await ibid.ask("What is the capital of France?", stream=stream, headers={"x-plan": "+edge"})
        assert reply.status == 200
        assert reply.text == "answer #1 to: What is the capital of France?"
        assert (reply.headers["x-upstream"], reply.tier) == ("edge", "edge")
        assert reply.headers["x-plan"] == "exact,semantic,collapse,edge"
        assert up.requests == []
        (seen,) = edge.requests
        assert seen.json["model"] == EDGE_MODEL
        assert seen.header("Authorization") is None
        await ibid.settled()
        (mechanism, saved), *rest = await steps(ibid, reply)
        assert (mechanism, rest) == ("edge.local", [])
        assert saved > 0
        assert metered(edge) == await billed(ibid, "edge")
        assert (await ibid.entries()) == []  # another model's answer is not kept as the one asked for
        assert await balanced(ibid)


async def test_an_alias_of_the_model_steers_a_client_that_can_set_nothing_else(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge, **{"alias.local": {"plan": "+edge"}})) as ibid:
        reply = await ibid.ask("Who wrote Faust?", model=f"{MODEL}@local")
        assert reply.headers["x-upstream"] == "edge"
        reply = await ibid.ask("Who wrote Hamlet?", model=f"{MODEL}@exact")
        assert up.requests[0].json["model"] == MODEL
        assert "semantic" not in reply.headers["x-plan"]
        reply = await ibid.ask("Who wrote Emma?", model=f"{MODEL}@2024")
        assert up.requests[1].json["model"] == f"{MODEL}@2024"


async def test_a_policy_chooses_the_plan_and_the_first_that_matches_wins(data_dir, up, edge):
    policies = [
        {"match": {"tag": "eval"}, "plan": ["exact", "edge"], "ttl_s": 60},
        {"match": {"stream": False}, "plan": ["exact"]},
    ]
    async with running(data_dir, up.url, lanes(edge, policy=policies)) as ibid:
        tagged = await ibid.ask("Who wrote Faust?", headers={"x-cache-tags": "eval"})
        plain = await ibid.ask("Who wrote Faust?")
        assert tagged.headers["x-plan"] == "exact,edge"
        assert plain.headers["x-plan"] == "exact"
        assert (tagged.headers["x-upstream"], plain.headers["x-upstream"]) == ("edge", "openai")


@pytest.mark.parametrize("plan", ["warp", "+hedge,exact", "+exact,-exact", "route"])
async def test_a_plan_that_cannot_be_is_refused_by_name(data_dir, up, edge, plan):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        reply = await ibid.ask("Who wrote Faust?", headers={"x-plan": plan})
        assert (reply.status, reply.json["error"]["param"]) == (400, "x-plan")
        assert up.requests == []


async def test_when_the_cloud_is_down_a_stale_answer_comes_first_then_the_edge_then_the_error(data_dir, up, edge):
    policy = [{"on_error": ["stale", "edge"]}]
    sections = lanes(edge, policy=policy, **{"lane.stale": {"if_error_s": 600}})
    async with running(data_dir, up.url, sections) as ibid:
        known = await ibid.ask("What is the capital of France?", headers={"x-cache-ttl": "1"})
        await ibid.settled()
        up.default = DOWN
        await asyncio.sleep(1.1)
        stale = await ibid.ask("What is the capital of France?", stream=True)
        assert (stale.status, stale.cache, stale.tier, stale.text) == (200, "STALE", "stale", known.text)
        assert re.fullmatch(r"ibid; hit; ttl=-\d+; detail=stale-if-error", stale.headers["Cache-Status"])
        local = await ibid.ask("What is the capital of Spain?")
        assert (local.status, local.tier, local.headers["x-upstream"]) == (200, "edge", "edge")
        assert "fwd-status=503" in local.headers["Cache-Status"]
        edge.default = DOWN
        failed = await ibid.ask("What is the capital of Italy?")
        assert (failed.status, failed.json["error"]["message"]) == (503, "down")
        await ibid.settled()
        assert await steps(ibid, stale) == [("cache.stale-if-error", 0)]
        ((mechanism, saved),) = await steps(ibid, local)
        assert mechanism == "edge.offline"
        assert saved < 0  # an error would have cost nothing
        assert (await ibid.row(stale))["cache_status"] == "STALE"
        assert metered(edge) == await billed(ibid, "edge")
        assert await balanced(ibid)


async def test_a_cloud_that_cannot_be_reached_is_as_good_as_down(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge, policy=[{"on_error": ["edge"]}])) as ibid:
        up.default = Raw(b"", then="rst")
        reply = await ibid.ask("What is the capital of Spain?", stream=True)
        assert (reply.status, reply.tier) == (200, "edge")


async def test_a_stale_answer_is_served_at_once_while_one_new_one_is_fetched(data_dir, up, edge):
    policy = [{"plan": ["exact", "stale-while-revalidate", "collapse"]}]
    sections = lanes(edge, policy=policy, **{"lane.stale": {"while_revalidate_s": 600}})
    async with running(data_dir, up.url, sections) as ibid:
        await ibid.ask("What is the capital of France?", headers={"x-cache-ttl": "1"})
        await ibid.settled()
        await asyncio.sleep(1.1)
        gate = asyncio.Event()

        async def held(_seen: Any) -> Chat:
            await gate.wait()
            return Chat()

        up.default = held
        replies = await asyncio.gather(*(ibid.ask("What is the capital of France?") for _ in range(5)))
        gate.set()
        assert {reply.tier for reply in replies} == {"stale"}
        assert {reply.text for reply in replies} == {"answer #1 to: What is the capital of France?"}
        await ibid.settled()
        assert len(up.requests) == 2
        fresh = await ibid.ask("What is the capital of France?")
        assert (fresh.tier, fresh.text) == ("exact", "answer #2 to: What is the capital of France?")
        rows = await ibid.sql("SELECT mechanism, COUNT(*) AS n FROM saving GROUP BY mechanism ORDER BY mechanism")
        counts = {row["mechanism"]: row["n"] for row in rows}
        assert counts == {"cache.exact": 1, "cache.revalidate": 1, "cache.stale": 5}
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)


SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize(
    ("said", "served"), [('{"city": "Paris"}', "edge"), ('{"town": "Paris"}', "openai"), ("Paris", "openai")]
)
async def test_a_cascade_takes_the_edges_answer_only_when_it_stands_the_proof(data_dir, up, edge, said, served):
    edge.default = Chat(text=said)
    up.default = Chat(text='{"city": "Paris, of the cloud"}')
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        reply = await ibid.ask("Capital of France?", response_format=SCHEMA, headers={"x-plan": "exact,cascade"})
        assert reply.headers["x-upstream"] == served
        assert reply.text == (said if served == "edge" else '{"city": "Paris, of the cloud"}')
        await ibid.settled()
        ((mechanism, saved),) = await steps(ibid, reply)
        assert mechanism == "hybrid.cascade"
        assert (saved > 0) == (served == "edge")
        assert metered(edge) == await billed(ibid, "edge")
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)


async def test_what_nobody_can_prove_is_not_tried_at_the_edge(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        reply = await ibid.ask("Write me a poem about Paris", headers={"x-plan": "exact,cascade,race"})
        assert reply.headers["x-upstream"] == "openai"
        assert edge.requests == []


@pytest.mark.parametrize(
    ("edge_s", "cloud_s", "served"), [(0.0, 0.5, "edge"), (1.5, 0.0, "openai"), (0.4, 3.0, "edge")]
)
async def test_a_race_is_won_by_whoever_is_first_with_a_good_answer(data_dir, up, edge, edge_s, cloud_s, served):
    edge.default = Chat(text='{"city": "Paris"}', delay_s=edge_s)
    up.default = Chat(text='{"city": "Paris, of the cloud"}', delay_s=cloud_s)
    sections = lanes(edge, **{"lane.race": {"head_start_s": 0.2}})
    async with running(data_dir, up.url, sections) as ibid:
        reply = await ibid.ask("Capital of France?", response_format=SCHEMA, headers={"x-plan": "exact,race"})
        assert (reply.status, reply.headers["x-upstream"]) == (200, served)
        await ibid.settled()
        calls = await ibid.sql("SELECT upstream, purpose, won FROM upstream_call ORDER BY won DESC")
        assert (calls[0]["upstream"], calls[0]["won"]) == (served, 1)
        assert {call["purpose"] for call in calls[1:]} <= {"race"}
        assert len(calls) == (1 if (edge_s, cloud_s) == (0.0, 0.5) else 2)
        assert await balanced(ibid)


TIER = {"lane.tier": {"models": ["gpt-*"], "margin_s": 0.2}}


async def test_flex_is_asked_first_and_the_default_tier_when_it_refuses(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge, **TIER)) as ibid:
        cheap = await ibid.ask("Question one please", headers={"x-plan": "exact,tier"})
        assert up.requests[0].json["service_tier"] == "flex"
        up.script(Json(429, {"error": {"message": "Resource unavailable", "code": "resource_unavailable"}}))
        dear = await ibid.ask("Question two please", headers={"x-plan": "exact,tier"})
        assert [request.json.get("service_tier") for request in up.requests[1:]] == ["flex", None]
        assert (cheap.status, dear.status) == (200, 200)
        await ibid.settled()
        rows = await ibid.sql("SELECT tier, status, won FROM upstream_call ORDER BY id")
        assert sorted((row["tier"], row["status"], row["won"]) for row in rows) == [
            ("default", 200, 1), ("flex", 200, 1), ("flex", 429, 0)
        ]  # fmt: skip
        assert [mechanism for mechanism, _ in await steps(ibid, cheap)] == ["batch.flex"]
        assert await steps(ibid, dear) == []
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)


async def test_flex_is_left_in_time_for_the_clients_deadline(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge, **TIER)) as ibid:
        up.script(Chat(delay_s=PATIENCE_S))
        reply = await ibid.ask("Question one please", headers={"x-deadline": "1s"})
        assert (reply.status, len(up.requests)) == (200, 2)
        assert "service_tier" not in up.requests[1].json
        await ibid.settled()
        assert await balanced(ibid)


async def test_a_slow_first_token_is_hedged_within_the_load_budget(data_dir, up, edge):
    sections = lanes(edge, **{"lane.hedge": {"min_samples": 20, "min_delay_s": 0.5, "max_extra_load": 0.05}})
    async with running(data_dir, up.url, sections) as ibid:
        plan = {"x-plan": "exact,hedge"}
        for number in range(40):
            await ibid.ask(f"Question number {number}", headers=plan)
        up.script(Chat(delay_s=PATIENCE_S))
        reply = await ibid.ask("The slow question", headers=plan)
        assert reply.status == 200
        await ibid.settled()
        await until(lambda: up.meter.cancelled == 1)
        calls = await ibid.sql("SELECT purpose, won, usage_basis, in_tok, out_tok FROM upstream_call "
                               f"WHERE request_id = '{reply.headers['x-request-id']}' ORDER BY won")  # fmt: skip
        assert [(call["purpose"], call["won"]) for call in calls] == [("hedge", 0), ("answer", 1)]
        assert (calls[0]["usage_basis"], calls[0]["in_tok"], calls[0]["out_tok"]) == (
            "estimated",
            calls[1]["in_tok"],
            0,
        )
        mechanisms = await steps(ibid, reply)
        assert [mechanism for mechanism, _ in mechanisms] == ["spec.hedge", "spec.hedge"]
        assert sum(saved for _, saved in mechanisms) < 0
        assert await balanced(ibid)


async def test_a_tail_of_slow_answers_costs_no_more_than_the_budget(data_dir, up, edge):
    sections = lanes(edge, **{"lane.hedge": {"min_samples": 20, "min_delay_s": 0.001, "max_extra_load": 0.05}})
    async with running(data_dir, up.url, sections) as ibid:
        count = 0

        def tail(seen: Any) -> Chat:
            nonlocal count
            count += 1
            if count == 41:
                return Chat(delay_s=PATIENCE_S)  # whatever the 40 before took on a busy machine, this takes longer
            return Chat(delay_s=0.15 if count > 41 and count % 3 == 0 else 0.0)

        up.default = tail
        for number in range(200):
            await ibid.ask(f"Question number {number}", headers={"x-plan": "exact,hedge"})
        extra = len(up.requests) - 200
        assert 1 <= extra <= 200 * 0.05
        told = (await ibid.admin("GET", "/cache/stats"))["lanes"]["hedge"]
        assert told["made"] == 200
        assert extra <= told["extra"] <= 200 * 0.05  # some were given up before they were sent
        await ibid.settled()
        (lost,) = await ibid.sql(
            "SELECT COUNT(*) AS n FROM upstream_call WHERE purpose = 'hedge' AND usage_basis <> 'none'"
        )
        assert lost["n"] == extra
        assert await balanced(ibid)


async def test_a_near_miss_is_sent_along_as_a_prediction_while_it_is_accepted(data_dir, up, edge):
    def predicted(seen: Any) -> Any:
        text = "word " * 100
        body = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120},
        }  # fmt: skip
        if "prediction" in seen.json:
            body["usage"]["completion_tokens"] = 190
            body["usage"]["completion_tokens_details"] = {
                "accepted_prediction_tokens": 10, "rejected_prediction_tokens": 90,
            }  # fmt: skip
        return Json(200, body)

    up.default = predicted
    sections = lanes(edge, **{"lane.predict": {"models": ["gpt-*"]}, "cache": {}})
    async with running(data_dir, up.url, sections) as ibid:
        await ibid.ask("How do I get from Paris to Lyon in 2 hours?")
        await ibid.settled()
        sent = []
        for hours in range(3, 10):
            reply = await ibid.ask(f"How do I get from Paris to Lyon in {hours} hours?", headers={"x-plan": "+predict"})
            assert reply.reason == "numbers"
            await ibid.settled()
            sent.append("prediction" in up.requests[-1].json)
        assert sent == [True] * 4 + [False] * 3  # a tenth accepted: below break-even after four trials
        call = (await ibid.sql("SELECT * FROM upstream_call WHERE rejected_pred_tok > 0 LIMIT 1"))[0]
        assert (call["out_tok"], call["accepted_pred_tok"], call["rejected_pred_tok"]) == (190, 10, 90)
        rows = await ibid.sql("SELECT saved_nusd FROM saving WHERE mechanism = 'spec.predict'")
        assert [row["saved_nusd"] for row in rows] == [-90 * 4_000] * 4
        assert await balanced(ibid)


async def test_an_upstream_that_refuses_a_prediction_is_asked_plainly(data_dir, up, edge):
    sections = lanes(edge, **{"lane.predict": {"models": ["*"], "min_output_tokens": 1}, "cache": {}})
    async with running(data_dir, up.url, sections) as ibid:
        await ibid.ask("How do I get from Paris to Lyon in 2 hours?")
        await ibid.settled()
        up.script(Json(400, {"error": {"message": "Unsupported parameter: 'prediction'"}}))
        reply = await ibid.ask("How do I get from Paris to Lyon in 3 hours?", headers={"x-plan": "+predict"})
        assert (reply.status, len(up.requests)) == (200, 3)
        assert [("prediction" in request.json) for request in up.requests[1:]] == [True, False]
        await ibid.ask("How do I get from Paris to Lyon in 4 hours?", headers={"x-plan": "+predict"})
        assert "prediction" not in up.requests[-1].json
        await ibid.settled()
        assert await balanced(ibid)


async def test_a_plan_that_lets_the_edge_answer_is_not_joined_by_one_that_does_not(data_dir, up, edge):
    gate = asyncio.Event()
    edge.default = Chat(gates={0: gate})
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        local = asyncio.ensure_future(ibid.ask("Who wrote Faust?", stream=True, headers={"x-plan": "+edge"}))
        await until(lambda: edge.requests)
        cloud = await ibid.ask("Who wrote Faust?", stream=True)
        assert cloud.headers["x-upstream"] == "openai"
        gate.set()
        assert (await local).headers["x-upstream"] == "edge"


async def test_an_anthropic_client_is_answered_by_the_edge_in_its_own_words(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        headers = {"x-api-key": "sk-a", "anthropic-version": "2026-10-21", "x-plan": "+edge"}
        question = {"role": "user", "content": "Who wrote Faust?"}
        body = {"model": "claude-x", "max_tokens": 100, "system": "Be brief.", "messages": [question]}
        async with ibid.session.post(ibid.url + "/v1/messages", json=body, headers=headers) as response:
            said = await response.json()
            assert response.status == 200, said
        assert said["type"] == "message"
        assert said["content"] == [{"type": "text", "text": "answer #1 to: Who wrote Faust?"}]
        asked = edge.requests[0].json
        assert asked["messages"] == [{"role": "system", "content": "Be brief."}, question]
        assert (asked["model"], asked["max_tokens"]) == (EDGE_MODEL, 100)
        async with ibid.session.post(
            ibid.url + "/v1/messages", json={**body, "stream": True}, headers=headers
        ) as response:
            events = [line for line in (await response.text()).splitlines() if line.startswith("event:")]
        assert (events[0], events[-1]) == ("event: message_start", "event: message_stop")
        await ibid.settled()
        assert metered(edge) == await billed(ibid, "edge")
        assert json.loads(edge.requests[1].body).get("stream") is None
        assert await balanced(ibid)


async def test_explain_tells_the_plan_and_what_it_would_cost(data_dir, up, edge):
    policies = [{"name": "cheap ones", "match": {"model": "gpt-*"}, "plan": ["exact", "tier", "hedge"]}]
    sections = lanes(edge, policy=policies, **{"lane.tier": {"models": ["gpt-*"]}})
    async with running(data_dir, up.url, sections) as ibid:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 100}
        told = await ibid.admin("POST", "/cache/explain", body)
        assert told["plan"] == {"lanes": ["exact", "tier", "hedge"], "policy": "cheap ones"}
        cost = told["cost"]
        assert cost["output_tokens"] == 100
        assert cost["baseline_nusd"] == cost["input_tokens"] * 1_000 + 100 * 4_000
        assert cost["at_most_nusd"] == 2 * cost["baseline_nusd"]
        assert up.requests == []
        await ibid.ask("y" * 400)
        await ibid.settled()
        await ibid.app.store.ledger.flush()
        (row,) = await ibid.sql("SELECT out_tok FROM upstream_call")
        told = await ibid.admin("POST", "/cache/explain", {**body, "max_tokens": 10_000})
        assert told["cost"]["output_tokens"] == row["out_tok"]
        known = {"model": MODEL, "messages": [{"role": "user", "content": "y" * 400}]}
        hit = await ibid.admin("POST", "/cache/explain", known)
        assert (hit["verdict"], hit["cost"]["likely_nusd"], hit["cost"]["at_most_nusd"]) == ("hit", 0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_names_a_deadline_is_held_with_a_heartbeat_and_the_sdk_reads_the_answer(
    data_dir, up, edge, stream, monkeypatch
):
    monkeypatch.setattr("proxy.client.delivery.HEARTBEAT_S", 0.2)
    up.default = Chat(delay_s=1.5)
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        client = AsyncOpenAI(base_url=f"{ibid.url}/v1", api_key="sk-a", max_retries=0)
        made = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "A slow one"}], stream=stream,
            extra_headers={"x-deadline": "10m"},
        )  # fmt: skip
        raw = await made
        assert "detail=held" in raw.headers["Cache-Status"]
        answer = raw.parse()
        if stream:
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
        else:
            text = answer.choices[0].message.content
            assert raw.content.startswith(b"\n")
        assert text == "answer #1 to: A slow one"
        await client.close()
        await ibid.settled()
        assert (await ibid.ask("A slow one")).tier == "exact"
        assert await balanced(ibid)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_held_answer_that_fails_never_looks_whole(data_dir, up, edge, stream, monkeypatch):
    monkeypatch.setattr("proxy.client.delivery.HEARTBEAT_S", 0.2)

    async def slow_failure(seen: Any) -> Json:
        await asyncio.sleep(1.0)
        return DOWN

    up.default = slow_failure
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        client = AsyncOpenAI(base_url=f"{ibid.url}/v1", api_key="sk-a", max_retries=0)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "A slow one"}], "stream": stream}

        async def read() -> None:
            answer = await client.chat.completions.create(**asked, extra_headers={"x-deadline": "10m"})
            if stream:
                _ = [chunk async for chunk in answer]

        with pytest.raises(APIError):
            await read()
        await client.close()


async def test_a_client_that_leaves_while_it_is_held_ends_the_call(data_dir, up, edge, monkeypatch):
    monkeypatch.setattr("proxy.client.delivery.HEARTBEAT_S", 0.1)
    up.default = Chat(delay_s=PATIENCE_S)
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        async with ibid.open(chat_body("slow"), headers={"x-deadline": "10m"}) as response:
            assert response.status == 200
            response.close()
        await until(lambda: up.meter.cancelled == 1)
        await ibid.settled()
        assert [row["outcome"] for row in await ibid.sql("SELECT outcome FROM request")] == ["cancelled"]


class Claude:
    """A scripted messages server with a prefix cache and a meter: what stands before the last mark is written once,
    then read."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.usages: list[dict[str, int]] = []
        self.marks: list[int] = []

    def __call__(self, seen: Any) -> Any:
        body = seen.json
        spelled = seen.body.decode()
        marks = spelled.count('"cache_control"')
        self.marks.append(marks)
        system = body["system"] if isinstance(body["system"], str) else body["system"][0]["text"]
        size = len(system) // 4 if marks else 0
        is_known = system in self.seen
        if marks:
            self.seen.add(system)
        usage = {
            "input_tokens": len(spelled) // 4 - size,
            "cache_read_input_tokens": size if is_known else 0,
            "cache_creation_input_tokens": 0 if is_known else size,
            "output_tokens": 5,
        }
        self.usages.append(usage)
        said = [{"type": "text", "text": "Fine."}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": said}
        return Json(200, {**message, "stop_reason": "end_turn", "stop_sequence": None, "usage": usage})


async def test_a_prefix_seen_twice_is_marked_and_the_books_say_what_that_cost_and_saved(data_dir, up, edge):
    up.default = claude = Claude()
    prices = {
        "input_usd_per_mtok": 3, "output_usd_per_mtok": 15, "cache_read_usd_per_mtok": 0.3,
        "cache_write_usd_per_mtok": 3.75,
    }  # fmt: skip
    sections = lanes(edge, **{'prices.override."anthropic/*"': prices})
    async with running(data_dir, up.url, sections) as ibid:
        headers = {"x-api-key": "sk-a", "anthropic-version": "2026-10-21", "x-plan": "exact,prefix"}
        for number in range(5):
            question = {"role": "user", "content": f"Question number {number}"}
            body = {"model": "claude-x", "max_tokens": 9, "system": "You are careful. " * 400, "messages": [question]}
            async with ibid.session.post(ibid.url + "/v1/messages", json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
            await ibid.settled()
        assert claude.marks == [0, 1, 1, 1, 1]
        steps = await ibid.sql("SELECT mechanism, saved_nusd FROM saving ORDER BY saved_nusd")
        assert [step["mechanism"] for step in steps] == ["cache.prefix"] * 4
        written = claude.usages[1]["cache_creation_input_tokens"]
        assert [step["saved_nusd"] for step in steps] == [-written * 750] + [written * 2_700] * 3
        (row,) = await ibid.sql("SELECT SUM(cost_nusd) AS paid FROM upstream_call")
        assert row["paid"] == sum(
            usage["input_tokens"] * 3_000 + usage["output_tokens"] * 15_000
            + usage["cache_read_input_tokens"] * 300 + usage["cache_creation_input_tokens"] * 3_750
            for usage in claude.usages
        )  # fmt: skip
        assert await balanced(ibid)


async def test_openai_is_given_one_key_for_one_beginning_and_the_client_keeps_its_own(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        system = {"role": "system", "content": "You are careful."}
        for number in range(2):
            await ibid.ask([system, {"role": "user", "content": f"{number}"}], headers={"x-plan": "exact,prefix"})
        own = [system, {"role": "user", "content": "own"}]
        await ibid.ask(own, headers={"x-plan": "exact,prefix"}, prompt_cache_key="mine")
        await ibid.ask(own, key="sk-b", headers={"x-plan": "exact,prefix"})
        keys = [request.json["prompt_cache_key"] for request in up.requests]
        assert keys[0] == keys[1]
        assert keys[2] == "mine"
        assert keys[3] not in keys[:3]


@pytest.mark.parametrize(
    ("match", "headers"),
    [
        ({"namespace": "news"}, {"x-cache-namespace": "news"}),
        ({"tag": "doc:*"}, {"x-cache-tags": "team:a,doc:42"}),
        ({"model": "gpt-*"}, {}),
    ],
    ids=["namespace", "tag", "pattern"],
)
async def test_a_policy_says_how_long_answers_live(data_dir, up, edge, match, headers):
    sections = lanes(edge, policy=[{"match": match, "ttl_s": 9000}])
    async with running(data_dir, up.url, sections) as ibid:
        await ibid.ask("Who wrote Faust?", headers=headers)
        await ibid.settled()
        hit = await ibid.ask("Who wrote Faust?", headers=headers)
        assert (hit.tier, "ttl=8" in hit.headers["Cache-Status"]) == ("exact", True)
        await ibid.ask("Who wrote Emma?", headers={**headers, "x-cache-ttl": "7"})
        await ibid.settled()
        (row,) = await ibid.sql("SELECT (expires_ms - created_ms) AS life_ms FROM entry ORDER BY id DESC LIMIT 1")
        assert row["life_ms"] == 7_000  # the client's own wish comes first


async def test_a_local_model_can_be_priced_by_the_time_it_takes(data_dir, up, edge):
    edge.default = Chat(delay_s=0.25)
    sections = lanes(edge, **{'prices.override."edge/*"': {"per_second_usd": 0.0001}})
    async with running(data_dir, up.url, sections) as ibid:
        reply = await ibid.ask("Who wrote Faust?", headers={"x-plan": "+edge"})
        await ibid.settled()
        (call,) = await ibid.sql("SELECT cost_nusd, total_ms FROM upstream_call")
        assert call["cost_nusd"] == pytest.approx(call["total_ms"] * 100, abs=60)  # exact to the millisecond
        assert call["cost_nusd"] > 25_000
        assert await balanced(ibid)
        assert reply.headers["x-cost-usd"] == f"0.{call['cost_nusd']:09d}"


async def test_the_most_a_client_may_do_is_what_the_operator_made_ready(data_dir, up):
    async with running(data_dir, up.url, {**EXACT_ONLY}) as ibid:
        for lane in ("edge", "route", "tier", "predict", "stale", "cascade", "race"):
            reply = await ibid.ask("Who wrote Faust?", headers={"x-plan": f"+{lane}"})
            assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_value"), lane
        cheap = await ibid.ask("Who wrote Faust?", model=f"{MODEL}@cheap")  # an alias takes nothing that is not there
        assert (cheap.status, cheap.headers["x-plan"]) == (200, "exact,semantic,collapse")


async def test_metrics_name_who_answered_and_whom_it_cost(data_dir, up, edge):
    async with running(data_dir, up.url, lanes(edge)) as ibid:
        await ibid.ask("Who wrote Faust?", headers={"x-plan": "+edge"})
        await ibid.ask("Who wrote Emma?")
        await ibid.settled()
        told = await ibid.admin("GET", "/metrics")
        assert re.search(r'ibid_requests_total\{cache="MISS",reason="[a-z_]+",status="200",tier="edge"\} 1\.0', told)
        assert 'ibid_upstream_down{upstream="edge"} 0.0' in told
        costs = dict(re.findall(r'ibid_cost_usd_total\{upstream="(\w+)"\} (\S+)', told))
        assert set(costs) == {"edge", "openai"}
        assert float(costs["edge"]) < float(costs["openai"]) / 50
