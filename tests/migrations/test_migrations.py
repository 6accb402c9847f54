"""The migrations lead to exactly the schema the code describes, there and back, on both databases."""

from __future__ import annotations

from importlib.resources import files

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, text

from proxy.core.errors import ConfigError
from proxy.core.model import Draft
from proxy.core.risk import Tally
from proxy.core.saving import REQUEST_COLUMNS, settle
from proxy.judging.judge import Place
from proxy.store import migrate
from proxy.store.engine import open_database, transaction
from proxy.store.entries import checksum_of
from proxy.store.schema import HEAD, VIEWS, entry, metadata
from proxy.store.store import migrate_store, open_store
from tests.rows import NOW, digest, draft, hit, list_price, outcome


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return (
        f"sqlite:///{tmp_path / 'data' / 'ibid.db'}" if request.param == "sqlite" else request.getfixturevalue("pg_url")
    )


def test_the_code_names_the_newest_migration():
    heads = ScriptDirectory(str(files("proxy._migrations"))).get_heads()
    assert heads == [HEAD]


async def test_an_upgraded_empty_database_equals_the_metadata(url, tmp_path):
    done = await migrate_store(url, tmp_path / "data")
    assert (done.before, done.after, done.backup) == (None, HEAD, None)
    database = open_database(url, tmp_path / "data")

    def compare(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, metadata), set(inspect(connection).get_view_names())

    async with database.writer.connect() as connection:
        differences, views = await connection.run_sync(compare)
    await database.close()
    assert differences == []
    assert views == set(VIEWS)


async def test_up_down_up_works_and_leaves_nothing_between(url, tmp_path):
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        for _ in range(2):
            async with transaction(connection):
                await connection.run_sync(migrate.upgrade)
                assert await connection.run_sync(migrate.revision_of) == HEAD
            async with transaction(connection):
                await connection.run_sync(lambda sync: migrate.downgrade(sync, "base"))
                left = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
                assert set(left) == {"alembic_version"}
    await database.close()


async def upgrade_and_fail(connection):
    async with transaction(connection):
        await connection.run_sync(migrate.upgrade)
        raise RuntimeError("half way")


async def test_a_failed_migration_leaves_the_database_as_it_was(url, tmp_path):
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        with pytest.raises(RuntimeError, match="half way"):
            await upgrade_and_fail(connection)
        async with transaction(connection):
            assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == []
    await database.close()


async def test_migrating_a_current_database_keeps_its_rows(url, tmp_path):
    store = await open_store(url, tmp_path / "data", price=list_price)
    await store.entries.put(draft(), NOW)
    store.ledger.record(hit())
    await store.close()
    done = await migrate_store(url, tmp_path / "data")
    assert done.before == done.after == HEAD
    store = await open_store(url, tmp_path / "data", price=list_price)
    assert (await store.entries.find(digest("a"))).draft == draft()
    assert (await store.queries.request("h"))["id"] == "h"
    await store.close()


async def test_a_database_of_the_first_revision_is_upgraded_with_its_rows(url, tmp_path):
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        async with transaction(connection):
            await connection.run_sync(lambda sync: migrate.upgrade(sync, "0001"))
    await database.close()
    with pytest.raises(ConfigError, match="ibid migrate"):
        await open_store(url, tmp_path / "data", price=list_price)
    database = open_database(url, tmp_path / "data")
    names = ["id", *(field for field in Draft.__dataclass_fields__ if field not in ("usage", "tags"))]
    values = {"id": 7, **{name: getattr(draft(), name) for name in names[1:]}}
    usage = draft().usage
    values |= {"in_tok": usage.input_tokens, "out_tok": usage.output_tokens}
    values |= {"cache_read_tok": usage.cache_read_tokens, "cache_write_tok": usage.cache_write_tokens, "tags": "[]"}
    values |= {"used_ms": 1, "size_bytes": 1, "quarantined": 0, "checksum": checksum_of(draft())}
    async with database.writer.connect() as connection, transaction(connection):
        await connection.execute(insert(entry), values)
    await database.close()
    done = await migrate_store(url, tmp_path / "data")
    assert (done.before, done.after) == ("0001", HEAD)
    store = await open_store(url, tmp_path / "data", price=list_price)
    assert (await store.entries.find(digest("a"))).draft == draft()
    await store.close()


