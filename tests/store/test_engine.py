"""Starting, refusing to start, breaking and recovering."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.core.errors import CacheFault, ConfigError
from proxy.core.purges import Selector
from proxy.store.store import migrate_store, open_store
from tests.rows import NOW, digest, draft, hit, list_price
from tests.waiting import PATIENCE_S


async def reopen(data_dir: Path, url: str | None = None):
    return await open_store(url, data_dir, price=list_price)


async def test_files_are_private_and_the_writer_is_durable(tmp_path):
    store = await reopen(tmp_path / "data")
    await store.entries.put(draft(), NOW)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "data").iterdir():
        assert file.stat().st_mode & 0o077 == 0, file

    async def pragmas(connection):
        names = ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        return [(await connection.exec_driver_sql(f"PRAGMA {name}")).scalar() for name in names]

    assert await store.writer.run(pragmas) == ["wal", 2, 1, 1]
    with pytest.raises(CacheFault):
        await store.database.rows("DELETE FROM entry")
    await store.close()


async def test_a_second_process_on_the_directory_is_refused(tmp_path):
    store = await reopen(tmp_path)
    with pytest.raises(ConfigError, match="another ibid is using"):
        await reopen(tmp_path)
    await store.close()
    await (await reopen(tmp_path)).close()


async def test_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "real.db").touch()
    (tmp_path / "ibid.db").symlink_to(tmp_path / "real.db")
    with pytest.raises(ConfigError, match="symbolic link"):
        await reopen(tmp_path)


async def test_a_directory_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="cannot be written"):
        await reopen(Path("/proc/ibid"))


async def test_a_corrupt_database_is_kept_aside_and_a_fresh_one_serves(tmp_path):
    store = await reopen(tmp_path)
    await asyncio.gather(*(store.entries.put(draft(f"q{n}", answer=b"x" * 5_000), NOW) for n in range(50)))
    await store.close()
    with (tmp_path / "ibid.db").open("r+b") as file:
        for page in range(2, 30):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    store = await reopen(tmp_path)
    assert store.database.quarantined is not None
    assert store.database.quarantined.name.startswith("ibid.db.corrupt-")
    assert store.database.quarantined.exists()
    assert await store.entries.find(digest("q1")) is None
    await store.entries.put(draft(), NOW)
    await store.close()


async def test_rubbish_instead_of_a_database_is_kept_aside(tmp_path):
    (tmp_path / "ibid.db").write_bytes(b"not a database at all" * 500)
    store = await reopen(tmp_path)
    assert store.database.quarantined.read_bytes().startswith(b"not a database")
    await store.close()


async def set_revision(store, revision):
    async def act(connection):
        await connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")

    await store.writer.run(act)


async def test_a_newer_schema_is_refused_and_the_file_untouched(tmp_path):
    store = await reopen(tmp_path)
    await set_revision(store, "9999")
    await store.writer.checkpoint()
    await store.close()
    before = (tmp_path / "ibid.db").read_bytes()
    for open_it in (reopen(tmp_path), migrate_store(None, tmp_path)):
        with pytest.raises(ConfigError, match="newer than this ibid"):
            await open_it
    assert (tmp_path / "ibid.db").read_bytes() == before


async def test_an_older_schema_names_the_command(tmp_path, monkeypatch):
    store = await reopen(tmp_path)
    await store.close()
    monkeypatch.setattr("proxy.store.migrate.HEAD", "9999")
    with pytest.raises(ConfigError, match="ibid migrate"):
        await reopen(tmp_path)


async def test_a_database_of_something_else_is_refused(tmp_path):
    other = sqlite3.connect(tmp_path / "ibid.db")
    other.execute("CREATE TABLE customers(id INTEGER)")
    other.close()
    with pytest.raises(ConfigError, match="database of its own"):
        await reopen(tmp_path)


@pytest.mark.parametrize("url", ["mysql://u:s3cret@h/d", "s3cret", "sqlite://", "postgresql://u:s3cret@127.0.0.1:1/d"])
async def test_a_password_in_the_url_is_never_repeated(tmp_path, url, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError) as refused:
        await reopen(tmp_path, url)
    assert "s3cret" not in str(refused.value) + caplog.text


async def test_a_locked_database_fails_puts_with_a_fault_and_recovers_by_itself(sqlite_store, monkeypatch):
    await sqlite_store.entries.put(draft("before"), NOW)
    blocker = sqlite3.connect(sqlite_store.database.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(CacheFault) as fault:
        await sqlite_store.entries.put(draft(), NOW)
    assert fault.value.code == "store_down"
    assert (await sqlite_store.entries.find(digest("before"))).draft == draft("before"), "reads go on"
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_store.writer, "_retry_at", math.inf)
        patch.setattr(sqlite_store.writer, "_attempt", None)  # while it is down nobody waits for an attempt
        with pytest.raises(CacheFault):
            await sqlite_store.entries.put(draft(), NOW)
    blocker.execute("ROLLBACK")
    blocker.close()
    await recovered(sqlite_store)


async def test_a_full_database_says_so_and_recovers_by_itself(sqlite_store):
    async def limit(connection, pages):
        await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await sqlite_store.writer.run(lambda connection: limit(connection, 1))  # SQLite keeps at least what is used
    with pytest.raises(CacheFault) as fault:
        await sqlite_store.entries.put(draft(answer=b"x" * 200_000), NOW)
    assert fault.value.code == "store_full"
    assert sqlite_store.state == "full"
    await recovered(sqlite_store)


async def recovered(store):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await store.entries.put(draft(), NOW)
                break
            except CacheFault:
                await asyncio.sleep(0.1)
    assert store.state == "ok"
    assert (await store.entries.find(digest("a"))).draft == draft()


async def test_a_restarted_postgresql_is_found_again(pg_store, pg_server):
    await pg_store.entries.put(draft("before"), NOW)
    await pg_store.entries.find(digest("before"))
    pg_server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                      "AND backend_type = 'client backend'")  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert (await pg_store.entries.find(digest("before"))).draft == draft("before")
                break
            except CacheFault:
                await asyncio.sleep(0.1)
    await recovered(pg_store)


async def put_until_it_fails(store):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await store.entries.put(draft(), NOW)
            await asyncio.sleep(0.05)


async def test_a_postgresql_gone_read_only_is_a_fault_and_then_well_again(pg_store, pg_server):
    await pg_store.entries.put(draft("before"), NOW)
    pg_server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    pg_server.execute("SELECT pg_reload_conf()")
    try:
        with pytest.raises(CacheFault):
            await put_until_it_fails(pg_store)
    finally:
        pg_server.execute("ALTER SYSTEM RESET default_transaction_read_only")
        pg_server.execute("SELECT pg_reload_conf()")
    await recovered(pg_store)


async def test_closing_finishes_what_was_queued(tmp_path):
    store = await reopen(tmp_path)
    puts = [asyncio.ensure_future(store.entries.put(draft(f"q{n}"), NOW)) for n in range(300)]
    store.ledger.record(hit())
    await asyncio.sleep(0)
    await store.close()
    assert len({stored.entry.id for stored in await asyncio.gather(*puts)}) == 300
    with pytest.raises(CacheFault):
        await store.entries.put(draft(), NOW)
    again = await reopen(tmp_path)
    assert (await again.entries.stats()).entries == 300
    assert len(await again.entries.purge(Selector(everything=True))) == 300
    await again.close()


KILLED = """
import asyncio, json, sys
from pathlib import Path
from proxy.store.store import open_store
from tests.rows import NOW, draft, list_price
async def main():
    store = await open_store(None, Path(sys.argv[1]), price=list_price)
    async def put(n):
        made = await store.entries.put(draft(f"{sys.argv[2]}-{n}"), NOW)
        print(json.dumps([made.entry.id, f"{sys.argv[2]}-{n}"]), flush=True)
    for start in range(0, 100_000, 50):
        await asyncio.gather(*(put(n) for n in range(start, start + 50)))
asyncio.run(main())
"""


def write_until_killed(tmp_path):
    """[id, name] of every put a process acknowledged before each of three SIGKILLs."""
    acknowledged = []
    for turn in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(turn)], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(300 + 77 * turn):
            acknowledged.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        acknowledged.extend(json.loads(line) for line in process.stdout.read().splitlines() if line.endswith("]"))
        process.stdout.close()
        process.wait()
    return acknowledged


async def test_no_acknowledged_entry_is_lost_to_kill_9(tmp_path):
    acknowledged = write_until_killed(tmp_path)
    store = await reopen(tmp_path)
    for entry_id, name in acknowledged:
        found = await store.entries.get(entry_id)
        assert found is not None
        assert found.draft == draft(name)
    checker = sqlite3.connect(store.database.path)
    assert checker.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    checker.close()
    await store.close()
