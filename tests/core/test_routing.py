"""Wilson's bound, conversations, refusals, and the arithmetic of hedges."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.openai_chat import read
from proxy.core.hedging import BURST, Budget, Times
from proxy.core.routing import Votes, conversation_of, is_refusal, wilson


@pytest.mark.parametrize(
    ("good", "total", "z", "bound"),
    [(0, 0, 1.645, 0.0), (25, 25, 1.645, 0.9023), (95, 100, 1.96, 0.8882), (0, 9, 1.96, 0.0)],
)
def test_wilsons_bound_is_the_published_one(good, total, z, bound):
    assert wilson(good, total, z) == pytest.approx(bound, abs=5e-4)


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.1, 4))
def test_the_bound_is_below_the_share_and_grows_with_evidence(good, bad, z):
    total = good + bad
    if not total:
        return
    assert 0.0 <= wilson(good, total, z) <= good / total + 1e-12
    assert wilson(2 * good, 2 * total, z) >= wilson(good, total, z) - 1e-12
    assert wilson(good + 1, total + 1, z) >= wilson(good, total, z) - 1e-12
    assert Votes(good, total).lower_bound(z) == wilson(good, total, z)


def turn(*texts: str, **fields):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read({"model": "m", "messages": [{"role": "system", "content": "s"}, *messages], **fields})


def test_a_conversation_keeps_its_name_from_its_first_turn_on():
    first = conversation_of(turn("hello"), "t")
    assert conversation_of(turn("hello", "hi", "and now?"), "t") == first
    assert conversation_of(turn("hello", "hi", "and now?", "this", "more"), "t") == first
    assert conversation_of(turn("hello!"), "t") != first
    assert conversation_of(turn("hello"), "u") != first
    assert conversation_of(turn("hello", user="someone"), "t") != first


@pytest.mark.parametrize("text", ["I'm sorry, but I can't help with that.", "I cannot do this.", "As an AI I have no"])
def test_a_refusal_is_known_by_how_it_begins(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["Paris.", "It is a sorry sight.", "You cannot divide by zero.", ""])
def test_an_answer_is_no_refusal(text):
    assert not is_refusal(text)


@given(st.lists(st.booleans(), max_size=400), st.floats(0.0, 1.0))
def test_further_calls_never_exceed_their_share(wants, share):
    budget = Budget(share)
    for wanted in wants:
        budget.earn()
        if wanted:
            budget.spend()
        assert budget.spent <= budget.made * share + 1e-6
    for _ in range(50):
        budget.spend()
    assert budget.spent <= budget.made * share + 1e-6


def test_a_long_quiet_time_does_not_allow_a_flood():
    budget = Budget(1.0)
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == int(BURST)


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=600), st.floats(0.01, 1.0))
def test_a_quantile_is_that_of_the_last_durations_seen(durations, q):
    times = Times(window=100)
    for ms in durations:
        times.see("kind", ms)
    kept = sorted(durations[-100:])
    assert times.count("kind") == len(kept)
    assert times.quantile("kind", q, 1) == kept[max(0, math.ceil(q * len(kept)) - 1)]
    assert times.quantile("kind", q, 101) is None
    assert times.quantile("other", q, 1) is None


def test_kinds_are_bounded_and_the_least_used_goes():
    times = Times(kinds=3)
    for kind in ("a", "b", "c", "a", "d"):
        times.see(kind, 1.0)
    assert [times.count(kind) for kind in "abcd"] == [2, 0, 1, 1]
