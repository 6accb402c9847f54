"""Views and queries: one text, two databases, the same rows. And reading is all that SQL may do."""

from __future__ import annotations

import asyncio

import pytest

from proxy.core.errors import BadRequest
from proxy.core.model import Usage
from proxy.core.rates import Rate
from proxy.store.named_queries import NAMED
from proxy.store.queries import Queries
from proxy.store.schema import VIEWS
from proxy.store.views import DESCRIBED
from tests.rows import NOON_MS, NOW, call, draft, hit, outcome
from tests.waiting import PATIENCE_S

DAY_MS = 86_400_000


async def fill(store):
    await store.entries.put(draft(), NOW)
    for number in range(60):
        ts_ms = NOON_MS - (number % 3) * DAY_MS
        common = {"ts_ms": ts_ms, "tenant": "ab"[number % 2] * 64, "tag": ("", "eval")[number % 2]}
        common |= {"key_id": "key_1", "team": "red"} if number % 5 == 0 else {}
        if number % 4 == 0:
            store.ledger.record(hit(f"r{number}", total_ms=1.0 + number / 7, **common))
        elif number % 4 == 1:
            near = {"similarity": 0.9 + number / 1000, "mechanism": "cache.semantic", "model_requested": "m2"}
            store.ledger.record(hit(f"r{number}", **near, **common))
        elif number % 4 == 2:
            lost = call(f"l{number}", purpose="hedge", won=False, usage=Usage(number, 3, 1))
            store.ledger.record(outcome(f"r{number}", calls=(call(f"c{number}"), lost), **common))
        else:
            store.ledger.record(
                outcome(f"r{number}", calls=(), usage=None, cache_status="BYPASS", model_requested="free", **common)
            )
    for number in (0, 1, 5, 9):
        await store.feedback(verdict="wrong" if number == 5 else "right", ts_ms=NOON_MS, request_id=f"r{number}")


def close_to(rows):
    return [tuple(round(value, 9) if isinstance(value, float) else value for value in row) for row in rows]


async def test_views_and_named_queries_agree_between_sqlite_and_postgresql(sqlite_store, pg_store):
    await fill(sqlite_store)
    await fill(pg_store)
    for name, select in VIEWS.items():
        both = []
        for store in (sqlite_store, pg_store):
            result = await store.queries.run_readonly(f"SELECT * FROM {name}")
            fresh = await store.queries.run_readonly(select)
            assert sorted(fresh.rows) == sorted(result.rows), f"{name}: migration and schema differ"
            assert result.rows, name
            both.append((result.columns, close_to(sorted(result.rows))))
        assert both[0] == both[1], name
        types = [[tuple(map(type, row)) for row in rows] for _, rows in both]
        assert types[0] == types[1], name
    for name, query in NAMED.items():
        results = [await store.queries.named(name) for store in (sqlite_store, pg_store)]
        assert results[0].columns == results[1].columns == tuple(query.columns), name
        assert close_to(results[0].rows) == close_to(results[1].rows), name
        types = [[tuple(map(type, row)) for row in result.rows] for result in results]
        assert types[0] == types[1], name
        assert results[0].rows or name == "balance", name
    for group in (["day"], ["model", "tenant"], ["strategy"], ["day", "strategy"], ["team", "day"]):
        results = [await store.queries.savings(group) for store in (sqlite_store, pg_store)]
        assert close_to(results[0].rows) == close_to(results[1].rows)
        assert results[0].columns[: len(group)] == tuple(group)


async def test_every_view_and_query_is_described_column_by_column(store):
    assert list(DESCRIBED) == list(VIEWS)
    for name, view in DESCRIBED.items():
        assert (await store.queries.run_readonly(f"SELECT * FROM {name}")).columns == tuple(view.columns), name
    for name in NAMED:
        assert (await store.queries.named(name)).columns == tuple(NAMED[name].columns), name
    for described in [*DESCRIBED.values(), *NAMED.values()]:
        assert described.title
        assert all(described.columns.values())


def stepped(upstream, model, tier, ts_ms):
    """Above 1,000 input tokens all of them cost twice as much; "old" cannot be batched, nobody knows "free"."""
    if model == "free" or (model == "old" and tier == "batch"):
        return None
    share = 1_000 if tier == "default" else 500
    return [Rate(1_000, *(2 * share * usd for usd in (3, 15, 1, 4))), Rate(-1, *(share * usd for usd in (3, 15, 1, 4)))]


