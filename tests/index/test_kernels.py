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
from index.arena import fixed_point
from index.tokens import WIDTH, signature
from tests.index_fakes import vetoes_of
from tests.waiting import PATIENCE_S

D = 32
LANES = hnp.arrays(np.uint64, WIDTH, elements=st.integers(0, 2**64 - 1))


def stored(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, *fixed_point(vectors)


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
    assert (rows.dtype, scales.dtype) == (np.int16, np.float32)
    assert np.abs(rows).max(axis=1).tolist() == [32767] * 300
    back = rows.astype(np.float32) * scales[:, None]
    np.testing.assert_allclose(back @ vectors.T, vectors @ vectors.T, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_nearest_keeps_the_best_rows_like_its_twin(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(-127, 128, (n, D)).astype(np.int8), rng.random(n, np.float32) + np.float32(0.1)
    query = rng.standard_normal(D).astype(np.float32)
    best, similarities = np.full(k, -1), np.empty(k, np.float32)
    kept = kernels.nearest(codes, scales, query, best, similarities)
    twin = (codes.astype(np.float32) * scales[:, None]) @ query
    assert kept == min(n, k)
    np.testing.assert_allclose(similarities[:kept], -np.sort(-twin)[:k], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(twin[best[:kept]], similarities[:kept], rtol=1e-4, atol=1e-3)


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


STEP = st.tuples(st.booleans(), st.lists(st.integers(0, 40), max_size=6, unique=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_the_id_table_and_the_chains_behave_as_dicts(steps: list[tuple[bool, list[int]]]) -> None:
    table = np.zeros(128, np.int64), np.full(128, -1, np.int32)
    heads, counts = np.full(3, -1, np.int32), np.zeros(3, np.int32)
    after, ahead, scopes = (np.full(64, -1, np.int32) for _ in range(3))
    ids = np.full(64, -1, np.int64)
    twin: dict[int, int] = {}  # entry id -> slot
    for puts, numbers in steps:
        entry_ids = np.array([number * 2**33 + number % 3 for number in numbers], np.int64)
        out = np.empty(len(entry_ids), np.int32)
        n = kernels.leave_many(*table, heads, after, ahead, ids, scopes, counts, entry_ids, out)
        assert out[:n].tolist() == [twin.pop(i) for i in entry_ids.tolist() if i in twin]
        if puts:
            slots = np.array(sorted(set(range(64)) - set(twin.values()))[: len(entry_ids)], np.int32)
            ids[slots], scopes[slots] = entry_ids, entry_ids % 3
            kernels.enter_many(*table, heads, after, ahead, ids, scopes, counts, slots)
            twin.update(zip(entry_ids.tolist(), slots.tolist(), strict=True))
    asked = np.array([number * 2**33 + number % 3 for number in range(41)] + [-1, 12345], np.int64)
    out = np.empty(64, np.int32)
    assert out[: kernels.find_many(*table, asked, out)].tolist() == [twin[i] for i in asked.tolist() if i in twin]
    for scope in range(3):
        chained = out[: kernels.chain(heads, after, scope, out)].tolist()
        assert sorted(chained) == sorted(slot for i, slot in twin.items() if i % 3 == scope)
        assert counts[scope] == len(chained)


PROGRAM = """
import numpy as np
from index import kernels
from index.tokens import signature
kernels.compile_kernels(16)
codes = (np.arange(64) % 7 - 3).astype(np.int8).reshape(4, 16)
best, likeness = np.zeros(2, np.int64), np.zeros(2, np.float32)
kernels.nearest(codes, np.ones(4, np.float32), codes[2].astype(np.float32), best, likeness)
lamps = signature("turn on 5 lamps"), signature("turn off 6 lamps for Anna")
print(best.tolist(), likeness.tolist(), int(kernels.veto_bits(*lamps)))
"""


def test_without_the_compiler_the_results_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "program", "exec"), {})
    compiled = capsys.readouterr().out
    plain = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": "/nonexistent/cache"},
        capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    ).stdout  # fmt: skip
    assert compiled == plain != ""
