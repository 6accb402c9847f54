"""PostgreSQL for the migrations' tests."""

from __future__ import annotations

from tests.pg import pg_server, pg_url

__all__ = ["pg_server", "pg_url"]