async def test_a_batch_is_priced_by_each_models_own_rates(store):
    calls = (
        call("a", usage=Usage(1_000, 10, 400, 100)),
        call("b", usage=Usage(1_001, 10)),
        call("old", model="old", usage=Usage(500, 0)),
        call("free", model="free", usage=Usage(500, 0)),
        call("flex", tier="flex", usage=Usage(500, 0)),
        call("failed", usage=None, status=500),
    )
    store.ledger.record(outcome("q", tag="eval", calls=calls))
    store.ledger.record(outcome("r", tag="", calls=(call("c", usage=Usage(1, 1)),)))
    await store.ledger.flush()
    found = await Queries(store.database, stepped).named("could_wait")
    batch_nusd = (500 * 3 + 10 * 15 + 400 + 100 * 4) // 2 + (1_001 * 3 + 10 * 15)
    paid_nusd = [1_000 * 1_000 + 10 * 4_000 - 400 * 900 + 100 * 250, 1_001 * 1_000 + 10 * 4_000, 500 * 1_000]
    assert close_to(found.rows) == close_to(
        [("eval", 5, sum(paid_nusd) / 1e9, sum(paid_nusd[:2]) / 1e9, batch_nusd / 1e9,
          (sum(paid_nusd[:2]) - batch_nusd) / 1e9),
         ("", 1, 5_000 / 1e9, 5_000 / 1e9, 9 / 1e9, 4_991 / 1e9)]
    )  # fmt: skip


async def test_prompt_caching_is_weighed_with_the_tiers_own_rates(store):
    calls = (
        call("a", usage=Usage(1_000, 0, 900)),
        call("b", usage=Usage(1_000, 0, 0, 900)),
        call("f", tier="flex", usage=Usage(1_000, 0, 900)),
        call("old", model="free", usage=Usage(9, 0, 9)),
    )
    store.ledger.record(outcome("q", calls=calls))
    await store.ledger.flush()
    found = await Queries(store.database, stepped).named("prompt_cache")
    saved, spent = (900 * 2 + 900), 900
    assert found.rows == (
        ("openai", "m", 3, 3_000, 1_800, 900, 0.6, saved / 1e9, spent / 1e9, (saved - spent) / 1e9, 0),
        ("openai", "free", 1, 9, 9, 0, 1.0, 0.0, 0.0, 0.0, 1),
    )
    unrated = await Queries(store.database).named("prompt_cache")
    assert [row[-1] for row in unrated.rows] == [1, 3]


async def test_calls_are_counted_by_their_own_day_and_latency_by_lane(store):
    late = call("late", ts_ms=NOON_MS + DAY_MS, ttft_ms=None)
    store.ledger.record(outcome("q", calls=(call("own"), late)))
    store.ledger.record(outcome("r", ttft_ms=None, calls=()))
    for number in range(3):
        store.ledger.record(outcome(f"t{number}", ttft_ms=float(number), calls=()))
    await store.ledger.flush()
    on_the_day = await store.queries.named("invoice", since_day="2026-11-22", until_day="2026-11-22")
    assert [row[3] for row in on_the_day.rows] == [1]
    assert [row[3] for row in (await store.queries.named("invoice", since_day="2026-11-23")).rows] == [1]
    lanes = {row[0]: row[1:] for row in (await store.queries.named("latency")).rows}
    assert lanes == {"forward": (1, 90.0, 90.0, 800.0, 800.0), "refused": (4, 1.0, 2.0, 800.0, 800.0)}
    with pytest.raises(BadRequest, match="since must be a day"):
        await store.queries.named("invoice", since_day="yesterday")


