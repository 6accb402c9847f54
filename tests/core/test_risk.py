"""Evidence in, bounds out: valid at every time at once, narrowed at once, never risking what the account cannot pay."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import risk
from proxy.core.contrast import Noise, Pairs
from proxy.core.risk import ALIKE, CERTAIN, NORMAL, Account, Doubt, Labels, Region, Standing, Thresholds

RATES = st.floats(0.001, 0.5)
COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


class Counted(NamedTuple):
    n: list[float]
    wrong: list[float]
    noisy: list[float]
    alarms: list[float]
    weighted: list[float]
    weighted_wrong: list[float]
    weighted_noisy: list[float]
    weighted_alarms: list[float]


def counted(n: list[float], wrong: list[float]) -> Counted:
    return weighted(n, wrong, n, wrong)


def weighted(n: list[float], wrong: list[float], standing_for: list[float], wrong_for: list[float]) -> Counted:
    none = [0.0] * len(n)
    return Counted(n, wrong, none, none, standing_for, wrong_for, none, none)


def noisy(n: list[float], alarms: list[float]) -> Counted:
    none = [0.0] * len(n)
    return Counted(none, none, n, alarms, none, none, n, alarms)


@given(COUNTS, st.sampled_from([0.01, 0.1, 0.3]))
def test_the_bound_lies_above_the_mean_and_a_stricter_one_lies_higher(counts: tuple[int, int], alpha: float) -> None:
    n, wrong = counts
    bound = risk.upper_bound(n, wrong, alpha)
    assert wrong / n <= bound <= 1.0
    assert risk.upper_bound(n, wrong, alpha / 2) >= bound
    assert risk.certifies(Labels(n, wrong), min(bound + 1e-6, 0.999999), alpha) or bound > 0.9999


@given(COUNTS)
def test_a_right_decision_lowers_the_bound_and_a_wrong_one_raises_it(counts: tuple[int, int]) -> None:
    n, wrong = counts
    before = risk.upper_bound(n, wrong, 0.1)
    assert risk.upper_bound(n + 1, wrong, 0.1) <= before + 1e-9
    assert risk.upper_bound(n + 1, wrong + 1, 0.1) >= before - 1e-9


@pytest.mark.parametrize(("n", "wrong", "proves"), [(229, 0, False), (460, 0, True), (460, 4, False), (3000, 12, True)])
def test_one_percent_needs_hundreds_of_decisions(n: int, wrong: int, proves: bool) -> None:
    assert risk.certifies(Labels(n, wrong), 0.01, 0.1) is proves


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_looking_after_every_label_does_not_break_the_bound(rate: float) -> None:
    """Of many streams whose true rate is the budget, hardly any is ever certified, however often it is looked at."""
    fooled = 0
    for seed in range(200):
        rng = random.Random(seed)
        wrong = 0
        for n in range(1, 1501):
            wrong += rng.random() < rate
            if n % 5 == 0 and risk.certifies(Labels(n, wrong), rate, 0.1):
                fooled += 1
                break
    assert fooled <= 0.1 * 200 + 13  # three standard deviations


def test_what_is_no_rate_is_never_evidence() -> None:
    assert risk.log_evidence(Labels(100), 0.0) == 0.0
    assert risk.upper_bound(0, 0, 0.1) == 1.0
    assert not risk.certifies(Labels(), 0.5, 0.1)


def test_the_loosest_proven_level_and_the_loosest_within_the_mean() -> None:
    levels = [0.0, 1.0, 2.0, 3.0]
    found = risk.thresholds_of(levels, counted([900, 700, 600, 500], [30, 5, 0, 0]), 0.01, 0.1)
    assert found == Thresholds(proven=2.0, provisional=1.0)
    few = risk.thresholds_of(levels, counted([99, 40, 20, 10], [0, 0, 0, 0]), 0.01, 0.1)
    assert few == Thresholds(math.inf, math.inf)
    assert risk.thresholds_of(levels, counted([0, 0, 0, 0], [0, 0, 0, 0]), 0.5, 0.1) == Thresholds()


def test_labels_of_audits_stand_for_the_hits_that_were_not_audited() -> None:
    """10 of 100 forwarded were wrong, 0 of 20 audited that stand for 400: the mean is 2.1 %, not 8 %."""
    found = risk.thresholds_of([0.0], weighted([120], [10], [500], [10]), 0.025, 0.1)
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
            account.label(float(wrong), 1.0, served=True, would_be=True, region=ALIKE if near else "")
    assert account.counted_wrong <= max_error * account.hits + risk.CREDIT_WRONG + 1


def test_an_overdrawn_account_opens_again_when_what_it_refuses_proves_right() -> None:
    account = Account()
    for _ in range(5):
        account.hits += 1
        account.label(1.0, 1.0, served=True, would_be=True, region="")
    assert not account.has_room(0.01)
    account.hits += 400  # served meanwhile because proven
    for _ in range(800):
        account.label(0.0, 1.0, served=False, would_be=True, region="")
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
    account.label(1.0, 2.0, served=True, would_be=True, region=ALIKE)
    before = account.alike.rate(0.008)
    account.correct(1.0, 0.0, 2.0, served=True, would_be=True, region=ALIKE)
    assert (account.counted_wrong, account.would_be_wrong, account.alike.wrong) == (0.0, 0.0, 0.0)
    assert account.alike.rate(0.008) < before


def test_the_start_region_serves_one_percent_at_once_and_half_a_percent_after_fifteen_right() -> None:
    account, prior = Account(), risk.prior_of(ALIKE, Region(), 0.01)
    assert 0.005 < account.alike.rate(prior) <= 0.01
    for _ in range(15):
        account.label(0.0, 1.0, served=False, would_be=False, region=ALIKE)
    assert account.alike.rate(prior) <= 0.005
    account.label(1.0, 1.0, served=True, would_be=True, region=ALIKE)
    assert account.alike.rate(prior) > 0.02


def test_other_scopes_are_a_prior_and_no_verdict() -> None:
    """Bad ones make a new scope more cautious and do not close it; good ones open it for a tighter budget."""
    bad, good = Region(n=500, wrong=100), Region(n=500, wrong=0)
    assert risk.prior_of(ALIKE, bad, 0.01) == 0.01
    assert risk.prior_of(ALIKE, good, 0.01) < 0.001
    assert risk.prior_of(ALIKE, bad, 0.001) == risk.prior_of(ALIKE, Region(), 0.001)  # was closed, and stays so


@given(st.floats(0.0, 0.4), st.floats(0.5, 1.0), st.floats(0.002, 0.2))
def test_a_noisy_label_counts_on_average_for_what_is_true(right: float, wrong: float, rate: float) -> None:
    silent, alarm = Doubt(right, wrong).values
    alarms = rate * wrong + (1.0 - rate) * right
    assert alarms * alarm + (1.0 - alarms) * silent == pytest.approx(rate)
    assert CERTAIN.values == (0.0, 1.0)


@pytest.mark.parametrize(("right", "wrong"), [(0.13, 0.9), (0.45, 0.9)])
def test_noisy_labels_at_the_budgets_own_rate_prove_nothing(right: float, wrong: float) -> None:
    fooled, rate = 0, 0.02
    for seed in range(100):
        rng, alarms = random.Random(seed), 0
        for n in range(1, 1001):
            alarms += rng.random() < (wrong if rng.random() < rate else right)
            if n % 10 == 0 and risk.certifies(Labels(noisy=n, alarms=alarms), rate, 0.1, Doubt(right, wrong)):
                fooled += 1
                break
    assert fooled <= 0.1 * 100 + 9  # three standard deviations


def test_what_alarms_without_known_noise_counts_as_wrong() -> None:
    assert risk.thresholds_of([0.0], noisy([600], [80]), 0.05, 0.1) == Thresholds()
    assert risk.thresholds_of([0.0], noisy([600], [0]), 0.05, 0.1) == Thresholds(0.0, 0.0)
    few_seen = risk.doubt_of(Noise(10, 5, 100, 90), Noise(10, 5), 0.1)
    assert few_seen.right < 0.25 < Noise(10, 5).false_alarm_rate


@pytest.mark.parametrize(
    ("log_odds", "region", "vetoed", "opened", "standing"),
    [
        (4.0, "", False, "", Standing.PROVEN),
        (3.9, "", False, "", Standing.PROVISIONAL),
        (3.9, NORMAL, False, NORMAL, Standing.NORMAL),
        (3.9, NORMAL, False, ALIKE, Standing.PROVISIONAL),
        (1.9, ALIKE, False, ALIKE, Standing.START),
        (1.9, ALIKE, False, NORMAL, None),
        (1.9, "", False, ALIKE, None),
        (9.0, ALIKE, True, ALIKE, None),
    ],
)
def test_how_a_candidate_stands(
    log_odds: float, region: str, vetoed: bool, opened: str, standing: Standing | None
) -> None:
    bounds, opened_regions = Thresholds(proven=4.0, provisional=2.0), frozenset({opened})
    found = risk.standing_of(log_odds, region=region, vetoed=vetoed, thresholds=bounds, open_regions=opened_regions)
    assert found is standing


def test_audits_thin_out_with_evidence_and_stop_when_none_are_wanted() -> None:
    fresh, known = Account(), Account(would_be=600.0, audited=300.0)
    assert share_of(Standing.START, fresh) == 1.0
    assert share_of(Standing.PROVISIONAL, known) == pytest.approx(0.1)
    assert share_of(Standing.PROVEN, fresh) == 1.0
    assert share_of(Standing.PROVEN, known) == 0.05
    assert share_of(Standing.START, fresh, least=0.0) == 0.0


def test_pairs_thin_audits_out_and_an_alarming_region_is_audited_whole() -> None:
    calm, alarming = Account(), Account()
    calm.pair(Pairs(even=18.0), ALIKE)
    alarming.pair(Pairs(more=6.0, even=30.0), ALIKE)
    assert share_of(Standing.START, calm, least=0.001) == pytest.approx(0.01)
    assert share_of(Standing.START, alarming) == 1.0


def test_a_wording_that_is_asked_again_is_audited_sooner() -> None:
    calm = Account()
    calm.pair(Pairs(even=18.0), ALIKE)
    assert share_of(Standing.START, calm, least=0.001, uses=4) == pytest.approx(0.16)
    assert share_of(Standing.START, calm, least=0.001, uses=16) == 1.0
    assert share_of(Standing.PROVEN, Account(audited=300.0), least=0.05, uses=4) == pytest.approx(0.2)


def share_of(standing: Standing, account: Account, least: float = 0.05, uses: int = 1) -> float:
    alarm = account.alike.alarm(0.01, Noise(100, 1, 100, 90))
    return risk.audit_share(standing, account, ALIKE, alarm, 0.1, least, uses)
