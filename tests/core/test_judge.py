"""Similarity and vetoes in, probability and reason out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import tokens
from proxy.core import policy
from proxy.core.model import Candidate, Controls, Miss, NearMiss, Rules
from proxy.core.policy import Choice, choose, judge, probability_of

RULES, FREE = Rules(), Controls()
SIMILARITIES = st.floats(-1, 1)
CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(1, 99), st.floats(0.7, 1), st.sampled_from([0, 0, 1, 6])), max_size=8
)


def test_the_names_of_the_vetoes_are_those_of_the_index() -> None:
    assert policy.GUARDS == tokens.GUARDS


@given(SIMILARITIES, SIMILARITIES)
def test_probability_never_falls_as_similarity_rises(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= probability_of(low) <= probability_of(high) < 1.0


@pytest.mark.parametrize(
    ("similarity", "probability"),
    [(0.90, 0.97), (0.95, 0.99), (0.97, 0.995), (0.985, 0.9975), (1.0, 0.9995), (1.00005, 0.9995), (0.93, 0.982)],
)
def test_probability_at_and_between_the_knots(similarity: float, probability: float) -> None:
    assert probability_of(similarity) == pytest.approx(probability, abs=1e-12)


@pytest.mark.parametrize("similarity", [math.nan, math.inf, -math.inf, 1.01, -1.5])
def test_what_cannot_be_a_similarity_never_passes(similarity: float) -> None:
    judgement = judge(similarity, 0, Rules(max_error_rate=1.0), FREE)
    assert (judgement.probability, judgement.reason) == (0.0, "bad_similarity")
    assert not judgement.serves


def test_the_default_budget_serves_from_095() -> None:
    assert judge(0.95, 0, RULES, FREE).serves
    assert judge(0.95, 0, RULES, FREE).reason == "alike"
    below = judge(0.9499, 0, RULES, FREE)
    assert (below.serves, below.reason) == (False, "below_bound")


def test_a_client_may_tighten_the_budget_and_not_loosen_it() -> None:
    assert not judge(0.95, 0, RULES, Controls(max_error=0.005)).serves
    assert judge(0.97, 0, RULES, Controls(max_error=0.005)).serves
    assert not judge(0.90, 0, RULES, Controls(max_error=0.5)).serves
    assert not judge(1.0, 0, RULES, Controls(max_error=0.0)).serves


@pytest.mark.parametrize(
    ("vetoes", "name"), [(1, "numbers"), (0b11000, "ids"), (1 << 7, "negation"), (1 << 40, "veto")]
)
def test_a_veto_is_certain_and_names_its_guard(vetoes: int, name: str) -> None:
    judgement = judge(1.0, vetoes, Rules(max_error_rate=0.5), FREE)
    assert (judgement.probability, judgement.reason, judgement.serves) == (0.0, name, False)


def test_a_vetoed_best_match_does_not_hide_a_good_second() -> None:
    chosen = choose([Candidate(1, 0.99, 1), Candidate(2, 0.96, 0), Candidate(3, 0.97, 0)], RULES, FREE)
    assert isinstance(chosen, Choice)
    assert (chosen.entry_id, chosen.similarity, chosen.judgement.reason) == (3, 0.97, "alike")


def test_a_near_miss_tells_of_the_best_one() -> None:
    assert choose([Candidate(2, 0.94, 0), Candidate(1, 0.99, 1)], RULES, FREE) == NearMiss(1, 0.99, 0.0, "numbers")
    assert choose([Candidate(2, 0.90, 0)], RULES, FREE) == NearMiss(2, 0.90, pytest.approx(0.97), "below_bound")


def test_a_miss_tells_nothing_alike_from_nothing_there() -> None:
    assert choose([], RULES, FREE) == Miss("no_candidate")
    assert choose([Candidate(1, math.nan, 0)], RULES, FREE) == Miss("no_candidate")
    assert choose([Candidate(1, 0.79, 0)], RULES, FREE) == Miss("nothing_alike")


@given(CANDIDATES)
def test_the_choice_is_the_most_similar_that_passes_in_any_order(candidates: list[Candidate]) -> None:
    passing = [c for c in candidates if judge(c.similarity, c.vetoes, RULES, FREE).serves]
    chosen = choose(candidates, RULES, FREE)
    if passing:
        assert isinstance(chosen, Choice)
        assert chosen.similarity == max(c.similarity for c in passing)
        assert chosen.candidate in passing
    elif candidates and max(c.similarity for c in candidates) >= RULES.near_floor:
        assert isinstance(chosen, NearMiss)
        assert chosen.similarity == max(c.similarity for c in candidates)
    else:
        assert isinstance(chosen, Miss)
