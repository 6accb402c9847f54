"""Every kernel against its NumPy twin, compiled and as plain Python."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from index import kernels
from index.tokens import WIDTH, signature
from tests.index_fakes import vetoes_of

D = 32
LANES = hnp.arrays(np.uint64, WIDTH, elements=st.integers(0, 2**64 - 1))


def stored(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows, scales = np.zeros((n, D), np.int16), np.zeros(n, np.float32)
    kernels.write_many(vectors, np.arange(n, dtype=np.int32), rows, scales)
    return vectors, rows, scales


def sorted_words(lanes: np.ndarray) -> np.ndarray:
    """A valid signature keeps its content words ascending and distinct, unused ones last."""
    words = sorted(set(lanes[8:].view(np.uint16).tolist()) - {0})
    lanes = lanes.copy()
    lanes[8:].view(np.uint16)[:] = words + [0] * (24 - len(words))
    return lanes


@settings(deadline=None)
@given(LANES, LANES)
def test_veto_bits_equal_their_twin_on_any_signatures(a: np.ndarray, b: np.ndarray) -> None:
    a, b = sorted_words(a), sorted_words(b)
    b[6] = (b[6] & np.uint64((1 << 48) - 1)) | (a[6] & np.uint64(0xFFFF << 48))
    assert kernels.veto_bits(a, b) == vetoes_of(a, b) == kernels.veto_bits(b, a)


@settings(deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_veto_bits_equal_their_twin_on_any_texts(a: str, b: str) -> None:
    left, right = signature(a), signature(b)
    assert kernels.veto_bits(left, right) == vetoes_of(left, right)


def test_fixed_point_keeps_inner_products() -> None:
    vectors, rows, scales = stored(300)
    twin = rows.astype(np.float32) * scales[:, None]
    for i in range(0, 300, 7):
        assert kernels.inner(rows[i], scales[i], vectors[3]) == pytest.approx(float(twin[i] @ vectors[3]), abs=1e-6)
        assert kernels.inner(rows[i], scales[i], vectors[3]) == pytest.approx(float(vectors[i] @ vectors[3]), abs=2e-5)
    back = np.empty((300, D), np.float32)
    kernels.restore(rows, scales, np.arange(300, dtype=np.int32), back)
    np.testing.assert_allclose(back, twin, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 120), st.integers(1, 12), st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_rank_keeps_the_best_fresh_of_the_scope_like_its_twin(n: int, k: int, now_ms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, rows, scales = stored(120, seed % 97)
    scopes, expires = rng.integers(0, 3, 120).astype(np.int32), rng.integers(0, 1000, 120)
    signs = rng.integers(0, 2**63, (120, WIDTH)).astype(np.uint64)
    slots = rng.permutation(120)[:n].astype(np.int32)
    best = np.empty(k, np.int32), np.empty(k, np.float32), np.empty(k, np.int64)
    kept = kernels.rank(rows, scales, signs, scopes, expires, slots, n, 1, now_ms, vectors[0], signs[0], *best)

    usable = slots[(scopes[slots] == 1) & (expires[slots] > now_ms)]
    similarities = (rows[usable].astype(np.float32) * scales[usable, None]) @ vectors[0]
    order = np.argsort(-similarities, kind="stable")[:k]
    np.testing.assert_allclose(best[1][:kept], similarities[order], atol=1e-6)
    assert best[0][:kept].tolist() == usable[order].tolist()
    assert best[2][:kept].tolist() == [kernels.veto_bits(signs[0], signs[s]) for s in usable[order]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_the_id_table_behaves_as_a_dict(steps: list[tuple[bool, int]]) -> None:
    keys, values = np.zeros(64, np.int64), np.full(64, -1, np.int32)
    twin: dict[int, int] = {}
    for slot, (puts, number) in enumerate(steps):
        entry_id = number * 2**33 + number % 3
        if puts:
            kernels.table_put(keys, values, entry_id, slot)
            twin[entry_id] = slot
        else:
            assert kernels.table_take(keys, values, entry_id) == twin.pop(entry_id, -1)
    for number in range(41):
        entry_id = number * 2**33 + number % 3
        assert kernels.table_find(keys, values, entry_id) == twin.get(entry_id, -1)
    asked = np.array([*twin, -1, 12345], np.int64)
    out = np.empty(len(asked), np.int32)
    assert out[: kernels.find_many(keys, values, asked, out)].tolist() == list(twin.values())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 19)), max_size=80))
def test_chains_hold_exactly_the_slots_of_their_scope(steps: list[tuple[int, int]]) -> None:
    heads = np.full(3, -1, np.int32)
    after, ahead = np.full(20, -1, np.int32), np.full(20, -1, np.int32)
    owner: dict[int, int] = {}
    for scope, slot in steps:
        if slot in owner:
            kernels.unlink(heads, after, ahead, owner.pop(slot), slot)
        else:
            kernels.link(heads, after, ahead, scope, slot)
            owner[slot] = scope
    out = np.empty(20, np.int32)
    for scope in range(3):
        found = out[: kernels.chain(heads, after, scope, out)].tolist()
        assert sorted(found) == sorted(s for s, o in owner.items() if o == scope)


def test_without_the_compiler_the_results_are_the_same() -> None:
    program = (
        "import numpy as np\n"
        "from index import kernels\n"
        "from index.tokens import signature\n"
        "kernels.compile_kernels(16)\n"
        "v = (np.arange(16) % 5 - 2).astype(np.float32); v /= np.linalg.norm(v)\n"
        "row = np.zeros(16, np.int16); scale = np.float32(kernels.quantise(v, row))\n"
        "print(row.tolist(), round(float(kernels.inner(row, scale, v)), 4),"
        " kernels.veto_bits(signature('turn on 5 lamps'), signature('turn off 6 lamps for Anna')))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled, "NUMBA_CACHE_DIR": "/nonexistent/cache"},
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for disabled in ("0", "1")
    ]  # fmt: skip
    assert outputs[0] == outputs[1] != ""
