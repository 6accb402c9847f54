"""Predictions and the basis of a cost in upstream_call; votes of the router.

Revision 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("upstream_call", sa.Column("accepted_pred_tok", sa.BigInteger(), nullable=True))
    op.add_column("upstream_call", sa.Column("rejected_pred_tok", sa.BigInteger(), nullable=True))
    op.add_column("upstream_call", sa.Column("cost_basis", sa.Text(), nullable=False, server_default="none"))
    op.execute(
        "UPDATE upstream_call SET cost_basis = CASE WHEN usage_basis = 'none' THEN 'none' "
        "WHEN price_id = '' THEN 'unpriced' ELSE usage_basis END"
    )
    op.create_table(
        "route_vote",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), nullable=False),
        sa.Column("candidate", sa.Text(), nullable=False),
        sa.Column("good", sa.SmallInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.CheckConstraint("good IN (0, 1)", name=op.f("ck_route_vote_good")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_route_vote")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_route_vote_request_id"), "route_vote", ["request_id"], unique=False)


def downgrade() -> None:
    op.drop_table("route_vote")
    op.drop_column("upstream_call", "cost_basis")
    op.drop_column("upstream_call", "rejected_pred_tok")
    op.drop_column("upstream_call", "accepted_pred_tok")
