"""Rows of answers on both databases."""

from __future__ import annotations

import asyncio
import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import BadRequest, CacheFault
from proxy.core.model import Draft
from proxy.core.purges import Selector
from proxy.store.entries import checksum_of
from proxy.store.known import LOOSE, SLACK, Fingerprints, shortened
from proxy.store.selection import Filters
from tests.rows import HOUR_MS, NOON_MS, NOW, digest, draft, hit
from tests.waiting import PATIENCE_S

OTHER = {
    "scope": digest("x"), "fingerprint": digest("y"), "tenant": "u" * 64, "namespace": "n", "upstream": "other",
    "operation": "completion", "model": "other", "prompt": "other", "answer": b"other", "usage": None,
    "created_ms": 1, "expires_ms": 2, "total_ms": 3.0, "embedding": None, "embedder": None, "signature": None,
}  # fmt: skip


@given(st.sampled_from(sorted(OTHER)))
def test_the_checksum_covers_every_field_that_decides_what_is_served(name):
    assert checksum_of(draft()) != checksum_of(draft(**{name: OTHER[name]}))
    assert set(Draft.__dataclass_fields__) - set(OTHER) == {"request_id", "tags"}


async def test_a_put_is_found_whole_by_fingerprint_and_by_id(store):
    made = await store.entries.put(draft(tags=("doc:1", "team:a")), NOW)
    assert made.replaced == ()
    assert await store.entries.find(digest("a")) == made.entry
    assert await store.entries.get(made.entry.id) == made.entry
    assert made.entry.draft == draft(tags=("doc:1", "team:a"))


async def test_unknown_identities_are_absent(store):
    assert await store.entries.find(digest("nothing")) is None
    for entry_id in (0, -1, 99, 1 << 70):
        assert await store.entries.get(entry_id) is None


async def test_the_same_fingerprint_gets_a_new_id_and_names_the_one_it_replaced(store):
    first = await store.entries.put(draft(), NOW)
    second = await store.entries.put(draft(answer=b"newer"), NOW)
    assert second.entry.id > first.entry.id
    assert second.replaced == (first.entry.id,)
    assert await store.entries.get(first.entry.id) is None
    assert (await store.entries.find(digest("a"))).draft.answer == b"newer"


async def test_an_id_is_never_reused_even_after_the_last_row_is_gone(store):
    first = await store.entries.put(draft(), NOW)
    await store.entries.purge(Selector(everything=True), dry_run=False)
    after = NOW._replace(purge=store.entries.purges.newest)
    assert (await store.entries.put(draft(), after)).entry.id > first.entry.id


async def test_concurrent_puts_share_commits_and_twins_keep_one_row(store):
    before = store.writer.commits
    made = await asyncio.gather(*(store.entries.put(draft(f"q{number % 100}"), NOW) for number in range(200)))
    assert store.writer.commits - before <= 5
    assert len({stored.entry.id for stored in made}) == 200
    replaced = {gone for stored in made for gone in stored.replaced}
    assert len(replaced) == 100
    assert (await store.entries.stats()).entries == 100
    assert set((await store.entries.ids()).tolist()) == {stored.entry.id for stored in made} - replaced


@pytest.mark.parametrize("bad", [{"prompt": "a\x00b"}, {"prompt": "\ud800"}, {"created_ms": 1 << 70}])
async def test_what_no_database_keeps_is_refused_alone(store, bad):
    results = await asyncio.gather(
        store.entries.put(draft("good"), NOW), store.entries.put(draft("bad", **bad), NOW), return_exceptions=True
    )
    assert results[0].entry.id > 0
    assert isinstance(results[1], CacheFault)
    assert results[1].code == "store_refused"


async def test_a_full_queue_refuses_at_once(sqlite_store):
    sqlite_store.writer._limit = 3
    results = await asyncio.gather(
        *(sqlite_store.entries.put(draft(f"q{n}"), NOW) for n in range(10)), return_exceptions=True
    )
    busy = [result for result in results if isinstance(result, CacheFault)]
    assert len(busy) == 7
    assert {fault.code for fault in busy} == {"store_busy"}


async def test_a_row_edited_behind_our_back_is_absent_and_counted(sqlite_store):
    made = await sqlite_store.entries.put(draft(), NOW)
    other = sqlite3.connect(sqlite_store.database.path, timeout=PATIENCE_S)
    other.execute("UPDATE entry SET answer = x'00' WHERE id = ?", (made.entry.id,))
    other.commit()
    other.close()
    assert await sqlite_store.entries.find(digest("a")) is None
    assert await sqlite_store.entries.get(made.entry.id) is None
    assert sqlite_store.entries.damaged == 2


