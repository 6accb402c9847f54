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
from proxy.core.contrast import Noise
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


# The pair guard: it refuses, and speaks for a pair in one place alone.


def test_the_pair_guard_refuses_what_is_not_above_zero_and_the_next_candidate_is_tried() -> None:
    judge = judge_of()
    opinion = consider(judge, candidate(1, 0.99), candidate(2, 0.97))
    first = opinion.chosen
    assert first is not None
    assert objection(opinion, first, judge, can_verify=True) is None  # ask
    opinion.logits[1] = 0.0
    assert objection(opinion, first, judge, can_verify=True) == PAIR_GUARD
    opinion.refused[1] = PAIR_GUARD
    second = opinion.chosen
    assert second is not None
    assert second.candidate.entry_id == 2
    opinion.logits[2] = math.inf  # no opinion
    assert objection(opinion, second, judge, can_verify=True) == ""


def test_a_refusal_of_the_pair_guard_is_what_is_told_and_no_evidence() -> None:
    opinion = consider(judge_of(), candidate(1, 0.99), candidate(2, 0.85))
    opinion.refused[1] = PAIR_GUARD
    told = verdict_of(opinion, 0.8)
    assert isinstance(told, NearMiss)
    assert (told.entry_id, told.reason) == (1, PAIR_GUARD)
    assert opinion.decision is not None
    assert opinion.decision.candidate.entry_id == 2


def test_what_the_pair_guard_was_not_asked_about_any_more_is_refused() -> None:
    judge = judge_of()
    opinion = consider(judge, *(candidate(i, 0.99 - i / 1000) for i in range(GUARD_ASKS + 1)))
    for judged in opinion.judged[:GUARD_ASKS]:
        assert objection(opinion, judged, judge, can_verify=True) is None
        opinion.logits[judged.candidate.entry_id] = -1.0
    assert objection(opinion, opinion.judged[GUARD_ASKS], judge, can_verify=True) == PAIR_GUARD


def test_without_a_guard_likeness_alone_serves_nothing_and_the_operator_may_waive_it() -> None:
    judge = judge_of()
    opinion = consider(judge, candidate(1, 0.99))
    (judged,) = opinion.judged
    assert judged.standing is Standing.START
    assert objection(opinion, judged, judge, can_verify=False) == "no_guard"
    assert objection(opinion, judged, judge_of(pair_guard=False), can_verify=False) == ""
    judged.standing = Standing.PROVEN
    assert objection(opinion, judged, judge, can_verify=False) == ""


@given(logit=st.floats(allow_nan=False), similarity=st.floats(0.0, 1.0))
def test_no_logit_makes_anything_served_that_the_judge_would_not_serve(logit: float, similarity: float) -> None:
    opinion = consider(judge_of(), candidate(1, similarity))
    before = opinion.chosen
    opinion.logits[1] = logit
    assert opinion.chosen is before


def guarded(prior: float) -> Judge:
    """A judge whose pairs are wrong at `prior` where the guard is sure, and else twice as often."""
    return Judge(
        Rules(), Learner, LEVELS, prior=lambda _, logit, budget: (prior if logit > 4.0 else 2.0 * prior) <= budget
    )


def test_the_pair_guards_word_is_enough_where_the_measured_prior_is_within_the_budget() -> None:
    judge = guarded(0.006)
    opinion = consider(judge, candidate(1, 0.8))
    chosen = opinion.chosen
    assert chosen is not None
    assert objection(opinion, chosen, judge, can_verify=True) is None  # ask
    opinion.logits[1] = 5.0
    assert objection(opinion, chosen, judge, can_verify=True) == ""
    opinion.logits[1] = 3.0
    assert objection(opinion, chosen, judge, can_verify=True) == "below_bound"
    unguarded = judge_of(pair_guard=False)
    assert objection(opinion, chosen, unguarded, can_verify=True) == "below_bound"
    assert consider(guarded(0.02), candidate(1, 0.8)).chosen is None  # no word of the guard would be enough


def test_what_lies_behind_another_question_is_not_served_on_the_guards_word() -> None:
    judge = guarded(0.006)
    opinion = consider(judge, candidate(1, 0.8), candidate(2, 0.78))
    assert [judged.candidate.entry_id for judged in opinion.judged if judged.standing is not None] == [1]
    judge.join(entry_id=2, group_id=1)  # the answers of both were found to be the same
    opinion = consider(judge, candidate(1, 0.8), candidate(2, 0.78))
    assert [judged.group_id for judged in opinion.judged if judged.standing is not None] == [1]
    unlike = tokens.signature("How do I not reset the router of my office")
    opinion = consider(guarded(0.006), candidate(1, 0.9, unlike), candidate(2, 0.78))
    assert [judged.candidate.entry_id for judged in opinion.judged if judged.standing is not None] == [2]


