"""The judge: what it serves without evidence, how labels move it, and what it never does again."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index import tokens
from index.kernels import veto_bits
from index.learner import Learner
from index.levels import LEVELS
from proxy.core import policy
from proxy.core.model import Candidate, Comparison, Miss, NearMiss, Rules
from proxy.core.risk import Standing
from proxy.judging.judge import GUARD_ASKS, PAIR_GUARD, THICK, Judge, Opinion, Place, comparison, objection, verdict_of

HOME = Place(b"s" * 32, "", "t", b"q" * 32)
ASKED = tokens.signature("How do I reset the router of my office")
REWORDED = tokens.signature("How can I reset the router of my office")
OTHER = tokens.signature("How do I sell the router of my office")


def candidate(entry_id: int, similarity: float, stored: np.ndarray = REWORDED, asked: np.ndarray = ASKED) -> Candidate:
    return Candidate(entry_id, similarity, int(veto_bits(asked, stored)), stored)


def judge_of(**rules: float) -> Judge:
    return Judge(Rules(**rules), Learner, LEVELS)  # type: ignore[arg-type]


def consider(judge: Judge, *candidates: Candidate, place: Place = HOME, max_error: float = 0.01) -> Opinion:
    return judge.consider(place, ASKED, candidates, max_error)


def label(judge: Judge, opinion: Opinion, same: bool, *, served: bool = False) -> Comparison:
    decision = opinion.decision
    assert decision is not None
    found = comparison(
        opinion, decision, p_same=float(same), weight=1.0, served=served, source="audit" if served else "forward",
        request_id="r", embedder="e", ts_ms=0,
    )  # fmt: skip
    if served:
        judge.serve(opinion.place)
    judge.apply(found)
    return found


def test_the_names_of_the_vetoes_are_those_of_the_index() -> None:
    assert policy.GUARDS == tokens.GUARDS


def test_without_evidence_only_what_is_almost_the_same_is_served() -> None:
    judge = judge_of()
    served = consider(judge, candidate(1, 0.97))
    assert served.chosen is not None
    assert served.chosen.standing is Standing.START
    assert served.chosen.probability == pytest.approx(0.992)
    assert consider(judge, candidate(1, 0.949)).chosen is None
    assert consider(judge, candidate(1, 0.99, OTHER)).chosen is None
    assert consider(judge, candidate(1, 0.97), max_error=0.001).chosen is None


def test_what_is_not_served_names_its_reason() -> None:
    judge = judge_of()
    assert verdict_of(consider(judge), 0.8) == Miss("no_candidate")
    assert verdict_of(consider(judge, candidate(1, 0.7)), 0.8) == Miss("nothing_alike")
    below = verdict_of(consider(judge, candidate(1, 0.9)), 0.8)
    assert isinstance(below, NearMiss)
    assert (below.entry_id, below.reason) == (1, "below_bound")
    vetoed = verdict_of(consider(judge, candidate(1, 0.99, OTHER)), 0.8)
    assert isinstance(vetoed, NearMiss)
    assert vetoed.reason == "antonyms" or vetoed.reason == "substitution"
    assert verdict_of(consider(judge, candidate(1, 0.97), max_error=0.001), 0.8).reason == "budget_spent"


def test_a_vetoed_best_match_does_not_hide_a_good_second() -> None:
    chosen = consider(judge_of(), candidate(1, 0.99, OTHER), candidate(2, 0.96)).chosen
    assert chosen is not None
    assert chosen.candidate.entry_id == 2


def test_a_similarity_that_is_none_serves_nothing() -> None:
    assert consider(judge_of(), candidate(1, float("nan"))).chosen is None


def test_one_wrong_mark_closes_the_start_region_of_its_scope_at_once_and_evidence_opens_it_again() -> None:
    judge = judge_of()
    first = consider(judge, candidate(1, 0.97))
    label(judge, first, same=False, served=True)
    assert judge.epoch == 1
    assert consider(judge, candidate(1, 0.97)).chosen is None
    for _ in range(120):
        label(judge, consider(judge, candidate(1, 0.97)), same=True)
    assert consider(judge, candidate(1, 0.97)).chosen is not None


def test_a_tenants_wrong_marks_close_nothing_in_another_tenants_evidence_alone() -> None:
    judge = judge_of()
    for _ in range(40):
        label(judge, consider(judge, candidate(1, 0.97)), same=True)
    label(judge, consider(judge, candidate(1, 0.97)), same=False, served=True)
    other = Place(b"o" * 32, "", "other", b"q" * 32)
    for _ in range(60):
        label(judge, consider(judge, candidate(1, 0.97), place=other), same=True)
    assert consider(judge, candidate(1, 0.97), place=other).chosen is not None
    assert consider(judge, candidate(1, 0.97)).chosen is None


def taught(judge: Judge, place: Place, n: int, wrong_below: float, seed: int = 0) -> None:
    """Labels of a traffic in which what is alike by less than `wrong_below` is wrong."""
    rng = random.Random(seed)
    for i in range(n):
        similarity = rng.uniform(0.7, 0.99)
        opinion = consider(judge, candidate(i, similarity), place=place)
        label(judge, opinion, same=similarity >= wrong_below)


def test_evidence_widens_what_is_served_and_proves_it() -> None:
    judge = judge_of()
    assert consider(judge, candidate(1, 0.93)).chosen is None
    taught(judge, HOME, 1500, wrong_below=0.85)
    chosen = consider(judge, candidate(1, 0.93)).chosen
    assert chosen is not None
    assert chosen.standing is Standing.PROVEN
    assert consider(judge, candidate(1, 0.75)).chosen is None
    assert judge.evidence(HOME, 0.01)["level"] == "scope"


def test_what_the_pair_guard_would_refuse_trains_the_judge_and_is_no_evidence() -> None:
    judge = judge_of()
    taught(judge, HOME, 300, wrong_below=0.85)
    before, opinion = judge.status(), consider(judge, candidate(1, 0.97))
    assert opinion.decision is not None
    wrong = comparison(
        opinion, opinion.decision, p_same=0.0, weight=0.0, served=False, source="forward", request_id="r",
        embedder="e", ts_ms=0,
    )  # fmt: skip
    epoch = judge.epoch
    judge.apply(wrong)
    assert judge.status() == before
    assert judge.epoch == epoch
    assert consider(judge, candidate(1, 0.97)).judged[0].log_odds < opinion.judged[0].log_odds
    judge.correct(wrong, 1.0)
    assert judge.status() == before


def test_a_thin_scope_is_judged_by_the_levels_above_it() -> None:
    judge = judge_of()
    taught(judge, HOME, THICK + 500, wrong_below=0.85)
    sibling = Place(b"n" * 32, "", "t", b"q" * 32)
    assert consider(judge, candidate(1, 0.94), place=sibling).level == "namespace"
    stranger = Place(b"x" * 32, "", "x", b"q" * 32)
    assert consider(judge, candidate(1, 0.94), place=stranger).level == "installation"


def test_more_similar_is_never_less_probable() -> None:
    judge = judge_of()
    taught(judge, HOME, 400, wrong_below=0.9)
    odds = [consider(judge, candidate(1, s)).judged[0].log_odds for s in np.linspace(0.6, 0.999, 40)]
    assert odds == sorted(odds)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0.62, 0.999), st.booleans()), min_size=1, max_size=40), st.integers(0, 3))
def test_no_bound_ever_falls_on_a_wrong_mark(steps: list[tuple[float, bool]], seed: int) -> None:
    judge = judge_of()
    taught(judge, HOME, 150, wrong_below=0.85, seed=seed)
    for similarity, same in steps:
        before, opinion = consider(judge, candidate(9, 0.9)).thresholds, consider(judge, candidate(9, similarity))
        label(judge, opinion, same=same)
        after = consider(judge, candidate(9, 0.9)).thresholds
        if not same:
            assert after.proven >= before.proven
            assert after.provisional >= before.provisional


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=30))
def test_a_refused_pair_stays_refused_until_it_is_allowed(steps: list[tuple[int, int, bool]]) -> None:
    judge, refused = judge_of(), set()
    for asked, kept, refuse in steps:
        pair = bytes([asked]) * 32, bytes([kept]) * 32
        if refuse:
            judge.refuse(*pair)
            refused.add(pair)
        else:
            judge.allow(*pair)
            refused.discard(pair)
        for a in range(4):
            for k in range(4):
                probe = bytes([a]) * 32, bytes([k]) * 32
                assert judge.is_refused(*probe) is (probe in refused)


def test_what_one_judge_learned_another_learns_from_its_rows() -> None:
    judge, again = judge_of(), judge_of()
    rng = random.Random(1)
    for i in range(300):
        similarity = rng.uniform(0.7, 0.99)
        found = label(judge, consider(judge, candidate(i, similarity)), same=similarity >= 0.85)
        again.apply(found)
    one, other = consider(judge, candidate(1, 0.93)), consider(again, candidate(1, 0.93))
    assert one.thresholds == other.thresholds
    assert one.judged[0].log_odds == pytest.approx(other.judged[0].log_odds, abs=1e-3)


def test_entries_with_one_answer_are_one_candidate() -> None:
    judge = judge_of()
    judge.enter(HOME, 1, 1)
    judge.enter(HOME, 2, 1)
    opinion = consider(judge, candidate(2, 0.97), candidate(1, 0.96), candidate(3, 0.9))
    assert [judged.group_id for judged in opinion.judged] == [1, 3]
    assert opinion.judged[0].candidate.entry_id == 2


def test_what_comparing_overlooks_is_taken_off_the_budget() -> None:
    strict = Judge(Rules(), Learner, LEVELS, sensitivity=0.5)
    assert consider(judge_of(), candidate(1, 0.97)).chosen is not None
    assert consider(strict, candidate(1, 0.97)).chosen is None


# The pair guard: it refuses, and never speaks for anything.


def test_the_pair_guard_refuses_what_is_not_above_zero_and_the_next_candidate_is_tried() -> None:
    opinion = consider(judge_of(), candidate(1, 0.99), candidate(2, 0.97))
    first = opinion.chosen
    assert first is not None
    assert objection(opinion, first, Rules(), can_verify=True) is None  # ask
    opinion.logits[1] = 0.0
    assert objection(opinion, first, Rules(), can_verify=True) == PAIR_GUARD
    opinion.refused[1] = PAIR_GUARD
    second = opinion.chosen
    assert second is not None
    assert second.candidate.entry_id == 2
    opinion.logits[2] = math.inf  # no opinion
    assert objection(opinion, second, Rules(), can_verify=True) == ""


def test_a_refusal_of_the_pair_guard_is_what_is_told_and_no_evidence() -> None:
    opinion = consider(judge_of(), candidate(1, 0.99), candidate(2, 0.85))
    opinion.refused[1] = PAIR_GUARD
    told = verdict_of(opinion, 0.8)
    assert isinstance(told, NearMiss)
    assert (told.entry_id, told.reason) == (1, PAIR_GUARD)
    assert opinion.decision is not None
    assert opinion.decision.candidate.entry_id == 2


def test_what_the_pair_guard_was_not_asked_about_any_more_is_refused() -> None:
    opinion = consider(judge_of(), *(candidate(i, 0.99 - i / 1000) for i in range(GUARD_ASKS + 1)))
    for judged in opinion.judged[:GUARD_ASKS]:
        assert objection(opinion, judged, Rules(), can_verify=True) is None
        opinion.logits[judged.candidate.entry_id] = -1.0
    assert objection(opinion, opinion.judged[GUARD_ASKS], Rules(), can_verify=True) == PAIR_GUARD


def test_without_a_guard_likeness_alone_serves_nothing_and_the_operator_may_waive_it() -> None:
    opinion = consider(judge_of(), candidate(1, 0.99))
    (judged,) = opinion.judged
    assert judged.standing is Standing.START
    assert objection(opinion, judged, Rules(), can_verify=False) == "no_guard"
    assert objection(opinion, judged, Rules(pair_guard=False), can_verify=False) == ""
    judged.standing = Standing.PROVEN
    assert objection(opinion, judged, Rules(), can_verify=False) == ""


@given(logit=st.floats(allow_nan=False), similarity=st.floats(0.0, 1.0))
def test_no_logit_makes_anything_served_that_the_judge_would_not_serve(logit: float, similarity: float) -> None:
    opinion = consider(judge_of(), candidate(1, similarity))
    before = opinion.chosen
    opinion.logits[1] = logit
    assert opinion.chosen is before
