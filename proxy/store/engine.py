"""The databases behind the store: open, guard, read, and say what a driver's error means.

SQLite: one writer connection for the life of the process and a few read-only ones. Checkpoints run on the writer
alone: SQLite before 3.51.3 can corrupt a WAL database when two connections write or checkpoint at once, and one writer
cannot meet itself. `flock` on the data directory keeps a second process out.

PostgreSQL: pools of bounded size, every wait with a deadline. A failed read closes the door for a second, so a dead
database costs each request nothing rather than a timeout.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import ssl
import stat
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import Executable, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from proxy.core.errors import CacheFault, ConfigError, NotYet

log = logging.getLogger(__name__)

DATABASE_ERRORS = (SQLAlchemyError, sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
"""Everything the two drivers raise when a database cannot answer."""

SAFE_SQLITE = (3, 51, 3)
BUSY_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0
BREAK_S = 1.0  # how long a failed read keeps further ones away
SQLITE_READERS = 4
POSTGRES_READERS = 8

_WRITER_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA secure_delete=ON",
    "PRAGMA cache_size=-16384",
    "PRAGMA wal_autocheckpoint=4000",  # 16 MiB: an index page is copied back once for what 4 MiB copied four times
)
_READER_PRAGMAS = ("PRAGMA query_only=ON", "PRAGMA foreign_keys=ON", "PRAGMA cache_size=-4096")


def fault_of(error: BaseException) -> CacheFault:
    """The typed fault of a driver's error: store_full, store_refused (this row, not the database) or store_down.

    The message never quotes SQL parameters: they are prompts and answers.
    """
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or ""
    detail = f"{type(original).__name__} {name}".strip()
    if str(name).startswith("SQLITE_FULL") or name == "53100" or getattr(original, "errno", None) == 28:
        return CacheFault(f"database full: {detail}", code="store_full")
    if is_row_error(error):
        return CacheFault(f"row refused by the database: {detail}", code="store_refused")
    return CacheFault(f"database unavailable: {detail}", code="store_down")


def is_row_error(error: BaseException) -> bool:
    """True when the statement's own values are to blame, so that other rows may well be written."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = str(getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or "")
    if isinstance(original, ValueError | OverflowError | UnicodeError):
        return True
    return name.startswith(("SQLITE_CONSTRAINT", "SQLITE_TOOBIG", "SQLITE_MISMATCH", "22", "23"))


def unavailable(label: str, error: BaseException) -> ConfigError:
    """What a start makes of a driver's error: NotYet where the database may answer later by itself."""
    kind = NotYet if _may_heal(error) else ConfigError
    return kind(f"{label}: {fault_of(error).message}", code="database_unavailable")


def _may_heal(error: BaseException) -> bool:
    """No connection, no room or no answer, or somebody's lock. A wrong name or password will not become right."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = str(getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or "")
    if name:  # classes of SQLSTATE: connection, resources, operator intervention ("the database system is starting up")
        return name.startswith(("08", "53", "57", "SQLITE_BUSY", "SQLITE_LOCKED"))
    return isinstance(original, OSError | TimeoutError) and not isinstance(original, ssl.SSLError | PermissionError)


@dataclass
class Database:
    """Two engines and the locks that guard them. `path` is the SQLite file, None for PostgreSQL."""

    dialect: str  # "sqlite" | "postgresql"
    writer: AsyncEngine
    reader: AsyncEngine
    path: Path | None
    data_dir: Path
    label: str  # for logs: no user, no password
    quarantined: Path | None = None  # where a corrupt database was moved at start
    _locks: list[int] = field(default_factory=list)
    _closed_until: float = 0.0
    is_failing: bool = False  # the last read could not be answered
    is_new: bool = False  # it held nothing when it was opened
    _inode: int = 0

    def __post_init__(self) -> None:
        self._inode = self.path.stat().st_ino if self.path is not None else 0

    @property
    def is_gone(self) -> bool:
        """The SQLite file was removed, or another one put in its place: what is written now nobody finds again."""
        try:
            return self.path is not None and self.path.stat().st_ino != self._inode
        except OSError:
            return True

    async def rows(self, statement: str | Executable, parameters: tuple[Any, ...] = ()) -> Sequence[Any]:
        """All rows of a read; text is in the driver's own spelling. Raises CacheFault; at once while it is down."""
        if time.monotonic() < self._closed_until:
            raise CacheFault("database unavailable a moment ago", code="store_down")
        try:
            found = await self._read(statement, parameters)
            self.is_failing = False
            return found
        except DATABASE_ERRORS as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated and self.dialect == "postgresql":
                try:  # a restarted server: every pooled connection was dead, a new one may not be
                    return await self._read(statement, parameters)
                except DATABASE_ERRORS as again:
                    error = again
            fault = fault_of(error)
            if fault.code != "store_refused":
                self.is_failing = True
                self._closed_until = time.monotonic() + BREAK_S
            raise fault from error

    async def _read(self, statement: str | Executable, parameters: tuple[Any, ...]) -> Sequence[Any]:
        async with self.reader.connect() as connection:
            if not isinstance(statement, str):
                return (await connection.execute(statement)).all()
            return (await connection.exec_driver_sql(statement, parameters)).all()

    async def close(self) -> None:
        """Dispose of both engines, then let the directory go."""
        await self.reader.dispose()
        await self.writer.dispose()
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks.clear()


