"""The same core flow on a real PostgreSQL."""

from __future__ import annotations

from tests.flows.running import running

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"


async def test_miss_hit_semantic_hit_purge_restart_and_ledger_on_postgresql(data_dir, up, pg_url):
    async with running(data_dir, up.url, database=pg_url) as ibid:
        first = await ibid.fill(ASKED, stream=True)
        exact, alike = await ibid.ask(ASKED), await ibid.ask(REWORDED, stream=True)
        assert [(r.tier, r.text) for r in (exact, alike)] == [("exact", first.text), ("semantic", first.text)]
        assert (await ibid.ask(ASKED, key="sk-b", headers={"x-cache-mode": "read"})).cache == "MISS"
        assert up.meter.calls == 2
        assert not (data_dir / "ibid.db").exists()
    async with running(data_dir, up.url, database=pg_url) as ibid:
        assert (await ibid.ask(REWORDED)).tier == "semantic"
        assert (await ibid.ask(ASKED)).tier == "exact"
        body = {"request_id": alike.headers["x-request-id"], "verdict": "wrong"}
        assert (await ibid.admin("POST", "/cache/feedback", body))["entry_id"] == alike.entry
        assert (await ibid.ask(ASKED, headers={"x-cache-mode": "read"})).cache == "MISS"
        await ibid.admin("POST", "/cache/feedback", {"entry_id": alike.entry, "verdict": "right"})
        assert (await ibid.ask(REWORDED)).tier == "semantic"
        assert (await ibid.admin("POST", "/cache/flush", {"confirm": "flush"}))["count"] == 1
        for prompt in (ASKED, REWORDED):
            assert (await ibid.ask(prompt, headers={"x-cache-mode": "read"})).cache == "MISS"
        lanes = await ibid.sql("SELECT lane, COUNT(*) AS n FROM request GROUP BY lane ORDER BY lane")
        assert {row["lane"]: row["n"] for row in lanes} == {"cache.exact": 2, "cache.semantic": 3, "forward": 5}
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []
        meter = (await ibid.sql("SELECT COUNT(*) AS n, SUM(in_tok) AS i, SUM(out_tok) AS o FROM upstream_call"))[0]
        assert meter == {"n": up.meter.calls, "i": up.meter.input_tokens, "o": up.meter.output_tokens}
