"""Purges as rows: in the order of the commits, in one transaction with what they remove."""

from __future__ import annotations

import asyncio
import random
import sqlite3

import pytest
from sqlalchemy import func, select

from proxy.core.errors import CacheFault
from proxy.core.purges import KEPT_MS, Began, Purge, Selector, asked_ms, marks_of, prefixes, reaches
from proxy.store.schema import purge
from proxy.store.store import open_store
from tests.rows import HOUR_MS, NOON_MS, NOW, digest, draft, list_price
from tests.waiting import PATIENCE_S

RED = Selector(namespace="red")


async def numbers(store):
    return [row[0] for row in await store.database.rows(select(purge.c.number).order_by(purge.c.number))]


def some_selector(chance, ids):
    return Selector(
        ids=tuple(chance.sample(ids, chance.choice([0, 0, 0, 3]))),
        tags=tuple(chance.sample(["a", "b", "c"], chance.choice([0, 0, 1, 2]))),
        namespace=chance.choice([None, None, "", "red"]),
        model=chance.choice([None, None, "m", "m2"]),
        older_than_ms=chance.choice([None, None, NOON_MS - 812, NOON_MS - 813, NOON_MS - HOUR_MS]),
        writer=chance.choice([None, None, None, "r-1", "t" * 64]),
        everything=chance.random() < 0.05,
    )


async def test_what_sql_removes_is_what_a_purge_reaches(store):
    """One rule in two languages: over what is stored, and over what is under way."""
    chance = random.Random(42)
    stored = {}
    for n in range(40):
        one = draft(
            f"q{n}", tags=tuple(chance.sample(["a", "b", "c"], chance.randrange(3))),
            namespace=chance.choice(["", "red"]), model=chance.choice(["m", "m2"]),
            created_ms=NOON_MS - chance.choice([0, 0, 1, 2 * HOUR_MS]), tenant=chance.choice("tu") * 64,
            request_id=f"r-{n % 3}",
        )  # fmt: skip
        stored[(await store.entries.put(one, NOW)).entry.id] = one
    kinds = set()
    for _ in range(150):
        selector = some_selector(chance, sorted(stored))
        removed = prefixes([stored[i].fingerprint for i in selector.ids]) if _only_ids(selector) else b""
        made = Purge(1, NOON_MS, selector, removed)
        if selector.ids and not _only_ids(selector):
            continue  # which of them: only SQL can say
        found = await store.entries.purge(selector)
        assert list(found) == [i for i in stored if reaches(made, marks_of(stored[i]), asked_ms(stored[i]))], selector
        kinds.add(0 < len(found) < 40)
    assert kinds == {True, False}


def _only_ids(selector):
    return bool(selector.ids) and selector == Selector(ids=selector.ids)


async def test_what_began_before_a_purge_is_not_stored_after_it(store):
    before = Began(store.entries.purges.newest, NOON_MS)
    kept = (await store.entries.put(draft("kept", namespace="blue"), before)).entry
    assert await store.entries.purge(RED, dry_run=False) == ()
    assert await store.entries.put(draft(namespace="red"), before) is None
    assert await store.entries.put(draft("kept", namespace="red"), before) is None
    assert await store.entries.get(kept.id) == kept  # nor is anything replaced
    assert await store.entries.put(draft("c", namespace="blue"), before) is not None
    after = Began(store.entries.purges.newest, NOON_MS)
    assert await store.entries.put(draft(namespace="red"), after) is not None


async def test_what_a_purge_removed_is_not_put_back_by_what_began_before_it(store):
    made = (await store.entries.put(draft(namespace="red"), NOW)).entry
    assert await store.entries.purge(Selector(ids=(made.id, 999)), dry_run=False) == (made.id,)
    assert await store.entries.put(draft(namespace="blue"), NOW) is None
    assert await store.entries.put(draft("b", namespace="red"), NOW) is not None


async def test_an_entry_kept_from_lookups_is_not_replaced_by_what_began_before(store):
    made = (await store.entries.put(draft(), NOW)).entry
    assert await store.entries.quarantine(made.id) is True
    assert await store.entries.put(draft(answer=b"from before"), NOW) is None
    assert await store.entries.quarantine(made.id, on=False) is True
    assert await store.entries.get(made.id) == made
    assert await store.entries.quarantine(999) is False
    assert await numbers(store) == [1]