def row_of(asked):
    return dict(zip(REQUEST_COLUMNS, settle(asked, list_price).request, strict=True))


async def test_requests_of_the_second_revision_belong_to_no_key(url, tmp_path):
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        async with transaction(connection):
            await connection.run_sync(lambda sync: migrate.upgrade(sync, "0002"))
        before = {name: value for name, value in row_of(outcome("old")).items() if name not in ("key_id", "team")}
        names, marks = ", ".join(before), ", ".join(f":{name}" for name in before)
        async with transaction(connection):
            await connection.execute(text(f"INSERT INTO request ({names}) VALUES ({marks})"), before)
    await database.close()
    await migrate_store(url, tmp_path / "data")
    store = await open_store(url, tmp_path / "data", price=list_price)
    found = await store.queries.request("old")
    assert (found["key_id"], found["team"], found["actual_nusd"]) == (None, "", before["actual_nusd"])
    (row,) = (await store.queries.run_readonly("SELECT tenant, team, requests FROM savings_by_tenant")).rows
    assert row == ("t" * 64, "", 1)
    (payer,) = (await store.queries.named("showback")).rows
    assert payer[0] == "t" * 64
    await store.close()
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        async with transaction(connection):
            await connection.run_sync(lambda sync: migrate.downgrade(sync, "0002"))
        found = (await connection.execute(text("SELECT * FROM request"))).mappings().one()
        assert dict(found) == before
    await database.close()


async def test_comparisons_of_the_sixth_revision_are_evidence_where_they_are_certain(url, tmp_path):
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection:
        async with transaction(connection):
            await connection.run_sync(lambda sync: migrate.upgrade(sync, "0006"))
        told = {
            "ts": 5, "source": "audit", "request_id": "r", "tenant": "t", "namespace": "n", "embedder": "e1",
            "scope": digest("s"), "fingerprint": digest("q"), "entry_id": 1, "group_id": 1, "similarity": 0.97,
            "log_odds": 1.0, "standing": "start", "served": 1, "near_same": 1, "p_same": 0.2, "weight": 2.0,
            "features": b"", "words": b"", "signature": b"", "writer": "w",
        }  # fmt: skip
        rows = [
            told,
            told | {"p_same": 0.9995, "ts": 7},
            told | {"p_same": 0.0, "source": "feedback"},
            told | {"standing": "", "served": 0, "near_same": 0, "weight": 1.0},
            told | {"weight": 0.0},
            told | {"embedder": "e2", "namespace": ""},
        ]
        names, marks = ", ".join(told), ", ".join(f":{name}" for name in told)
        async with transaction(connection):
            for row in rows:
                await connection.execute(text(f"INSERT INTO audit ({names}) VALUES ({marks})"), row)
    await database.close()
    await migrate_store(url, tmp_path / "data")
    store = await open_store(url, tmp_path / "data", price=list_price)
    place = Place(digest("s"), "n", "t", b"")
    tally = Tally(labelled=4, hits=6, audited=2, counted_wrong=1, would_be=2, would_be_wrong=1, start=4, start_wrong=2)
    assert [*(await store.comparisons.tallies("e1", place.levels)).values()] == [tally] * 4
    (namespace,) = (await store.comparisons.tallies("e2", [place.levels[1]])).values()
    assert namespace == Tally()
    seen = [one.comparison for one in await store.comparisons.newest("e1", 9)]
    assert [(one.region, one.comparer, one.p_null) for one in seen[:4]] == [
        ("alike", "built-in", None), ("alike", "built-in", None), ("alike", "", None), ("", "built-in", None),
    ]  # fmt: skip
    await store.close()
    database = open_database(url, tmp_path / "data")
    async with database.writer.connect() as connection, transaction(connection):
        await connection.run_sync(lambda sync: migrate.downgrade(sync, "0008"))
        found = await connection.execute(text("SELECT near_same FROM audit ORDER BY id"))
        assert [row[0] for row in found] == [1, 1, 1, 0, 1, 1]
    await database.close()
