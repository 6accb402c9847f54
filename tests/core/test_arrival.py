"""Bodies on their way: patience, a least rate, shares, and who gives way. Times are numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.arrival import GRACE_S, SCARCE, Arrival, HeadRoom, Room
from proxy.core.errors import Busy
from proxy.core.model import Limits

LIMITS = replace(
    Limits(), body_timeout_s=30.0, body_bytes_per_s=1000, upload_timeout_s=600.0, bodies=8, body_share=0.25
)


def ends_after(arrival: Arrival, every_s: float, size_bytes: int, until_s: float) -> float:
    """When a body that sends so many bytes each so often is cut; infinity when it lasts."""
    now_s = 0.0
    while now_s < until_s:
        if (left_s := arrival.waits(now_s)) < every_s:
            return now_s + left_s
        now_s += every_s
        arrival.came(size_bytes, now_s)
    return float("inf")


@pytest.mark.parametrize(
    ("every_s", "size_bytes", "ends_s"),
    [
        (1e9, 0, 30.0),  # half a body
        (1.0, 1, 30.0),  # a byte a second
        (3.0, 1, 30.0),
        (1.0, 500, 60.0),  # half the least rate uses half a second of patience each second
        (29.0, 100_000, 600.0),  # bursts keep up, until the total deadline
        (0.01, 11, 600.0),
    ],
)
def test_a_body_ends_when_it_is_too_far_behind_or_takes_too_long(
    every_s: float, size_bytes: int, ends_s: float
) -> None:
    assert ends_after(Arrival(LIMITS), every_s, size_bytes, 1e9) == pytest.approx(ends_s, rel=0.02)


@given(
    st.lists(st.tuples(st.floats(0.001, 5.0), st.floats(1.0, 50.0)), min_size=1, max_size=50),
    st.floats(0.0, 1000.0),
)
def test_who_keeps_up_is_never_cut_before_the_total_deadline_however_the_bytes_are_cut(
    pieces: list[tuple[float, float]], pause_s: float
) -> None:
    arrival, now_s, waited_s = Arrival(LIMITS), 0.0, 0.0
    for wait_s, times in pieces:
        assert arrival.waits(now_s) >= min(wait_s, LIMITS.upload_timeout_s - waited_s) - 1e-6
        now_s += wait_s
        waited_s += wait_s
        arrival.came(int(wait_s * times * LIMITS.body_bytes_per_s) + 1, now_s)
        now_s += pause_s  # an upstream that takes its time costs nothing
        assert arrival.behind_s(now_s) == pytest.approx(0.0, abs=1e-6)


def who(tenant: str, address: str = "a") -> tuple[str, str]:
    return f"tenant {tenant}", f"address {address}"


def waiting(room: Room, owners: tuple[str, str], now_s: float) -> Arrival:
    arrival = room.enter(owners, now_s)
    arrival.waits(now_s)
    return arrival


def test_half_bodies_keep_another_key_out_no_longer_than_the_grace() -> None:
    room = Room(LIMITS)
    ended: list[int] = []
    for number in range(room.places):
        arrival = waiting(room, who(f"garbage {number}", str(number)), 0.0)
        arrival.wake = lambda number=number: ended.append(number)
    with pytest.raises(Busy):
        room.enter(who("other"), GRACE_S / 2)
    for number in range(room.places):
        waiting(room, who(f"other {number}", f"other {number}"), GRACE_S + number * 0.01)
    assert ended == list(range(room.places))
    assert len(room) == room.places


def test_behind_one_load_balancer_an_honest_crowd_loses_none_of_its_bodies() -> None:
    room = Room(LIMITS)
    honest = [waiting(room, who(f"user {number}", "balancer"), 0.0) for number in range(5)]
    halves: list[Arrival] = []
    for second in range(1, 20):
        for arrival in honest:
            arrival.came(2000, float(second))
            arrival.waits(float(second))
        if second % 3 == 1:
            halves.append(waiting(room, who(f"attacker {second}", "balancer"), float(second)))
        elif second % 3 == 0:  # whoever comes next takes the place of half a body
            waiting(room, who(f"newcomer {second}", "balancer"), second + 0.5).leave()
    assert not any(arrival.is_displaced for arrival in honest)
    assert [arrival.is_displaced for arrival in halves] == [True] * 6 + [False]


@pytest.mark.parametrize("shared", ["tenant", "address"])
def test_a_share_counts_only_where_places_are_scarce(shared: str) -> None:
    room = Room(LIMITS)
    mine = [
        waiting(room, who("same" if shared == "tenant" else str(n), "same" if shared == "address" else str(n)), 0.0)
        for n in range(6)
    ]
    greedy = who("same" if shared == "tenant" else "x", "same" if shared == "address" else "x")
    with pytest.raises(Busy):
        room.enter(greedy, 0.0)
    others = [waiting(room, who(f"other {n}", f"other {n}"), 0.0) for n in range(2)]
    mine[0].leave()
    with pytest.raises(Busy):
        room.enter(greedy, 0.0)
    waiting(room, greedy, GRACE_S)  # of one's own, what is behind gives way
    assert [arrival.is_displaced for arrival in others] == [False, False]
    assert sum(arrival.is_displaced for arrival in mine) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 40)), max_size=80))
def test_the_room_counts_right_whatever_happens(steps: list[tuple[int, int, int]]) -> None:
    limits = replace(LIMITS, bodies_bytes=1000)
    room, inside = Room(limits), list[Arrival]()
    for number, (kind, owner, size) in enumerate(steps):
        now_s = number * 0.7
        try:
            if kind <= 1 or not inside:
                inside.append(waiting(room, who(str(owner), str(owner % 2)), now_s))
            elif kind == 2:
                inside.pop(size % len(inside)).leave()
            else:
                inside[size % len(inside)].hold(size * 10, now_s)
        except Busy:
            pass
        inside = [arrival for arrival in inside if not arrival.is_displaced]
        assert len(room) == len(inside) <= room.places
        assert room.held_bytes == sum(arrival.held_bytes for arrival in inside) <= limits.bodies_bytes
    for arrival in inside:
        arrival.leave()
        arrival.leave()
    assert (len(room), room.held_bytes, dict(room._held_by)) == (0, 0, {})


def test_bodies_that_pass_through_may_have_half_of_the_turns() -> None:
    assert Room(replace(LIMITS, bodies=512, in_flight=10)).places == 5
    assert Room(replace(LIMITS, bodies=512, in_flight=1)).places == 1


# --- heads ------------------------------------------------------------------------------------------------------------

PIECES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 400), st.booleans()), max_size=200)


@given(PIECES)
def test_half_heads_hold_their_room_at_most_and_an_address_its_share_when_it_is_scarce(
    pieces: list[tuple[int, int, bool]],
) -> None:
    limits = replace(Limits(), heads_bytes=1000, head_share=0.25)
    room = HeadRoom[int](limits)
    held: dict[int, int] = {}
    for sender, size_bytes, is_over in pieces:
        if is_over:
            room.leave(sender)
            held.pop(sender, None)
            continue
        oldest = list(held)
        held[sender] = held.get(sender, 0) + size_bytes
        ended = room.hold(sender, f"address {sender % 3}", size_bytes)
        if ended and oldest and sum(held.values()) <= limits.heads_bytes:
            assert all(one % 3 == sender % 3 for one in ended), "of the greedy address only"
        for one in ended:
            del held[one]
        assert room.held_bytes == sum(held.values()) <= limits.heads_bytes
        if room.held_bytes > limits.heads_bytes * SCARCE:
            assert sum(size for one, size in held.items() if one % 3 == sender % 3) <= 250
