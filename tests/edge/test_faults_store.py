"""Fault catalogue, what ibid keeps: a damaged, full, slow, locked or foreign store costs hits, never an answer."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy import parts
from proxy.app import open_app
from proxy.client.handlers import ClientHandler
from proxy.commands import main as cli
from proxy.core.errors import ConfigError
from proxy.store.writer import Writer
from tests.edge.faults_app import EXACT_ONLY, Running, ibid, question, serving, settings_of, until, up
from tests.upstream import ScriptedUpstream
from tests.waiting import PATIENCE_S

__all__ = ["ibid", "up"]  # fixtures

COLD = "[cache]\nsemantic = false\nhot_bytes = 0\n"  # every hit is read from SQL
ONE = question("Which colour has the first answer kept here?")
TWO = question("Which colour has the second answer kept here?")


@pytest.fixture
async def cold(tmp_path: Path, up: ScriptedUpstream) -> AsyncIterator[Running]:
    async with serving(tmp_path, up, COLD) as running:
        yield running


def edit(ibid: Running, script: str) -> None:
    """What an operator with the sqlite3 command does behind our back."""
    assert ibid.app.store.database.path is not None
    connection = sqlite3.connect(ibid.app.store.database.path, timeout=PATIENCE_S)
    connection.executescript(f"BEGIN IMMEDIATE; {script}; COMMIT;")
    connection.close()


# --- rows that change under a running ibid --------------------------------------------------------------------------

EDITS: dict[str, str] = {
    "answer of the other": "UPDATE entry SET answer = (SELECT answer FROM entry WHERE id = 2) WHERE id = 1",
    "answer that is none": "UPDATE entry SET answer = x'00ff' WHERE id = 1",
    "answer as text": "UPDATE entry SET answer = 'hello' WHERE id = 1",
    "answer null": "UPDATE entry SET answer = x'' WHERE id = 1",
    "fingerprints swapped": "CREATE TEMP TABLE f AS SELECT id, fingerprint FROM entry;"
    "UPDATE entry SET fingerprint = id;"
    "UPDATE entry SET fingerprint = (SELECT fingerprint FROM f WHERE f.id = 3 - entry.id)",
    "scope of the other": "UPDATE entry SET scope = zeroblob(32)",
    "tenant": "UPDATE entry SET tenant = 'somebody else'",
    "model": "UPDATE entry SET model = 'gpt-5'",
    "prompt": "UPDATE entry SET prompt = 'another question'",
    "longer life": "UPDATE entry SET expires_ms = expires_ms + 1000000",
    "younger": "UPDATE entry SET created_ms = created_ms + 1",
    "tokens": "UPDATE entry SET in_tok = 1",
    "checksum": "UPDATE entry SET checksum = zeroblob(32)",
    "tags": "UPDATE entry SET tags = 'not json'",
    "id": "UPDATE entry SET id = id + 100",
    "deleted": "DELETE FROM entry",
}


@pytest.mark.parametrize("name", EDITS)
async def test_an_edited_row_is_asked_again_and_never_served_wrong(cold: Running, name: str) -> None:
    for body in (ONE, TWO):
        await cold.ask(body)
        await cold.settled()
    texts = {body: (await cold.ask(body)).text for body in (ONE, TWO)}
    assert cold.asked == 2
    edit(cold, EDITS[name])
    for body in (ONE, TWO):
        before = cold.asked
        reply = await cold.ask(body)
        assert reply.status == 200
        if reply.is_hit:
            assert reply.text == texts[body]
        else:
            assert cold.asked == before + 1
            assert reply.text.endswith(json.loads(body)["messages"][0]["content"])
    if name not in ("id", "tags"):
        assert cold.asked > 2


async def test_a_table_that_is_gone_costs_hits_only(cold: Running) -> None:
    await cold.ask(ONE)
    await cold.settled()
    edit(cold, "ALTER TABLE entry RENAME TO elsewhere")
    for number in range(3):
        reply = await cold.ask(ONE)
        assert (reply.status, reply.headers["x-cache"], reply.headers["x-cache-reason"]) == (
            200,
            "BYPASS",
            "store_down",
        )
        assert cold.asked == number + 2
        await cold.settled()
    assert cold.faults()["store_down"] >= 3
    edit(cold, "ALTER TABLE elsewhere RENAME TO entry")
    await cold.until_hit(ONE)


# --- a store that is full, slow or locked ---------------------------------------------------------------------------


async def limit_pages(ibid: Running, pages: int) -> None:
    async def act(connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await ibid.app.store.writer.run(act)


async def test_a_full_disk_fails_no_client_and_is_forgotten_when_there_is_room(ibid: Running) -> None:
    await ibid.ask(ONE)
    await ibid.settled()
    await limit_pages(ibid, 1)
    filler = "x" * 200_000
    replies = [await ibid.ask(question(f"Question {n} on a full disk, {filler}?")) for n in range(8)]
    await ibid.settled()
    assert {reply.status for reply in replies} == {200}
    assert (await ibid.ask(ONE)).is_hit, "what is there is still served"
    assert ibid.faults().get("store_full", 0) >= 1
    ready = await ibid.admin("/readyz")
    assert (ready.status, json.loads(ready.body)["degraded"]) == (200, {"store": "full"})
    async with asyncio.timeout(PATIENCE_S):  # a new connection has no page limit: the writer finds it by itself
        number = 0
        while ibid.app.store.state != "ok":
            number += 1
            assert (await ibid.ask(question(f"Is there room again, attempt {number}?"))).status == 200
            await asyncio.sleep(0.1)


async def test_a_slow_disk_delays_no_client_and_its_queue_is_bounded(
    tmp_path: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = EXACT_ONLY + "[store]\nqueue = 4\n"
    async with serving(tmp_path, up, toml) as ibid:
        await ibid.ask(ONE)
        await ibid.settled()
        disk = asyncio.Event()
        attempt = Writer._attempt

        async def slow(self: Writer, jobs: Any) -> Any:
            await disk.wait()
            return await attempt(self, jobs)

        monkeypatch.setattr(Writer, "_attempt", slow)
        replies = [await ibid.ask(question(f"Question number {n} while the disk is slow?")) for n in range(20)]
        hit = await ibid.ask(ONE)
        assert not disk.is_set(), "all were answered before it wrote anything"
        assert {reply.status for reply in replies} == {200}
        assert hit.is_hit
        assert ibid.app.store.writer.waiting <= 4
        assert ibid.faults()["store_busy"] >= 10, "answers that were not kept are counted"
        disk.set()
        await ibid.settled()
        ((rows,),) = await ibid.app.store.database.rows("SELECT count(*) FROM request")
        assert rows == 22, "the ledger lost none"


async def test_a_database_locked_by_another_process_fails_no_client(ibid: Running) -> None:
    await ibid.ask(ONE)
    await ibid.settled()
    assert ibid.app.store.database.path is not None
    blocker = sqlite3.connect(ibid.app.store.database.path, isolation_level=None, timeout=PATIENCE_S)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        replies = [await ibid.ask(question(f"Question number {n} while it is locked?")) for n in range(5)]
        assert {reply.status for reply in replies} == {200}
        assert (await ibid.ask(ONE)).is_hit
        await until(lambda: ibid.app.store.state != "ok")
        assert json.loads((await ibid.admin("/readyz")).body)["degraded"] == {"store": "down"}
        for stream in (False, True):
            assert (await ibid.ask(question("And once it is known to be locked?", stream=stream))).status == 200
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    async with asyncio.timeout(PATIENCE_S):
        number = 0
        while ibid.app.store.state != "ok":
            number += 1
            await ibid.ask(question(f"Is it free again, attempt {number}?"))
            await asyncio.sleep(0.1)
    asked = ibid.asked
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await ibid.settled()
            ((rows,),) = await ibid.app.store.database.rows("SELECT count(*) FROM request")
            if rows >= asked:
                break
            await asyncio.sleep(0.1)


# --- starts that must not happen ------------------------------------------------------------------------------------


async def refused_start(folder: Path, up: ScriptedUpstream, words: str) -> None:
    before = {task.get_name() for task in asyncio.all_tasks()}
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=words):
        async with serving(folder, up):
            pass
    assert {task.get_name() for task in asyncio.all_tasks()} == before
    assert len(os.listdir("/proc/self/fd")) <= files


async def test_a_second_ibid_on_one_directory_does_not_start_and_the_first_goes_on(
    ibid: Running, tmp_path: Path, up: ScriptedUpstream
) -> None:
    with pytest.raises(ConfigError, match="another ibid is using"):
        async with serving(tmp_path, up):
            pass
    assert (await ibid.ask()).status == 200


def linked(data: Path) -> None:
    (data / "real.db").touch()
    (data / "ibid.db").symlink_to(data / "real.db")


def folder_in_its_place(data: Path) -> None:
    (data / "ibid.db").mkdir()


def newer(data: Path) -> None:
    with sqlite3.connect(data / "ibid.db", timeout=PATIENCE_S) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")
    connection.close()


def open_secret(data: Path) -> None:
    (data / "installation-secret").write_bytes(bytes(32))
    (data / "installation-secret").chmod(0o644)


def short_secret(data: Path) -> None:
    (data / "installation-secret").write_bytes(bytes(7))
    (data / "installation-secret").chmod(0o600)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (linked, "symbolic link"),
        (folder_in_its_place, "not a file"),
        (newer, "newer|9999"),
        (open_secret, "owner only"),
        (short_secret, "damaged"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_a_place_that_cannot_be_trusted_is_refused_in_one_line_and_left_alone(
    tmp_path: Path, up: ScriptedUpstream, prepare: Callable[[Path], None], words: str
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    prepare(data)
    content = {path: path.read_bytes() for path in data.iterdir() if path.is_file()}
    await refused_start(tmp_path, up, words)
    assert content == {path: path.read_bytes() for path in content}


def test_the_command_says_so_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    newer(data)
    arguments = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir", str(data)]
    assert cli.main(arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("ibid: ")
    assert "newer" in last


async def test_a_port_that_is_taken_is_refused_in_one_line(tmp_path: Path, ibid: Running, up: ScriptedUpstream) -> None:
    other = tmp_path / "other"
    other.mkdir()
    settings = settings_of(other, up.url)
    server = type(settings.server)(listen=settings.server.listen._replace(port=ibid.port), admin=settings.server.admin)
    with pytest.raises(ConfigError, match="cannot listen"):
        async with open_app(replace(settings, server=server)):
            pass


# --- time -----------------------------------------------------------------------------------------------------------


class Clock:
    """Wall-clock seconds that a test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def timed(
    tmp_path: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Running, Clock]]:
    clock = Clock()
    monkeypatch.setattr(parts, "ClientHandler", partial(ClientHandler, clock=clock))
    monkeypatch.setattr(parts, "Pipeline", partial(parts.Pipeline, clock=clock))
    async with serving(tmp_path, up, EXACT_ONLY + "ttl_s = 100\nmax_ttl_s = 1000\n") as running:
        yield running, clock


