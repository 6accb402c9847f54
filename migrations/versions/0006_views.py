"""Time to the first byte in the view of latencies.

Revision 0006.
"""

from __future__ import annotations

from importlib import import_module

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

VIEWS = {
    "latency_by_lane": (
        "WITH ranked AS (SELECT lane, total_ms, ROW_NUMBER() OVER (PARTITION BY lane ORDER BY total_ms) AS i, "
        "COUNT(*) OVER (PARTITION BY lane) AS n, ttft_ms, ROW_NUMBER() OVER (PARTITION BY lane ORDER BY "
        "CASE WHEN ttft_ms IS NULL THEN 1 ELSE 0 END, ttft_ms) AS k, COUNT(ttft_ms) OVER (PARTITION BY lane) AS m "
        "FROM request) SELECT lane, CAST(MAX(n) AS BIGINT) AS requests, "
        "MAX(CASE WHEN i <= (n * 50 + 99) / 100 THEN total_ms END) AS p50_ms, "
        "MAX(CASE WHEN i <= (n * 95 + 99) / 100 THEN total_ms END) AS p95_ms, "
        "MAX(CASE WHEN i <= (n * 99 + 99) / 100 THEN total_ms END) AS p99_ms, "
        "MAX(CASE WHEN k <= (m * 50 + 99) / 100 THEN ttft_ms END) AS ttft_p50_ms, "
        "MAX(CASE WHEN k <= (m * 95 + 99) / 100 THEN ttft_ms END) AS ttft_p95_ms FROM ranked GROUP BY lane"
    ),
}
"""The views that changed; what they were stands in revision 0001."""


def upgrade() -> None:
    for name, select in VIEWS.items():
        op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE VIEW {name} AS {select}")


def downgrade() -> None:
    before = import_module("proxy._migrations.versions.0001_entries_and_ledger").VIEWS
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE VIEW {name} AS {before[name]}")
