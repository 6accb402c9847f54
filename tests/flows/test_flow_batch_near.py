"""Lines of one file that ask the same in other words: one is sent, if the judge lets its answer serve the other."""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.batch_upstream import BatchUpstream, Handed
from tests.flows.batching import balanced, ended, hand_in, line, rows, sdk, text
from tests.flows.questions import TASKS
from tests.flows.running import CHAT, KEY_ENV, MODEL, running, serving, until
from tests.flows.test_flow_batches_restart import written
from tests.upstream import Chat, Json, ScriptedUpstream, Seen

QUICKLY = {"batch": {"poll_interval_s": 0.02}}
ALIKE = [(f"How do I {TASKS[task][0]}?", f"How can I {TASKS[task][0]}?") for task in (0, 1, 2, 7, 8, 9, 11)]
DIFFERENT = [
    ("How do I repair 3 leaking garden hoses?", "How do I repair 5 leaking garden hoses?"),
    ("How do I get from Vienna to Prague by train?", "How do I get from Vienna to Budapest by train?"),
    ("How do I turn on dark mode?", "How do I turn off dark mode?"),
    ("Who is the mayor of Paris?", "Who is the mayor of Madrid?"),
]


def lines_of(pairs: list[tuple[str, str]], **fields: Any) -> list[Any]:
    first = [line(f"first-{n}", pair[0], **fields) for n, pair in enumerate(pairs)]
    return first + [line(f"second-{n}", pair[1], **fields) for n, pair in enumerate(pairs)]


def tell_apart(up: ScriptedUpstream) -> None:
    """Answers that say what was asked, and take their time."""

    def reply(seen: Seen) -> Chat:
        return Chat(text=f"to {seen.json['messages'][-1]['content']}", delay_s=0.2)

    up.default = reply


@pytest.mark.parametrize("has_api", [True, False])
async def test_of_a_reworded_pair_one_line_is_sent_and_of_a_pair_that_a_guard_refuses_both(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    if theirs is None:
        tell_apart(up)
    pairs = [*ALIKE, *DIFFERENT]
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid) as client:
        batch = await ended(client, await hand_in(client, lines_of(pairs)))
        assert (batch.status, batch.request_counts.completed) == ("completed", 2 * len(pairs))
        found = await rows(client, batch.output_file_id)
        await ibid.settled()
        for n, (one, other) in enumerate(pairs):
            assert text(found[f"first-{n}"]).endswith(one)
            assert text(found[f"second-{n}"]).endswith(one if n < len(ALIKE) else other)
        ids = {row["response"]["body"]["id"] for row in found.values()}
        assert len(ids) == 2 * len(pairs)
        sent = len(ALIKE) + 2 * len(DIFFERENT)
        if theirs is None:
            assert up.meter.calls == sent
            tokens, tier = Usage(up.meter.input_tokens, up.meter.output_tokens), "default"
        else:
            assert ([len(one.requests) for one in theirs.batches.values()], up.meter.calls) == ([sent], 0)
            tokens, tier = Usage(theirs.input_tokens, theirs.output_tokens), "batch"
        cost = Prices().price("openai", MODEL, tokens, tier, int(time.time() * 1000)).nusd
        assert await ibid.sql("SELECT SUM(actual_nusd) AS n, COUNT(*) AS requests FROM request") == [
            {"n": cost, "requests": 2 * len(pairs)}
        ]
        hits = await ibid.sql("SELECT COUNT(*) AS n FROM request WHERE lane = 'cache.semantic'")
        assert hits == [{"n": len(ALIKE)}]
        assert await balanced(ibid)


class RefusesFirst(BatchUpstream):
    """Refuses the first line of its first batch."""

    def _work(self, batch: Handed, outcome: str, expire: set[int]) -> None:
        self.refuse = {0} if batch.id.endswith("M1") else set()
        super()._work(batch, outcome, expire)


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_line_whose_forerunner_brought_nothing_is_sent_after_all(data_dir, up, has_api):
    theirs = RefusesFirst(up) if has_api else None
    one, other = ALIKE[0]

    def reply(seen: Seen) -> Any:
        if not seen.path.startswith(CHAT):
            return Json(404, {})
        is_first = seen.json["messages"][-1]["content"] == one
        refused = {"error": {"message": "no", "type": "x", "param": None, "code": "y"}}
        return Json(400, refused) if is_first else Chat(text=f"to {other}")

    if theirs is None:
        up.default = reply
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid) as client:
        batch = await hand_in(client, [line("first", one), line("second", other), line("again", other)])
        batch = await ended(client, batch)
        good = await rows(client, batch.output_file_id)
        assert sorted(good) == ["again", "second"]
        assert all(text(row).endswith(other) for row in good.values())
        assert batch.request_counts.failed == 1
        if theirs is not None:
            assert [len(handed.requests) for handed in theirs.batches.values()] == [1, 1]  # a further part
        assert await balanced(ibid)