async def test_touch_moves_the_end_of_freshness_and_keeps_the_row_sound(store):
    made = await store.entries.put(draft(), NOW)
    await store.entries.touch(made.entry.id, NOON_MS + 9 * HOUR_MS)
    assert (await store.entries.get(made.entry.id)).draft.expires_ms == NOON_MS + 9 * HOUR_MS


async def test_quarantine_hides_an_entry_until_it_is_undone(store):
    entry_id = (await store.entries.put(draft(), NOW)).entry.id
    assert await store.entries.quarantine(entry_id)
    assert await store.entries.find(digest("a")) is None
    assert (await store.entries.ids("e1")).tolist() == []
    assert await store.entries.quarantine(entry_id, on=False)
    assert (await store.entries.get(entry_id)).id == entry_id
    assert not await store.entries.quarantine(999)


async def test_purge_takes_exactly_what_each_selector_names(store):
    ids = {}
    for name, changes in {
        "tagged": {"tags": ("doc:1", "doc:1", "x")}, "named": {"namespace": "ns"}, "model": {"model": "m2"},
        "old": {"created_ms": NOON_MS - HOUR_MS}, "writer": {"request_id": "r-9"}, "tenant": {"tenant": "z" * 64},
    }.items():  # fmt: skip
        ids[name] = (await store.entries.put(draft(name, **changes), NOW)).entry.id
    for selector, wanted in [
        (Selector(), ()),
        (Selector(tags=("doc:1", "nope")), (ids["tagged"],)),
        (Selector(tags=("doc:%",)), ()),
        (Selector(namespace="ns"), (ids["named"],)),
        (Selector(namespace="ns", model="m2"), ()),
        (Selector(model="m2"), (ids["model"],)),
        (Selector(older_than_ms=NOON_MS - 813), (ids["old"],)),
        (Selector(older_than_ms=NOON_MS - 812), tuple(sorted(ids.values()))),  # asked for 812.5 ms before it was there
        (Selector(writer="r-9"), (ids["writer"],)),
        (Selector(writer="z" * 64), (ids["tenant"],)),
        (Selector(ids=(ids["old"], 999)), (ids["old"],)),
        (Selector(everything=True), tuple(sorted(ids.values()))),
    ]:
        assert await store.entries.purge(selector) == wanted
    assert (await store.entries.stats()).entries == 6, "dry runs remove nothing"
    assert await store.entries.purge(Selector(tags=("doc:1",)), dry_run=False) == (ids["tagged"],)
    assert await store.entries.find(digest("tagged")) is None
    assert await store.database.rows("SELECT * FROM entry_tag") == []


async def test_a_purged_text_is_gone_from_the_database_file_and_its_log(sqlite_store):
    await sqlite_store.entries.put(draft(prompt="CANARY-PROMPT", answer=b"CANARY-ANSWER"), NOW)
    await sqlite_store.entries.purge(Selector(everything=True), dry_run=False)
    path = sqlite_store.database.path
    for file in path.parent.glob("ibid.db*"):
        assert b"CANARY" not in file.read_bytes()


async def test_search_pages_newest_first_and_reads_wildcards_literally(store):
    for number in range(5):
        await store.entries.put(draft(f"q{number}", prompt=f"100% of {number}", model="m" if number else "other"), NOW)
    first = await store.entries.search(Filters(), limit=3)
    rest = await store.entries.search(Filters(), limit=3, cursor=first.cursor)
    ids = [line.id for line in (*first.entries, *rest.entries)]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 5
    assert rest.cursor is None
    assert len((await store.entries.search(Filters(q="100% OF"))).entries) == 5
    assert (await store.entries.search(Filters(q="1%f"))).entries == ()
    assert (await store.entries.search(Filters(q="_"))).entries == ()
    assert [line.prompt for line in (await store.entries.search(Filters(model="other"))).entries] == ["100% of 0"]
    assert (await store.entries.search(Filters(namespace="' OR 1=1--"))).entries == ()


@pytest.mark.parametrize("bad", [{"limit": 0}, {"limit": 1001}, {"cursor": "1 OR 1=1"}, {"cursor": "9" * 30}])
async def test_a_bad_limit_or_cursor_names_its_parameter(sqlite_store, bad):
    with pytest.raises(BadRequest) as refused:
        await sqlite_store.entries.search(Filters(), **bad)
    assert refused.value.param == next(iter(bad))


