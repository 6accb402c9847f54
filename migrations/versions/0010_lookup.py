"""How each request was looked up, so that it can be told later why it was no hit.

Revision 0010.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lookup",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_lookup"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("lookup")