def test_what_a_guard_knows_no_prior_overrules() -> None:
    other = tokens.signature("How do I not reset the router of my office")
    assert consider(guarded(0.0001), candidate(1, 0.97, other)).chosen is None


# Labels that err.


def noisy(judge: Judge, p_same: float, p_null: float | None = None, *, place: Place = HOME) -> None:
    opinion = consider(judge, candidate(1, 0.97), place=place)
    assert opinion.decision is not None
    judge.serve(place)
    found = comparison(
        opinion, opinion.decision, p_same=p_same, weight=1.0, served=True, comparer="c", p_null=p_null,
        source="audit", request_id="r", embedder="e", ts_ms=0,
    )  # fmt: skip
    judge.apply(found)


def noisy_judge() -> Judge:
    return Judge(Rules(), Learner, LEVELS, comparer="c", noise=Noise(100, 13, 100, 90))


def test_one_alarm_closes_nothing_and_a_mark_by_somebody_who_knows_does() -> None:
    judge = noisy_judge()
    epoch = judge.epoch
    noisy(judge, 0.1, 0.9)
    assert consider(judge, candidate(1, 0.97)).chosen is not None
    assert judge.epoch == epoch
    label(judge, consider(judge, candidate(1, 0.97)), same=False, served=True)
    assert consider(judge, candidate(1, 0.97)).chosen is None


def test_a_scope_in_which_every_hit_is_wrong_is_closed_within_thirty_audits_and_others_stay_open() -> None:
    """As the comparer errs: it overlooks one in ten, and calls 30 % of repeats different."""
    other = Place(b"o" * 32, "", "t", b"q" * 32)
    for seed in range(40):
        judge, rng = noisy_judge(), random.Random(seed)
        audits = 0
        while consider(judge, candidate(1, 0.97)).chosen is not None:
            noisy(judge, 0.1 if rng.random() < 0.9 else 0.9, 0.1 if rng.random() < 0.3 else 0.9)
            audits += 1
            assert audits <= 30
        assert consider(judge, candidate(1, 0.97), place=other).chosen is not None
        assert "more than 1 % is wrong" in judge.outlook(HOME, 0.01)


def test_alarms_as_often_as_repeats_alarm_close_nothing() -> None:
    judge, rng = noisy_judge(), random.Random(3)
    for _ in range(400):
        noisy(judge, 0.1 if rng.random() < 0.45 else 0.9, 0.1 if rng.random() < 0.45 else 0.9)
    assert consider(judge, candidate(1, 0.97)).chosen is not None
    level = next(row for row in judge.status() if row["level"] == "scope")
    assert level["comparer"]["false_alarm_rate"] == pytest.approx(0.45, abs=0.06)
    low, high = level["regions"]["alike"]["interval"]
    assert low == 0.0 < high


def test_labels_of_another_comparer_are_no_evidence() -> None:
    """A model that compares was set up: what was compared before, or without it, says nothing of its errors."""
    judge, rng = Judge(Rules(), Learner, LEVELS, comparer="a model", noise=Noise(20, 1, 20, 19)), random.Random(5)
    for _ in range(200):
        noisy(judge, 0.1 if rng.random() < 0.3 else 0.9, 0.9)
    assert judge.evidence(HOME, 0.01)["curve"] == []
    assert judge.evidence(HOME, 0.01)["comparer"]["repeats"] == 0
    assert consider(judge, candidate(1, 0.97)).chosen is not None


def test_a_judge_that_says_anything_changes_nothing() -> None:
    judge, rng = Judge(Rules(), Learner, LEVELS, comparer="c", noise=Noise(20, 1, 20, 19)), random.Random(4)
    for _ in range(300):
        noisy(judge, float(rng.random() < 0.5), float(rng.random() < 0.5))
    assert consider(judge, candidate(1, 0.97)).chosen is not None


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=25), st.sampled_from([0.01, 0.05]))
def test_a_wrong_mark_by_feedback_never_widens(steps: list[tuple[bool, bool, bool]], max_error: float) -> None:
    judge = noisy_judge()
    for alarm, null, marked in steps:
        before = consider(judge, candidate(1, 0.97), max_error=max_error)
        if marked:
            label(judge, before, same=False, served=True)
            after = consider(judge, candidate(1, 0.97), max_error=max_error)
            assert after.chosen is None or before.chosen is not None
            assert after.has_room <= before.has_room
            assert after.thresholds.proven >= before.thresholds.proven
        else:
            noisy(judge, 0.1 if alarm else 0.9, 0.1 if null else 0.9)
