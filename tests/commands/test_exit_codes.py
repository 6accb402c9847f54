"""What ends a start: 75 where waiting may help, 2 where only the operator can; and what supervisors make of it."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.app import open_app
from proxy.commands import main as cli
from proxy.commands.main import ACT, TRY_AGAIN
from proxy.commands.serve import banner
from proxy.settings import config
from proxy.store.engine import open_database
from tests.flows.running import started
from tests.pg import init_postgres, pg_server, pg_url, run_postgres, stop_postgres
from tests.upstream import ScriptedUpstream
from tests.waiting import PATIENCE_S, until

__all__ = ["pg_server", "pg_url"]

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "proxy.service"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IBID_")]:
        monkeypatch.delenv(name)


def run(capsys: Capture, folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code of a command, and the one line that says why."""
    (folder / "ibid.toml").write_text("[cache]\nsemantic = false\n")
    code = cli.main([arguments[0], "--config", str(folder / "ibid.toml"), *arguments[1:]])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ibid: ")]
    assert len(lines) == 1, lines
    assert "canary" not in lines[0]
    return code, lines[0]


def serve(capsys: Capture, folder: Path, *arguments: str) -> tuple[int, str]:
    places = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir", str(folder / "data"))
    return run(capsys, folder, "serve", *places, *arguments)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# --- what may heal by itself ----------------------------------------------------------------------------------------


def test_a_database_that_is_not_up_yet_is_waited_for_and_named_with_its_port(capsys: Capture, tmp_path: Path) -> None:
    port = free_port()
    code, said = serve(capsys, tmp_path, "--database", f"postgresql://ann:canary@127.0.0.1:{port}/ledger")
    assert code == TRY_AGAIN
    assert f"postgresql 127.0.0.1:{port}/ledger" in said


