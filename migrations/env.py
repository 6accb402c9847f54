"""How Alembic reaches the database: over the connection it is handed, in that connection's transaction."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, create_engine

from proxy.store.schema import metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
    context.run_migrations()


handed = context.config.attributes.get("connection")
if handed is not None:
    run(handed)
else:  # `alembic revision --autogenerate` in a checkout, against a scratch database
    with create_engine(os.environ.get("ALEMBIC_URL", "sqlite://")).connect() as own, own.begin():
        run(own)