async def test_a_dry_run_and_what_names_nothing_are_no_purges(store):
    await store.entries.purge(RED)
    await store.entries.purge(Selector(), dry_run=False)
    await store.entries.purge(Selector(ids=(999,)), dry_run=False)
    assert await numbers(store) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_purges_are_known_after_a_restart(kind, tmp_path, request):
    url = None if kind == "sqlite" else request.getfixturevalue("pg_url")
    store = await open_store(url, tmp_path / "data", price=list_price)
    await store.entries.purge(RED, dry_run=False)
    await store.close()
    store = await open_store(url, tmp_path / "data", price=list_price)
    assert store.entries.purges.newest == 1
    assert await store.entries.put(draft(namespace="red"), NOW) is None
    await store.close()


async def test_old_purges_go_but_the_newest_stays_and_no_number_is_given_twice(store):
    for _ in range(3):
        await store.entries.purge(RED, dry_run=False)
    await store.entries.housekeep(int(1e15))
    assert await numbers(store) == [3]
    assert await store.entries.put(draft("b", namespace="blue"), NOW) is None  # what came since is not known any more
    await store.entries.purge(RED, dry_run=False)
    assert await numbers(store) == [3, 4]
    assert KEPT_MS > 26 * HOUR_MS  # a provider's batch and its grace


async def test_a_purge_of_another_process_counts(pg_url, tmp_path):
    ours, theirs = [await open_store(pg_url, tmp_path / name, price=list_price) for name in ("a", "b")]
    try:
        began = Began(ours.entries.purges.newest, NOON_MS)
        await theirs.entries.purge(RED, dry_run=False)
        assert await ours.entries.put(draft(namespace="red"), began) is None  # although nobody told it
        assert ours.entries.purges.newest == 1
        await asyncio.gather(*(one.entries.purge(RED, dry_run=False) for one in (ours, theirs) * 5))
        await ours.entries.follow()
        assert (await numbers(ours), ours.entries.purges.newest) == (list(range(1, 12)), 11)
    finally:
        await ours.close()
        await theirs.close()


async def test_whatever_the_order_of_two_processes_nothing_from_before_a_purge_is_left(pg_url, tmp_path):
    """Each stores what it began before the other's purge, at the same moment."""
    ours, theirs = [await open_store(pg_url, tmp_path / name, price=list_price) for name in ("a", "b")]
    try:
        for turn in range(30):
            began = Began(ours.entries.purges.newest, NOON_MS)
            puts = [ours.entries.put(draft(f"{turn}-{n}", namespace="red"), began) for n in range(8)]
            await asyncio.gather(theirs.entries.purge(RED, dry_run=False), *puts)
            ((left,),) = await ours.database.rows("SELECT COUNT(*) FROM entry")
            assert left == 0
    finally:
        await ours.close()
        await theirs.close()


async def test_while_another_program_holds_the_database_a_purge_is_refused_and_not_half_made(sqlite_store):
    made = (await sqlite_store.entries.put(draft(namespace="red"), NOW)).entry
    lock = sqlite3.connect(sqlite_store.database.path, isolation_level=None, timeout=PATIENCE_S)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(CacheFault):
            await sqlite_store.entries.purge(RED, dry_run=False)
        with pytest.raises(CacheFault):
            await sqlite_store.entries.quarantine(made.id)
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert (await sqlite_store.entries.get(made.id), await numbers(sqlite_store)) == (made, [])
    assert sqlite_store.entries.purges.newest == 0


async def test_a_purge_that_cannot_empty_the_log_is_a_purge_and_the_log_is_emptied_later(sqlite_store, monkeypatch):
    await sqlite_store.entries.put(draft(prompt="CANARY-PROMPT", namespace="red"), NOW)
    reading = sqlite3.connect(sqlite_store.database.path, isolation_level=None, timeout=PATIENCE_S)
    reading.execute("BEGIN")
    reading.execute("SELECT COUNT(*) FROM entry").fetchall()  # a snapshot that needs the log
    wal = sqlite_store.database.path.with_name("ibid.db-wal")
    try:
        assert len(await sqlite_store.entries.purge(RED, dry_run=False)) == 1
        assert b"CANARY-PROMPT" in wal.read_bytes()
    finally:
        reading.execute("ROLLBACK")
        reading.close()
    await sqlite_store.entries.housekeep(NOON_MS)
    assert b"CANARY-PROMPT" not in wal.read_bytes()


async def test_the_rows_of_a_purge_hold_no_text(store):
    await store.entries.put(draft(prompt="CANARY-PROMPT", answer=b"CANARY-ANSWER", namespace="red"), NOW)
    await store.entries.purge(RED, dry_run=False)
    ((selector, removed),) = await store.database.rows(select(purge.c.selector, purge.c.removed))
    assert "CANARY" not in selector
    assert bytes(removed) == digest("a")[:8]
    await store.entries.purge(Selector(everything=True), dry_run=False)
    assert (await store.database.rows(select(func.sum(func.length(purge.c.removed)))))[0][0] == 8
