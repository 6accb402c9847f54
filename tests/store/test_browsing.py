"""What people page through and change by hand: the ledger, batches, comparisons, an entry's life and tags."""

from __future__ import annotations

import sqlite3

import pytest

from proxy.core.purges import Selector
from proxy.store.named_queries import NAMED, grouped
from proxy.store.selection import Filters
from proxy.store.store import Store
from tests.rows import HOUR_MS, NOON_MS, NOW, digest, draft, outcome
from tests.store.test_comparisons import comparison
from tests.store.test_sql_batches import job

DAYS = {"since": "2026-11-01", "until": "2026-11-30"}


async def test_requests_are_read_page_by_page_without_a_gap_or_a_repeat(store: Store) -> None:
    for number in range(25):  # some at the same instant, over two days
        store.ledger.record(outcome(f"r{number:02}", ts_ms=NOON_MS + number // 3 * 3 * HOUR_MS))
    await store.ledger.flush()
    found: list[str] = []
    cursor = None
    while True:
        page = await store.queries.requests(limit=4, cursor=cursor)
        found += [row["id"] for row in page]
        if len(page) < 4:
            break
        cursor = f"{page[-1]['ts']}:{page[-1]['id']}"
    assert found == sorted(found, reverse=True)
    assert len(found) == 25
    assert await store.queries.requests(limit=4, cursor="999999999999999:x") == await store.queries.requests(limit=4)


async def test_requests_are_filtered_by_any_of_the_columns_that_the_route_names(store: Store) -> None:
    store.ledger.record(outcome("a", mechanism="cache.exact", calls=(), entry_id=7, team="red"))
    store.ledger.record(outcome("b", reason="numbers", namespace="legal", outcome="error"))
    await store.ledger.flush()
    for wanted, ids in (
        ({"lane": "cache.exact"}, ["a"]), ({"reason": "numbers"}, ["b"]), ({"team": "red"}, ["a"]),
        ({"namespace": "legal"}, ["b"]), ({"entry_id": 7}, ["a"]), ({"outcome": "error"}, ["b"]),
        ({"model": "m", "cache_status": "MISS"}, ["b", "a"]), ({"lane": None}, ["b", "a"]), ({"lane": "none"}, []),
    ):  # fmt: skip
        assert [row["id"] for row in await store.queries.requests(**wanted)] == ids, wanted


async def test_savings_by_the_hour_add_up_to_the_day(store: Store) -> None:
    for number in range(6):
        store.ledger.record(outcome(f"r{number}", ts_ms=NOON_MS + number * HOUR_MS // 2))
    await store.ledger.flush()
    hours = await store.queries.savings(("hour",))
    assert [row[0] for row in hours.rows] == [NOON_MS, NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS]
    (day,) = (await store.queries.savings(("day",))).rows
    assert [sum(row[i] for row in hours.rows) for i in (1, 2)] == list(day[1:3])


async def test_latency_lately_is_latency_while_there_are_few(store: Store) -> None:
    for number in range(30):
        hit = {"mechanism": "cache.exact", "calls": ()} if number % 2 else {}
        store.ledger.record(outcome(f"r{number}", total_ms=float(number), **hit))
    await store.ledger.flush()
    assert (await store.queries.named("latency_lately")).rows == (await store.queries.named("latency")).rows


@pytest.mark.parametrize("statement", [
    f"SELECT * FROM ({grouped(('day',))})", f"SELECT * FROM ({grouped(('hour',))})", NAMED["top_entries"].sql,
], ids=["day", "hour", "top_entries"])  # fmt: skip
async def test_what_the_overview_sums_is_read_from_the_index_alone(sqlite_store: Store, statement: str) -> None:
    assert "COVERING INDEX ix_request_browsed" in plan(sqlite_store, statement)


async def test_a_page_of_requests_follows_the_index_and_sorts_nothing(sqlite_store: Store) -> None:
    found = plan(
        sqlite_store,
        "SELECT * FROM request WHERE day <= :until AND ts < 5 ORDER BY day DESC, ts DESC, id DESC LIMIT 50",
    )
    assert "ix_request_browsed" in found
    assert "TEMP B-TREE" not in found


def plan(store: Store, statement: str) -> str:
    assert store.database.path is not None
    connection = sqlite3.connect(store.database.path)
    try:
        return "\n".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", DAYS))
    finally:
        connection.close()


async def test_an_amended_entry_has_its_new_life_and_tags_everywhere_and_is_sound(store: Store) -> None:
    stored = await store.entries.put(draft("a", tags=("old", "both")), NOW)
    assert stored is not None
    number = stored.entry.id
    amended = await store.entries.amend(number, expires_ms=NOON_MS + 9 * HOUR_MS, tags=["both", "new", "new"])
    assert amended is not None
    again = await store.entries.get(number)  # its checksum holds
    assert again == amended
    assert (again.draft.expires_ms, again.draft.tags) == (NOON_MS + 9 * HOUR_MS, ("both", "new"))
    for tag, ids in (("old", []), ("both", [number]), ("new", [number])):
        assert [one.id for one in (await store.entries.search(Filters(tag=tag))).entries] == ids
    assert await store.entries.purge(Selector(tags=("old",))) == ()
    assert await store.entries.amend(number, tags=[]) is not None
    assert (await store.entries.search(Filters(ids=[number]))).entries[0].tags == ()
    assert await store.entries.amend(number + 1, tags=["x"]) is None


async def test_an_amended_entry_counts_as_purged_to_those_who_hold_it(store: Store) -> None:
    """Another process has the row in memory with its old life: it must read it anew."""
    stored = await store.entries.put(draft("a"), NOW)
    assert stored is not None
    before = store.entries.purges.newest
    await store.entries.amend(stored.entry.id, expires_ms=NOON_MS + 1)
    (made,) = store.entries.purges.after(before)
    assert made.removed == digest("a")[:8]


async def test_batches_of_all_tenants_are_listed_newest_first_page_by_page(store: Store) -> None:
    for number in range(7):
        made = job(f"j{number}", tenant=f"t{number % 2}", created_ms=NOON_MS + number // 2)
        await store.batches.create_job(made, "w", NOON_MS)
    found: list[str] = []
    before = None
    for size in (3, 3, 1, 0):
        page = await store.batches.recent(limit=3, before=before)
        assert len(page) == size
        found += [row["id"] for row in page]
        before = f"{page[-1]['created_ms']}:{page[-1]['id']}" if page else None
    assert found == ["j6", "j5", "j4", "j3", "j2", "j1", "j0"]


async def test_a_near_miss_shows_both_questions_and_a_verdict_by_its_id(store: Store) -> None:
    kept = await store.entries.put(draft("kept", request_id="r-kept"), NOW)
    asked = await store.entries.put(draft("asked", request_id="r-asked"), NOW)
    assert kept is not None
    assert asked is not None
    for served, request_id in ((False, "r-asked"), (True, "r-hit")):
        await store.comparisons.keep(comparison(served=served, request_id=request_id, entry_id=kept.entry.id))
    (near,) = await store.comparisons.recent(limit=5, before_id=None, near_misses=True)
    assert (near["prompt"], near["asked"], near["asked_entry_id"]) == (
        "question kept",
        "question asked",
        asked.entry.id,
    )
    (hit,) = await store.comparisons.recent(limit=5, before_id=None, near_misses=False)
    assert (hit["prompt"], hit["asked"]) == ("question kept", None)
    seen = await store.comparisons.near_miss(near["id"])
    assert seen is not None
    assert seen.comparison.request_id == "r-asked"
    assert await store.comparisons.near_miss(hit["id"]) is None
