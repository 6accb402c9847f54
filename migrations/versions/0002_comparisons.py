"""What the judge learns from: comparisons of answers, refused pairs, groups of entries; audits in the views.

Revision 0002.
"""

from __future__ import annotations

from importlib import import_module

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

VIEWS = {
    "savings_daily": (
        "SELECT day, CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END), 0) AS BIGINT) AS "
        "requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 "
        "END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE "
        "PRECISION) / 1e9 AS baseline_usd, CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE "
        "PRECISION) / 1e9 AS actual_usd, CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) "
        "AS DOUBLE PRECISION) / 1e9 AS saved_usd FROM request GROUP BY day"
    ),
    "savings_by_model": (
        "SELECT upstream, model_requested AS model, CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 "
        "END), 0) AS BIGINT) AS requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = "
        "'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd), "
        "0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS baseline_usd, CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS"
        " BIGINT) AS DOUBLE PRECISION) / 1e9 AS actual_usd, CAST(CAST(COALESCE(SUM(baseline_nusd - "
        "actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS saved_usd FROM request GROUP BY upstream, "
        "model_requested"
    ),
    "savings_by_tenant": (
        "SELECT tenant, CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END), 0) AS BIGINT) AS "
        "requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 "
        "END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE "
        "PRECISION) / 1e9 AS baseline_usd, CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE "
        "PRECISION) / 1e9 AS actual_usd, CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) "
        "AS DOUBLE PRECISION) / 1e9 AS saved_usd FROM request GROUP BY tenant"
    ),
    "hit_rate_daily": (
        "SELECT day, CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END), 0) AS BIGINT) AS "
        "requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 "
        "END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = "
        "'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS DOUBLE PRECISION) / "
        "NULLIF(CAST(COALESCE(SUM(CASE WHEN lane = 'audit' THEN 0 ELSE 1 END), 0) AS BIGINT), 0) AS hit_rate,"
        " CAST(CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN baseline_nusd"
        " ELSE 0 END), 0) AS BIGINT) AS DOUBLE PRECISION) / NULLIF(SUM(baseline_nusd), 0) AS money_hit_rate "
        "FROM request GROUP BY day"
    ),
    "wrong_hits": (
        "SELECT r.day AS day, r.model_requested AS model, r.lane AS lane, CAST(COUNT(*) AS BIGINT) AS hits, "
        "CAST(COUNT(COALESCE(f.wrong, a.wrong)) AS BIGINT) AS judged, CAST(COALESCE(SUM(COALESCE(f.wrong, "
        "a.wrong)), 0) AS DOUBLE PRECISION) AS wrong, CAST(COALESCE(SUM(COALESCE(f.wrong, a.wrong)), 0) AS "
        "DOUBLE PRECISION) / NULLIF(COUNT(COALESCE(f.wrong, a.wrong)), 0) AS wrong_rate FROM request r LEFT "
        "JOIN (SELECT request_id, MAX(CASE WHEN verdict = 'wrong' THEN 1.0 ELSE 0.0 END) AS wrong FROM "
        "feedback WHERE request_id IS NOT NULL GROUP BY request_id) f ON f.request_id = r.id LEFT JOIN "
        "(SELECT request_id, MAX(1.0 - p_same) AS wrong FROM audit WHERE served = 1 GROUP BY request_id) a ON"
        " a.request_id = r.id WHERE r.lane LIKE 'cache.%' GROUP BY r.day, r.model_requested, r.lane"
    ),
}
"""The views that changed; what they were stands in revision 0001."""


def upgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    op.add_column("entry", sa.Column("group_id", sa.BigInteger(), nullable=True))
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("scope", sa.LargeBinary(length=32), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), nullable=False),
        sa.Column("group_id", sa.BigInteger(), nullable=False),
        sa.Column("similarity", sa.Double(), nullable=False),
        sa.Column("log_odds", sa.Double(), nullable=False),
        sa.Column("standing", sa.Text(), nullable=False),
        sa.Column("served", sa.SmallInteger(), nullable=False),
        sa.Column("near_same", sa.SmallInteger(), nullable=False),
        sa.Column("p_same", sa.Double(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("features", sa.LargeBinary(), nullable=False),
        sa.Column("words", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("writer", sa.Text(), nullable=False),
        sa.CheckConstraint("source IN ('forward', 'audit', 'feedback')", name=op.f("ck_audit_source")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_embedder_id"), "audit", ["embedder", "id"], unique=False)
    op.create_index(op.f("ix_audit_request_id"), "audit", ["request_id"], unique=False)
    op.create_index(op.f("ix_audit_entry_id"), "audit", ["entry_id"], unique=False)
    op.create_table(
        "refused_pair",
        sa.Column("asked", sa.LargeBinary(length=32), nullable=False),
        sa.Column("kept", sa.LargeBinary(length=32), nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("asked", "kept", name=op.f("pk_refused_pair")),
    )
    op.create_index(op.f("ix_refused_pair_ts"), "refused_pair", ["ts"], unique=False)
    for name, select in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {select}")


def downgrade() -> None:
    before = import_module("proxy._migrations.versions.0001_entries_and_ledger").VIEWS
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    op.drop_table("refused_pair")
    op.drop_table("audit")
    op.drop_column("entry", "group_id")
    for name in VIEWS:
        op.execute(f"CREATE VIEW {name} AS {before[name]}")
