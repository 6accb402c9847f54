"""Evidence in, bounds out: valid at every time at once, narrowed at once, never risking what the account cannot pay."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import risk
from proxy.core.risk import Account, Standing, Thresholds

RATES = st.floats(0.001, 0.5)
COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


class Counted(NamedTuple):
    n: list[float]
    wrong: list[float]
    weighted: list[float]
    weighted_wrong: list[float]


def counted(n: list[float], wrong: list[float]) -> Counted:
    return Counted(n, wrong, n, wrong)


@given(COUNTS, st.sampled_from([0.01, 0.1, 0.3]))
def test_the_bound_lies_above_the_mean_and_a_stricter_one_lies_higher(counts: tuple[int, int], alpha: float) -> None:
    n, wrong = counts
    bound = risk.upper_bound(n, wrong, alpha)
    assert wrong / n <= bound <= 1.0
    assert risk.upper_bound(n, wrong, alpha / 2) >= bound
    assert risk.certifies(n, wrong, min(bound + 1e-6, 0.999999), alpha) or bound > 0.9999


@given(COUNTS)
def test_a_right_decision_lowers_the_bound_and_a_wrong_one_raises_it(counts: tuple[int, int]) -> None:
    n, wrong = counts
    before = risk.upper_bound(n, wrong, 0.1)
    assert risk.upper_bound(n + 1, wrong, 0.1) <= before + 1e-9
    assert risk.upper_bound(n + 1, wrong + 1, 0.1) >= before - 1e-9


@pytest.mark.parametrize(("n", "wrong", "proves"), [(229, 0, False), (460, 0, True), (460, 4, False), (3000, 12, True)])
def test_one_percent_needs_hundreds_of_decisions(n: int, wrong: int, proves: bool) -> None:
    assert risk.certifies(n, wrong, 0.01, 0.1) is proves


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_looking_after_every_label_does_not_break_the_bound(rate: float) -> None:
    """Of many streams whose true rate is the budget, hardly any is ever certified, however often it is looked at."""
    fooled = 0
    for seed in range(200):
        rng = random.Random(seed)
        wrong = 0
        for n in range(1, 1501):
            wrong += rng.random() < rate
            if n % 5 == 0 and risk.certifies(n, wrong, rate, 0.1):
                fooled += 1
                break
    assert fooled <= 0.1 * 200 + 13  # three standard deviations


def test_what_is_no_rate_is_never_evidence() -> None:
    assert risk.log_evidence(100, 0, 0.0) == 0.0
    assert risk.upper_bound(0, 0, 0.1) == 1.0
    assert not risk.certifies(0, 0, 0.5, 0.1)


def test_the_loosest_proven_level_and_the_loosest_within_the_mean() -> None:
    levels = [0.0, 1.0, 2.0, 3.0]
    found = risk.thresholds_of(levels, counted([900, 700, 600, 500], [30, 5, 0, 0]), 0.01, 0.1)
    assert found == Thresholds(proven=2.0, provisional=1.0)
    few = risk.thresholds_of(levels, counted([99, 40, 20, 10], [0, 0, 0, 0]), 0.01, 0.1)
    assert few == Thresholds(math.inf, math.inf)
    assert risk.thresholds_of(levels, counted([0, 0, 0, 0], [0, 0, 0, 0]), 0.5, 0.1) == Thresholds()


def test_labels_of_audits_stand_for_the_hits_that_were_not_audited() -> None:
    """10 of 100 forwarded were wrong, 0 of 20 audited that stand for 400: the mean is 2.1 %, not 8 %."""
    found = risk.thresholds_of([0.0], Counted([120], [10], [500], [10]), 0.025, 0.1)
    assert found == Thresholds(math.inf, 0.0)
    assert risk.thresholds_of([0.0], counted([120], [10]), 0.025, 0.1) == Thresholds()


THRESHOLDS = st.builds(Thresholds, st.floats(-1, 9), st.floats(-1, 9))


@given(THRESHOLDS, THRESHOLDS)
def test_narrowing_never_widens(a: Thresholds, b: Thresholds) -> None:
    both = a.narrowed(b)
    assert both.proven >= max(a.proven, b.proven)
    assert both.provisional >= max(a.provisional, b.provisional)


LABELS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=60)


@given(LABELS, st.sampled_from([0.005, 0.01, 0.02, 0.05]))
def test_an_account_pays_no_more_wrong_hits_than_its_budget_and_credit(
    labels: list[tuple[bool, bool, bool]], max_error: float
) -> None:
    account = Account()
    for wrong, audited, near in labels:
        if not account.has_room(max_error):
            break
        account.hits += 1
        if audited:
            account.label(float(wrong), 1.0, served=True, would_be=True, near_same=near)
    assert account.counted_wrong <= max_error * account.hits + risk.CREDIT_WRONG + 1


def test_an_overdrawn_account_opens_again_when_what_it_refuses_proves_right() -> None:
    account = Account()
    for _ in range(5):
        account.hits += 1
        account.label(1.0, 1.0, served=True, would_be=True, near_same=False)
    assert not account.has_room(0.01)
    account.hits += 400  # served meanwhile because proven
    for _ in range(800):
        account.label(0.0, 1.0, served=False, would_be=True, near_same=False)
    assert account.has_room(0.02)


def test_credit_is_paid_back_as_the_budget_grows() -> None:
    """Over many hits what counts is the budget alone: 0.1 % more than it at 5,000 hits and 1 % closes the account."""
    young = Account(hits=50, audited=50, counted_wrong=4.0)
    assert young.has_room(0.01)
    old = Account(hits=5000, audited=5000, counted_wrong=50.0)
    assert old.has_room(0.01)
    old.counted_wrong = 51.0
    assert not old.has_room(0.01)


def test_a_correction_takes_back_what_a_label_did() -> None:
    account = Account(hits=1)
    account.label(1.0, 2.0, served=True, would_be=True, near_same=True)
    before = account.start_rate
    account.correct(1.0, 0.0, 2.0, served=True, would_be=True, near_same=True)
    assert (account.counted_wrong, account.would_be_wrong, account.start_wrong) == (0.0, 0.0, 0.0)
    assert account.start_rate < before


def test_the_start_region_serves_one_percent_at_once_and_half_a_percent_after_fifteen_right() -> None:
    account = Account()
    assert 0.005 < account.start_rate <= 0.01
    for _ in range(15):
        account.label(0.0, 1.0, served=False, would_be=False, near_same=True)
    assert account.start_rate <= 0.005
    account.label(1.0, 1.0, served=True, would_be=True, near_same=True)
    assert account.start_rate > 0.02


@pytest.mark.parametrize(
    ("log_odds", "near_same", "vetoed", "starts", "standing"),
    [
        (4.0, False, False, False, Standing.PROVEN),
        (3.9, False, False, False, Standing.PROVISIONAL),
        (1.9, True, False, True, Standing.START),
        (1.9, True, False, False, None),
        (1.9, False, False, True, None),
        (9.0, True, True, True, None),
    ],
)
def test_how_a_candidate_stands(
    log_odds: float, near_same: bool, vetoed: bool, starts: bool, standing: Standing | None
) -> None:
    bounds = Thresholds(proven=4.0, provisional=2.0)
    found = risk.standing_of(log_odds, near_same=near_same, vetoed=vetoed, thresholds=bounds, starts=starts)
    assert found is standing


def test_audits_thin_out_with_evidence_and_stop_when_none_are_wanted() -> None:
    fresh, known = Account(), Account(would_be=600.0, audited=300.0)
    assert risk.audit_share(Standing.START, fresh, 0.05) == 1.0
    assert risk.audit_share(Standing.PROVISIONAL, known, 0.05) == pytest.approx(0.1)
    assert risk.audit_share(Standing.PROVEN, fresh, 0.05) == 1.0
    assert risk.audit_share(Standing.PROVEN, known, 0.05) == 0.05
    assert risk.audit_share(Standing.START, fresh, 0.0) == 0.0
