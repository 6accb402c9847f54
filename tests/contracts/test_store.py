"""What every EntryStore does, the fake and the real ones."""

from __future__ import annotations

import asyncio

import pytest

from proxy.store.store import open_store
from tests.pg import pg_server, pg_url
from tests.rows import HOUR_MS, NOON_MS, NOW, digest, draft, list_price
from tests.store_fakes import FakeEntryStore

__all__ = ["pg_server", "pg_url"]


@pytest.fixture(params=["fake", "sqlite", "postgresql"])
async def entries(request, tmp_path):
    if request.param == "fake":
        yield FakeEntryStore()
        return
    url = None if request.param == "sqlite" else request.getfixturevalue("pg_url")
    store = await open_store(url, tmp_path, price=list_price)
    yield store.entries
    await store.close()


async def test_what_is_put_is_found(entries):
    stored = await entries.put(draft(tags=("a", "b")), NOW)
    assert stored.entry.id > 0
    assert stored.replaced == ()
    assert await entries.find(digest("a")) == stored.entry
    assert await entries.get(stored.entry.id) == stored.entry


async def test_what_was_never_put_is_none(entries):
    assert await entries.find(digest("never")) is None
    assert await entries.get(12345) is None


async def test_a_second_put_of_a_fingerprint_replaces_the_first_under_a_new_id(entries):
    old = await entries.put(draft(), NOW)
    new = await entries.put(draft(answer=b"new"), NOW)
    assert new.entry.id > old.entry.id
    assert new.replaced == (old.entry.id,)
    assert await entries.get(old.entry.id) is None


async def test_touch_changes_only_the_end_of_freshness(entries):
    stored = await entries.put(draft(), NOW)
    await entries.touch(stored.entry.id, NOON_MS + 7 * HOUR_MS)
    assert (await entries.get(stored.entry.id)).draft == draft(expires_ms=NOON_MS + 7 * HOUR_MS)
    await entries.touch(999, NOON_MS)


async def test_many_are_found_at_once(entries):
    names = [f"n{i}" for i in range(700)]  # more than one batch of the writer
    stored = await asyncio.gather(*[entries.put(draft(name), NOW) for name in names])
    await entries.put(draft("other"), NOW)
    found = await entries.find_many([digest(name) for name in ["never", *names[::2], "neither"]])
    assert sorted(entry.id for entry in found) == sorted(kept.entry.id for kept in stored[::2])
    assert {entry.draft.fingerprint: entry for entry in found}[digest("n0")] == stored[0].entry
    assert list(await entries.find_many([])) == []
    assert list(await entries.find_many([digest("never")])) == []


async def test_an_entry_asked_for_twice_is_found_once(entries):
    stored = await entries.put(draft(), NOW)
    assert list(await entries.find_many([digest("a"), digest("a")])) == [stored.entry]


async def test_use_is_noted_without_asking_whether_it_is_there(entries):
    stored = await entries.put(draft(), NOW)
    entries.mark_used(stored.entry.id, NOON_MS)
    entries.mark_used(999, NOON_MS)
    assert await entries.get(stored.entry.id) == stored.entry
