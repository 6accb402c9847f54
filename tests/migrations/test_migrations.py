"""The migrations lead to exactly the schema the code describes, there and back, on both databases."""

from __future__ import annotations

from importlib.resources import files

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from proxy.store import migrate
from proxy.store.engine import open_database, transaction
from proxy.store.schema import HEAD, VIEWS, metadata
from proxy.store.store import migrate_store, open_store
from tests.rows import digest, draft, hit, list_price


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
    await store.entries.put(draft())
    store.ledger.record(hit())
    await store.close()
    done = await migrate_store(url, tmp_path / "data")
    assert done.before == done.after == HEAD
    store = await open_store(url, tmp_path / "data", price=list_price)
    assert (await store.entries.find(digest("a"))).draft == draft()
    assert (await store.queries.request("h"))["id"] == "h"
    await store.close()
