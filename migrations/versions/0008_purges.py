"""Purges that were made, and which of them a provider's batch was handed in after.

Revision 0008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "purge",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("ts", sa.BigInteger(), nullable=False),
        sa.Column("selector", sa.Text(), nullable=False),
        sa.Column("removed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_purge")),
    )
    op.add_column("batch_part", sa.Column("purge", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("batch_part", "purge")
    op.drop_table("purge")
