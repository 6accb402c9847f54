"""Age and lifetime, whatever the clock does."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.freshness import SKEW_MS, Anchor, age_s, is_fresh, may_serve_stale, remaining_s, steady_ms

TIMES = st.integers(0, 2**45)
LIFETIMES = st.integers(-(10**6), 2**40)
NOW = 1_800_000_000_000


def test_an_entry_is_fresh_until_and_not_at_its_end() -> None:
    assert is_fresh(NOW, NOW + 1000, NOW)
    assert is_fresh(NOW, NOW + 1000, NOW + 999)
    assert not is_fresh(NOW, NOW + 1000, NOW + 1000)
    assert not is_fresh(NOW, NOW, NOW)
    assert remaining_s(NOW, NOW + 60_000, NOW + 61_500) == -2
    assert age_s(NOW, NOW + 1999) == 1


def test_max_age_bounds_what_is_fresh() -> None:
    assert is_fresh(NOW, NOW + 90_000, NOW + 60_000, max_age_s=60)
    assert not is_fresh(NOW, NOW + 90_000, NOW + 60_001, max_age_s=60)
    assert is_fresh(NOW, NOW + 90_000, NOW, max_age_s=0)
    assert not is_fresh(NOW, NOW + 90_000, NOW + 1, max_age_s=0)


def test_stale_is_served_only_when_asked_and_only_that_far() -> None:
    expired = NOW + 1000
    assert not may_serve_stale(NOW, expired, expired + 500, None)
    assert may_serve_stale(NOW, expired, expired + 500, 1)
    assert not may_serve_stale(NOW, expired, expired + 1001, 1)
    assert may_serve_stale(NOW, expired, expired + 10**12, math.inf)
    assert not may_serve_stale(NOW, expired, expired - 1, 60)
    assert not may_serve_stale(NOW, expired, expired + 500, 60, max_age_s=1)


@given(TIMES, LIFETIMES, TIMES)
def test_age_is_never_negative_and_life_never_longer(created: int, lifetime: int, now: int) -> None:
    expires = created + lifetime
    assert age_s(created, now) >= 0
    assert remaining_s(created, expires, now) * 1000 <= lifetime
    if is_fresh(created, expires, now):
        assert remaining_s(created, expires, now) >= 0
        assert now >= created - SKEW_MS
        assert not may_serve_stale(created, expires, now, math.inf)


@given(TIMES, st.integers(1, 2**40), st.integers(SKEW_MS + 1, 2**40))
def test_an_entry_from_the_future_is_neither_fresh_nor_stale(created: int, lifetime: int, back: int) -> None:
    now = created - back
    assert not is_fresh(created, created + lifetime, now)
    assert not may_serve_stale(created, created + lifetime, now, math.inf)


@given(TIMES, TIMES, st.lists(st.tuples(st.integers(0, 10**9), st.integers(-(10**12), 10**12)), max_size=20))
def test_steady_time_never_runs_behind_real_time(wall: int, mono: int, steps: list[tuple[int, int]]) -> None:
    anchor, start = Anchor(wall, mono), wall
    passed = 0
    for elapsed, step in steps:
        passed += elapsed
        wall += elapsed + step
        now = steady_ms(anchor, wall, mono + passed)
        assert now >= anchor.now_ms
        assert now >= start + passed
        assert now >= wall
        anchor = Anchor(now, mono + passed)
