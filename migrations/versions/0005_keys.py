"""Virtual keys, and whose key a request was made with.

Revision 0005.
"""

from __future__ import annotations

from importlib import import_module

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BY_TENANT = (
    "SELECT tenant, team, CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END), 0) AS BIGINT) AS "
    "requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 "
    "END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE "
    "PRECISION) / 1e9 AS baseline_usd, CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE "
    "PRECISION) / 1e9 AS actual_usd, CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) "
    "AS DOUBLE PRECISION) / 1e9 AS saved_usd FROM request GROUP BY tenant, team"
)


def upgrade() -> None:
    op.execute("DROP VIEW savings_by_tenant")
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("changed_ms", sa.BigInteger(), nullable=False),
        sa.Column("rotated_ms", sa.BigInteger(), nullable=True),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=True),
        sa.Column("expires_ms", sa.BigInteger(), nullable=True),
        sa.Column("limits", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index(op.f("ix_api_key_digest"), "api_key", ["digest"], unique=True)
    op.add_column("request", sa.Column("key_id", sa.Text(), nullable=True))
    op.add_column("request", sa.Column("team", sa.Text(), server_default="", nullable=False))
    op.create_index(
        op.f("ix_request_key_id_ts"),
        "request",
        ["key_id", "ts"],
        unique=False,
        sqlite_where=sa.text("key_id IS NOT NULL"),
        postgresql_where=sa.text("key_id IS NOT NULL"),
    )
    op.execute(f"CREATE VIEW savings_by_tenant AS {BY_TENANT}")


def downgrade() -> None:
    before = import_module("proxy._migrations.versions.0002_comparisons").VIEWS["savings_by_tenant"]
    op.execute("DROP VIEW savings_by_tenant")
    op.drop_index(op.f("ix_request_key_id_ts"), table_name="request")
    op.drop_column("request", "team")
    op.drop_column("request", "key_id")
    op.drop_table("api_key")
    op.execute(f"CREATE VIEW savings_by_tenant AS {before}")
