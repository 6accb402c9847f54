"""Shadow before serving: everything is looked up and told, nothing is served, and `ibid report` says what for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from proxy.commands import main as cli
from tests.flows.running import ROOT, UNHURRIED, Ibid, running, started
from tests.upstream import Chat, Seen
from tests.waiting import PATIENCE_S, until

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
OTHER = "What is the boiling point of water at sea level?"
SHADOW = {"cache": {"shadow": True}}
SAID = "Cut out the damaged part and join both ends with a brass hose mender and two clamps."


def report(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["report", *arguments]) == 0
    return out.getvalue()


async def reported(ibid: Ibid, data_dir: Path, *arguments: str) -> dict[str, Any]:
    """What the command says while ibid runs."""
    await ibid.settled()
    await ibid.app.store.ledger.flush()
    await ibid.app.store.comparisons.flush()
    found = await asyncio.to_thread(report, "--data-dir", str(data_dir), "--json", *arguments)
    return dict(json.loads(found))


def drive(url: str, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The official client, in a process of its own."""
    asked = json.dumps({"base_url": f"{url}/v1", "key": "sk-a", "steps": list(steps)})
    driver = [sys.executable, str(ROOT / "tests/flows/sdk_driver.py")]
    done = subprocess.run(driver, input=asked + "\n", capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["results"])


async def test_in_shadow_the_sdk_is_always_answered_by_the_model_server_and_the_report_says_what_for(
    data_dir, up, tmp_path
):
    up.default = Chat(text=SAID)
    arguments = ["--shadow", "--data-dir", str(data_dir), "--upstream", up.url]
    env = {"IBID_EMBEDDING__DEADLINE_MS": str(UNHURRIED["deadline_ms"])}
    places = ["--data-dir", str(data_dir)]
    async with started(arguments, data_dir.with_suffix(".log"), env) as ibid:
        assert "shadow        everything is looked up" in data_dir.with_suffix(".log").read_text()

        async def ask(*prompts: str) -> list[str | None]:
            found = await asyncio.to_thread(drive, ibid.url, [{"prompt": prompt} for prompt in prompts])
            return [one["cache"] for one in found]

        assert await ask(ASKED, OTHER) == ["SHADOW", "SHADOW"]

        async def is_indexed() -> bool:
            return "\nibid_vectors 2.0\n" in await ibid.admin("GET", "/metrics")

        await until(is_indexed)
        assert await ask(ASKED, REWORDED, OTHER, OTHER) == ["SHADOW"] * 4
        assert up.meter.calls == 6
        assert len(await ibid.entries()) == 2  # as many as there would be if it served

        async def is_told() -> bool:
            found = json.loads(await asyncio.to_thread(report, *places, "--json"))
            return found["requests"] == 6 and found["shadow"]["wrong"]["compared"] == 1

        await until(is_told)
        found = json.loads(await asyncio.to_thread(report, *places, "--json"))
        assert await ibid.admin("POST", "/savings/query", {"name": "balance"})
    assert found["looked_up"] == 6
    would_be = found["shadow"]["would_be_hits"]
    assert {tier: kind["requests"] for tier, kind in would_be.items()} == {"exact": 3, "semantic": 1}
    assert [(one["times"], "question" in one) for one in found["most_asked"]] == [(2, False), (2, False)]
    assert found["reasons"][0]["reason"] in ("no_candidate", "nothing_alike")
    text = await asyncio.to_thread(report, *places, "--text")  # and when it does not run
    assert OTHER in text
    assert "4 would have been served (66.7 %)" in text
    page = await asyncio.to_thread(report, *places, "--format", "html", "--text")
    assert OTHER in page
    assert page.startswith("<!doctype html>")


async def test_a_would_be_hit_says_what_would_have_been_served_and_its_money_is_the_calls_own(data_dir, up):
    async with running(data_dir, up.url, SHADOW) as ibid:
        first = await ibid.ask(ASKED)
        await ibid.settled()
        assert (first.cache, first.reason) == ("SHADOW", "no_candidate")
        exact, alike = await ibid.ask(ASKED), await ibid.ask(REWORDED)
        await ibid.settled()
        assert [(one.cache, one.tier, one.reason) for one in (exact, alike)] == [
            ("SHADOW", "exact", "would_exact"),
            ("SHADOW", "semantic", "would_semantic"),
        ]
        assert exact.entry == alike.entry
        assert len({first.text, exact.text, alike.text}) == 3  # each from the model server
        rows = [await ibid.row(one) for one in (exact, alike)]
        found = await reported(ibid, data_dir)
    assert [(row["lane"], row["entry_id"]) for row in rows] == [("forward", exact.entry)] * 2
    would_be = found["shadow"]["would_be_hits"]
    nusd = [round(float(would_be[tier]["usd"]) * 1e9) for tier in ("exact", "semantic")]
    assert nusd == [row["actual_nusd"] for row in rows]
    assert min(nusd) > 0
    assert found["served"] == {"hits": {}, "wrong": found["served"]["wrong"], "marked_wrong": 0, "saved": []}


