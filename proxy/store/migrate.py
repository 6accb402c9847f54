"""The schema's revision: read it, bring it forward. Alembic is loaded only when something has to change."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

from sqlalchemy import Connection, inspect, text

from proxy.core.errors import ConfigError
from proxy.store.schema import HEAD


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did. `before` is None for an empty database; `backup` names the copy made of an older one."""

    before: str | None
    after: str
    backup: str | None


def revision_of(connection: Connection) -> str | None:
    """The database's revision; None when it is empty. Raises ConfigError when the tables are not ibid's."""
    names = set(inspect(connection).get_table_names())
    if "alembic_version" in names:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found is not None:
            return str(found)
    if names - {"alembic_version"}:
        raise ConfigError("the database has tables but no ibid schema revision; point ibid at a database of its own")
    return None


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations in the caller's transaction."""
    _run(connection, "upgrade", revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Undo migrations in the caller's transaction; `base` leaves an empty database."""
    _run(connection, "downgrade", revision)


def known_revisions() -> list[str]:
    """Every revision this program can migrate from, newest first."""
    from alembic.script import ScriptDirectory

    with as_file(files("proxy._migrations")) as folder:
        return [script.revision for script in ScriptDirectory(str(folder)).walk_revisions()]


def refuse_unless_current(found: str | None) -> None:
    """Raise ConfigError naming what to do when a database's revision is not this program's. Empty is fine."""
    if found is None or found == HEAD:
        return
    if found in known_revisions():
        raise ConfigError(
            f"the database schema is at revision {found}, this ibid needs {HEAD}: run `ibid migrate`",
            code="schema_old",
        )
    raise ConfigError(
        f"the database schema is at revision {found}, newer than this ibid ({HEAD}): install the newer ibid; "
        "the database was not touched",
        code="schema_newer",
    )


def _run(connection: Connection, direction: str, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    with as_file(files("proxy._migrations")) as folder:
        config = Config()
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        config.attributes["connection"] = connection
        act: Any = command.upgrade if direction == "upgrade" else command.downgrade
        act(config, revision)
