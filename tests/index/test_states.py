"""Token states as they are kept: rounded once, the same at every look, bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.states import Rounded, StatesKept, restored, rounded


def unit_rows(seed: int, tokens: int = 5, layers: int = 3, dimension: int = 384) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(tokens, layers, dimension)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16)


@given(st.integers(0, 2**32 - 1), st.integers(1, 44))
def test_rows_come_back_of_unit_length_and_in_their_direction(seed: int, tokens: int) -> None:
    states = unit_rows(seed, tokens)
    back = restored(rounded(states))
    assert back.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(back, axis=2), 1.0, atol=1e-5)
    cosines = np.einsum("tld,tld->tl", back, states.astype(np.float32))
    assert cosines.min() > 0.9995


def test_one_large_component_keeps_the_others_within_its_step() -> None:
    states = np.zeros((1, 1, 4), np.float32)
    states[0, 0] = (0.9, 0.4, -0.17, 0.0)
    back = restored(rounded(states))[0, 0]
    assert np.abs(back * np.linalg.norm(states) - states[0, 0]).max() < 0.9 / 127


def test_a_row_of_zeros_stays_one() -> None:
    assert not restored(rounded(np.zeros((2, 1, 4), np.float16))).any()


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(0, 4))
def test_what_is_put_is_given_back_alike_and_bytes_stay_within_the_bound(order: list[int], room: int) -> None:
    one = rounded(unit_rows(0)).nbytes
    kept = StatesKept(room * one + one // 2)
    recent: list[int] = []
    for seed in order:
        digest = bytes([seed])
        before = kept.get(digest)
        assert (before is not None) == (seed in recent)
        given_back = restored(kept.put(digest, unit_rows(seed)))
        if before is not None:
            np.testing.assert_array_equal(before, given_back)
        recent = [*(other for other in recent if other != seed), seed][-room:] if room else []
        assert kept.held_bytes == len(recent) * one <= room * one
    kept.clear()
    assert kept.held_bytes == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_of_the_bytes_of_fp16(dtype: type) -> None:
    states = unit_rows(1, 30).astype(dtype)
    found = rounded(states)
    assert isinstance(found, Rounded)
    assert found.nbytes < 0.51 * states.astype(np.float16).nbytes