async def test_an_answer_is_served_until_its_last_moment_and_not_at_its_end(timed: tuple[Running, Clock]) -> None:
    ibid, clock = timed
    born = clock.now = float(int(clock.now))
    await ibid.ask()
    await ibid.settled()
    clock.now = born + 99.9
    reply = await ibid.ask()
    assert reply.is_hit
    assert (reply.headers["age"], "ttl=0" in reply.headers["cache-status"]) == ("99", True)
    clock.now = born + 100
    assert not (await ibid.ask()).is_hit, "memory and SQL agree"
    await ibid.settled()
    clock.now = born + 199.9
    assert (await ibid.ask()).is_hit, "a new answer, a new life"
    assert ibid.asked == 2


@pytest.mark.parametrize(("wish", "life"), [("5", 5), ("99999999", 1000), ("1000", 1000), ("0", 0)])
async def test_a_wished_life_is_bounded_by_the_operators(timed: tuple[Running, Clock], wish: str, life: int) -> None:
    ibid, clock = timed
    born = clock.now
    await ibid.ask(None, f"x-cache-ttl: {wish}")
    await ibid.settled()
    if life:
        clock.now = born + life - 1
        assert (await ibid.ask(None, f"x-cache-ttl: {wish}")).is_hit
    clock.now = born + life
    assert not (await ibid.ask(None, f"x-cache-ttl: {wish}")).is_hit


@pytest.mark.parametrize("wish", ["-1", "NaN", "1e400", "soon", "9" * 400])
async def test_a_life_that_is_no_number_is_refused_or_bounded(timed: tuple[Running, Clock], wish: str) -> None:
    ibid, _ = timed
    reply = await ibid.ask(None, f"x-cache-ttl: {wish}")
    if reply.status == 400:
        assert reply.code == "invalid_value"
        assert ibid.asked == 0
    else:
        assert reply.status == 200


async def test_a_clock_that_steps_back_or_far_ahead_serves_nothing_stale(timed: tuple[Running, Clock]) -> None:
    ibid, clock = timed
    born = clock.now
    await ibid.ask()
    await ibid.settled()
    for step in (-3 * 86_400, 10 * 365 * 86_400):
        clock.now = born + step
        reply = await ibid.ask(None, "Cache-Control: only-if-cached")
        assert (reply.status, reply.code) == (504, "not_cached")
    clock.now = born + 1
    assert (await ibid.ask()).is_hit
