"""How alike two answers to one question were, wherever one was answered anew.

Revision 0011.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "repeated_answer",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), nullable=False),
        sa.Column("comparer", sa.Text(), nullable=False),
        sa.Column("p_same", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_repeated_answer")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_repeated_answer_ts"), "repeated_answer", ["ts"])


def downgrade() -> None:
    op.drop_index(op.f("ix_repeated_answer_ts"), table_name="repeated_answer")
    op.drop_table("repeated_answer")
