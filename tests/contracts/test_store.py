"""What every EntryStore does, the fake and the real ones."""

from __future__ import annotations

import pytest

from proxy.store.store import open_store
from tests.pg import pg_server, pg_url
from tests.rows import HOUR_MS, NOON_MS, digest, draft, list_price
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
    stored = await entries.put(draft(tags=("a", "b")))
    assert stored.entry.id > 0
    assert stored.replaced == ()
    assert await entries.find(digest("a")) == stored.entry
    assert await entries.get(stored.entry.id) == stored.entry


async def test_what_was_never_put_is_none(entries):
    assert await entries.find(digest("never")) is None
    assert await entries.get(12345) is None


async def test_a_second_put_of_a_fingerprint_replaces_the_first_under_a_new_id(entries):
    old = await entries.put(draft())
    new = await entries.put(draft(answer=b"new"))
    assert new.entry.id > old.entry.id
    assert new.replaced == (old.entry.id,)
    assert await entries.get(old.entry.id) is None


async def test_touch_changes_only_the_end_of_freshness(entries):
    stored = await entries.put(draft())
    await entries.touch(stored.entry.id, NOON_MS + 7 * HOUR_MS)
    assert (await entries.get(stored.entry.id)).draft == draft(expires_ms=NOON_MS + 7 * HOUR_MS)
    await entries.touch(999, NOON_MS)
