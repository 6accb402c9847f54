"""What a purge reaches, and what is remembered of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import purges as room
from proxy.core.purges import Began, Marks, Purge, Purges, Selector, prefixes, reaches
from tests.rows import NOON_MS, digest

MARKS = Marks(digest("a"), "t" * 64, "red", "m", "r-1", ("doc:1", "team:a"))


def purge(number=1, removed=(), ts_ms=NOON_MS, **selector):
    return Purge(number, ts_ms, Selector(**selector), prefixes(removed))


def known(*made):
    purges = Purges()
    purges.learn(made)
    return purges


@pytest.mark.parametrize(
    ("selector", "reached"),
    [
        ({}, False),
        ({"everything": True}, True),
        ({"tags": ("doc:1",)}, True),
        ({"tags": ("doc:2", "team:a")}, True),
        ({"tags": ("doc:2",)}, False),
        ({"namespace": "red"}, True),
        ({"namespace": ""}, False),
        ({"model": "m"}, True),
        ({"model": "M"}, False),
        ({"writer": "r-1"}, True),
        ({"writer": "t" * 64}, True),
        ({"writer": "r-2"}, False),
        ({"older_than_ms": NOON_MS + 1}, True),
        ({"older_than_ms": NOON_MS}, False),
        ({"namespace": "red", "model": "m", "tags": ("doc:1",)}, True),
        ({"namespace": "red", "model": "other"}, False),
        ({"ids": (7,)}, False),
        ({"ids": (7,), "namespace": "red"}, False),
    ],
)
def test_a_purge_reaches_what_meets_every_condition(selector, reached):
    assert reaches(purge(**selector), MARKS, NOON_MS) is reached


@given(st.sets(st.binary(min_size=32, max_size=32), max_size=40), st.binary(min_size=32, max_size=32))
def test_what_a_purge_removed_it_reaches_whatever_its_selector(removed, other):
    made = purge(removed=removed, ids=(7,))
    for fingerprint in removed:
        assert reaches(made, MARKS._replace(fingerprint=fingerprint), NOON_MS)
    assert reaches(made, MARKS._replace(fingerprint=other), NOON_MS) is (other[:8] in {one[:8] for one in removed})


def test_only_what_began_before_a_purge_is_overtaken_by_it():
    purges = known(purge(1, namespace="blue"), purge(2, namespace="red"), purge(3, namespace="blue"))
    assert [purges.overtook(MARKS, Began(number, NOON_MS)) for number in range(5)] == [True, True, False, False, False]


def test_what_began_before_the_oldest_purge_that_is_remembered_is_overtaken(monkeypatch):
    monkeypatch.setattr(room, "KEPT", 2)
    purges = known(*[purge(number, namespace="blue") for number in range(1, 6)])
    assert [one.number for one in purges] == [4, 5]
    assert [purges.overtook(MARKS, Began(number, NOON_MS)) for number in range(6)] == [True] * 3 + [False] * 3


def test_purges_of_others_that_were_forgotten_in_between_count_as_unknown():
    purges = known(purge(1, namespace="blue"), purge(5, namespace="blue"))
    assert [purges.overtook(MARKS, Began(number, NOON_MS)) for number in (0, 1, 3, 4, 5)] == [True] * 3 + [False] * 2


def test_no_more_bytes_are_remembered_than_are_allowed(monkeypatch):
    monkeypatch.setattr(room, "KEPT_BYTES", 64)
    purges = known(*[purge(number, [digest(f"{number}-{i}") for i in range(3)], ids=(1,)) for number in range(1, 9)])
    assert sum(len(one.removed) for one in purges) <= 64
    assert (purges.newest, purges.forgotten) == (8, 6)
    assert known(purge(1, [digest(str(i)) for i in range(9)], ids=(1,))).forgotten == 0  # never the newest


def test_old_purges_are_forgotten_but_never_the_newest():
    purges = known(purge(1, tags=("x",)), purge(2, ts_ms=NOON_MS + 1, tags=("x",)), purge(3, ts_ms=0, tags=("x",)))
    assert purges.forget(NOON_MS + room.KEPT_MS) == 0
    assert purges.forget(NOON_MS + room.KEPT_MS + 1) == 1
    assert purges.forget(NOON_MS + 2 * room.KEPT_MS) == 2
    assert (purges.newest, [one.number for one in purges]) == (3, [3])


def test_what_is_known_already_is_not_taken_up_twice():
    purges = known(purge(1, tags=("x",)), purge(2, tags=("x",)))
    purges.learn([purge(1, tags=("x",)), purge(2, tags=("x",)), purge(3, tags=("x",))])
    assert [one.number for one in purges] == [1, 2, 3]
    assert [one.number for one in purges.after(1)] == [2, 3]
