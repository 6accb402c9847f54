"""The ledger balances: against itself, and against the upstream's own meter."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.flows.running import MODEL, ROOT, running, until
from tests.upstream import Chat, Json
from tests.waiting import PATIENCE_S

QUESTIONS = [f"How do I {verb} a wooden garden chair?" for verb in ("paint", "repair", "clean", "store", "sell")]


def ibid_command(data_dir, *arguments: str, database: str | None = None) -> str:
    """What the command line prints, as an operator runs it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
    command = [sys.executable, "-m", "proxy", *arguments, "--data-dir", str(data_dir)]
    if database:
        command += ["--database", database]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_the_ledger_balances_against_the_upstreams_meter(data_dir, up, request, database):
    """Misses, exact and semantic hits, streams, joined calls, refused and failed ones; then money and tokens agree."""
    url = request.getfixturevalue("pg_url") if database == "postgresql" else None
    async with running(data_dir, up.url, database=url) as ibid:
        for prompt in QUESTIONS:
            await ibid.fill(prompt, stream=prompt.startswith("How do I p"))
        for prompt in QUESTIONS:
            for wording in (prompt, prompt.replace("How do", "How can")):
                for stream in (True, False):
                    assert (await ibid.ask(wording, stream=stream)).cache == "HIT", wording
        gate = asyncio.Event()
        up.script(Chat(gates={1: gate}))
        joined = [asyncio.create_task(ibid.ask("How do I join a call in flight?", stream=True)) for _ in range(4)]
        await until(lambda: sum(len(flight._seats) for flight in ibid.app.pipeline.flights.values()) == 4)
        gate.set()
        await asyncio.gather(*joined)
        assert (await ibid.ask(QUESTIONS[0], seed=15)).cache == "BYPASS"
        assert (await ibid.ask(QUESTIONS[0], n=2)).cache == "BYPASS"
        up.script(Json(500, {"error": {"message": "x"}}), Json(429, {"error": {"message": "x"}}))
        assert {(await ibid.ask(f"How do I fail {n} times?")).status for n in (1, 2)} == {500, 429}
        assert (await ibid.ask("Unheard of!", headers={"Cache-Control": "only-if-cached"})).status == 504
        async with ibid.session.get(ibid.url + "/v1/models", headers={"Authorization": "Bearer sk-a"}) as response:
            assert response.status == 200
        async with ibid.session.get(up.url + "/__meter") as response:
            meter = await response.json()
        await ibid.settled()
        calls = (await ibid.sql(
            "SELECT COUNT(*) AS n, SUM(in_tok) AS i, SUM(out_tok) AS o, SUM(cost_nusd) AS cost FROM upstream_call "
            "WHERE status = 200 AND purpose = 'answer'"
        ))[0]  # fmt: skip
        assert (calls["n"], calls["i"], calls["o"]) == (meter["calls"], meter["input_tokens"], meter["output_tokens"])
        price = Prices().price
        usage = Usage(meter["input_tokens"], meter["output_tokens"])
        assert calls["cost"] == price("openai", MODEL, usage, "default", 1_790_000_000_000).nusd > 0
        paid = (await ibid.sql("SELECT SUM(actual_nusd) AS n FROM request"))[0]["n"]
        assert paid == calls["cost"]
        saved = (await ibid.sql("SELECT SUM(baseline_nusd - actual_nusd) AS n FROM request"))[0]["n"]
        assert saved == (await ibid.sql("SELECT SUM(saved_nusd) AS n FROM saving"))[0]["n"] > 0
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []
        lanes = await ibid.sql("SELECT lane, COUNT(*) AS n FROM request GROUP BY lane ORDER BY lane")
        assert {row["lane"]: row["n"] for row in lanes} == {
            "bypass": 3,
            "cache.exact": 10,
            "cache.semantic": 10,
            "forward": len(QUESTIONS) + 1 + 2,
            "stream.coalesce": 3,
            "refused": 1,
        }
    rows = json.loads(
        ibid_command(data_dir, "sql", "SELECT * FROM savings_by_strategy ORDER BY mechanism", "--json", database=url)
    )
    assert [(row["mechanism"], row["steps"]) for row in rows] == [
        ("cache.exact", 10),
        ("cache.semantic", 10),
        ("stream.coalesce", 3),
    ]
    assert round(sum(row["saved_usd"] for row in rows) * 1e9) == saved
    balance = ibid_command(data_dir, "savings", "balance", "--json", database=url)
    assert json.loads(balance) == []


async def test_an_answer_on_a_hit_is_booked_at_the_price_it_would_have_cost(exact, up):
    await exact.fill(QUESTIONS[0])
    hit = await exact.ask(QUESTIONS[0])
    row = await exact.row(hit)
    call = (await exact.sql("SELECT * FROM upstream_call"))[0]
    assert (row["baseline_nusd"], row["actual_nusd"]) == (call["cost_nusd"], 0)
    assert round(float(hit.headers["x-cache-saved-usd"]) * 1e9) == call["cost_nusd"]
    assert float(hit.headers["x-cost-usd"]) == 0
    assert call["price_id"].startswith("genai-prices ")


async def test_a_model_without_a_price_is_named_unpriced_not_guessed(exact, up):
    await exact.fill(QUESTIONS[0], model="nobody-knows-me")
    hit = await exact.ask(QUESTIONS[0], model="nobody-knows-me")
    row = await exact.row(hit)
    assert (hit.cache, row["baseline_nusd"], row["baseline_basis"]) == ("HIT", 0, "unpriced")
