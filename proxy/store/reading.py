"""The database as a visitor sees it: read-only, no lock taken, so it works while a server runs and while none does."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine

from proxy.core.errors import ConfigError
from proxy.store import migrate
from proxy.store.engine import (
    COMMAND_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    DATABASE_ERRORS,
    Database,
    label_of,
    parse_url,
    unavailable,
)


def open_reading(url: str | None, data_dir: Path) -> Database:
    """A Database whose both engines only read; the caller closes it. Raises ConfigError when there is no such file."""
    parsed = parse_url(url, data_dir)
    if parsed.get_backend_name() == "postgresql":
        settings = {"default_transaction_read_only": "on"}
        arguments = {"timeout": CONNECT_TIMEOUT_S, "command_timeout": COMMAND_TIMEOUT_S, "server_settings": settings}
        engine = create_async_engine(parsed, connect_args=arguments, pool_size=1, max_overflow=0, hide_parameters=True)
        return Database("postgresql", engine, engine, None, data_dir, label_of(parsed))
    path = Path(str(parsed.database)).absolute()
    refuse_unless_there(url, data_dir)
    address = URL.create("sqlite+aiosqlite", database=f"{path.as_uri()}?mode=ro", query={"uri": "true"})
    engine = create_async_engine(address, pool_size=1, max_overflow=0, hide_parameters=True)
    return Database("sqlite", engine, engine, path, data_dir, f"sqlite {path}")


def refuse_unless_there(url: str | None, data_dir: Path) -> None:
    """Raises ConfigError when an SQLite file is named that does not exist: only a start makes one."""
    parsed = parse_url(url, data_dir)
    path = Path(str(parsed.database)).absolute()
    if parsed.get_backend_name() == "sqlite" and not path.is_file():
        raise ConfigError(f"there is no database at {path} yet: start ibid, or name another with --database")


async def revision(database: Database) -> str | None:
    """The schema's revision, None for an empty database. Raises ConfigError."""
    try:
        async with database.reader.connect() as connection:
            return await connection.run_sync(migrate.revision_of)
    except DATABASE_ERRORS as error:
        raise unavailable(database.label, error) from error
