"""A store on each of the two real databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.store.store import Store, open_store
from tests.pg import pg_server, pg_url
from tests.rows import list_price, list_rates

__all__ = ["pg_server", "pg_url"]


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(None, tmp_path / "data", price=list_price, rates=list_rates)
    yield store
    await store.close()


@pytest.fixture
async def pg_store(tmp_path: Path, pg_url: str) -> AsyncIterator[Store]:
    store = await open_store(pg_url, tmp_path / "pgdata", price=list_price, rates=list_rates)
    yield store
    await store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    url = None if request.param == "sqlite" else request.getfixturevalue("pg_url")
    opened = await open_store(url, tmp_path / "data", price=list_price, rates=list_rates)
    yield opened
    await opened.close()
