"""The promises of the README on real parts: sockets, SQLite, PostgreSQL, the bundled model, processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.flows.running import EXACT_ONLY, Ibid, running
from tests.models import converted_data_dir
from tests.pg import pg_server, pg_url
from tests.upstream import ScriptedUpstream

__all__ = ["pg_server", "pg_url"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def models() -> Path:
    """The converted model, shared by every test of the session."""
    return converted_data_dir() / "models"


@pytest.fixture
def data_dir(tmp_path: Path, models: Path) -> Path:
    """An empty data directory that finds the converted model."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    (directory / "models").symlink_to(models, target_is_directory=True)
    return directory


@pytest.fixture
async def up() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def ibid(data_dir: Path, up: ScriptedUpstream) -> AsyncIterator[Ibid]:
    """ibid with everything on."""
    async with running(data_dir, up.url) as served:
        yield served


@pytest.fixture
async def exact(data_dir: Path, up: ScriptedUpstream) -> AsyncIterator[Ibid]:
    """ibid without the model: quicker, for what does not need it."""
    async with running(data_dir, up.url, EXACT_ONLY) as served:
        yield served
