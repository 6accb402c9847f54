"""What the judge learned from, as rows on both databases."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from proxy.core.errors import CacheFault
from proxy.core.model import Comparison
from proxy.core.purges import Selector
from proxy.core.risk import LevelName, Tally
from proxy.ports import RefusedPair
from proxy.store import comparisons as room
from proxy.store.comparisons import Comparisons
from proxy.store.schema import evidence
from tests.rows import NOON_MS, NOW, digest, draft, hit


def comparison(name: str = "q", **changes: object) -> Comparison:
    fields: dict[str, object] = {
        "ts_ms": NOON_MS, "source": "audit", "request_id": name, "tenant": "t" * 64, "namespace": "", "embedder": "e1",
        "scope": digest("scope"), "fingerprint": digest(name), "entry_id": 1, "group_id": 1, "similarity": 0.97,
        "log_odds": 3.5, "standing": "start", "served": True, "region": "alike", "comparer": "c", "p_same": 0.9,
        "p_null": 0.8, "weight": 2.0,
        "features": b"\x00\x01", "words": b"\x02", "signature": b"\x03",
    }  # fmt: skip
    return Comparison(**{**fields, **changes})  # type: ignore[arg-type]


async def test_comparisons_come_back_as_they_were_oldest_first(store):
    made = [comparison(f"q{i}") for i in range(5)]
    for one in made:
        store.comparisons.record(one)
    await store.comparisons.flush()
    found = await store.comparisons.newest("e1", 3)
    assert [seen.comparison for seen in found] == made[2:]
    assert all(seen.own for seen in found)
    assert [seen.comparison for seen in await store.comparisons.after("e1", found[0].id)] == made[3:]
    assert await store.comparisons.newest("another", 3) == []


async def test_another_process_sees_that_it_did_not_write_them(store):
    store.comparisons.record(comparison())
    await store.comparisons.flush()
    other = Comparisons(store.database, store.writer)
    assert [seen.own for seen in await other.after("e1", 0)] == [False]


async def test_a_group_is_noted_with_the_comparison_and_read_back(store):
    first = (await store.entries.put(draft("a"), NOW)).entry
    second = (await store.entries.put(draft("b"), NOW)).entry
    store.comparisons.record(comparison(), second.id, first.id)
    store.comparisons.record(None, first.id, first.id)
    await store.comparisons.flush()
    assert [pair async for pair in store.comparisons.groups()] == [(second.id, first.id)]
    assert len(await store.comparisons.newest("e1", 9)) == 1
    assert await store.entries.get(second.id) == second  # a group is not part of what is served


async def test_a_verdict_finds_the_comparison_of_its_request_and_overrules_it(store):
    store.comparisons.record(comparison("hit"))
    store.comparisons.record(comparison("miss", served=False, source="forward"))
    (seen,) = await store.comparisons.judged("hit", 1)
    assert await store.comparisons.judged("miss", 1) == []
    assert await store.comparisons.judged(None, 1) == []
    await store.comparisons.correct(seen.id, 0.0, "feedback")
    (again,) = await store.comparisons.judged(None, 1)
    assert (again.comparison.p_same, again.comparison.source) == (0.0, "feedback")


async def test_a_pair_is_refused_once_and_allowed_again(store):
    pair = RefusedPair(digest("asked"), digest("kept"), NOON_MS, "r", 7, "feedback")
    await store.comparisons.refuse(pair)
    await store.comparisons.refuse(pair._replace(request_id="later"))
    assert await store.comparisons.refused() == [pair]
    assert await store.comparisons.refused(NOON_MS + 1) == []
    assert await store.comparisons.refused_for("r", 0) == await store.comparisons.refused_for(None, 7) == [pair]
    assert await store.comparisons.allow(pair.asked, pair.kept)
    assert not await store.comparisons.allow(pair.asked, pair.kept)
    assert await store.comparisons.refused() == []


async def test_near_misses_and_audits_are_listed_newest_first_with_the_stored_question(store):
    made = await store.entries.put(draft(), NOW)
    store.comparisons.record(comparison("near", entry_id=made.entry.id, served=False, source="forward", standing=""))
    store.comparisons.record(comparison("audited", entry_id=made.entry.id))
    store.comparisons.record(comparison("gone", entry_id=999))
    near = await store.comparisons.recent(limit=10, before_id=None, near_misses=True)
    audits = await store.comparisons.recent(limit=10, before_id=None, near_misses=False)
    assert [(row["request_id"], row["prompt"]) for row in near] == [("near", "question a")]
    assert [(row["request_id"], row["prompt"]) for row in audits] == [("gone", None), ("audited", "question a")]
    older = await store.comparisons.recent(limit=10, before_id=audits[0]["id"], near_misses=False)
    assert [row["request_id"] for row in older] == ["audited"]
    assert not {"features", "words", "signature"} & set(audits[0])


async def test_what_was_learned_from_purged_entries_goes_with_them(store):
    """What was written, and what is written after the purge."""
    gone, left = [(await store.entries.put(draft(name), NOW)).entry.id for name in ("a", "b")]
    store.comparisons.record(comparison("a", entry_id=gone))
    store.comparisons.record(comparison("b", entry_id=left))
    await store.comparisons.flush()
    ids = await store.entries.purge(Selector(ids=(gone,)), dry_run=False)
    assert [seen.comparison.request_id for seen in await store.comparisons.newest("e1", 9)] == ["b"]
    store.comparisons.record(comparison("late", entry_id=gone))
    store.comparisons.forget(ids)
    await store.comparisons.flush()
    assert [seen.comparison.request_id for seen in await store.comparisons.newest("e1", 9)] == ["b"]


async def test_only_the_newest_are_kept(store, monkeypatch):
    monkeypatch.setattr(room, "KEPT", 2)
    for i in range(5):
        store.comparisons.record(comparison(f"q{i}"))
    await store.comparisons.flush()
    await store.comparisons.housekeep()
    assert [seen.comparison.request_id for seen in await store.comparisons.newest("e1", 9)] == ["q3", "q4"]


async def test_a_database_that_does_not_write_loses_no_comparison(sqlite_store, monkeypatch):
    store = sqlite_store

    async def down(act):
        raise CacheFault("gone", code="store_down")

    with monkeypatch.context() as patch:
        patch.setattr(store.writer, "run", down)
        store.comparisons.record(comparison())
        with pytest.raises(CacheFault):
            await store.comparisons.flush()
    await store.comparisons.flush()
    assert len(await store.comparisons.newest("e1", 9)) == 1


async def test_an_audited_hit_is_judged_in_the_views_and_its_cost_is_booked(store):
    store.ledger.record(hit("served", "cache.semantic", similarity=0.97))
    await store.ledger.flush()
    store.comparisons.record(comparison("served", p_same=0.0))
    await store.comparisons.flush()
    (row,) = (await store.queries.run_readonly("SELECT hits, judged, wrong, wrong_rate FROM wrong_hits")).rows
    assert tuple(row) == (1, 1, 1.0, 1.0)
    (band,) = (await store.queries.named("wrong_by_similarity")).rows
    assert tuple(band)[1:] == (1, 1, 1.0)


HERE = LevelName("scope", scope=digest("scope"))
LEVELS = (
    HERE,
    LevelName("namespace", tenant="t" * 64, namespace="n"),
    LevelName("tenant", tenant="t" * 64),
    LevelName("installation"),
)


async def test_what_is_noted_of_a_level_adds_up_over_processes_written_or_not(store):
    other = Comparisons(store.database, store.writer)
    for number in range(3):
        for level in LEVELS:
            store.comparisons.note("e1", level, Tally(hits=1.0, counted_wrong=1.0))
            other.note("e1", level, Tally(labelled=1.0, hits=number))
        await store.comparisons.flush()
    assert (await store.comparisons.tallies("e1", [HERE]))[HERE] == Tally(hits=3.0, counted_wrong=3.0)
    await other.flush()
    store.comparisons.note("e1", HERE, Tally(start=0.5))
    found = await store.comparisons.tallies("e1", [*LEVELS, LevelName("tenant", tenant="nobody")])
    both = Tally(labelled=3.0, hits=6.0, counted_wrong=3.0)
    assert [*found.values()] == [both._replace(start=0.5), both, both, both, Tally()]
    assert (await store.comparisons.tallies("another", [HERE]))[HERE] == Tally()


async def test_what_is_noted_while_it_is_written_is_told_once(store):
    async def asked() -> Tally:
        return (await store.comparisons.tallies("e1", [HERE]))[HERE]

    for number in range(1, 40):
        store.comparisons.note("e1", HERE, Tally(hits=1.0))
        writing = asyncio.create_task(store.comparisons.flush())
        await asyncio.sleep(0)
        asking = asyncio.create_task(asked())
        await asyncio.wait([writing, asking])
        assert asking.result() == Tally(hits=number)


async def test_a_note_outlives_a_database_that_does_not_write(store, monkeypatch):
    async def refuse(*_: object) -> None:
        raise CacheFault("full", code="store_full")

    store.comparisons.note("e1", HERE, Tally(hits=1.0))
    with monkeypatch.context() as patched:
        patched.setattr(store.writer, "run", refuse)
        with pytest.raises(CacheFault):
            await store.comparisons.flush()
    assert (await store.comparisons.tallies("e1", [HERE]))[HERE] == Tally(hits=1.0)
    await store.comparisons.flush()
    assert (await store.comparisons.tallies("e1", [HERE]))[HERE] == Tally(hits=1.0)


async def test_a_levels_comparisons_come_back_newest_last(store):
    made = [comparison(f"q{n}", namespace="n" if n % 2 else "", scope=digest(f"s{n % 3}")) for n in range(6)]
    for one in made[:5]:
        store.comparisons.record(one)
    await store.comparisons.flush()
    store.comparisons.record(made[5])  # still waits
    of_level = store.comparisons.of_level
    assert await of_level("e1", LevelName("scope", scope=digest("s2")), 9) == [made[2], made[5]]
    assert await of_level("e1", LEVELS[1], 9) == [made[1], made[3], made[5]]
    assert await of_level("e1", LEVELS[2], 9) == made
    assert await of_level("e1", LEVELS[3], 2) == made[4:]


async def test_housekeeping_keeps_every_tally_that_narrows(store):
    now = NOON_MS / 1000
    books = Comparisons(store.database, store.writer, clock=lambda: now)
    kept = {
        "wrong": Tally(counted_wrong=1.0),
        "would": Tally(would_be_wrong=1.0),
        "start": Tally(start_wrong=1.0),
        "thick": Tally(labelled=float(room.CLEAN_LABELS)),
    }
    for name, tally in {**kept, "clean": Tally(labelled=99.0, hits=500.0)}.items():
        books.note("e1", LevelName("tenant", tenant=name), tally)
    await books.flush()
    now += room.CLEAN_KEPT_MS / 1000
    await books.housekeep()
    assert len(await store.database.rows(select(evidence.c.tenant))) == 5
    now += 1
    await books.housekeep()
    assert {row[0] for row in await store.database.rows(select(evidence.c.tenant))} == set(kept)


async def test_what_is_kept_is_written_when_it_returns_and_once_however_many_write(store):
    made = [comparison(f"q{i}") for i in range(5)]
    for one in made[:-1]:
        store.comparisons.record(one)
    await asyncio.gather(store.comparisons.keep(made[-1]), store.comparisons.flush(), store.comparisons.flush())
    other = Comparisons(store.database, store.writer)
    assert [seen.comparison for seen in await other.newest("e1", 99)] == made
