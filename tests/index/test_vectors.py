"""The owner: order, bounds, promotion, compaction, and agreement with an exact index over any history."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import kernels
from index.arena import Arena
from index.errors import IndexFault, IndexRebuilding, Overloaded
from index.tokens import signature
from index.vectors import VectorOwner
from tests.index_fakes import FakeVectorIndex
from tests.waiting import PATIENCE_S

D = 48
SCOPES = [bytes([i]) * 32 for i in range(3)]
SIGNS = [signature(text) for text in ("turn on 5 lamps", "turn off 5 lamps", "turn on 6 lamps for Anna")]
FAR = 1 << 50
ROUNDING = 6e-5  # half a fixed-point step (largest component / 32767) times the L1 norm of a query: 5.6e-5 at most here


def units(n: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def signs(n: int) -> np.ndarray:
    return np.tile(SIGNS[0], (n, 1))


async def bulk(owner: VectorOwner, n: int, scope: bytes = SCOPES[0], first: int = 0, seed: int = 0) -> np.ndarray:
    vectors = units(n, seed)
    await owner.add_many(np.arange(first, first + n), [scope] * n, vectors, signs(n), np.full(n, FAR))
    return vectors


ADD = st.tuples(st.just("add"), st.integers(0, 60), st.integers(0, 2), st.integers(0, 80), st.integers(0, 100))
REMOVE = st.tuples(st.just("remove"), st.integers(0, 60))
SEARCH = st.tuples(st.just("search"), st.integers(0, 2), st.integers(0, 80), st.integers(0, 100), st.integers(1, 10))


async def replay(steps: list[tuple[object, ...]], promote_above: int) -> None:
    vectors = units(81)
    owner, fake = VectorOwner("m", D, promote_above=promote_above), FakeVectorIndex(D)
    owner.start()
    homes: dict[int, bytes] = {}
    clock = 0  # a search tells the time and a sweep believes the latest, so it does not run back here
    try:
        for step in steps:
            match step:
                case ("add", int(i), int(scope), int(v), int(expires)):
                    for index in (owner, fake):
                        index.add(i, SCOPES[scope], vectors[v], SIGNS[v % 3], expires)
                    homes[i] = SCOPES[scope]
                case ("remove", int(i)):
                    for index in (owner, fake):
                        index.remove([i])
                    homes.pop(i, None)
                case ("search", int(scope), int(v), int(now), int(k)):
                    clock = now = max(clock, now)
                    found = await owner.search(SCOPES[scope], vectors[v], SIGNS[0], now, k)
                    exact = await fake.search(SCOPES[scope], vectors[v], SIGNS[0], now, 1000)
                    assert all(homes[c.entry_id] == SCOPES[scope] for c in found)
                    assert len(found) == min(k, len(exact))
                    known = {c.entry_id: c for c in exact}
                    for c, twin in zip(found, exact, strict=False):  # equal vectors may come in either order
                        assert c.similarity == pytest.approx(twin.similarity, abs=ROUNDING)
                        assert c.similarity == pytest.approx(known[c.entry_id].similarity, abs=ROUNDING)
                        assert c.vetoes == known[c.entry_id].vetoes
        held = set((await owner.ids()).tolist())
        assert held <= fake.rows.keys()
        assert all(fake.rows[i][3] <= clock for i in fake.rows.keys() - held)  # only what a sweep may take
    finally:
        owner.close()
    assert owner.faults == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(ADD, ADD, REMOVE, SEARCH), max_size=60))
def test_any_history_agrees_with_an_exact_index(steps: list[tuple[object, ...]]) -> None:
    asyncio.run(replay(steps, promote_above=2000))


async def test_a_large_scope_is_promoted_and_goes_on_finding_what_it_holds() -> None:
    owner = VectorOwner("m", D, promote_above=300)
    owner.start()
    vectors = await bulk(owner, 1200)
    late = await bulk(owner, 200, first=5000, seed=3)
    await owner.settled()
    states = await owner.states()
    assert states[SCOPES[0]][0] == 1400
    assert states[SCOPES[0]][2] >= 0.995
    found = [(await owner.search(SCOPES[0], v, SIGNS[0], 0, 1))[0].entry_id for v in (*vectors, *late)]
    assert np.mean(np.array(found) == np.r_[0:1200, 5000:5200]) >= 0.995
    owner.remove(range(0, 1200, 2))
    found = [c.entry_id for v in vectors[:200:2] for c in await owner.search(SCOPES[0], v, SIGNS[0], 0, 4)]
    assert all(i % 2 or i >= 5000 for i in found)
    assert (await owner.states())[SCOPES[0]][0] == 800
    assert owner.faults == 0
    owner.close()


async def test_searches_adds_and_removes_go_on_while_a_scope_is_built() -> None:
    owner = VectorOwner("m", D, promote_above=1000)
    owner.start()
    vectors = await bulk(owner, 3000)
    fresh = units(1500, seed=4)
    for i in range(1500):
        owner.add(10_000 + i, SCOPES[0], fresh[i], SIGNS[0], FAR)
        owner.remove([i])
        if i % 100 == 0:
            assert (await owner.search(SCOPES[0], fresh[i], SIGNS[0], 0, 1))[0].entry_id == 10_000 + i
    await owner.settled()
    ids = set((await owner.ids()).tolist())
    assert ids == {*range(1500, 3000), *range(10_000, 11_500)}
    assert (await owner.states())[SCOPES[0]][0] == 3000
    for v in (vectors[10], vectors[2000], fresh[77]):
        assert {c.entry_id for c in await owner.search(SCOPES[0], v, SIGNS[0], 0, 8)} <= ids
    assert owner.faults == 0
    owner.close()


async def test_a_replay_is_promoted_once_when_all_of_it_is_there() -> None:
    owner = VectorOwner("m", D, promote_above=300)
    async with owner.replaying():
        owner.start()
        vectors = await bulk(owner, 1200)
        with pytest.raises(IndexRebuilding):
            await owner.search(SCOPES[0], vectors[0], SIGNS[0], 0)
        await owner.settled()
        assert await owner.states() == {}
    assert (await owner.search(SCOPES[0], vectors[7], SIGNS[0], 0, 1))[0].entry_id == 7
    await owner.settled()
    assert (await owner.states())[SCOPES[0]][0] == 1200
    owner.close()


async def test_a_scope_that_shrinks_is_scanned_exactly_again() -> None:
    owner = VectorOwner("m", D, promote_above=300)
    owner.start()
    vectors = await bulk(owner, 600)
    await owner.settled()
    owner.remove(range(500))
    assert await owner.states() == {}
    assert (await owner.search(SCOPES[0], vectors[555], SIGNS[0], 0, 1))[0].entry_id == 555
    owner.close()


async def test_memory_of_removed_entries_is_given_back() -> None:
    owner = VectorOwner("m", D, promote_above=10**9)
    owner.start()
    vectors = await bulk(owner, 9000)
    await bulk(owner, 10, SCOPES[1], first=20_000, seed=2)
    owner.remove([i for i in range(9000) if i % 3])
    assert (await owner.ids()).size == 3010
    assert owner._arena.used == 3010
    assert owner._arena.ids.shape[0] < 4500
    for i in range(0, 9000, 300):
        assert (await owner.search(SCOPES[0], vectors[i], SIGNS[0], 0, 1))[0].entry_id == i
    assert len(await owner.search(SCOPES[1], vectors[0], SIGNS[0], 0, 20)) == 10
    owner.close()


async def test_what_expired_is_swept() -> None:
    owner = VectorOwner("m", D)
    owner.start()
    await owner.add_many(np.arange(5000), SCOPES[:1] * 5000, units(5000), signs(5000), np.arange(5000))
    assert await owner.sweep(3000) == 3001
    assert (await owner.ids()).tolist() == list(range(3001, 5000))
    owner.close()


async def test_a_full_queue_refuses_at_once_but_never_a_removal() -> None:
    owner = VectorOwner("m", D, queue_limit=3)
    owner.start()
    await owner.ids()
    gate = threading.Event()
    owner._ask(lambda: gate.wait(PATIENCE_S))
    vectors = units(4)
    while owner.waiting < 3:
        owner.add(owner.waiting, SCOPES[0], vectors[0], SIGNS[0], FAR)
    with pytest.raises(Overloaded) as refusal:
        owner.add(9, SCOPES[0], vectors[0], SIGNS[0], FAR)
    assert refusal.value.reason == "index_busy"
    with pytest.raises(Overloaded):
        await owner.search(SCOPES[0], vectors[0], SIGNS[0], 0)
    owner.remove([0])
    gate.set()
    assert 0 not in (await owner.ids()).tolist()
    owner.close()


async def test_a_search_nobody_waits_for_is_skipped() -> None:
    owner = VectorOwner("m", D)
    owner.start()
    await owner.ids()
    ran = []
    owner.find_now = lambda *_: ran.append(1) or []  # type: ignore[method-assign,assignment,func-returns-value]
    gate = threading.Event()
    owner._ask(lambda: gate.wait(PATIENCE_S))
    waiting = asyncio.ensure_future(owner.search(SCOPES[0], units(1)[0], SIGNS[0], 0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await owner.ids()
    assert ran == []
    owner.close()


async def test_a_failure_inside_is_an_index_fault_and_the_owner_lives_on() -> None:
    owner = VectorOwner("m", D)
    owner.start()

    def broken(*_: object) -> list[object]:
        raise RuntimeError("broken")

    vector = units(1)[0]
    whole = owner.find_now
    owner.find_now = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(IndexFault):
        await owner.search(SCOPES[0], vector, SIGNS[0], 0)
    owner.find_now = whole  # type: ignore[method-assign]
    assert await owner.search(SCOPES[0], vector, SIGNS[0], 0) == []
    owner.close()


async def test_an_index_that_is_not_running_or_not_complete_says_so() -> None:
    owner = VectorOwner("m", D)
    vector = units(1)[0]
    with pytest.raises(IndexFault):
        await owner.search(SCOPES[0], vector, SIGNS[0], 0)
    owner.start()
    owner.rebuilding = True
    with pytest.raises(IndexRebuilding):
        await owner.search(SCOPES[0], vector, SIGNS[0], 0)
    owner.rebuilding = False
    assert await owner.search(SCOPES[0], vector, SIGNS[0], 0) == []
    owner.close()
    owner.close()
    with pytest.raises(IndexFault):
        owner.add(1, SCOPES[0], vector, SIGNS[0], FAR)


async def test_an_id_given_twice_in_bulk_counts_once_and_last() -> None:
    owner = VectorOwner("m", D)
    owner.start()
    vectors = units(3)
    ids = np.array([4, 5, 4])
    await owner.add_many(ids, [SCOPES[0], SCOPES[0], SCOPES[1]], vectors, signs(3), np.full(3, FAR))
    assert [c.entry_id for c in await owner.search(SCOPES[0], vectors[0], SIGNS[0], 0)] == [5]
    assert [c.entry_id for c in await owner.search(SCOPES[1], vectors[2], SIGNS[0], 0)] == [4]
    assert owner.size == 2
    owner.close()


def test_scope_numbers_are_not_reused_while_a_snapshot_is_read() -> None:
    arena = Arena(D)
    arena.add(1, SCOPES[0], units(1)[0], SIGNS[0], FAR)
    arena.hold()
    arena.remove(1)
    assert arena.add(2, SCOPES[1], units(1)[0], SIGNS[0], FAR) != 0
    assert arena.digests()[0] == SCOPES[0]
    arena.release()
    assert arena.digests()[0] == b""
    assert arena.add(3, SCOPES[2], units(1)[0], SIGNS[0], FAR) == 0


async def test_nothing_is_compiled_in_a_request() -> None:
    """The embedder hands out read-only vectors; a kernel would be compiled once more for those."""
    owner = VectorOwner("m", D)
    owner.start()
    vectors = units(3)
    try:
        await owner.ids()  # compiled from here on
        compiled = [len(kernels.rank.signatures), len(kernels.veto_bits.signatures)]
        for i, vector in enumerate(vectors):
            vector.flags.writeable = False
            owner.add(i, SCOPES[0], vector, SIGNS[0], FAR)
        query, guards = vectors[1], SIGNS[0].copy()
        guards.flags.writeable = False
        assert [found.entry_id for found in await owner.search(SCOPES[0], query, guards, 0, 1)] == [1]
        assert owner.compare(query, guards, query.tobytes(), guards.tobytes())[0] == pytest.approx(1.0)
        assert [len(kernels.rank.signatures), len(kernels.veto_bits.signatures)] == compiled
    finally:
        owner.close()
