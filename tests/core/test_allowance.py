"""A bound a minute that nobody else's doing loosens, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.allowance import MINUTE_S, Allowance

WHO = st.integers(0, 40).map(lambda number: f"key {number}")


def used_up(allowance: Allowance, who: str, now_s: float) -> int:
    """How often it may happen yet, all of it taken."""
    n = 0
    while allowance.has_room(who, now_s):
        allowance.count(who, now_s)
        n += 1
    return n


@given(st.lists(WHO, max_size=400), st.integers(1, 20))
def test_whoever_has_used_theirs_up_has_none_whatever_others_do(others: list[str], per_min: int) -> None:
    allowance = Allowance(per_min, named=8)
    assert used_up(allowance, "prober", 600.0) == per_min
    for number, who in enumerate(others):
        now_s = 600.0 + 59.0 * number / len(others)
        if allowance.has_room(who, now_s):
            allowance.count(who, now_s)
        assert not allowance.has_room("prober", now_s)
        assert len(allowance) <= 2 * 9


@given(st.lists(WHO, max_size=400))
def test_whoever_is_counted_by_themselves_loses_nothing_to_others(others: list[str]) -> None:
    allowance = Allowance(5, named=8)
    allowance.count("early", 600.0)
    for who in others:
        allowance.count(who, 600.0)
    assert used_up(allowance, "early", 600.0) == 4


@given(st.floats(0.0, 59.9))
def test_the_minute_slides(past_s: float) -> None:
    allowance = Allowance(600)
    assert used_up(allowance, "k", 600.0) == 600
    assert abs(used_up(allowance, "k", 660.0 + past_s) - 600 * past_s / MINUTE_S) <= 1
    assert used_up(allowance, "k", 800.0) == 600


def test_without_a_bound_nothing_is_counted() -> None:
    allowance = Allowance(0)
    for _ in range(1_000):
        allowance.count("k", 0.0)
    assert allowance.has_room("k", 0.0)
    assert len(allowance) == 0
