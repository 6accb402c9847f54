"""What every vector index promises, held against the fake and the real one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest

from index.errors import IndexFault
from index.kernels import veto_bits
from index.tokens import signature
from index.vectors import VectorOwner
from proxy.core.policy import mask
from proxy.ports import VectorIndex
from tests.index_fakes import FakeVectorIndex

DIMENSION = 384
ALICE, BOB = b"a" * 32, b"b" * 32
FAR = 1 << 50
PLAIN = signature("how do I reset my password")


@pytest.fixture(params=["fake", "real", "real, approximate"])
def index(request: pytest.FixtureRequest) -> Iterator[VectorIndex]:
    if request.param == "fake":
        yield FakeVectorIndex(DIMENSION)
        return
    owner = VectorOwner("test", DIMENSION, promote_above=2000 if request.param == "real" else 64)
    owner.start()
    yield owner
    owner.close()


def units(n: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


async def fill(index: VectorIndex, vectors: np.ndarray, scope: bytes = ALICE, first: int = 0) -> None:
    for i, vector in enumerate(vectors):
        index.add(first + i, scope, vector, PLAIN, FAR)
    if isinstance(index, VectorOwner):
        await index.settled()


async def test_the_nearest_come_first_with_their_similarity(index: VectorIndex) -> None:
    vectors = units(200)
    await fill(index, vectors)
    query = vectors[17] * 0.9 + vectors[3] * 0.3
    query /= np.linalg.norm(query)
    found = await index.search(ALICE, query, PLAIN, 0, 8)
    assert [c.entry_id for c in found[:2]] == [17, 3]
    assert len(found) == 8
    assert [c.similarity for c in found] == sorted((c.similarity for c in found), reverse=True)
    for candidate in found:
        assert candidate.similarity == pytest.approx(float(vectors[candidate.entry_id] @ query), abs=1e-5)


async def test_another_scope_is_never_proposed_even_for_an_identical_vector(index: VectorIndex) -> None:
    vectors = units(100)
    await fill(index, vectors)
    await fill(index, vectors[:3], BOB, first=1000)
    assert {c.entry_id for c in await index.search(BOB, vectors[50], PLAIN, 0, 8)} == {1000, 1001, 1002}
    assert await index.search(b"c" * 32, vectors[50], PLAIN, 0, 8) == []


async def test_an_entry_is_proposed_until_the_millisecond_it_expires(index: VectorIndex) -> None:
    vector = units(1)[0]
    index.add(1, ALICE, vector, PLAIN, 1000)
    assert [c.entry_id for c in await index.search(ALICE, vector, PLAIN, 999)] == [1]
    assert await index.search(ALICE, vector, PLAIN, 1000) == []


async def test_a_removed_entry_is_gone_from_the_next_search_on(index: VectorIndex) -> None:
    vectors = units(100)
    await fill(index, vectors)
    index.remove([5, 5, 777])
    assert 5 not in {c.entry_id for c in await index.search(ALICE, vectors[5], PLAIN, 0, 100)}
    assert (await index.search(ALICE, vectors[6], PLAIN, 0))[0].entry_id == 6


async def test_adding_an_id_again_replaces_it_wherever_it_was(index: VectorIndex) -> None:
    vectors = units(100)
    await fill(index, vectors)
    fresh = units(1, seed=9)[0]
    index.add(7, BOB, fresh, PLAIN, FAR)
    assert 7 not in {c.entry_id for c in await index.search(ALICE, vectors[7], PLAIN, 0, 8)}
    assert [c.entry_id for c in await index.search(BOB, fresh, PLAIN, 0)] == [7]


async def test_vetoes_name_what_differs_between_the_texts(index: VectorIndex) -> None:
    vector = units(1)[0]
    index.add(1, ALICE, vector, signature("send 5 km to Anna"), FAR)
    (found,) = await index.search(ALICE, vector, signature("send 6 km to Anna"), 0)
    assert found.vetoes == mask("numbers")


async def test_a_candidate_carries_every_veto_and_the_classes_of_the_stored_text(index: VectorIndex) -> None:
    mine, yours = signature("how do I reset my old password"), signature("how do I reset your old password")
    vector = units(1)[0]
    index.add(1, ALICE, vector, mine, FAR)
    (found,) = await index.search(ALICE, vector, yours, 0)
    _, vetoes = index.compare(vector, yours, vector.tobytes(), mine.tobytes())
    assert found.vetoes == vetoes == veto_bits(mine, yours) == mask("possessive")
    assert np.array_equal(found.signature, mine)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v * np.float32(np.nan),
        lambda v: v * np.float32(0),
        lambda v: v * np.float32(2),
        lambda v: v[:-1],
        lambda v: v.astype(np.float64),
        lambda v: np.stack([v, v]),
        lambda v: np.where(np.arange(DIMENSION) == 0, np.float32(np.inf), v).astype(np.float32),
    ],
    ids=["nan", "zero", "long", "short", "float64", "matrix", "inf"],
)
async def test_a_vector_that_is_no_embedding_is_refused_at_the_door(index: VectorIndex, spoil) -> None:  # type: ignore[no-untyped-def]
    bad = spoil(units(1)[0])
    with pytest.raises(IndexFault):
        index.add(1, ALICE, bad, PLAIN, FAR)
    with pytest.raises(IndexFault):
        await index.search(ALICE, bad, PLAIN, 0)
    assert await index.search(ALICE, units(1)[0], PLAIN, 0) == []


async def test_later_changes_of_the_callers_array_do_not_reach_the_index(index: VectorIndex) -> None:
    vector = units(1)[0]
    kept = vector.copy()
    index.add(1, ALICE, vector, PLAIN, FAR)
    vector[:] = 0
    (found,) = await index.search(ALICE, kept, PLAIN, 0)
    assert found.similarity == pytest.approx(1, abs=1e-5)


async def test_searches_at_once_each_get_their_own_answer(index: VectorIndex) -> None:
    vectors = units(150)
    await fill(index, vectors)
    found = await asyncio.gather(*(index.search(ALICE, v, PLAIN, 0, 1) for v in vectors))
    assert [f[0].entry_id for f in found] == list(range(150))


def test_the_gate_recomputes_from_the_rows_own_bytes(index: VectorIndex) -> None:
    a, b = units(2)
    signs = signature("how do I reset my 3 passwords")
    similarity, vetoes = index.compare(a, PLAIN, b.tobytes(), signs.tobytes())
    assert similarity == pytest.approx(float(a @ b), abs=1e-6)
    assert vetoes == mask("numbers")


@pytest.mark.parametrize("damage", ["cut", "long", "nan", "scaled", "no signature", "other rules"])
def test_the_gate_says_nan_for_damaged_rows(index: VectorIndex, damage: str) -> None:
    vector = units(1)[0]
    row, signs = vector.copy(), PLAIN.copy()
    if damage == "nan":
        row[3] = np.nan
    elif damage == "scaled":
        row *= 3
    elif damage == "other rules":
        signs[6] ^= np.uint64(1 << 50)
    raw = row.tobytes() + (b"1234" if damage == "long" else b"")
    similarity, vetoes = index.compare(
        vector, PLAIN, raw[:-1] if damage == "cut" else raw, b"" if damage == "no signature" else signs.tobytes()
    )
    assert math.isnan(similarity)
    assert vetoes == 0
