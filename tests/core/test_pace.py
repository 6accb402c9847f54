"""A replay goes out in whole events, and as its original came."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.pace import RUNS_MAX, ends_of, runs_of, schedule

PIECES = st.lists(st.tuples(st.integers(1, 500), st.floats(0, 3, width=32)), min_size=1, max_size=200)


def came(pieces):
    """Sizes and arrival times of pieces given as (size, seconds since the one before)."""
    return [size for size, _ in pieces], list(accumulate(gap for _, gap in pieces))


def due(ends, pace, runs=(), tokens=0):
    """When each event goes out."""
    plan = schedule(ends, pace, runs, tokens)
    return [next(at_s for end, at_s in plan if end >= own) for own in ends]


@given(pieces=PIECES, events=st.lists(st.integers(1, 300), min_size=1, max_size=300))
def test_every_byte_goes_out_once_in_order_and_the_first_event_at_once(pieces, events):
    sizes, times = came(pieces)
    runs = runs_of(sizes, times)
    ends = list(accumulate(events))
    assert len(runs) % 3 == 0
    assert len(runs) // 3 <= RUNS_MAX
    assert all(number >= 0 for number in runs)
    assert not runs or sum(runs[::3]) == sum(sizes)
    plan = schedule(ends, "recorded", runs, 0)
    assert plan[0][1] == 0.0
    assert plan[-1][0] == ends[-1]
    assert {end for end, _ in plan} <= set(ends)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(plan))
    assert plan[-1][1] <= times[-1] - times[0] + 0.001


@given(st.lists(st.tuples(st.integers(50, 500), st.integers(1, 3000)), min_size=2, max_size=25))
def test_what_came_in_few_pieces_goes_out_at_their_times(pieces):
    sizes, times = came([(size, gap / 1000) for size, gap in pieces])
    assert due(list(accumulate(sizes)), "recorded", runs_of(sizes, times)) == pytest.approx(
        [at - times[0] for at in times], abs=0.002
    )


@given(st.lists(st.tuples(st.integers(60, 80), st.floats(0.001, 0.5)), min_size=60, max_size=400))
def test_a_long_stream_is_never_off_by_more_than_a_step(pieces):
    sizes, times = came(pieces)
    told = due(list(accumulate(sizes)), "recorded", runs_of(sizes, times))
    step = (times[-1] - times[0]) / (RUNS_MAX // 2)
    assert max(abs(told_s - (at - times[0])) for told_s, at in zip(told, times, strict=True)) <= step + 0.002


def test_what_came_together_goes_out_together_and_a_silence_is_kept():
    runs = runs_of([300, 100], [5.0, 7.0])
    assert runs == (300, 0, 0, 100, 2000, 0)
    assert schedule([100, 200, 300, 400], "recorded", runs, 0) == ((300, 0.0), (400, 2.0))
    assert schedule([40, 80, 122, 160], "recorded", runs, 0) == ((122, 0.0), (160, 2.0))  # ids of another length


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0, 1.0], [1.0, 1.0001, 1.0002]])
def test_what_came_at_once_has_no_pace(times):
    assert runs_of([10] * len(times), times) == ()
    assert schedule([10, 20], "recorded", (), 9) == ((20, 0.0),)


def test_tokens_a_second_are_spread_over_the_events():
    assert schedule([10, 20, 30, 40, 50], 40.0, (), 80) == ((10, 0.0), (20, 0.5), (30, 1.0), (40, 1.5), (50, 2.0))
    assert schedule([10], 40.0, (), 80) == ((10, 0.0),)
    assert schedule([10, 20, 30], 10_000.0, (), 10) == ((20, 0.0), (30, 0.001))
    assert schedule([10, 20], "instant", (5, 0, 0, 5, 9, 0), 80) == ((20, 0.0),)


def test_events_end_at_their_blank_line_or_at_their_line():
    assert ends_of(b"data: 1\n\nevent: x\ndata: 2\n\n", "text/event-stream") == [9, 27]
    assert ends_of(b'{"a":1}\n{"b":2}\n', "application/x-ndjson") == [8, 16]
    assert ends_of(b"data: 1\n\nrest", "text/event-stream") == [9, 13]
