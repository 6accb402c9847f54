"""Work behind the scenes takes its share of a core, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.spare import Spare


@given(st.lists(st.floats(0.0, 3.0), max_size=200), st.floats(0.001, 0.5))
def test_no_stretch_of_time_has_more_work_than_its_share_and_a_burst(pauses: list[float], cost_s: float) -> None:
    spare, now_s, spent_s = Spare(0.1, 2.0), 100.0, 0.0
    for pause in pauses:
        now_s += pause
        if spare.take(cost_s, now_s):
            spent_s += cost_s
        assert spent_s <= 2.0 + 0.1 * (now_s - 100.0) + 1e-9


def test_what_was_not_used_is_kept_for_a_burst_only() -> None:
    spare = Spare(0.1, 2.0)
    assert all(spare.take(0.5, 0.0) for _ in range(4))
    assert not spare.take(0.5, 0.0)
    assert spare.take(0.5, 5.0)
    assert sum(spare.take(0.5, 10_000.0) for _ in range(10)) == 4
