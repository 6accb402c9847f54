"""Rows of virtual keys on both databases, and what the ledger says they spent."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import orjson
import pytest
from sqlalchemy import text

from proxy.core.errors import CacheFault
from proxy.core.keys import Cost, Key, Kind, Limit, Window, digest_of, is_virtual
from proxy.core.model import Usage
from proxy.core.saving import REQUEST_COLUMNS, settle
from proxy.money.keys import KeyRing, MeteredLedger, cost_of, new_secret
from proxy.store import keys as store_keys
from proxy.store.ledger import SPILL_NAME
from proxy.store.store import open_store
from tests.rows import NOON_MS, call, hit, list_price, outcome
from tests.waiting import PATIENCE_S

LIMITS = tuple([Limit(kind, 10**12, window) for kind in Kind for window in Window])


def key(name="key_1", **changes):
    fields = {"id": name, "digest": digest_of(name.encode()), "project": "red", "name": "night", "created_ms": NOON_MS}
    return Key(**{**fields, **changes})


class ListPrices:
    price = staticmethod(list_price)


def ring_of(store, now_ms=NOON_MS):
    return KeyRing(store.keys, ListPrices(), clock=lambda: now_ms / 1000)


def test_secrets_are_long_and_never_the_same():
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(is_virtual(secret) and len(secret) == 5 + 48 for secret in made)  # 192 bits in hexadecimal


async def test_a_key_comes_back_as_it_was_stored(store):
    made = key(expires_ms=NOON_MS + 5, limits=LIMITS, models=("gpt-*", 'odd "name"'), plan="+route,-semantic")
    await store.keys.create(made)
    await store.keys.create(key("key_2"))
    assert sorted(await store.keys.keys(), key=lambda one: one.id) == [made, key("key_2")]


async def test_every_change_is_noticed_whoever_made_it(store):
    marks = [await store.keys.mark()]

    async def has_changed() -> bool:
        marks.append(await store.keys.mark())
        return marks[-1] not in marks[:-1]

    await store.keys.create(key())
    assert await has_changed()
    assert not await has_changed()
    for number in range(3):  # within one millisecond
        assert (await store.keys.rotate("key_1", digest_of(b"%d" % number), NOON_MS)).rotated_ms == NOON_MS
        assert await has_changed()
    assert (await store.keys.revoke("key_1", NOON_MS)).revoked_ms == NOON_MS
    assert await has_changed()

    async def remove(connection):
        await connection.execute(text("DELETE FROM api_key"))

    await store.writer.run(remove)
    assert await store.keys.mark() == marks[0]


async def test_a_revoked_key_stays_revoked_and_is_given_no_new_secret(store):
    await store.keys.create(key())
    assert (await store.keys.revoke("key_1", NOON_MS + 1)).revoked_ms == NOON_MS + 1
    assert (await store.keys.revoke("key_1", NOON_MS + 9)).revoked_ms == NOON_MS + 1
    assert await store.keys.rotate("key_1", digest_of(b"x"), NOON_MS) is None
    assert await store.keys.revoke("nobody", NOON_MS) is None
    assert await store.keys.rotate("nobody", digest_of(b"x"), NOON_MS) is None


OUTCOMES = [
    outcome("a", key_id="key_1", team="red"),
    hit("b", key_id="key_1", team="red"),
    outcome("c", key_id="key_1", team="red", usage=None, outcome="cancelled"),  # billed all the same
    outcome("d", key_id="key_1", team="red", usage=None, cache_status="AUDIT", calls=(call("d1", purpose="audit"),)),
    outcome("e", key_id="key_1", team="red", calls=(call("e1"), call("e2", won=False, usage=Usage(7, 1, 2)))),
    outcome("f", key_id="key_1", team="red", calls=(), usage=None, status=504),
    outcome("g", key_id="key_2", team="red", calls=(call("g1", model="free"),)),
    outcome("h"),
]


async def test_what_is_read_is_what_the_ledgers_keeper_counts(store):
    for asked in OUTCOMES:
        store.ledger.record(asked)
    await store.ledger.flush()
    found = await store.keys.spent(["key_1", "key_2", "key_3"], {"day": NOON_MS, "hour": NOON_MS + 1})
    costs = [cost_of(asked, list_price) for asked in OUTCOMES if asked.key_id == "key_1"]
    assert found["key_1", "day"] == Cost(*[sum(part) for part in zip(*costs, strict=True)])
    assert found["key_1", "day"] == Cost(180_000 * 4 + 9_200, 5, 120 * 4)
    assert found["key_1", "hour"] == Cost(0, 0, 0)
    assert found["key_2", "day"] == Cost(0, 1, 120)
    assert ("key_3", "day") not in found


async def test_many_keys_are_read_in_pieces(store, monkeypatch):
    monkeypatch.setattr(store_keys, "IDS_AT_ONCE", 2)
    names = [f"key_{number}" for number in range(5)]
    for name in names:
        store.ledger.record(outcome(f"r-{name}", key_id=name, team="red"))
    await store.ledger.flush()
    found = await store.keys.spent(names, {"day": NOON_MS})
    assert found == {(name, "day"): Cost(180_000, 1, 120) for name in names}


async def test_a_start_counts_what_was_spent_before_it(store):
    await store.keys.create(key(limits=LIMITS))
    ring = ring_of(store)
    await ring.load()
    ledger = MeteredLedger(store.ledger, ring)
    for asked in OUTCOMES:
        ledger.record(asked)
    counted = ring.described("key_1")["limits"]
    assert {limit["spent"] for limit in counted} == {"0.000729200", 5, 480}
    await store.ledger.flush()
    fresh = ring_of(store)
    await fresh.load()
    assert fresh.described("key_1")["limits"] == counted
    await ring.read_spent()  # what is read does not come on top
    assert ring.described("key_1")["limits"] == counted
    later = ring_of(store, NOON_MS + 3_600_000)
    await later.load()
    assert [limit["spent"] for limit in later.described("key_1")["limits"]][:4] == [
        "0.000000000", "0.000000000", "0.000729200", "0.000729200"
    ]  # fmt: skip


async def test_another_process_spending_is_read_beside_what_waits_here(store):
    await store.keys.create(key(limits=(Limit(Kind.REQUESTS, 100, Window.DAY),)))
    ring = ring_of(store)
    await ring.load()
    store.ledger.record(outcome("theirs", key_id="key_1", team="red"))  # past the counter, as another process would
    ledger = MeteredLedger(store.ledger, ring)
    ledger.record(outcome("ours", key_id="key_1", team="red"))
    assert ring.described("key_1")["limits"][0]["spent"] == 1
    await ring.read_spent()
    assert ring.described("key_1")["limits"][0]["spent"] == 2


async def test_a_database_that_does_not_write_takes_nothing_off_the_count(tmp_path):
    store = await open_store(None, tmp_path / "data", price=list_price)
    await store.keys.create(key(limits=(Limit(Kind.REQUESTS, 100, Window.DAY),)))
    ring = ring_of(store)
    await ring.load()
    ledger = MeteredLedger(store.ledger, ring)
    await store.writer.close()
    ledger.record(outcome("spilled", key_id="key_1", team="red"))
    await ring.read_spent()
    assert store.ledger.owes
    assert ring.described("key_1")["limits"][0]["spent"] == 1
    await store.close()
    store = await open_store(None, tmp_path / "data", price=list_price)  # replays
    fresh = ring_of(store)
    await fresh.load()
    assert fresh.described("key_1")["limits"][0]["spent"] == 1
    await store.close()


async def test_what_a_killed_process_left_on_file_counts_before_the_database_writes_again(tmp_path):
    store = await open_store(None, tmp_path / "data", price=list_price)
    await store.keys.create(key(limits=(Limit(Kind.REQUESTS, 100, Window.DAY),)))
    for name in ("first", "second"):
        store.ledger.record(outcome(name, key_id="key_1", team="red"))
        if name == "first":
            await store.ledger.flush()
    store.ledger.record(outcome("nobody's"))
    await store.writer.close()
    await store.close()  # `second` stays on file, as after a kill
    with closing(sqlite3.connect(tmp_path / "data" / "ibid.db", isolation_level=None, timeout=PATIENCE_S)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        store = await open_store(None, tmp_path / "data", price=list_price)
        ring = ring_of(store)
        await ring.load()
        assert store.ledger.owes
        assert ring.described("key_1")["limits"][0]["spent"] == 2
    async with asyncio.timeout(PATIENCE_S):
        while store.ledger.owes:
            await store.ledger.flush()
    await ring.read_spent()
    assert ring.described("key_1")["limits"][0]["spent"] == 2
    await store.close()


async def test_what_an_earlier_release_spilled_belongs_to_no_key(tmp_path):
    settled = settle(hit("old"), list_price)
    before = list(settled.request[: REQUEST_COLUMNS.index("key_id")])
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / SPILL_NAME).write_bytes(orjson.dumps([[before], [], settled.savings]) + b"\n")
    store = await open_store(None, tmp_path / "data", price=list_price)
    found = await store.queries.request("old")
    assert (found["key_id"], found["team"], found["baseline_ms"]) == (None, "", 800.0)
    await store.close()


@pytest.mark.parametrize("fields", [{"digest": digest_of(b"key_1")}, {"id": "key_1"}])
async def test_neither_a_digest_nor_an_id_is_stored_twice(store, fields):
    await store.keys.create(key())
    with pytest.raises(CacheFault, match="refused"):
        await store.keys.create(key("key_2", **fields))