async def test_what_a_provider_may_bill_is_summed_by_day_model_and_tier(store):
    calls = (
        call("a", usage=Usage(100, 20, 30, 10)),
        call("b", usage=Usage(7, 1), usage_basis="estimated"),
        call("flex", tier="flex"),
        call("late", ts_ms=NOON_MS + DAY_MS // 2),
        call("failed", usage=None, usage_basis="none", status=500),
        call("silent", usage=None, usage_basis="none", status=200),
        call("elsewhere", upstream="lab"),
    )
    store.ledger.record(outcome("q", calls=calls))
    store.ledger.record(outcome("e", endpoint="/v1/embeddings", calls=(call("vector", model="v", usage=Usage(9, 0)),)))
    await store.ledger.flush()
    day, billed = "2026-11-22", store.queries.billed
    assert sorted(await billed(day, day, ("openai",))) == [
        (day, "m", "default", 3, 107, 30, 10, 21, 100_000 + 80_000 - 27_000 + 2_500 + 7_000 + 4_000, 2, 0),
        (day, "m", "flex", 1, 100, 0, 0, 20, 90_000, 0, 0),
        (day, "v", "default", 1, 9, 0, 0, 0, 9_000, 0, 0),
    ]
    assert {type(value) for row in await billed(day, day, None) for value in row[3:]} == {int}
    assert sum(row.calls for row in await billed(day, day, None)) == 6
    store.ledger.record(outcome("f", calls=(call("gift", model="free"),)))
    await store.ledger.flush()
    assert [row.unpriced for row in await billed(day, day, None) if row.model == "free"] == [1]
    assert [row[-2:] for row in (await store.queries.named("invoice")).rows if row[1] == "free"] == [(0, 1)]
    assert [row.model for row in await billed(day, day, None, "embeddings")] == ["v"]
    assert {row.model for row in await billed(day, day, None, "others")} == {"m", "free"}
    assert [row.day for row in await billed("2026-11-23", "9999", ("openai",))] == ["2026-11-23"]
    assert await billed(day, day, ()) == []


async def test_the_ledger_balances_and_an_unbalanced_row_is_named(store):
    await fill(store)
    assert (await store.queries.named("balance")).rows == ()

    async def spoil(connection):
        await connection.exec_driver_sql("UPDATE saving SET saved_nusd = saved_nusd + 1 WHERE request_id = 'r0'")

    await store.writer.run(spoil)
    assert [row[0] for row in (await store.queries.named("balance")).rows] == ["r0"]


async def test_numbers_of_the_summary_are_right(store):
    for name in ("a", "b"):
        store.ledger.record(hit(name))
    store.ledger.record(outcome("c"))
    await store.ledger.flush()
    (row,) = (await store.queries.named("total")).rows
    assert row == pytest.approx((3, 540_000 / 1e9, 180_000 / 1e9, 360_000 / 1e9, 2 / 3))
    (row,) = (await store.queries.savings(["day"], since_day="2026-11-22", until_day="2026-11-22")).rows
    assert row[:3] == ("2026-11-22", 3, 2)
    assert (await store.queries.savings(["day"], since_day="2026-11-23")).rows == ()


@pytest.mark.parametrize(
    "sql",
    ["DELETE FROM request", "WITH x AS (SELECT 1) DELETE FROM request", "SELECT 1; DELETE FROM request",
     "PRAGMA query_only=OFF", "ATTACH 'x.db' AS x", "CREATE TABLE t(a INTEGER)", "DROP VIEW savings_daily",
     "UPDATE request SET tenant = ''", "INSERT INTO saving DEFAULT VALUES", "VACUUM", "BEGIN", "COMMIT", "", ";",
     "SELECT nothing FROM nowhere", "SELECT load_extension('x')", "COPY request TO '/tmp/x'"],
)  # fmt: skip
async def test_only_reading_is_possible(store, sql):
    store.ledger.record(hit())
    await store.ledger.flush()
    with pytest.raises(BadRequest):
        await store.queries.run_readonly(sql)
    assert (await store.queries.run_readonly("SELECT COUNT(*) FROM request")).rows == ((1,),)


async def test_a_runaway_query_is_stopped_in_time(store):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    with pytest.raises(BadRequest) as stopped:
        await store.queries.run_readonly(endless, timeout_s=0.2)
    assert stopped.value.code == "query_timeout"
    assert (await store.queries.run_readonly("SELECT 1")).rows == ((1,),)


async def test_rows_beyond_the_limit_are_cut_and_said_to_be(store):
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) SELECT i FROM n"
    result = await store.queries.run_readonly(many, row_limit=10)
    assert (len(result.rows), result.truncated) == (10, True)
    assert not (await store.queries.run_readonly(many, row_limit=50)).truncated


async def test_a_query_cannot_build_a_huge_value(sqlite_store):
    with pytest.raises(BadRequest):
        await sqlite_store.queries.run_readonly("SELECT zeroblob(1000000000)")


@pytest.mark.parametrize("group_by", [[], ["nothing"], ["day", "day"], ["day; DROP TABLE request"]])
async def test_grouping_is_by_known_columns_only(sqlite_store, group_by):
    with pytest.raises(BadRequest):
        await sqlite_store.queries.savings(group_by)


async def test_requests_are_listed_newest_first_and_filtered(store):
    await fill(store)
    rows = await store.queries.requests(limit=5, cache_status="HIT", model="m2", since=NOON_MS)
    assert [row["cache_status"] for row in rows] == ["HIT"] * 5
    assert {row["ts"] for row in rows} == {NOON_MS}


async def test_feedback_on_what_nobody_knows_is_not_recorded(store):
    assert await store.feedback(verdict="wrong", ts_ms=1, request_id="nobody") is None
    assert await store.feedback(verdict="wrong", ts_ms=1, entry_id=77) is None
    made = await store.entries.put(draft(), NOW)
    assert await store.feedback(verdict="wrong", ts_ms=1, entry_id=made.entry.id) == made.entry.id
    store.ledger.record(hit("just-now", entry_id=made.entry.id))
    assert (
        await asyncio.wait_for(store.feedback(verdict="right", ts_ms=1, request_id="just-now"), PATIENCE_S)
        == made.entry.id
    )


async def test_showback_is_by_team_and_by_tenant_where_there_is_none(store):
    store.ledger.record(outcome("a", key_id="key_1", team="red"))
    store.ledger.record(outcome("b", key_id="key_2", team="red", tenant="u" * 64))
    store.ledger.record(outcome("c"))
    await store.ledger.flush()
    result = await store.queries.named("showback")
    assert [row[:3] for row in result.rows] == [("red", 2, 0.00036), ("t" * 64, 1, 0.00018)]
