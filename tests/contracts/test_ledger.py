"""What every Ledger does: takes an outcome at once and never raises."""

from __future__ import annotations

import pytest

from proxy.store.store import open_store
from tests.rows import hit, list_price, outcome
from tests.store_fakes import FakeLedger


@pytest.fixture(params=["fake", "sqlite"])
async def ledger(request, tmp_path):
    if request.param == "fake":
        yield FakeLedger()
        return
    store = await open_store(None, tmp_path, price=list_price)
    yield store.ledger
    await store.close()


async def test_recording_returns_nothing_and_never_raises(ledger):
    for each in (hit(), outcome(), outcome("odd", tag="\ud800", usage=None, calls=())):
        assert ledger.record(each) is None
