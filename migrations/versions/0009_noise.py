"""Who compared two answers, and what the kept question's own repeat said; tallies of certain labels and of pairs.

What a comparison called wrong is no certain label any more: tallies are counted anew from feedback and from answers
that were equal.

Revision 0009.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

PAIRS = ("more", "less", "even", "normal", "normal_wrong", "normal_more", "normal_less", "normal_even")
CERTAIN = "(audit.source = 'feedback' OR audit.p_same >= 0.999)"
WRONG = "CASE WHEN audit.p_same < 0.5 THEN 1.0 ELSE 0.0 END"
SUMS = {
    "audited": "audit.served",
    "counted_wrong": f"audit.served * {WRONG}",
    "would_be": "CASE WHEN audit.standing <> '' THEN 1.0 ELSE 0.0 END",
    "would_be_wrong": f"CASE WHEN audit.standing <> '' THEN {WRONG} ELSE 0.0 END",
    "start": "audit.near_same * audit.weight",
    "start_wrong": f"audit.near_same * audit.weight * {WRONG}",
}
OF_LEVEL = {
    "scope": "audit.scope = evidence.scope",
    "namespace": "audit.tenant = evidence.tenant AND audit.namespace = evidence.namespace",
    "tenant": "audit.tenant = evidence.tenant",
    "installation": "1 = 1",
}


def upgrade() -> None:
    for name in PAIRS:
        op.add_column("evidence", sa.Column(name, sa.Double(), nullable=False, server_default="0"))
    for kind, condition in OF_LEVEL.items():
        counted = ", ".join(
            f"{name} = COALESCE((SELECT CAST(SUM({value}) AS DOUBLE PRECISION) FROM audit "
            f"WHERE audit.embedder = evidence.embedder AND {condition} AND {CERTAIN}), 0.0)"
            for name, value in SUMS.items()
        )
        op.execute(f"UPDATE evidence SET {counted} WHERE kind = '{kind}'")
    op.add_column("audit", sa.Column("region", sa.Text(), nullable=False, server_default=""))
    op.add_column("audit", sa.Column("comparer", sa.Text(), nullable=False, server_default="built-in"))
    op.add_column("audit", sa.Column("p_null", sa.Double(), nullable=True))
    op.execute("UPDATE audit SET region = 'alike' WHERE near_same = 1")
    op.execute("UPDATE audit SET comparer = '' WHERE source = 'feedback'")
    op.drop_column("audit", "near_same")


def downgrade() -> None:
    op.add_column("audit", sa.Column("near_same", sa.SmallInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE audit SET near_same = 1 WHERE region <> ''")
    for name in ("p_null", "comparer", "region"):
        op.drop_column("audit", name)
    for name in reversed(PAIRS):
        op.drop_column("evidence", name)