@asynccontextmanager
async def transaction(connection: AsyncConnection) -> AsyncIterator[AsyncConnection]:
    """One transaction, taking SQLite's write lock at its start, so that it cannot fail half way for want of it."""
    async with connection.begin():
        if connection.dialect.name == "sqlite":
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def parse_url(url: str | None, data_dir: Path) -> URL:
    """The async URL of what the operator wrote; SQLite in the data directory by default. Raises ConfigError."""
    try:
        parsed = make_url(url or f"sqlite:///{data_dir / 'ibid.db'}")
    except ArgumentError:
        raise ConfigError("database: not a URL (its text is not repeated here, it may hold a password)") from None
    backend = "postgresql" if parsed.drivername == "postgres" else parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+asyncpg")
    if backend != "sqlite":
        raise ConfigError(f"database: {backend} is not supported; use sqlite:///FILE or postgresql://…")
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("database: SQLite needs a file, as in sqlite:////var/lib/ibid/ibid.db")
    return parsed.set(drivername="sqlite+aiosqlite")


def open_database(url: str | None, data_dir: Path) -> Database:
    """Lock the directory, check the file, build the engines; connects to nothing yet. Raises ConfigError."""
    parsed = parse_url(url, data_dir)
    locks = [_prepare_data_dir(data_dir)]
    try:
        if parsed.get_backend_name() == "postgresql":
            return _postgres(parsed, data_dir, locks)
        path = Path(str(parsed.database)).absolute()
        if path.parent.resolve() != data_dir.resolve():
            locks.append(_lock_directory(path.parent))
        return _sqlite(path, data_dir, locks)
    except BaseException:
        for descriptor in locks:
            os.close(descriptor)
        raise


def _prepare_data_dir(directory: Path) -> int:
    """Make the data directory in a folder that is there, tighten it, and lock it; the lock's descriptor."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        about = directory.stat()
        if about.st_uid != os.geteuid():
            raise ConfigError(f"data directory {directory} belongs to user id {about.st_uid}, not to this process")
        if stat.S_IMODE(about.st_mode) != 0o700:
            directory.chmod(0o700)
    except OSError as error:
        if not directory.parent.is_dir():  # a slip of the pen makes no tree of folders
            message = (
                f"data directory {directory}: the folder {directory.parent} does not exist; make it, if it is right"
            )
            raise ConfigError(message) from error
        raise ConfigError(f"data directory {directory} cannot be written: {error.strerror}") from error
    return _lock_directory(directory)


def _lock_directory(directory: Path) -> int:
    """The lock's descriptor. Only one process may hold it."""
    if not directory.is_dir():
        raise ConfigError(f"database: the folder {directory} does not exist; make it, if it is right")
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"data directory {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise NotYet(f"another ibid is using {directory}", code="data_dir_locked") from error
    return descriptor


def is_locked(directory: Path) -> bool:
    """Whether a process that runs has this data directory. Makes nothing."""
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sqlite(path: Path, data_dir: Path, locks: list[int]) -> Database:
    if path.is_symlink():
        raise ConfigError(f"database {path} is a symbolic link; name the file itself")
    if path.exists() and not path.is_file():
        raise ConfigError(f"database {path} is not a file")
    moved = quarantine_if_corrupt(path) if path.exists() else None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)  # SQLite gives -wal and -shm the mode of the database
    except OSError as error:
        raise ConfigError(f"database {path} cannot be written: {error.strerror}") from error
    if sqlite3.sqlite_version_info < SAFE_SQLITE:
        log.warning(
            "SQLite %s can corrupt a WAL database under two writers (fixed in 3.51.3); safe here: one process, one "
            "writer connection, checkpoints only on it. Do not write to the file with other programs while ibid runs.",
            sqlite3.sqlite_version,
        )
    writer = _sqlite_engine(path, 1, _WRITER_PRAGMAS)
    reader = _sqlite_engine(path, SQLITE_READERS, _READER_PRAGMAS)
    return Database("sqlite", writer, reader, path, data_dir, f"sqlite {path}", moved, locks)


def _sqlite_engine(path: Path, size: int, pragmas: tuple[str, ...]) -> AsyncEngine:
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"isolation_level": None, "timeout": BUSY_TIMEOUT_S},
        pool_size=size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        hide_parameters=True,
    )

    def configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    event.listen(engine.sync_engine, "connect", configure)
    return engine


def _postgres(parsed: URL, data_dir: Path, locks: list[int]) -> Database:
    def build(size: int) -> AsyncEngine:
        return create_async_engine(
            parsed,
            connect_args={"timeout": CONNECT_TIMEOUT_S, "command_timeout": COMMAND_TIMEOUT_S},
            pool_size=size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
            hide_parameters=True,
        )

    return Database("postgresql", build(1), build(POSTGRES_READERS), None, data_dir, label_of(parsed), None, locks)


def label_of(parsed: URL) -> str:
    """A PostgreSQL database for people and logs: where it is looked for, without user and password."""
    where = f"{parsed.host}:{parsed.port or 5432}" if parsed.host else "local socket"
    return f"postgresql {where}/{parsed.database or ''}"


def quarantine_if_corrupt(path: Path) -> Path | None:
    """Move a damaged database and its companions to `*.corrupt-<time>`; where to, or None when it is sound.

    Reads only. A database locked or unreadable for another reason is not called corrupt.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        try:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "").split("_")[:2] not in (["SQLITE", "CORRUPT"], ["SQLITE", "NOTADB"]):
            raise ConfigError(f"database {path} cannot be opened: {error}") from error
        verdict = str(error)
    if verdict == "ok":
        return None
    moved = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
    for suffix in ("", "-wal", "-shm"):
        if (companion := path.with_name(path.name + suffix)).exists():
            companion.rename(moved.with_name(moved.name + suffix))
    log.error("database %s is corrupt (%s); kept as %s, starting with an empty one", path, verdict[:200], moved.name)
    return moved