@pytest.mark.parametrize("wrong", [False, True])
async def test_what_comes_anyway_is_compared_with_what_would_have_been_served(data_dir, up, wrong):
    def answer(seen: Seen) -> Chat:
        is_reworded = "can I" in seen.json["messages"][-1]["content"]
        return Chat(
            text="The capital of Peru is Lima, which has ten million people." if wrong and is_reworded else SAID
        )

    up.default = answer
    async with running(data_dir, up.url, SHADOW) as ibid:
        await ibid.ask(ASKED)
        await ibid.settled()
        for _ in range(3):
            assert (await ibid.ask(REWORDED)).reason == "would_semantic"
            await ibid.settled()
        assert (await ibid.ask(ASKED)).reason == "would_exact"
        found = await reported(ibid, data_dir)
        rows = await ibid.sql("SELECT source, standing, served, p_same FROM audit")
        repeats = await ibid.sql("SELECT comparer, p_same FROM repeated_answer")
    (row,) = rows  # one pair, whatever it is asked
    assert (row["source"], row["standing"], row["served"]) == ("forward", "start", 0)
    assert (row["p_same"] < 0.5) == wrong
    assert [(one["comparer"], one["p_same"] > 0.99) for one in repeats] == [("built-in", True)]
    share = found["shadow"]["wrong"]
    assert share["compared"] == 1
    assert (share["share"] > 0.5) == wrong
    low, high = share["interval"]
    assert 0.0 <= low <= share["share"] <= high <= 1.0
    assert up.meter.calls == 5  # no audit was paid for


async def test_in_shadow_nothing_stored_stands_in_nobody_shares_a_call_and_what_is_not_looked_up_says_so(data_dir, up):
    sections = {**SHADOW, "lane.stale": {"if_error_s": 3600}, "policy": [{"on_error": ["stale"]}]}
    async with running(data_dir, up.url, sections) as ibid:
        same = await asyncio.gather(*(ibid.ask(ASKED) for _ in range(3)))
        assert [one.cache for one in same] == ["SHADOW"] * 3
        assert up.meter.calls == 3
        await ibid.settled()
        assert (await ibid.ask(ASKED, temperature=1.9)).cache == "BYPASS"
        assert (await ibid.ask(ASKED, headers={"Cache-Control": "no-cache"})).cache == "REFRESH"
        cached_only = await ibid.ask(ASKED, headers={"Cache-Control": "only-if-cached"})
        assert cached_only.status == 504
        off = await ibid.ask(ASKED, headers={"x-cache-mode": "off"})
        assert off.cache == "BYPASS"
        vectors = [await ibid.embed(["one", "two"]) for _ in range(2)]
        await ibid.settled()
        vectors.append(await ibid.embed(["one", "two"]))
        assert vectors[-1].reason == "would_exact"
        found = await reported(ibid, data_dir)
    assert found["requests"] - found["looked_up"] == 3


async def test_the_report_reads_postgresql_alike_and_tells_served_money_by_strategy(data_dir, up, pg_url):
    found = []
    for database, folder in ((None, data_dir), (pg_url, data_dir)):
        async with running(folder, up.url, database=database) as ibid:
            await ibid.fill(ASKED)
            for prompt in (ASKED, ASKED, REWORDED):
                assert (await ibid.ask(prompt)).cache == "HIT"
            place = ("--database", database) if database else ()
            found.append(await reported(ibid, folder, *place))
    here, there = (
        {name: one[name] for name in ("requests", "looked_up", "served", "reasons", "advice")} for one in found
    )
    assert here == there
    assert {tier: one["requests"] for tier, one in here["served"]["hits"].items()} == {"exact": 2, "semantic": 1}
    assert {one["mechanism"] for one in here["served"]["saved"]} == {"cache.exact", "cache.semantic"}


async def test_what_has_no_price_is_told_apart_and_an_older_schema_is_named(data_dir, up):
    async with running(data_dir, up.url, {"cache": {"shadow": True, "semantic": False}}) as ibid:
        for model in ("gpt-4o-mini", "model-of-nobody"):
            for _ in range(2):
                await ibid.ask(ASKED, model=model)
                await ibid.settled()
        found = await reported(ibid, data_dir)
        exact = found["shadow"]["would_be_hits"]["exact"]
        assert (exact["requests"], exact["unpriced"]) == (2, 1)
        rows = await ibid.sql("SELECT baseline_nusd FROM request WHERE reason = 'would_exact' AND baseline_nusd > 0")
        assert [round(float(exact["usd"]) * 1e9)] == [row["baseline_nusd"] for row in rows]
        assert found["advice"].startswith("All hits repeat a question to the letter")
        text = await asyncio.to_thread(report, "--data-dir", str(data_dir))
        assert "--text shows the questions themselves." in text
        assert "and 1 without a known price" in text
        later = await reported(ibid, data_dir, "--since", "2100-01-01")
        assert (later["requests"], later["most_asked"]) == (0, [])
        assert later["advice"].startswith("Nothing was looked up")
    with contextlib.closing(sqlite3.connect(data_dir / "ibid.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0009'")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert await asyncio.to_thread(cli.main, ["report", "--data-dir", str(data_dir)]) == 2
    assert "run `ibid migrate`" in err.getvalue()