async def test_vectors_come_in_blocks_of_one_embedder_in_id_order(store):
    made = [await store.entries.put(draft(f"q{number}"), NOW) for number in range(5)]
    await store.entries.put(draft("other", embedder="e2"), NOW)
    await store.entries.put(draft("none", embedding=None, embedder=None, signature=None), NOW)
    blocks = [block async for block in store.entries.vectors("e1", chunk=2)]
    assert [len(block.ids) for block in blocks] == [2, 2, 1]
    ids = np.concatenate([block.ids for block in blocks])
    assert ids.tolist() == [stored.entry.id for stored in made]
    for block, index in zip(blocks, (0, 2, 4), strict=True):
        assert block.vectors.dtype == np.float32
        assert block.vectors[0].tobytes() == made[index].entry.draft.embedding
        assert block.scopes[0].tobytes() == digest("scope")
        assert block.signatures[0].tolist() == [0, 1, 2, 3]
        assert block.expires_ms[0] == NOON_MS + HOUR_MS
    later = [block async for block in store.entries.vectors("e1", after_id=int(ids[3]))]
    assert [block.ids.tolist() for block in later] == [[int(ids[4])]]


async def test_expired_entries_are_swept_at_their_boundary_and_not_before(store):
    entry_id = (await store.entries.put(draft(expires_ms=NOON_MS), NOW)).entry.id
    assert await store.entries.housekeep(NOON_MS - 1) == ()
    assert await store.entries.housekeep(NOON_MS, stale_for_ms=1) == ()
    assert await store.entries.housekeep(NOON_MS) == (entry_id,)


async def test_eviction_keeps_what_was_used_and_obeys_both_bounds(store):
    ids = [(await store.entries.put(draft(f"q{number}"), NOW)).entry.id for number in range(4)]
    store.ledger.record(hit(entry_id=ids[0], ts_ms=NOON_MS + 120_000))
    await store.ledger.flush()
    store.entries._limit_entries = 2
    assert set(await store.entries.housekeep(NOON_MS + 130_000)) == {ids[1], ids[2]}
    store.entries._limit_bytes = 1
    assert set(await store.entries.housekeep(NOON_MS + 130_000)) == {ids[0], ids[3]}
    assert (await store.entries.stats()).entries == 0


async def test_fingerprints_in_memory_go_with_their_rows_however_those_go(sqlite_store):
    entries = sqlite_store.entries
    entries._limit_entries = 50
    for start in range(0, 4_000, 500):
        await asyncio.gather(*(entries.put(draft(f"q{start + number}"), NOW) for number in range(500)))
        await entries.housekeep(NOON_MS)
        assert entries.fingerprints_known <= LOOSE * 50 + SLACK + 500
    assert entries.fingerprints_known <= LOOSE * 50 + SLACK
    kept = [line.id for line in (await entries.search(Filters(), limit=100)).entries]
    assert len(kept) == 50
    for entry_id in kept:
        row = await entries.get(entry_id)
        assert (await entries.find(row.draft.fingerprint)).id == entry_id


async def test_what_is_stored_while_the_rows_are_read_anew_is_known(sqlite_store):
    entries, known = sqlite_store.entries, sqlite_store.entries._known
    await asyncio.gather(*(entries.put(draft(f"old{number}"), NOW) for number in range(300)))
    first = asyncio.create_task(entries.put(draft("given up"), NOW))
    await asyncio.sleep(0)
    reading = asyncio.create_task(entries._read_known(known))
    await asyncio.sleep(0)
    first.cancel()  # its row may be written all the same
    await asyncio.gather(*(entries.put(draft(f"new{number}"), NOW) for number in range(300)), reading)
    await sqlite_store.writer.settle()
    rows = await sqlite_store.database.rows("SELECT substr(fingerprint, 1, 8) FROM entry", ())
    assert len(rows) >= 600
    assert {row[0] for row in rows} <= {one.to_bytes(8, "big") for one in known._known}


STEPS = st.tuples(st.sampled_from(["add", "remove", "begin", "end", "fail"]), st.integers(0, 30))


@given(st.lists(STEPS), st.booleans())
def test_a_fingerprint_that_is_said_to_be_unknown_has_no_row(steps, small):
    known, rows, reading = Fingerprints(8 if small else 1_000), set(), None
    with known.reading():
        pass
    for step, number in steps:
        fingerprint = digest(str(number))
        if step == "add":
            assert known.add(fingerprint) or fingerprint not in rows
            rows.add(fingerprint)
        elif step == "remove":
            rows.discard(fingerprint)
        elif step == "begin" and reading is None:
            reading = known.reading()
            found, seen = reading.__enter__(), set(rows)
        elif step in ("end", "fail") and reading is not None:
            if step == "end":
                found.update(shortened(one[:8]) for one in seen)
                reading.__exit__(None, None, None)
            else:
                with pytest.raises(CacheFault):
                    reading.gen.throw(CacheFault("down"))
            reading = None
        assert all(known.may_hold(one) for one in rows)
        assert len(known) <= (8 if small else 1_000)
