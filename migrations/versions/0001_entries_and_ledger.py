"""Entries, the ledger, feedback, and the views finance reads.

Revision 0001, the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VIEWS = {
    "savings_daily": (
        "SELECT day, CAST(COUNT(*) AS BIGINT) AS requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR"
        " lane = 'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS hits, "
        "CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS baseline_usd, "
        "CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS actual_usd, "
        "CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS "
        "saved_usd FROM request GROUP BY day"
    ),
    "savings_by_model": (
        "SELECT upstream, model_requested AS model, CAST(COUNT(*) AS BIGINT) AS requests, "
        "CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 END), 0) "
        "AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 "
        "AS baseline_usd, CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS "
        "actual_usd, CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) "
        "/ 1e9 AS saved_usd FROM request GROUP BY upstream, model_requested"
    ),
    "savings_by_tenant": (
        "SELECT tenant, CAST(COUNT(*) AS BIGINT) AS requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%'"
        " OR lane = 'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS hits, "
        "CAST(CAST(COALESCE(SUM(baseline_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS baseline_usd, "
        "CAST(CAST(COALESCE(SUM(actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS actual_usd, "
        "CAST(CAST(COALESCE(SUM(baseline_nusd - actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS "
        "saved_usd FROM request GROUP BY tenant"
    ),
    "savings_by_strategy": (
        "SELECT family AS strategy, mechanism, CAST(COUNT(*) AS BIGINT) AS steps, "
        "CAST(CAST(COALESCE(SUM(saved_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS saved_usd, "
        "CAST(CAST(COALESCE(SUM(CASE WHEN saved_nusd > 0 THEN saved_nusd ELSE 0 END), 0) AS BIGINT) AS DOUBLE"
        " PRECISION) / 1e9 AS earned_usd, CAST(CAST(COALESCE(SUM(CASE WHEN saved_nusd < 0 THEN -saved_nusd "
        "ELSE 0 END), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS spent_usd, COALESCE(SUM(saved_ms), 0) / "
        "1000.0 AS saved_s FROM saving GROUP BY family, mechanism"
    ),
    "hit_rate_daily": (
        "SELECT day, CAST(COUNT(*) AS BIGINT) AS requests, CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' OR"
        " lane = 'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(CASE "
        "WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 END), 0) AS BIGINT) AS DOUBLE "
        "PRECISION) / NULLIF(COUNT(*), 0) AS hit_rate, CAST(CAST(COALESCE(SUM(CASE WHEN lane LIKE 'cache.%' "
        "OR lane = 'stream.coalesce' THEN baseline_nusd ELSE 0 END), 0) AS BIGINT) AS DOUBLE PRECISION) / "
        "NULLIF(SUM(baseline_nusd), 0) AS money_hit_rate FROM request GROUP BY day"
    ),
    "wrong_hits": (
        "SELECT r.day AS day, r.model_requested AS model, r.lane AS lane, CAST(COUNT(*) AS BIGINT) AS hits, "
        "CAST(COUNT(f.request_id) AS BIGINT) AS judged, CAST(COALESCE(SUM(f.wrong), 0) AS BIGINT) AS wrong, "
        "CAST(COALESCE(SUM(f.wrong), 0) AS DOUBLE PRECISION) / NULLIF(COUNT(f.request_id), 0) AS wrong_rate "
        "FROM request r LEFT JOIN (SELECT request_id, MAX(CASE WHEN verdict = 'wrong' THEN 1 ELSE 0 END) AS "
        "wrong FROM feedback WHERE request_id IS NOT NULL GROUP BY request_id) f ON f.request_id = r.id WHERE"
        " r.lane LIKE 'cache.%' GROUP BY r.day, r.model_requested, r.lane"
    ),
    "top_entries": (
        "SELECT entry_id, CAST(COUNT(*) AS BIGINT) AS hits, CAST(CAST(COALESCE(SUM(baseline_nusd - "
        "actual_nusd), 0) AS BIGINT) AS DOUBLE PRECISION) / 1e9 AS saved_usd, MAX(ts) AS last_hit_ms FROM "
        "request WHERE entry_id IS NOT NULL AND lane LIKE 'cache.%' GROUP BY entry_id"
    ),
    "latency_by_lane": (
        "WITH ranked AS (SELECT lane, total_ms, ROW_NUMBER() OVER (PARTITION BY lane ORDER BY total_ms) AS i,"
        " COUNT(*) OVER (PARTITION BY lane) AS n FROM request) SELECT lane, CAST(MAX(n) AS BIGINT) AS "
        "requests, MAX(CASE WHEN i <= (n * 50 + 99) / 100 THEN total_ms END) AS p50_ms, MAX(CASE WHEN i <= (n"
        " * 95 + 99) / 100 THEN total_ms END) AS p95_ms, MAX(CASE WHEN i <= (n * 99 + 99) / 100 THEN total_ms"
        " END) AS p99_ms FROM ranked GROUP BY lane"
    ),
}
TABLES = ["entry", "feedback", "request", "saving", "upstream_call", "entry_tag"]


def upgrade() -> None:
    op.create_table(
        "entry",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("embedder", sa.Text(), nullable=True),
        sa.Column("scope", sa.LargeBinary(length=32), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("used_ms", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.SmallInteger(), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=True),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.Column("checksum", sa.LargeBinary(length=32), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("in_tok", sa.BigInteger(), nullable=True),
        sa.Column("out_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_read_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_write_tok", sa.BigInteger(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("total_ms", sa.Double(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("quarantined IN (0, 1)", name=op.f("ck_entry_quarantined")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_entry")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_entry_created_ms"), "entry", ["created_ms"], unique=False)
    op.create_index(op.f("ix_entry_expires_ms"), "entry", ["expires_ms"], unique=False)
    op.create_index(op.f("ix_entry_fingerprint"), "entry", ["fingerprint"], unique=True)
    op.create_index(op.f("ix_entry_model_id"), "entry", ["model", "id"], unique=False)
    op.create_index(op.f("ix_entry_namespace_id"), "entry", ["namespace", "id"], unique=False)
    op.create_index(op.f("ix_entry_request_id"), "entry", ["request_id"], unique=False)
    op.create_index(op.f("ix_entry_tenant_id"), "entry", ["tenant", "id"], unique=False)
    op.create_index(op.f("ix_entry_used_ms_size_bytes"), "entry", ["used_ms", "size_bytes"], unique=False)
    op.create_table(
        "feedback",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("entry_id", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.CheckConstraint("verdict IN ('right', 'wrong')", name=op.f("ck_feedback_verdict")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_feedback_entry_id"), "feedback", ["entry_id"], unique=False)
    op.create_index(op.f("ix_feedback_request_id"), "feedback", ["request_id"], unique=False)
    op.create_table(
        "request",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("dialect", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("stream", sa.SmallInteger(), nullable=False),
        sa.Column("model_requested", sa.Text(), nullable=False),
        sa.Column("model_served", sa.Text(), nullable=False),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("cache_status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("similarity", sa.Double(), nullable=True),
        sa.Column("entry_id", sa.BigInteger(), nullable=True),
        sa.Column("retry_of", sa.Text(), nullable=True),
        sa.Column("in_tok", sa.BigInteger(), nullable=True),
        sa.Column("out_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_read_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_write_tok", sa.BigInteger(), nullable=True),
        sa.Column("usage_basis", sa.Text(), nullable=False),
        sa.Column("baseline_nusd", sa.BigInteger(), nullable=False),
        sa.Column("actual_nusd", sa.BigInteger(), nullable=False),
        sa.Column("baseline_basis", sa.Text(), nullable=False),
        sa.Column("price_id", sa.Text(), nullable=False),
        sa.Column("ttft_ms", sa.Double(), nullable=True),
        sa.Column("total_ms", sa.Double(), nullable=False),
        sa.Column("baseline_ms", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_request")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_request_day_ts"), "request", ["day", "ts"], unique=False)
    op.create_table(
        "saving",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("mechanism", sa.Text(), nullable=False),
        sa.Column("before_nusd", sa.BigInteger(), nullable=False),
        sa.Column("after_nusd", sa.BigInteger(), nullable=False),
        sa.Column("saved_nusd", sa.BigInteger(), nullable=False),
        sa.Column("saved_ms", sa.Double(), nullable=True),
        sa.Column("basis", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "step", name=op.f("pk_saving")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "upstream_call",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("won", sa.SmallInteger(), nullable=False),
        sa.Column("in_tok", sa.BigInteger(), nullable=True),
        sa.Column("out_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_read_tok", sa.BigInteger(), nullable=True),
        sa.Column("cache_write_tok", sa.BigInteger(), nullable=True),
        sa.Column("cost_nusd", sa.BigInteger(), nullable=False),
        sa.Column("price_id", sa.Text(), nullable=False),
        sa.Column("usage_basis", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("ttft_ms", sa.Double(), nullable=True),
        sa.Column("total_ms", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upstream_call")),
    )
    op.create_index(op.f("ix_upstream_call_request_id"), "upstream_call", ["request_id"], unique=False)
    op.create_index(op.f("ix_upstream_call_ts"), "upstream_call", ["ts"], unique=False)
    op.create_table(
        "entry_tag",
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column(
            "entry_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.ForeignKeyConstraint(["entry_id"], ["entry.id"], name=op.f("fk_entry_tag_entry_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tag", "entry_id", name=op.f("pk_entry_tag")),
    )
    op.create_index(op.f("ix_entry_tag_entry_id"), "entry_tag", ["entry_id"], unique=False)
    for name, select in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {select}")


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    for name in reversed(TABLES):
        op.drop_table(name)