async def test_the_same_command_serves_once_its_database_has_come_up(
    tmp_path: Path,
) -> None:
    """What a supervisor does that starts it again after exit code 75."""
    directory = init_postgres()
    (tmp_path / "ibid.toml").write_text("[cache]\nsemantic = false\n")
    arguments = ["--config", str(tmp_path / "ibid.toml"), "--data-dir", str(tmp_path / "data")]
    arguments += ["--database", f"postgresql://postgres@/postgres?host={directory}"]
    command = [sys.executable, "-m", "proxy", "serve", *arguments]
    places = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    down = await asyncio.to_thread(
        subprocess.run, [*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert down.returncode == TRY_AGAIN, down.stderr
    assert TRY_AGAIN not in [int(code) for code in unit()["Service"]["RestartPreventExitStatus"].split()]
    server = run_postgres(directory)
    try:
        async with ScriptedUpstream() as up, started([*arguments, "--upstream", up.url], tmp_path / "log", {}) as ibid:
            assert (await ibid.ask("hose?")).cache == "MISS"

            async def is_kept() -> bool:
                return (await ibid.ask("hose?")).cache == "HIT"

            await until(is_kept)
    finally:
        stop_postgres(server)


def test_a_host_nobody_knows_is_named_with_its_port(capsys: Capture, tmp_path: Path) -> None:
    code, said = serve(capsys, tmp_path, "--database", "postgresql://ann:canary@nowhere.invalid/ledger")
    assert code == TRY_AGAIN
    assert "postgresql nowhere.invalid:5432/ledger" in said


@pytest.mark.parametrize("listener", ["--listen", "--admin"])
def test_a_port_that_another_process_holds_may_become_free(capsys: Capture, tmp_path: Path, listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = serve(capsys, tmp_path, listener, f"127.0.0.1:{taken.getsockname()[1]}")
    assert code == TRY_AGAIN
    assert "cannot listen on 127.0.0.1:" in said


def test_an_address_the_machine_does_not_have_yet_may_come(capsys: Capture, tmp_path: Path) -> None:
    code, said = serve(capsys, tmp_path, "--listen", "192.0.2.1:4141")
    assert (code, "cannot listen on 192.0.2.1:4141" in said) == (TRY_AGAIN, True), said


def test_a_directory_that_another_ibid_holds_may_become_free(capsys: Capture, tmp_path: Path) -> None:
    held = open_database(None, tmp_path / "data")
    try:
        code, said = serve(capsys, tmp_path)
    finally:
        asyncio.run(held.close())
    assert (code, "another ibid is using" in said) == (TRY_AGAIN, True), said


# --- what only the operator can mend --------------------------------------------------------------------------------


def test_a_database_that_answers_but_does_not_exist_is_the_operators(
    capsys: Capture, tmp_path: Path, pg_url: str
) -> None:
    code, said = serve(capsys, tmp_path, "--database", re.sub(r"/[^/?]+(\?|$)", r"/never_made\1", pg_url, count=1))
    assert code == ACT
    assert "never_made" in said


@pytest.mark.parametrize(
    "wrong",
    [
        ("--database", "sqlite:///{folder}/no/such/folder/x.db"),
        ("--database", "sqlite:///{folder}/nofolder/x.db"),
        ("--data-dir", "{folder}/no/such/data"),
        ("--config", "{folder}/no.toml"),
    ],
    ids=" ".join,
)
def test_a_place_typed_wrong_is_said_and_nothing_is_made(
    capsys: Capture, tmp_path: Path, wrong: tuple[str, str]
) -> None:
    name, place = wrong[0], wrong[1].format(folder=tmp_path)
    before = {tmp_path / "ibid.toml", tmp_path / "data"}
    code, said = serve(capsys, tmp_path, name, place)
    assert code == ACT
    missing = Path(place.removeprefix("sqlite:///"))
    assert str(missing.parent if name != "--config" else missing) in said
    made = {path for path in tmp_path.iterdir()} - before
    assert not made, made
    assert not (tmp_path / "data").exists() or not [file for file in (tmp_path / "data").glob("*.db*")]


@pytest.mark.parametrize(
    "command", [("rebuild-index",), ("keys", "list"), ("keys", "revoke", "key_x"), ("sql", "SELECT 1"), ("stats",)]
)
def test_a_command_that_only_looks_makes_no_database(capsys: Capture, tmp_path: Path, command: tuple[str, ...]) -> None:
    for place in ("here", "no/such"):
        assert run(capsys, tmp_path, *command, "--data-dir", str(tmp_path / place))[0] == ACT
        assert not list(tmp_path.rglob("*.db*"))


async def test_the_banner_says_that_a_database_is_new_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "ibid.toml").write_text("[cache]\nsemantic = false\n")
    flags = config.Flags(str(tmp_path / "ibid.toml"), "127.0.0.1:0", "127.0.0.1:0", data_dir=str(tmp_path / "data"))
    for end in (" (new)\n", "\n"):
        async with open_app(config.load(flags, {})) as app:
            assert f"\ndatabase      sqlite {tmp_path}/data/ibid.db{end}" in banner(app)


def test_the_data_directory_nobody_named_is_made_with_the_folders_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert cli.main(["migrate"]) == 0
    assert (tmp_path / "home" / ".local" / "share" / "ibid" / "ibid.db").exists()


# --- supervisors ----------------------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_starts_again_what_may_heal_for_as_long_as_it_takes() -> None:
    service = unit()["Service"]
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == [str(ACT)]
    assert "SuccessExitStatus" not in service
    assert float(service["RestartSec"]) >= 1
    assert unit()["Unit"]["StartLimitIntervalSec"] == "0", "or five quick failures end it"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/ibid/bin/ibid", sys.executable)  # it must exist where it is verified
    (tmp_path / "proxy.service").write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "proxy.service")], capture_output=True, text=True
    )
    complaints = [line for line in found.stderr.splitlines() if "proxy.service" in line]
    assert (found.returncode, complaints) == (0, []), found.stderr


def test_the_container_is_asked_for_its_health_where_it_listens() -> None:
    """The address of the admin listener may be set; its health must not be looked for elsewhere."""
    command = re.search(r'CMD \["python", "-c", "(.*)"\]', (ROOT / "deploy" / "Dockerfile").read_text())
    assert command is not None
    script = command[1].replace("u.urlopen(", "print(").replace(", timeout=2).read()", ")")
    for env, port in (({}, 4142), ({"IBID_ADMIN": "0.0.0.0:9"}, 9), ({"IBID_ADMIN": "[::]:9"}, 9)):
        told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert told.stdout == f"http://127.0.0.1:{port}/healthz\n"
