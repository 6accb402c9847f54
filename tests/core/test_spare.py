"""Work behind the scenes takes its share of a core, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.spare import Spare


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 2.0)), max_size=200))
def test_no_stretch_of_time_has_more_work_than_its_share_a_burst_and_the_last_piece(
    work: list[tuple[float, float]],
) -> None:
    spare, now_s, spent_s = Spare(0.1, 2.0), 100.0, 0.0
    for pause_s, cost_s in work:
        now_s += pause_s
        if spare.has_room(now_s):
            assert spent_s <= 2.0 + 0.1 * (now_s - 100.0) + 1e-9
            spare.spend(cost_s)
            spent_s += cost_s


def test_what_was_not_used_is_kept_for_a_burst_only() -> None:
    spare = Spare(0.1, 2.0)
    assert taken(spare, 0.0) == 4
    assert taken(spare, 5.0) == 1
    assert taken(spare, 10_000.0) == 4


def test_work_that_cost_more_than_was_left_is_paid_back_first() -> None:
    spare = Spare(0.1, 2.0)
    assert spare.has_room(0.0)
    spare.spend(5.0)
    assert not spare.has_room(29.0)
    assert spare.has_room(31.0)


def taken(spare: Spare, now_s: float) -> int:
    """Pieces of half a second that are begun at once."""
    count = 0
    while spare.has_room(now_s):
        spare.spend(0.5)
        count += 1
    return count
