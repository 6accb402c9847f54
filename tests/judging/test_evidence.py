"""What the judge has learned against serving outlives its memory: dropped levels, a restart, refused pairs."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.learner import LEVELS, Learner
from proxy.core.model import Comparison, Rules
from proxy.core.purse import Purse
from proxy.core.risk import Standing
from proxy.hot import HotRows
from proxy.judging import judge as room
from proxy.judging.audits import Auditor
from proxy.judging.judge import LIMITS, THICK, Judge, Opinion, Place, comparison
from proxy.meaning import Meaning
from proxy.ports import RefusedPair
from proxy.store.store import Store, open_store
from proxy.tasks import Tasks
from proxy.watch.telemetry import Telemetry
from tests.judging.test_judge import ASKED, HOME, candidate, consider
from tests.rows import list_price

SMALL = {"scope": 2, "namespace": 1, "tenant": 1, "installation": 1}
UNLIMITED = dict.fromkeys(LIMITS, 1_000_000)
PLACES = [Place(bytes([n]) * 32, f"n{n % 2}", f"t{n // 4}", b"q" * 32) for n in range(12)]


def auditor_of(store: Store, embedder: str, limits: dict[str, int]) -> Auditor:
    """An auditor whose judge keeps this many levels and writes down what it learns."""
    note = partial(store.comparisons.note, embedder)
    meaning = Meaning()
    meaning.identity = embedder
    return Auditor(
        judge=Judge(Rules(), Learner, LEVELS, note=note, limits=limits),
        entries=store.entries, comparisons=store.comparisons, meaning=meaning, arbiter=None,
        hot=HotRows(1 << 20), tasks=Tasks(), telemetry=Telemetry(None, level=logging.ERROR), purse=Purse(0.1),
    )  # fmt: skip


def comparison_of(opinion: Opinion, embedder: str, *, same: bool, served: bool) -> Comparison:
    decision = opinion.decision
    assert decision is not None
    return comparison(
        opinion, decision, p_same=float(same), weight=1.0, served=served, source="audit" if served else "forward",
        request_id="r", embedder=embedder, ts_ms=0,
    )  # fmt: skip


def learn(judge: Judge, place: Place, found: Comparison) -> None:
    judge.see(place, ASKED)
    if found.served:
        judge.serve(place)
    judge.apply(found)


async def spend(auditor: Auditor, place: Place, n: int, *, same: bool) -> None:
    """n hits in one place, all audited."""
    for _ in range(n):
        await auditor.evidence.read(place)
        found = comparison_of(consider(auditor.judge, candidate(1, 0.97), place=place), "e", same=same, served=True)
        learn(auditor.judge, place, found)
        auditor._comparisons.record(found)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(None, tmp_path / "data", price=list_price)
    yield opened
    await opened.close()


async def test_a_spent_budget_is_remembered_after_more_scopes_than_are_kept(store: Store) -> None:
    auditor = auditor_of(store, "e", dict(LIMITS))
    await spend(auditor, HOME, 6, same=False)
    assert not consider(auditor.judge, candidate(1, 0.97)).has_room
    for number in range(LIMITS["scope"] + 43):
        other = Place(number.to_bytes(32, "big"), "", f"t{number}", b"q" * 32)
        await spend(auditor, other, 5, same=True)
    await auditor.evidence.read(HOME)
    again = consider(auditor.judge, candidate(1, 0.97))
    assert not again.has_room  # that of all the others together would have
    assert again.chosen is None or again.chosen.standing is Standing.PROVEN
    assert consider(auditor.judge, candidate(1, 0.97), place=other).has_room


async def test_a_level_that_is_not_read_back_serves_nothing(store: Store) -> None:
    auditor = auditor_of(store, "e", dict(LIMITS))
    assert consider(auditor.judge, candidate(1, 0.99)).chosen is None
    await auditor.evidence.read(HOME)
    assert consider(auditor.judge, candidate(1, 0.99)).chosen is not None


async def test_a_restart_keeps_a_spent_budget_that_its_newest_rows_do_not_show(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = auditor_of(store, "e", dict(LIMITS))
    await spend(auditor, HOME, 6, same=False)
    await spend(auditor, PLACES[0], 20, same=True)
    await store.comparisons.flush()
    monkeypatch.setattr("proxy.judging.audits.LOADED", 10)
    again = auditor_of(store, "e", dict(LIMITS))
    await again.load()
    await again.evidence.read(HOME)
    assert not consider(again.judge, candidate(1, 0.97)).has_room
    other = auditor_of(store, "another model", dict(LIMITS))
    await other.load()
    await other.evidence.read(HOME)
    assert consider(other.judge, candidate(1, 0.97)).has_room


async def test_a_level_judged_by_its_own_evidence_gets_that_back_and_not_the_one_above(store: Store) -> None:
    auditor = auditor_of(store, "e", SMALL)
    await spend(auditor, HOME, THICK + 10, same=True)
    await auditor.evidence.read(HOME)
    before = auditor.judge.evidence(HOME, 0.01)
    for place in PLACES:
        await spend(auditor, place, 1, same=True)
    await asyncio.gather(*(auditor.evidence.read(HOME) for _ in range(5)))
    after = auditor.judge.evidence(HOME, 0.01)
    assert after == before
    assert (after["level"], after["labelled"]) == ("scope", THICK + 10)
    assert len(after["curve"]) > 0


STEPS = st.tuples(
    st.integers(0, len(PLACES) - 1),
    st.sampled_from([0.96, 0.97, 0.99]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 30),
    st.booleans(),
)
"""Place, similarity, whether the answers are the same, whether it is served, how often, whether a restart follows."""


def test_a_small_memory_never_serves_what_an_unlimited_one_refuses_for_a_spent_budget(tmp_path: Path) -> None:
    numbers, spent = itertools.count(), 0

    async def play(store: Store, steps: list[tuple[int, float, bool, bool, int, bool]]) -> None:
        nonlocal spent
        embedder = f"e{next(numbers)}"
        small, whole = auditor_of(store, embedder, SMALL), Judge(Rules(), Learner, LEVELS, limits=UNLIMITED)
        for number, similarity, same, served, times, restarts in steps:
            place = PLACES[number]
            for _ in range(times):
                await small.evidence.read(place)
                wide = consider(whole, candidate(1, similarity), place=place)
                narrow = consider(small.judge, candidate(1, similarity), place=place)
                assert narrow.has_room == wide.has_room
                if wide.chosen is None and wide.judged[0].reason == "budget_spent":
                    spent += 1
                    # Thresholds of a level that was read back are derived anew, and may have been reviewed sooner.
                    assert narrow.chosen is None or narrow.chosen.standing is not Standing.START
                found = comparison_of(wide, embedder, same=same, served=served)
                learn(whole, place, found)
                learn(small.judge, place, found)
                small._comparisons.record(found)
            if restarts:
                while store.comparisons._waiting:
                    await store.comparisons.flush()
                small = auditor_of(store, embedder, SMALL)
                await small.load()

    with asyncio.Runner() as runner:
        store = runner.run(open_store(None, tmp_path / "data", price=list_price))

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(STEPS, max_size=25))
        def holds(steps: list[tuple[int, float, bool, bool, int, bool]]) -> None:
            runner.run(play(store, steps))

        try:
            holds()
        finally:
            runner.run(store.close())
    assert spent > 0


async def test_more_refused_pairs_than_memory_keeps_stay_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "REFUSED", 5)
    auditor = auditor_of(store, "e", dict(LIMITS))
    pairs = [(bytes([n]) * 32, b"k" * 32) for n in range(20)]
    for number, (asked, kept) in enumerate(pairs):
        auditor.judge.refuse(asked, kept)
        await store.comparisons.refuse(RefusedPair(asked, kept, number, "r", 1, "audit"))
    again = auditor_of(store, "e", dict(LIMITS))
    await again.load()
    for one in (auditor, again):
        assert one.judge.refused_pairs == 5
        assert all([await one.is_refused(*pair) for pair in pairs])
        assert not await one.is_refused(b"k" * 32, b"k" * 32)
