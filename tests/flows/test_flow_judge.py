"""The budget for wrong answers, kept on real parts: the model, SQL, sockets, and an upstream that answers by class."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from index.guard.head import FIRST, SECOND
from proxy.commands.evaluate import interval
from proxy.core.purse import CREDIT_HITS
from proxy.judging.arbiter import DIFFERENT
from tests.flows.questions import Question, stream
from tests.flows.running import Ibid, Reply, running, until
from tests.upstream import Chat, Json, ScriptedUpstream, Seen

BUDGET = 0.02
LEARNING: Mapping[str, Mapping[str, Any]] = {
    "cache": {"max_error_rate": BUDGET, "audit_share": 0.05, "semantic_misses_per_min": 0}
}
ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
WORDINGS = [
    f"How {verb} {who} repair a leaking garden hose?"
    for verb in ("can", "could", "may", "might", "would", "should", "shall", "must")
    for who in ("I", "we", "one", "you")
]


def by_class(questions: list[Question]) -> ScriptedUpstream:
    answers = {question.text: question.answer for question in questions}

    def reply(seen: Seen) -> Chat:
        return Chat(text=answers[seen.json["messages"][-1]["content"]])

    return ScriptedUpstream(reply)


async def ask_all(ibid: Ibid, questions: list[Question], at_once: int = 4) -> list[tuple[Question, Reply]]:
    """In order, a few at a time; what came back."""
    found: list[tuple[Question, Reply]] = []
    for at in range(0, len(questions), at_once):
        part = questions[at : at + at_once]
        replies = await asyncio.gather(*(ibid.ask(question.text) for question in part))
        found += zip(part, replies, strict=True)
    await ibid.settled()
    return found


def semantic(found: list[tuple[Question, Reply]]) -> list[tuple[Question, Reply]]:
    return [(question, reply) for question, reply in found if reply.tier == "semantic"]


def wrong(found: list[tuple[Question, Reply]]) -> list[tuple[Question, Reply]]:
    return [(question, reply) for question, reply in semantic(found) if reply.text != question.answer]


async def evidence(ibid: Ibid) -> dict[str, Any]:
    (level,) = [row for row in (await ibid.admin("GET", "/cache/policy"))["evidence"] if row["level"] == "scope"]
    return dict(level)


async def test_the_budget_holds_while_hits_grow_feedback_tightens_at_once_and_a_restart_keeps_what_was_learned(
    data_dir, models
):
    questions = stream(2000)
    async with by_class(questions) as up:
        async with running(data_dir, up.url, LEARNING) as ibid:
            first, second = await ask_all(ibid, questions[:1000]), await ask_all(ibid, questions[1000:])
            hits, errors = len(semantic(first + second)), len(wrong(first + second))
            assert interval(errors, hits)[0] <= BUDGET, (errors, hits)
            assert len(semantic(second)) > len(semantic(first)) + 100
            assert len(semantic(second)) > 250

            calls = await ibid.sql("SELECT purpose, COUNT(*) AS calls FROM upstream_call GROUP BY purpose")
            assert sum(row["calls"] for row in calls) == up.meter.calls
            made = {row["purpose"]: row["calls"] for row in calls}
            audits = made["audit"]
            assert 20 <= audits < hits / 2
            assert made["repeat"] == audits
            assert made["repeat"] + audits <= 0.1 * hits + CREDIT_HITS + 2
            (compared,) = await ibid.sql(
                "SELECT (SELECT COUNT(*) FROM audit WHERE served = 1) AS n, "
                "(SELECT COUNT(*) FROM upstream_call WHERE purpose = 'audit') AS audits"
            )  # of one moment
            assert compared["audits"] - 20 <= compared["n"] <= compared["audits"]  # an entry may be gone meanwhile
            (booked,) = await ibid.sql("SELECT * FROM savings_by_strategy WHERE mechanism = 'cache.audit'")
            assert (booked["steps"], booked["earned_usd"]) == (2 * audits, 0)
            assert booked["spent_usd"] > 0
            assert await ibid.sql("SELECT * FROM request WHERE lane = 'audit' AND baseline_nusd <> 0") == []
            total = (await ibid.admin("POST", "/savings/query", {"name": "total"}))["rows"][0]
            assert total[0] == 2000

            before = await evidence(ibid)
            question, reply = next((q, r) for q, r in semantic(second) if r.text == q.answer)
            await ibid.admin(
                "POST", "/cache/feedback", {"request_id": reply.headers["x-request-id"], "verdict": "wrong"}
            )
            after = await evidence(ibid)
            assert after["wrong"] == before["wrong"] + 1
            for bound in ("proven_from", "provisional_from"):
                assert before[bound] is None or after[bound] is None or after[bound] >= before[bound]
            again = await ibid.ask(question.text, headers={"x-cache-mode": "read"})
            assert again.cache == "MISS" or again.entry != reply.entry

        async with running(data_dir, up.url, LEARNING) as ibid:
            kept = await evidence(ibid)
            assert kept["labelled"] == after["labelled"]
            assert kept["wrong"] == after["wrong"]
            again = await ibid.ask(question.text, headers={"x-cache-mode": "read"})
            assert again.cache == "MISS" or again.entry != reply.entry
            third = stream(2300)[2000:]
            answers = {q.text: q.answer for q in third}
            up.default = lambda seen: Chat(text=answers[seen.json["messages"][-1]["content"]])
            found = await ask_all(ibid, third)
            assert len(semantic(found)) > 60
            assert interval(len(wrong(found)), len(semantic(found)))[0] <= BUDGET


async def test_an_audit_and_its_repeat_are_off_the_clients_path_and_the_audits_answer_is_stored(data_dir, up):
    gate = asyncio.Event()

    async def reply(seen: Seen) -> Chat:
        if len(up.requests) > 1:
            await gate.wait()
        return Chat(text="Wrap it in tape.")

    up.default = reply
    async with running(data_dir, up.url, {"cache": {"audit_share": 0.05}}) as ibid:
        await ibid.fill(ASKED)
        hit = await ibid.ask(REWORDED)
        assert (hit.tier, hit.text) == ("semantic", "Wrap it in tape.")
        await until(lambda: len(up.requests) == 2)
        assert (await ibid.ask(REWORDED)).tier == "semantic"  # while the audit waits for the upstream
        gate.set()
        await ibid.settled()
        assert [seen.json["messages"][-1]["content"] for seen in up.requests] == [ASKED, ASKED, REWORDED]
        assert (await ibid.ask(REWORDED)).tier == "exact"
        again = await ibid.ask(ASKED)
        assert (again.tier, again.entry) == ("exact", hit.entry)  # the repeat's answer is compared and not kept
        row = (await ibid.admin("GET", "/cache/audit"))["comparisons"][0]
        assert (row["request_id"], row["source"], row["prompt"]) == (hit.headers["x-request-id"], "audit", ASKED)
        assert (row["region"], row["comparer"]) == ("alike", "built-in")
        assert min(row["p_same"], row["p_null"]) > 0.9
        level = await evidence(ibid)
        assert (level["audited"], level["regions"]["alike"]["pairs"]) == (1, 1)
        metrics = await ibid.admin("GET", "/metrics")
        assert 'ibid_audits_total{found="same"} 1.0' in metrics


async def test_a_hit_whose_audit_has_no_room_is_served_and_not_audited(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.judging.audits.AUDITS_AT_ONCE", 1)
    monkeypatch.setattr("proxy.judging.audits.AUDITS_WAITING", 0)
    gate = asyncio.Event()

    async def reply(seen: Seen) -> Chat:
        if len(up.requests) == 2:
            await gate.wait()
        return Chat(text="Wrap it in tape.")

    up.default = reply
    async with running(data_dir, up.url, {"cache": {"audit_share": 0.05}}) as ibid:
        await ibid.fill(ASKED)
        assert (await ibid.ask(REWORDED)).tier == "semantic"
        await until(lambda: len(up.requests) == 2)
        assert (await ibid.ask("How could I repair a leaking garden hose?")).tier == "semantic"
        gate.set()
        await ibid.settled()
        assert len(await ibid.sql("SELECT id FROM audit WHERE served = 1")) == 1
        assert 'ibid_audits_total{found="skipped"} 1.0' in await ibid.admin("GET", "/metrics")


@pytest.mark.parametrize("share", [0.0, 0.1])
async def test_learning_costs_no_more_than_its_share_of_what_hits_saved(data_dir, up, share):
    up.default = lambda seen: Chat(text="Wrap it in tape.")
    async with running(data_dir, up.url, {"cache": {"audit_share": 1.0, "learning_share": share}}) as ibid:
        await ibid.fill(ASKED)
        for text in WORDINGS:
            await ibid.ask(text)
            await ibid.settled()
        learning = (await ibid.admin("GET", "/cache/policy"))["learning"]
        assert learning["earned"] > 0
        assert learning["share"] == share
        (paid,) = await ibid.sql("SELECT COUNT(*) AS n FROM upstream_call WHERE purpose IN ('audit', 'repeat')")
        assert paid["n"] == 2 * learning["audits"] < up.meter.calls
        assert (paid["n"] > 0) == (share > 0)
        assert learning["spent"] <= share * learning["earned"] + CREDIT_HITS * learning["earned"] / learning["hits"]


async def test_a_scope_whose_hits_are_wrong_is_closed_by_pairs_and_others_are_not(data_dir, up):
    """The upstream answers every wording differently, and each always alike: what is served is always wrong."""
    up.default = lambda seen: Chat(text=f"Call number {abs(hash(seen.json['messages'][-1]['content'])) % 10**9}.")
    settings = {"cache": {"audit_share": 1.0, "learning_share": 1.0}}
    async with running(data_dir, up.url, settings) as ibid:
        await ibid.fill(ASKED)
        verbs = ("can", "could", "may", "might", "would", "should", "shall", "must", "do")
        asked = [
            f"How {verb} {who} repair a leaking garden hose?" for verb in verbs for who in ("I", "we", "one", "you")
        ]
        served = []
        for text in asked:
            served.append((await ibid.ask(text)).tier == "semantic")
            await ibid.settled()
        assert 0 < sum(served) <= 30
        assert not any(served[-5:])
        level = await evidence(ibid)
        assert level["regions"]["alike"]["closed"]
        explained = await ibid.admin("POST", "/cache/explain", {"model": "gpt-4o-mini", "messages": [
            {"role": "user", "content": "How can she repair a leaking garden hose?"}]})  # fmt: skip
        assert "more than 1 % is wrong" in explained["evidence"]["outlook"]
        assert set(explained["candidates"][0]["features"]) >= {"similarity", "margin", "numbers"}
        other = {"x-cache-namespace": "other"}
        await ibid.fill(ASKED, headers=other)
        assert (await ibid.ask(REWORDED, headers=other)).tier == "semantic"


INTO, OUT_OF = "How do I get into the attic of a house?", "How do I get out of the attic of a house?"
LENIENT: Mapping[str, Any] = {"start_similarity": 0.85}  # the two are .89 alike, and no word guard sees a difference


async def test_a_look_alike_is_refused_by_the_pair_guard_and_explain_shows_why(data_dir, up):
    async with running(data_dir, up.url, {"cache": LENIENT}) as ibid:
        first = await ibid.fill(INTO)
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": OUT_OF}]}
        explained = await ibid.admin("POST", "/cache/explain", body)
        assert (explained["verdict"], explained["reason"]) == ("near-miss", "pair_guard")
        (candidate,) = explained["candidates"]
        assert (candidate["reason"], candidate["standing"], candidate["vetoes"]) == ("pair_guard", "start", [])
        assert candidate["pair_guard"]["refuses"]
        assert candidate["pair_guard"]["logit"] < 0
        refused = await ibid.ask(OUT_OF)
        assert (refused.cache, refused.reason) == ("MISS", "pair_guard")
        await ibid.settled()
        metrics = await ibid.admin("GET", "/metrics")
        assert 'ibid_guard_veto_total{guard="pair_guard"} 1.0' in metrics
        body["messages"] = [{"role": "user", "content": "How can I get into the attic of a house?"}]
        (candidate, *_) = (await ibid.admin("POST", "/cache/explain", body))["candidates"]
        assert candidate["pair_guard"]["refuses"] is False
        assert (await ibid.ask(body["messages"][0]["content"])).text == first.text


@pytest.mark.parametrize(("guard", "weight"), [(True, 0.0), (False, 1.0)])
async def test_a_near_miss_that_the_pair_guard_would_refuse_is_compared_and_no_evidence(data_dir, up, guard, weight):
    async with running(data_dir, up.url, {"cache": {"pair_guard": guard}}) as ibid:
        await ibid.fill(INTO)
        near = await ibid.ask(OUT_OF)
        assert near.reason == ("pair_guard" if guard else "below_bound")
        await ibid.settled()
        await ibid.admin("GET", "/cache/near-misses")
        assert await ibid.sql("SELECT source, weight FROM audit") == [{"source": "forward", "weight": weight}]
        assert (await evidence(ibid))["labelled"] == weight


async def test_what_is_purged_while_the_pair_guard_is_asked_is_not_served(data_dir, up):
    async with running(data_dir, up.url) as ibid:
        await ibid.fill(ASKED)
        embedder = ibid.app.pipeline.embedder
        verify = embedder.verify

        async def verify_late(*texts: Any) -> Any:
            await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
            return await verify(*texts)

        embedder.verify = verify_late
        late = await ibid.ask(REWORDED)
        assert (late.cache, late.reason) == ("MISS", "gone")


async def test_without_the_pair_guard_the_same_look_alike_is_served(data_dir, up):
    async with running(data_dir, up.url, {"cache": {**LENIENT, "pair_guard": False}}) as ibid:
        first = await ibid.fill(INTO)
        assert not ibid.app.pipeline.embedder.can_verify
        served = await ibid.ask(OUT_OF)
        assert (served.tier, served.text) == ("semantic", first.text)


async def test_a_damaged_pair_guard_means_exact_hits_only(data_dir, up, monkeypatch):
    monkeypatch.setattr("index.guard.head.SHA256", dict.fromkeys((FIRST, SECOND), "0" * 64))
    async with running(data_dir, up.url) as ibid:
        assert (await ibid.ask(ASKED)).reason == "embedder_down"
        await ibid.settled()
        assert (await ibid.ask(ASKED)).tier == "exact"
        assert (await ibid.ask(REWORDED)).reason == "embedder_down"


async def test_a_miss_with_a_candidate_is_a_free_label(ibid, up):
    up.default = lambda seen: Chat(text="Wrap it in tape.")
    await ibid.fill(ASKED)
    near = await ibid.ask("What is a good way of repairing a garden hose that leaks?")
    assert near.cache == "MISS"
    await ibid.settled()
    (row,) = (await ibid.admin("GET", "/cache/near-misses"))["comparisons"]
    assert (row["source"], row["standing"], row["prompt"]) == ("forward", "", ASKED)
    assert row["p_same"] > 0.9
    assert up.meter.calls == 2
    (entry,) = await ibid.sql("SELECT id, group_id FROM entry WHERE group_id IS NOT NULL")
    assert entry["group_id"] == row["entry_id"] != entry["id"]


JUDGED: Mapping[str, Any] = {"cache": {"judge_model": "gpt-4o", "audit_share": 0.05}}
UNLIKE = {ASKED: "Wrap it in tape.", REWORDED: "Cut out the leak and join the ends with a coupling."}


def with_judge(word: str, *, fails: bool = False) -> ScriptedUpstream:
    """Answers that no comparison of words takes for the same, and a model that has its own view of them."""

    def reply(seen: Seen) -> Chat | Json:
        if seen.json["model"] == "gpt-4o":
            return Json(500, {"error": {"message": "broken"}}) if fails else Chat(text=word)
        return Chat(text=UNLIKE.get(seen.json["messages"][-1]["content"], "Call a plumber."))

    return ScriptedUpstream(reply)


@pytest.mark.parametrize(("word", "p_same"), [("Same.", 0.97), ("different", 0.03)])
async def test_a_language_model_has_the_last_word_on_two_answers_and_its_calls_are_booked(data_dir, word, p_same):
    async with with_judge(word) as up, running(data_dir, up.url, JUDGED) as ibid:
        await ibid.fill(ASKED)
        hit = await ibid.ask(REWORDED, headers={"Idempotency-Key": "k1"})
        assert (hit.tier, hit.text) == ("semantic", UNLIKE[ASKED])
        await ibid.settled()
        first, _, _, judged = up.requests
        assert judged.header("Authorization") == first.header("Authorization")
        assert judged.header("Idempotency-Key") is None
        case = judged.json["messages"][-1]["content"]
        assert all(text in case for text in (ASKED, UNLIKE[ASKED], REWORDED, UNLIKE[REWORDED]))
        (row,) = (await ibid.admin("GET", "/cache/audit"))["comparisons"]
        assert row["p_same"] == p_same
        calls = await ibid.sql("SELECT model, purpose, won, cost_nusd > 0 AS paid FROM upstream_call WHERE won = 0")
        assert sorted((c["model"], c["purpose"], c["paid"]) for c in calls) == [
            ("gpt-4o", "judge", 1), ("gpt-4o-mini", "audit", 1), ("gpt-4o-mini", "repeat", 1),
        ]  # fmt: skip
        (booked,) = await ibid.sql("SELECT * FROM savings_by_strategy WHERE mechanism = 'cache.audit'")
        assert (booked["steps"], booked["earned_usd"]) == (3, 0)
        (pairs,) = await ibid.sql("SELECT COUNT(*) AS n FROM refused_pair")
        assert pairs["n"] == (p_same < 0.5)
        await ibid.ask(REWORDED)
        assert up.meter.calls == 4


@pytest.mark.parametrize(("word", "fails"), [("Maybe", False), ("same", True)])
async def test_a_language_model_without_a_verdict_leaves_it_to_the_comparison(data_dir, word, fails):
    async with with_judge(word, fails=fails) as up, running(data_dir, up.url, JUDGED) as ibid:
        await ibid.fill(ASKED)
        assert (await ibid.ask(REWORDED)).tier == "semantic"
        await ibid.settled()
        (row,) = (await ibid.admin("GET", "/cache/audit"))["comparisons"]
        assert row["p_same"] < 0.5
        assert row["p_same"] != DIFFERENT
        assert (await ibid.sql("SELECT COUNT(*) AS n FROM upstream_call WHERE purpose = 'judge'"))[0]["n"] == 1


async def test_answers_that_are_equal_need_no_language_model(data_dir):
    async with with_judge("same") as up, running(data_dir, up.url, JUDGED) as ibid:
        up.default = lambda seen: Chat(text="Wrap it in tape.")
        await ibid.fill(ASKED)
        await ibid.ask(REWORDED)
        await ibid.settled()
        assert [seen.json["model"] for seen in up.requests] == ["gpt-4o-mini"] * 3


async def test_another_backend_embeds_again_in_the_background_and_vectors_never_meet(data_dir, up):
    async with running(data_dir, up.url) as ibid:
        for prompt in (ASKED, "Where do penguins sleep in winter?", "Why is the sea salty and lakes are not?"):
            await ibid.fill(prompt)
        old = ibid.app.pipeline.embedder.identity
    async with running(data_dir, up.url, {"embedding": {"backend": "onnx-int8"}}) as ibid:
        assert ibid.app.pipeline.embedder.identity != old
        await until(lambda: ibid.app.pipeline.index.size == 3)
        rows = await ibid.sql("SELECT DISTINCT embedder FROM entry")
        assert rows == [{"embedder": ibid.app.pipeline.embedder.identity}]
        assert (await ibid.ask(REWORDED)).tier == "semantic"
        assert (await ibid.ask(ASKED)).tier == "exact"
        done = (await ibid.admin("POST", "/cache/reindex"))["done"]
        assert done == 3


async def test_simulate_rehearses_what_was_stored_under_another_budget(data_dir, models):
    questions = stream(300, seed=3)
    async with by_class(questions) as up, running(data_dir, up.url, {"cache": {"audit_share": 0.05}}) as ibid:
        await ask_all(ibid, questions)
        await ibid.app.store.ledger.flush()
        found = await ibid.admin("POST", "/cache/simulate", {"max_error": 0.05, "without": ["possessive"]})
        (row,) = found["budgets"]
        assert found["questions"] <= 300
        assert (row["max_error"], found["without"]) == (0.05, ["possessive"])
        assert row["hits"] > 0
        assert row["saved_usd"] > 0
        found = await ibid.admin("POST", "/cache/simulate", {"max_error": 0.05, "without": ["pair_guard"]})
        (unguarded,) = found["budgets"]
        # Not that more is hit: what the guard lets pass may be wrong, and spends the budget of others.
        assert ("pair_guard" in row["reasons"], "pair_guard" in unguarded["reasons"]) == (True, False)
        assert unguarded["hits"] > 0


async def test_a_wording_that_is_asked_often_is_audited_sooner_or_later(data_dir, up):
    """Nobody audits its first hit; the more it is asked, the surer one is that its answer was looked at."""
    up.default = lambda seen: Chat(text="Wrap it in tape.")
    async with running(data_dir, up.url, {"cache": {"audit_share": 0.02}}) as ibid:
        await ibid.fill(ASKED)
        chances = iter([0.999, 0.999, 0.0])
        ibid.app.pipeline.auditor._chance = lambda: next(chances)
        ibid.app.pipeline.judge.audit_share = lambda *_: 0.1
        tiers = []
        for _ in range(9):
            tiers.append((await ibid.ask(REWORDED)).tier)
            await ibid.settled()
        assert tiers == ["semantic"] * 8 + ["exact"]  # judged at the 1st, the 3rd and the 8th time
        ((purposes),) = await ibid.sql("SELECT COUNT(*) AS n FROM upstream_call WHERE purpose = 'audit'")
        assert purposes["n"] == 1
        assert (await evidence(ibid))["hits"] == 8
