"""Learning is paid from what hits have saved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.model import Usage
from proxy.core.purse import CREDIT_HITS, Purse, worth

STEPS = st.lists(st.booleans(), max_size=400)
SAVED = 100


@given(STEPS, st.integers(1, 40_000), st.integers(0, 4))
def test_what_is_spent_stays_within_the_share_the_credit_and_one_first_audit(
    steps: list[bool], cost: int, late: int
) -> None:
    """Whatever an audit costs, and however many are under way when the next is asked for."""
    purse, waiting = Purse(0.1), 0
    for ends in steps:
        purse.earn(SAVED)
        if purse.has_room:
            purse.begin()
            waiting += 1
        if waiting and (ends or waiting > late):
            purse.spend(cost)
            purse.end()
            waiting -= 1
        assert purse.spent <= max(0.1 * purse.earned + CREDIT_HITS * SAVED, cost)


def test_nothing_is_spent_where_nothing_may_be() -> None:
    purse = Purse(0.0)
    purse.earn(1_000_000)
    assert not purse.has_room


def test_what_has_no_price_counts_for_its_tokens() -> None:
    assert worth(0, Usage(10, 5)) == 15
    assert worth(70, Usage(10, 5)) == 70
    assert worth(0, None) == 0
