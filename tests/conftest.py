"""What all tests share: no deadline a busy machine could miss, and an order that keeps every worker busy to the end."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

FIRST = ("test_flow_crash", "test_demo", "test_embedder_model", "test_embedder")  # two minutes to 15 s, on two cores

settings.register_profile("ibid", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ibid")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="module")
def nothing_left() -> Iterator[None]:
    """What a file's programs held is given back before the next: models hang in cycles that Python thinks small."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured text may hold lone surrogates, which cannot travel from a worker of pytest-xdist: show them escaped."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
