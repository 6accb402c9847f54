"""The share of wrong look-alikes from comparisons that err, and what is advised of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.contrast import Noise
from proxy.core.hindsight import UNKNOWN, Seen, Share, advice, share_wrong, shown
from proxy.core.risk import Labels

MEASURED = Noise(769.0, 145.0, 1597.0, 1303.0)
ALPHA = 0.1
counts = st.integers(0, 400)


def test_without_a_comparison_nothing_is_known() -> None:
    assert share_wrong(Labels(), MEASURED, Noise(), ALPHA) == UNKNOWN
    assert (UNKNOWN.low, UNKNOWN.high) == (0.0, 1.0)


@given(counts, counts, counts, counts, counts, counts)
def test_the_interval_holds_the_estimate(n: int, wrong: int, noisy: int, alarms: int, repeats: int, false: int) -> None:
    found = Labels(n, min(wrong, n), noisy, min(alarms, noisy))
    seen = Noise(repeats, min(false, repeats))
    share = share_wrong(found, seen.after(MEASURED), seen, ALPHA)
    assert 0.0 <= share.low <= share.estimate <= share.high <= 1.0
    assert share.compared == n + noisy


@given(st.integers(1, 300), st.integers(0, 300))
def test_more_alarms_never_look_better(noisy: int, alarms: int) -> None:
    less, more = (
        share_wrong(Labels(10, 0, noisy, min(count, noisy)), MEASURED, Noise(100, 20), ALPHA)
        for count in (alarms, alarms + 1)
    )
    assert more.estimate >= less.estimate
    assert more.high >= less.high - 1e-9
    assert more.low >= less.low - 1e-9


def test_alarms_as_frequent_as_among_repeats_of_one_question_are_no_wrong_answers() -> None:
    seen = Noise(repeats=400.0, false_alarms=120.0)
    share = share_wrong(Labels(noisy=400.0, alarms=120.0), seen.after(MEASURED), seen, ALPHA)
    assert share.estimate < 0.02
    assert share.low == 0.0
    naive = share_wrong(Labels(noisy=400.0, alarms=120.0), Noise(1e6, 0.0, 1e6, 1e6), seen, ALPHA)
    assert naive.estimate > 0.25  # what they would say of a comparer that does not err


@pytest.mark.parametrize("wrong", [0.0, 0.02, 0.2, 0.9])
@pytest.mark.parametrize(("false", "misses"), [(0.05, 0.1), (0.35, 0.2)])
def test_the_truth_is_in_the_interval_as_often_as_promised(wrong: float, false: float, misses: float) -> None:
    chance = random.Random(f"{wrong} {false}")
    noise = Noise(differing=400.0, alarms=400.0 * (1 - misses))
    rounds, inside = 100, 0
    for _ in range(rounds):
        seen = Noise(150.0, float(sum(chance.random() < false for _ in range(150))))
        equal = sum(chance.random() < 0.3 for _ in range(200))
        noisy = 200 - equal
        share_of_noisy = wrong * 200 / noisy if wrong * 200 <= noisy else 1.0
        alarms = sum(
            chance.random() < (1 - misses if chance.random() < share_of_noisy else false) for _ in range(noisy)
        )
        share = share_wrong(Labels(equal, 0.0, noisy, alarms), seen.plus(noise), seen, ALPHA)
        inside += share.low <= share_of_noisy * noisy / 200 <= share.high
    assert inside >= (1 - ALPHA) * rounds


def seen(share: Share = UNKNOWN, *, exact: int = 5, alike: int = 5, looked_up: int = 20, shadow: bool = True) -> Seen:
    return Seen(looked_up, exact, alike, share, 0.01, shadow, "no_candidate")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (seen(looked_up=0), "Nothing was looked up"),
        (seen(exact=0, alike=0), "mostly for the reason no_candidate"),
        (seen(alike=0), "start without --shadow"),
        (seen(alike=0, shadow=False), "nothing needs to be done"),
        (seen(), "No look-alike was compared yet"),
        (seen(Share(900, 0.001, 0.0, 0.008)), "within the budget of 1 %: start without --shadow"),
        (seen(Share(900, 0.2, 0.1, 0.3)), "set cache.semantic = false and start without --shadow"),
        (seen(Share(90, 0.005, 0.0, 0.1)), "likely within the budget of 1 %, not proven yet"),
        (seen(Share(90, 0.02, 0.0, 0.1)), "perhaps above the budget of 1 %; stay in shadow"),
        (seen(Share(90, 0.02, 0.0, 0.1), shadow=False), "perhaps above the budget of 1 %"),
    ],
)
def test_advice_is_one_sentence_that_says_what_to_do(given: Seen, told: str) -> None:
    said = advice(given)
    assert told in said
    assert said.endswith(".")
    assert "\n" not in said


def test_a_share_is_told_in_per_cent() -> None:
    assert shown(Share(1, 0.004, 0.0, 0.213)) == "0.4 % (0 to 21 %)"
