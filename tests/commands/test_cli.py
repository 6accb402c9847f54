"""The command line as a user meets it: exit codes, one line of advice, tables and JSON."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from index.tokens import WIDTH
from index.vectors import VectorOwner
from proxy.admin.auth import Gate, load_token
from proxy.admin.roles import Who
from proxy.admin.server import EntryFilter, Selector, build
from proxy.commands import checks, printing, rebuild
from proxy.commands import main as cli
from proxy.core.errors import ConfigError
from proxy.doorstep import Doorstep
from proxy.store.store import migrate_store, open_store
from proxy.watch.telemetry import Telemetry
from tests.rows import NOW, draft, list_price
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IBID_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IBID_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def database(data_dir: Path) -> Path:
    asyncio.run(migrate_store(None, data_dir))
    return data_dir / "ibid.db"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("arguments", [
    (), ("frob",), ("serve", "--port", "1"), ("sql",), ("sql", "SELECT 1", "--format", "xml"),
    ("savings", "--limit", "x"), ("serve", "--listen", "nonsense"), ("serve", "--workers", "0"),
    ("serve", "--config", "/nowhere/x.toml"),
    ("purge", "--everything"), ("purge", "--everything", "--yes", "--model", "m"), ("stats",),
    ("explain", "/nowhere.json"), ("savings", "--since", "yesterday"), ("sql", "SELECT 1"), ("serve", "--database", "mysql://u:canary-pw@h/x"),
], ids=" ".join)  # fmt: skip
def test_what_the_operator_must_change_exits_2_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("ibid: ")
    assert err.count("\n") == 1
    assert "canary" not in err


def test_a_bug_exits_1(data_dir: Path) -> None:
    script = (
        "from proxy.commands import main as cli; cli._stats = lambda *_: 1 / 0;"
        " import sys; sys.exit(cli.main(['stats']))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 1


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "proxy", "--help"], capture_output=True, check=False, text=True)
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: ibid ")


def test_migrate_makes_the_schema_once(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    code, out, _ = run(capsys, "migrate")
    assert code == 0
    assert out.startswith("schema empty")
    code, out, _ = run(capsys, "migrate")
    assert code == 0
    assert out.startswith("the schema is current")


def test_sql_reads_while_another_process_holds_the_directory(
    capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    script = (
        "import sys, pathlib\nfrom proxy.store.engine import open_database\n"
        "open_database(None, pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(database.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        code, out, _ = run(capsys, "sql", "SELECT COUNT(*) AS n, 'a' AS b FROM request", "--json")
        busy = run(capsys, "migrate")
        holder.stdin.close()
    assert (code, json.loads(out)) == (0, [{"n": 0, "b": "a"}])
    assert busy[0] == 75
    assert "another ibid" in busy[2]


@pytest.mark.parametrize("statement", [
    "DELETE FROM entry", "INSERT INTO saving VALUES (1)", "PRAGMA journal_mode=DELETE", "ATTACH 'x' AS y", "VACUUM",
    "SELECT 1; DROP TABLE entry", "SELECT load_extension('x')", "nonsense", "SELECT * FROM absent",
])  # fmt: skip
def test_sql_only_reads(capsys: pytest.CaptureFixture[str], database: Path, statement: str) -> None:
    before = database.read_bytes()
    code, out, err = run(capsys, "sql", statement)
    assert (code, out) == (2, "")
    assert err.startswith("ibid: ")
    assert database.read_bytes() == before


def test_savings_come_as_table_csv_and_json_and_by_name(capsys: pytest.CaptureFixture[str], database: Path) -> None:
    assert run(capsys, "savings")[1].startswith("day ")
    code, out, _ = run(capsys, "savings", "--group-by", "day,model", "--format", "csv")
    assert code == 0
    assert next(csv.reader(io.StringIO(out)))[:2] == ["day", "model"]
    code, out, _ = run(capsys, "savings", "total", "--json")
    assert json.loads(out)[0]["requests"] == 0
    code, out, _ = run(capsys, "savings", "list", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert "total" in names
    for name in names:
        assert run(capsys, "savings", name)[0] == 0
    assert run(capsys, "savings", "LIST", "--json")[1] == out
    assert run(capsys, "savings", "list")[1].startswith("total: What did we save")
    assert "  saved_share       share of the baseline\n" in run(capsys, "savings", "list")[1]
    views = json.loads(run(capsys, "savings", "views", "--json")[1])
    for view in views:
        code, out, _ = run(capsys, "sql", f"SELECT * FROM {view['name']}", "--format", "csv")
        assert (code, out.strip().split(",")) == (0, list(view["columns"]))
    code, out, _ = run(capsys, "savings", "views", "--format", "csv")
    assert next(csv.reader(io.StringIO(out))) == ["name", "title", "column", "unit"]
    assert len(out.splitlines()) == 1 + sum(len(view["columns"]) for view in views)
    code, _, err = run(capsys, "savings", "--group-by", "day;DROP TABLE entry")
    assert code == 2
    assert "group_by" in err


def test_what_a_terminal_would_obey_is_escaped_in_tables(capsys: pytest.CaptureFixture[str], database: Path) -> None:
    code, out, _ = run(capsys, "sql", "SELECT char(27) || '[2J' || char(10) || char(8232) AS evil")
    assert code == 0
    assert out.isascii()
    assert "\x1b" not in out
    assert out.count("\n") == 3
    assert printing.as_csv(("a",), [("=1+1",)]).splitlines()[1] == "'=1+1"


class Running:
    """An ibid's admin listener in a thread, with operations that answer plainly."""

    def __init__(self, token: str) -> None:
        self.asked: list[Any] = []
        self.port = 0
        self._token = token
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    async def stats(self) -> Mapping[str, Any]:
        return {"entries": {"entries": 3}, "requests": {"hit": 2}}

    async def entries(self, wanted: EntryFilter) -> Sequence[Mapping[str, Any]]:
        self.asked.append(wanted)
        return [
            {"id": 9, "model": "m", "prompt": "hi\x1b[31m", "tags": ["a", "b"], "created_ms": 0, "quarantined": False}
        ]

    async def purge(self, selector: Selector, *, dry_run: bool) -> Sequence[int]:
        self.asked.append((selector, dry_run))
        return [7, 8]

    async def explain(
        self, path: str, body: bytes, headers: Mapping[str, str], tenant: str | None
    ) -> Mapping[str, Any]:
        self.asked.append((body, tenant))
        return {"verdict": "miss", "candidates": [{"id": 1, "similarity": 0.5}]}

    async def request(self, request_id: str) -> Mapping[str, Any] | None:
        self.asked.append(request_id)
        return {"id": request_id, "lane": "forward", "story": ["Not answered from the cache."], "bill": ["$1 saved."]}

    async def begin_act(self, who: Who, route: str, parameters: Mapping[str, Any]) -> int:
        return 1

    async def end_act(self, act_id: int, outcome: str, touched: int | None) -> None:
        return None

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _serve(self) -> None:
        self._runner = web.AppRunner(build(self, Telemetry(), Gate(self._token)))  # type: ignore[arg-type]
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self._started.set()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture
def running(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    token, _ = load_token(None, data_dir)
    with Running(token) as running:
        monkeypatch.setenv("IBID_ADMIN", f"127.0.0.1:{running.port}")
        yield running


def test_stats_entries_and_explain_ask_the_running_ibid(
    capsys: pytest.CaptureFixture[str], running: Running, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "stats")
    assert code == 0
    assert "requests.hit" in out
    assert json.loads(run(capsys, "stats", "--json")[1])["requests"] == {"hit": 2}
    code, out, _ = run(capsys, "entries", "--tag", "a", "--q", "100% & more", "--limit", "1")
    assert running.asked == [EntryFilter(None, None, "a", "100% & more", 1, None)]
    assert "hi\\x1b[31m" in out
    assert "more: --cursor 9" in out
    body = tmp_path / "request.json"
    body.write_text('{"messages": []}')
    code, out, _ = run(capsys, "explain", str(body), "--tenant", "a" * 64)
    assert code == 0
    assert "candidates[0].similarity" in out
    assert running.asked[-1] == (b'{"messages": []}', "a" * 64)


def test_explain_tells_the_story_of_a_request_that_was_answered(
    capsys: pytest.CaptureFixture[str], running: Running
) -> None:
    code, out, _ = run(capsys, "explain", "5c" * 16)
    assert (code, running.asked) == (0, ["5c" * 16])
    assert out.startswith("Not answered from the cache.\n$1 saved.\n\n")
    assert "lane" in out
    assert json.loads(run(capsys, "explain", "5c" * 16, "--json")[1])["bill"] == ["$1 saved."]


def test_purge_only_says_which_until_told_yes(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    code, out, _ = run(capsys, "purge", "--tag", "a", "--tag", "b")
    assert code == 0
    assert "would be purged (7, 8)" in out
    assert "2 entries purged" in run(capsys, "purge", "--id", "7", "--id", "8", "--yes")[1]
    assert run(capsys, "purge", "--everything", "--yes")[0] == 0
    assert running.asked == [
        (Selector(tags=("a", "b")), True),
        (Selector(ids=(7, 8)), False),
        (Selector(everything=True), False),
    ]


def test_a_refusal_of_the_running_ibid_is_one_line(
    capsys: pytest.CaptureFixture[str], running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, "entries", "--limit", "0")
    assert code == 2
    assert "limit" in err
    monkeypatch.setenv("IBID_ADMIN_TOKEN", "w" * 40)
    code, _, err = run(capsys, "stats")
    assert code == 2
    assert "invalid_admin_token" in err
    assert "w" * 40 not in err


def findings(*arguments: str) -> dict[str, checks.Finding]:
    settings = cli.config.load(cli.config.Flags(**dict(zip(arguments[::2], arguments[1::2], strict=True))), os.environ)
    return {finding.part: finding for finding in checks.inspect(settings)}


@pytest.fixture
def free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBID_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("IBID_ADMIN", "127.0.0.1:0")


@pytest.mark.usefixtures("free_ports")
def test_check_is_content_with_a_fresh_place_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "check", "--json")
    assert code == 0
    states = {row["part"]: row["state"] for row in json.loads(out)}
    assert "fail" not in states.values()
    assert {"configuration", "packages", "clock", "data directory", "database", "model", "index", "admin token",
            "client port", "admin port"} <= set(states)  # fmt: skip
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("free_ports")
def test_check_names_what_is_wrong_and_exits_2(
    capsys: pytest.CaptureFixture[str], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (database.parent / "admin-token").write_text("x" * 40)
    (database.parent / "admin-token").chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("IBID_LISTEN", f"127.0.0.1:{taken.getsockname()[1]}")
        found = findings()
        code, _, err = run(capsys, "check")
    assert found["database"].state == "ok"
    assert found["admin token"].state == "fail"
    assert found["client port"].state == "fail"
    assert found["admin port"].state == "ok"
    assert code == 2
    assert err.startswith("ibid: admin token: ")
    assert stat.S_IMODE((database.parent / "admin-token").stat().st_mode) == 0o644


@pytest.mark.usefixtures("free_ports")
def test_check_reports_a_database_of_another_program_and_a_second_owner(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_dir / "ibid.db").write_bytes(b"not a database" * 100)
    monkeypatch.setattr(
        checks.importlib.metadata,
        "packages_distributions",
        lambda: {"proxy": ["ibid-proxy", "proxy.py"], "index": ["index"]},
    )
    monkeypatch.setattr(checks.time, "time", lambda: 0.0)
    found = findings()
    assert found["database"].state == "fail"
    assert "proxy.py" in found["packages"].note
    assert found["packages"].state == "fail"
    assert found["clock"].state == "fail"


def test_a_bar_shows_at_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (io.StringIO(), Terminal()):
        bar = printing.Bar("indexing", 10, stream)
        bar.advance(5)
        bar.close()
        assert ("5/10" in stream.getvalue()) is stream.isatty()


def test_serve_hands_checked_settings_to_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = pytest.importorskip("proxy.commands.serve")
    seen: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # they are those of this process

    def serve(settings: Any, door: Doorstep) -> None:
        seen.append(settings)
        sockets = door.take()
        assert sockets.clients[0].getsockname()[1] > 0
        sockets.close()

    monkeypatch.setattr(program, "serve", serve)
    free = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    assert run(capsys, "serve", *free, "--upstream", "http://127.0.0.1:9")[0] == 0
    assert seen[0].server.listen == ("127.0.0.1", 0)

    def refuse(settings: object, door: Doorstep) -> None:
        door.take().close()
        raise ConfigError("no room\x1b[2J")

    monkeypatch.setattr(program, "serve", refuse)
    code, _, err = run(capsys, "serve", *free)
    assert (code, err) == (2, "ibid: no room\\x1b[2J\n")


def test_rebuild_index_saves_every_vector_of_sql_and_of_the_model_in_use(
    capsys: pytest.CaptureFixture[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Embedder:
        identity = "e1"
        dimension = 8

        async def close(self) -> None: ...

    async def open_embedder(data_dir: Path, **_: Any) -> Embedder:
        return Embedder()

    async def fill() -> None:
        store = await open_store(None, data_dir, price=list_price)
        signature = np.zeros(WIDTH, "<u8").tobytes()
        for name in "abc":
            await store.entries.put(draft(name, signature=signature), NOW)
        await store.entries.put(draft("other", signature=signature, embedder="e2"), NOW)
        await store.close()

    asyncio.run(fill())
    monkeypatch.setattr(rebuild, "open_embedder", open_embedder)
    code, out, err = run(capsys, "rebuild-index")
    assert (code, err) == (0, "")
    assert out.startswith("3 vectors indexed")
    index = VectorOwner.load(data_dir / "index.snapshot", "e1", 8)
    assert index.size == 3
