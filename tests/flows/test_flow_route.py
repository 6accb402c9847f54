"""Routing by what the nearest answered questions showed, and asking the likely next question beforehand.

The cheap model and the one asked for are scripted servers with meters; their answers say what they are worth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.flows.running import MODEL, Ibid, running
from tests.flows.test_flow_lanes import balanced, billed, lanes, metered, steps
from tests.upstream import Chat, Json, ScriptedUpstream, Seen

CITIES = (
    "Paris Lyon Rome Madrid Berlin Vienna Prague Lisbon Dublin Oslo Athens Warsaw Cairo Delhi Tokyo Seoul Lima Quito "
    "Bogota Caracas Havana Nairobi Accra Dakar Tunis Rabat Manila Hanoi Jakarta Bangkok"
).split()


@pytest.fixture
async def edge():
    async with ScriptedUpstream() as server:
        yield server


def routed(edge: ScriptedUpstream, **lane: Any) -> dict[str, Any]:
    limits = {"candidates": ["edge/edge-1b"], "min_neighbours": 8, "accept_quality": 0.7, "min_similarity": 0.15}
    return lanes(edge, **{"cache": {}, "lane.route": {**limits, **lane}})


def knows(seen: Seen) -> Chat:
    return Chat(text=f"It lies in the country of {seen.json['messages'][-1]['content'].split()[-1]}")


def explore_no_more(ibid: Ibid) -> None:
    router = ibid.app.pipeline.errands.router
    router.lane = replace(router.lane, explore_share=0.0)


async def asked(ibid: Ibid, cities: list[str], **fields: Any) -> list[str]:
    served = []
    for city in cities:
        reply = await ibid.ask(f"In which country is the city of {city}", headers={"x-plan": "exact,route"}, **fields)
        assert reply.status == 200
        served.append(reply.headers["x-upstream"])
        await ibid.settled()
    return served


async def test_a_model_that_proved_itself_on_alike_questions_answers(data_dir, up, edge):
    up.default = edge.default = knows
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        first = await asked(ibid, CITIES[:14])
        assert set(first) == {"openai"} or first.index("edge") >= 8
        later = await asked(ibid, CITIES[14:24])
        assert later.count("edge") >= 8
        explore_no_more(ibid)
        reply = await ibid.ask("In which country is the city of Hanoi", headers={"x-plan": "exact,route"})
        assert reply.headers["x-upstream"] == "edge"
        await ibid.settled()
        again = await ibid.ask("In which country is the city of Hanoi", headers={"x-plan": "exact,route"})
        assert (again.tier, again.headers["x-upstream"]) == ("exact", "edge")
        ((mechanism, saved),) = await steps(ibid, reply)
        assert mechanism == "hybrid.route"
        assert saved > 0
        shadows = await ibid.sql(
            "SELECT COUNT(*) AS n, SUM(saved_nusd) AS s FROM saving WHERE mechanism = 'hybrid.shadow'"
        )
        assert shadows[0]["n"] >= 14
        assert shadows[0]["s"] < 0
        assert metered(edge) == await billed(ibid, "edge")
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)
        plain = await ibid.ask("In which country is the city of Hanoi")
        assert plain.headers["x-upstream"] == "openai"  # who did not ask to be routed gets the model asked for


async def test_a_model_that_answers_otherwise_is_not_chosen(data_dir, up, edge):
    up.default = knows
    edge.default = Chat(text="No idea, 42 maybe")
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        assert set(await asked(ibid, CITIES[:20])) == {"openai"}
        rows = await ibid.sql("SELECT good, COUNT(*) AS n FROM route_vote WHERE source = 'shadow' GROUP BY good")
        assert [(row["good"], row["n"]) for row in rows] == [(0, 20)]


async def test_too_few_neighbours_mean_the_model_asked_for(data_dir, up, edge):
    up.default = edge.default = knows
    async with running(data_dir, up.url, routed(edge, explore_share=0.0)) as ibid:
        assert set(await asked(ibid, CITIES[:12])) == {"openai"}
        assert edge.requests == []


async def test_votes_survive_a_restart_and_feedback_takes_a_model_down(data_dir, up, edge):
    up.default = edge.default = knows
    sections = routed(edge, explore_share=1.0)
    async with running(data_dir, up.url, sections) as ibid:
        await asked(ibid, CITIES[:14])
    sections["lane.route"]["explore_share"] = 0.0
    async with running(data_dir, up.url, sections) as ibid:
        assert await asked(ibid, CITIES[14:16]) == ["edge", "edge"]
        for city in CITIES[16:26]:
            reply = await ibid.ask(f"In which country is the city of {city}", headers={"x-plan": "exact,route"})
            await ibid.settled()
            if reply.headers["x-upstream"] == "edge":
                told = {"request_id": reply.headers["x-request-id"], "verdict": "wrong"}
                await ibid.app.store.ledger.flush()
                await ibid.admin("POST", "/cache/feedback", told)
        assert (await asked(ibid, CITIES[26:28])) == ["openai", "openai"]


async def test_a_client_that_asks_the_same_again_within_two_minutes_votes_against(data_dir, up, edge):
    up.default = edge.default = knows
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        await asked(ibid, CITIES[:14])
        explore_no_more(ibid)
        assert await asked(ibid, ["Hanoi"]) == ["edge"]
        reply = await ibid.ask("In which country is the city of Hanoi?", headers={"x-plan": "exact,semantic,route"})
        assert reply.status == 200
        rows = await ibid.sql("SELECT good, source FROM route_vote WHERE source = 'rephrase'")
        assert [(row["good"], row["source"]) for row in rows] == [(0, "rephrase")]


async def test_a_conversation_stays_with_the_model_that_began_it(data_dir, up, edge):
    up.default = edge.default = knows
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        await asked(ibid, CITIES[:14])
        opening = "In which country is the city of Manila"
        first = await ibid.ask(opening, headers={"x-plan": "exact,route"})
        turns = [
            {"role": "user", "content": opening},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And what do people eat there"},
        ]
        second = await ibid.ask(turns, headers={"x-plan": "exact,route"})
        assert [first.headers["x-upstream"], second.headers["x-upstream"]] == ["edge", "edge"]


@pytest.mark.parametrize("status", [404, 500])
async def test_a_candidate_that_fails_leaves_the_question_to_the_model_asked_for(data_dir, up, edge, status):
    up.default = edge.default = knows
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        await asked(ibid, CITIES[:14])
        explore_no_more(ibid)
        edge.default = Json(status, {"error": {"message": "no such model"}})
        reply = await ibid.ask("In which country is the city of Hanoi", headers={"x-plan": "exact,route"})
        assert (reply.status, reply.headers["x-upstream"]) == (200, "openai")
        await ibid.settled()
        calls = await ibid.sql(
            f"SELECT upstream, status, won FROM upstream_call WHERE request_id = '{reply.headers['x-request-id']}'"
        )
        assert sorted((call["upstream"], call["status"], call["won"]) for call in calls) == [
            ("edge", status, 0), ("openai", 200, 1)
        ]  # fmt: skip
        assert (await ibid.ask("In which country is the city of Hanoi")).tier == "exact"
        assert await balanced(ibid)


async def test_the_likely_next_question_is_fetched_on_the_cheap_tier_only(data_dir, up, edge):
    sections = lanes(edge, **{"lane.prefetch": {"min_count": 2}, "lane.tier": {"models": [MODEL]}})
    plan = {"x-plan": "exact,prefetch"}
    first, second = "What is in stock today", "What does it cost today"
    async with running(data_dir, up.url, sections) as ibid:
        for _ in range(2):
            for question in (first, second):
                assert (await ibid.ask(question, headers=plan)).cache == "MISS"
                await ibid.settled()
            await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
        before = len(up.requests)
        await ibid.ask(first, headers=plan)
        await ibid.settled()
        sent = {str(r.json["messages"][0]["content"]): r.json.get("service_tier") for r in up.requests[before:]}
        assert sent == {first: None, second: "flex"}
        hit = await ibid.ask(second, headers=plan)
        assert hit.tier == "exact"
        mechanisms = await ibid.sql("SELECT mechanism, saved_nusd FROM saving ORDER BY saved_nusd")
        assert [row["mechanism"] for row in mechanisms] == ["spec.prefetch", "cache.exact"]
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)


async def test_a_guess_is_not_made_at_the_full_price(data_dir, up, edge):
    def no_flex(seen: Seen) -> Any:
        return Json(429, {"error": {"message": "busy"}}) if "service_tier" in seen.json else Chat()

    up.default = no_flex
    sections = lanes(edge, **{"lane.prefetch": {"min_count": 1}, "lane.tier": {"models": [MODEL]}})
    plan = {"x-plan": "exact,prefetch"}
    async with running(data_dir, up.url, sections) as ibid:
        await ibid.ask("What is in stock today", headers=plan)
        await ibid.ask("What does it cost today", headers=plan)
        await ibid.settled()
        await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
        before = len(up.requests)
        await ibid.ask("What is in stock today", headers=plan)
        await ibid.settled()
        assert [r.json.get("service_tier") for r in up.requests[before:]].count("flex") == 1
        assert len(up.requests) == before + 2
        assert await balanced(ibid)


async def test_a_shadow_of_another_dialect_is_asked_and_compared_in_openais_words(data_dir, up, edge):
    def claude(seen: Seen) -> Any:
        text = f"It lies in the country of {seen.json['messages'][-1]['content'].split()[-1]}"
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": seen.json["model"]}
        usage = {"input_tokens": 9, "output_tokens": 9}
        said = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None}
        return Json(200, {**message, **said, "usage": usage})

    up.default, edge.default = claude, knows
    headers = {"x-api-key": "sk-a", "anthropic-version": "2026-10-21", "x-plan": "exact,route"}
    async with running(data_dir, up.url, routed(edge, explore_share=1.0)) as ibid:
        upstreams = []
        for city in CITIES[:16]:
            question = {"role": "user", "content": f"In which country is the city of {city}"}
            body = {"model": "claude-x", "max_tokens": 50, "messages": [question]}
            async with ibid.session.post(ibid.url + "/v1/messages", json=body, headers=headers) as response:
                assert (response.status, (await response.json())["type"]) == (200, "message")
                upstreams.append(response.headers["x-upstream"])
            await ibid.settled()
        assert set(upstreams[:8]) == {"anthropic"}
        assert upstreams[-1] == "edge"
        rows = await ibid.sql("SELECT good, COUNT(*) AS n FROM route_vote WHERE source = 'shadow' GROUP BY good")
        assert [row["good"] for row in rows] == [1]
        assert await balanced(ibid)