async def test_where_no_time_is_left_for_a_further_part_a_line_is_asked_for_alone(data_dir, up, monkeypatch):
    passed = itertools.count(0, 20 * 3600)  # seconds of a clock that is read when a round begins and ends
    monkeypatch.setattr("proxy.batch.run.story.time", SimpleNamespace(monotonic=passed.__next__))
    theirs = RefusesFirst(up, polls=0)
    one, other = ALIKE[0]
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid) as client:
        batch = await hand_in(client, [line("first", one), line("second", other)])
        await until(lambda: theirs.batches)
        theirs.polls = 1
        batch = await ended(client, batch)
        assert text((await rows(client, batch.output_file_id))["second"]).endswith(other)
    assert (len(theirs.batches), up.meter.calls) == (1, 1)


async def test_a_line_that_waits_is_still_held_back_after_a_kill(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, {**QUICKLY, "upstream.openai": {"key_env": KEY_ENV}}) as process:
        async with sdk(process) as client:
            await hand_in(client, lines_of(ALIKE[:3]))
            await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        process.kill()
    theirs.polls = 3
    async with serving(data_dir, up.url, {**QUICKLY, "upstream.openai": {"key_env": KEY_ENV}}):
        done = "SELECT status, succeeded FROM batch_job"
        await until(lambda: written(data_dir, done) == [("completed", 6)])
    assert (len(theirs.batches), theirs.lines, up.meter.calls) == (1, 3, 0)


async def test_lines_of_two_scopes_do_not_wait_for_one_another(data_dir, up):
    theirs = BatchUpstream(up)
    one, other = ALIKE[0]
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid) as client:
        lines = [line("a", one, user="u1"), line("b", other, user="u2"), line("c", other, temperature=0.9)]
        batch = await ended(client, await hand_in(client, lines))
        assert batch.request_counts.completed == 3
        assert theirs.lines == 3


async def test_with_the_semantic_lane_off_nothing_waits(data_dir, up, monkeypatch):
    monkeypatch.setattr(
        "proxy.admin.reindex.Reindex.keep_up", asyncio.Event().wait
    )  # gives vectors to what has none, later
    theirs = BatchUpstream(up)
    async with running(data_dir, up.url, {**QUICKLY, "cache": {"semantic": False}}) as ibid, sdk(ibid) as client:
        batch = await ended(client, await hand_in(client, lines_of(ALIKE)))
        assert batch.request_counts.completed == 2 * len(ALIKE)
        assert theirs.lines == 2 * len(ALIKE)
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid, "sk-other") as client:
        exact = client.with_options(default_headers={"x-cache-mode": "exact"})
        batch = await ended(client, await hand_in(exact, lines_of(ALIKE)))
        assert theirs.lines == 4 * len(ALIKE)
        assert ibid.app.pipeline.embedder is not None
        assert ibid.app.pipeline.embedder.embedded == 0


async def test_a_batch_leaves_the_model_to_live_requests(data_dir, up):
    """While a file of distinct lines is embedded, a live question waits for few of them."""
    BatchUpstream(up, polls=0)
    lines = [line(f"l{n}", f"What is part {n} of the machine that was built in {1500 + n} for?") for n in range(600)]
    async with running(data_dir, up.url, QUICKLY) as ibid, sdk(ibid) as client:
        await ibid.fill("How do I repair a leaking garden hose?")
        await hand_in(client, lines)
        longest = 0
        for n in range(10):
            reply = await ibid.ask(f"How {'can' if n % 2 else 'could'} I repair a leaking garden hose{'?' * (n + 1)}")
            assert reply.status == 200
            assert reply.reason not in ("embedder_busy", "embedder_down")
            longest = max(longest, ibid.app.pipeline.embedder.queue_length)
        assert longest <= 16 + 2
