"""Tallies of the judge's levels, filled from the comparisons there are, and indexes to read a level's rows by.

Revision 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

SUMS = ("labelled", "hits", "audited", "counted_wrong", "would_be", "would_be_wrong", "start", "start_wrong")
WRONG = "CASE WHEN p_same < 0.5 THEN 1.0 ELSE 0.0 END"
TALLY = (
    "MAX(ts), CAST(COUNT(*) AS DOUBLE PRECISION), COALESCE(SUM(served * weight), 0.0), "
    "CAST(SUM(served) AS DOUBLE PRECISION), "
    f"SUM(served * {WRONG}), SUM(CASE WHEN standing <> '' THEN 1.0 ELSE 0.0 END), "
    f"SUM(CASE WHEN standing <> '' THEN {WRONG} ELSE 0.0 END), SUM(near_same * weight), "
    f"SUM(near_same * weight * {WRONG})"
)
LEVELS = {
    "scope": ("scope", "''", "''"),
    "namespace": ("{none}", "tenant", "namespace"),
    "tenant": ("{none}", "tenant", "''"),
    "installation": ("{none}", "''", "''"),
}
INDEXES = (
    ("audit", ("scope", "id")),
    ("audit", ("tenant", "id")),
    ("refused_pair", ("request_id",)),
    ("refused_pair", ("entry_id",)),
)


def upgrade() -> None:
    op.create_table(
        "evidence",
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("scope", sa.LargeBinary(32), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("changed_ms", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=False) for name in SUMS),
        sa.CheckConstraint("kind IN ('scope', 'namespace', 'tenant', 'installation')", name=op.f("ck_evidence_kind")),
        sa.PrimaryKeyConstraint("embedder", "kind", "scope", "tenant", "namespace", name=op.f("pk_evidence")),
    )
    op.create_index(op.f("ix_evidence_changed_ms"), "evidence", ["changed_ms"], unique=False)
    for table, columns in INDEXES:
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns), unique=False)
    none = "X''" if op.get_bind().dialect.name == "sqlite" else "''::bytea"
    for kind, (scope, tenant, namespace) in LEVELS.items():
        key = f"{scope.format(none=none)} AS level_scope, {tenant} AS level_tenant, {namespace} AS level_namespace"
        op.execute(
            f"INSERT INTO evidence (embedder, kind, scope, tenant, namespace, changed_ms, {', '.join(SUMS)}) "
            f"SELECT embedder, '{kind}', level_scope, level_tenant, level_namespace, {TALLY} "
            f"FROM (SELECT {key}, embedder, ts, served, standing, near_same, p_same, weight FROM audit "
            "WHERE weight > 0) AS counted GROUP BY embedder, level_scope, level_tenant, level_namespace"
        )


def downgrade() -> None:
    for table, columns in reversed(INDEXES):
        op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table_name=table)
    op.drop_table("evidence")
