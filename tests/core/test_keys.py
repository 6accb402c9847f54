"""Limits as arithmetic: windows tile time, budgets never let in more than they have, refusals say what and when."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import BadRequest
from proxy.core.identity import Credential, credential
from proxy.core.keys import (
    Budget,
    Key,
    Kind,
    Limit,
    Window,
    bounds_of,
    check_model,
    check_standing,
    digest_of,
    exhausted,
    over,
    read_expiry,
    read_limit,
    read_plan,
    shown,
    tenant_of_project,
    virtual_key_in,
)

NOON_MS = 1_795_348_800_000  # 2026-11-22 12:00 UTC
INSTANTS = st.integers(0, 4_102_444_800_000)


@given(st.sampled_from(Window), INSTANTS)
def test_windows_tile_time_without_gap_or_overlap(window, ts_ms):
    start_ms, end_ms = bounds_of(window, ts_ms)
    assert start_ms <= ts_ms < end_ms
    assert bounds_of(window, start_ms) == (start_ms, end_ms) == bounds_of(window, end_ms - 1)
    assert bounds_of(window, end_ms)[0] == end_ms


@given(INSTANTS)
def test_a_month_begins_on_its_first_day_in_utc(ts_ms):
    first, after = (datetime.fromtimestamp(ms / 1000, UTC) for ms in bounds_of(Window.MONTH, ts_ms))
    assert (first.day, first.hour, first.minute, after.day) == (1, 0, 0, 1)
    assert 28 <= (after - first).days <= 31


@pytest.mark.parametrize(
    ("kind", "text", "limit"),
    [
        (Kind.USD, "10/day", Limit(Kind.USD, 10_000_000_000, Window.DAY)),
        (Kind.USD, "0.000000001/minute", Limit(Kind.USD, 1, Window.MINUTE)),
        (Kind.USD, "0/month", Limit(Kind.USD, 0, Window.MONTH)),
        (Kind.REQUESTS, "100/minute", Limit(Kind.REQUESTS, 100, Window.MINUTE)),
        (Kind.TOKENS, "1000000/month", Limit(Kind.TOKENS, 1_000_000, Window.MONTH)),
    ],
)
def test_limits_are_read_exactly(kind, text, limit):
    assert read_limit(kind, text) == limit


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Kind.USD, text) for text in ("", "10", "10/week", "10/DAY", "-1/day", "1e3/day", "0.0000000001/day", "10 /day",
                                   "9999999999/day", "1/day/day", "NaN/day", "\u0661/day")]
    + [(Kind.REQUESTS, text) for text in ("0/day", "1.5/day", "1.0/day")],
)  # fmt: skip
def test_a_limit_that_says_something_else_is_refused_by_name(kind, text):
    with pytest.raises(BadRequest) as refused:
        read_limit(kind, text)
    assert (refused.value.code, refused.value.param) == ("invalid_value", f"limit_{kind.value}")


@pytest.mark.parametrize(
    ("nusd", "text"), [(1, "0.000000001 USD"), (0, "0 USD"), (10**10, "10 USD"), (10**11, "100 USD")]
)
def test_money_is_shown_exactly_and_shortly(nusd, text):
    assert shown(Kind.USD, nusd) == text


def test_a_key_ends_after_an_age_or_at_a_time():
    assert read_expiry("90d", NOON_MS) == NOON_MS + 90 * 86_400_000
    assert read_expiry("2027-01-01", NOON_MS) == 1_798_761_600_000
    assert read_expiry("2027-01-01T01:00+01:00", NOON_MS) == 1_798_761_600_000
    for text in ("0s", "2026-11-22T12:00", "soon", "9999999999d", "999999w", "2020-01-01", ""):
        with pytest.raises(BadRequest, match="expires"):
            read_expiry(text, NOON_MS)


@pytest.mark.parametrize("plan", ["exact", "exact,semantic", "+route,-semantic", "+hedge"])
def test_plans_are_words(plan):
    assert read_plan(plan) == plan


@pytest.mark.parametrize("plan", ["warp", "exact,+hedge", "++x", "x;y", "+exact,-exact"])
def test_other_plans_are_refused(plan):
    with pytest.raises(BadRequest, match="plan"):
        read_plan(plan)


def test_the_one_virtual_key_is_found_in_whatever_header():
    for name in (b"x-api-key", b"api-key", b"x-goog-api-key"):
        assert virtual_key_in(credential([(name, b"ibid-a")])) == b"ibid-a"
    both = Credential(((b"authorization", b"ibid-a"), (b"x-api-key", b"ibid-a")))
    assert virtual_key_in(both) == b"ibid-a"
    assert virtual_key_in(Credential(((b"authorization", b"sk-x"), (b"x-api-key", b"ibid-a")))) == b"ibid-a"
    assert virtual_key_in(Credential(((b"authorization", b"sk-ibid-x"),))) is None
    with pytest.raises(BadRequest) as refused:
        virtual_key_in(Credential(((b"authorization", b"ibid-a"), (b"x-api-key", b"ibid-b"))))
    assert refused.value.status == 401


def test_projects_are_tenants_of_their_own():
    assert tenant_of_project("red") == tenant_of_project("red") != tenant_of_project("blue")
    assert len(tenant_of_project("red")) == 64


def key(**changes):
    return Key(
        **{"id": "key_1", "digest": digest_of(b"ibid-a"), "project": "red", "name": "", "created_ms": 0, **changes}
    )


@pytest.mark.parametrize(
    ("made", "digest", "code"),
    [
        (key(revoked_ms=1), digest_of(b"ibid-a"), "key_revoked"),
        (key(expires_ms=NOON_MS), digest_of(b"ibid-a"), "key_expired"),
        (key(), digest_of(b"ibid-old"), "invalid_api_key"),
    ],
)
def test_a_key_that_does_not_stand_is_401_and_not_tried_again(made, digest, code):
    with pytest.raises(BadRequest) as refused:
        check_standing(made, digest, NOON_MS)
    assert (refused.value.status, refused.value.code, refused.value.should_retry) == (401, code, False)
    assert "ibid-" not in refused.value.message
    check_standing(key(expires_ms=NOON_MS + 1), digest_of(b"ibid-a"), NOON_MS)


def test_models_are_patterns_and_no_name_is_no_match():
    held = key(models=("gpt-4o*", "claude-?"))
    for model in ("gpt-4o", "gpt-4o-mini", "claude-3"):
        check_model(held, model)
    for model in ("gpt-5", "", "GPT-4o", "claude-35", "x-gpt-4o"):
        with pytest.raises(BadRequest) as refused:
            check_model(held, model)
        assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")
    check_model(key(), "")


def test_the_secret_is_not_in_a_keys_repr():
    assert digest_of(b"ibid-a").hex() not in repr(key())
    assert repr(digest_of(b"ibid-a")) not in repr(key())


# --- budgets --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 8)), max_size=60),
)
def test_money_is_overrun_by_no_more_than_the_answers_in_flight(amount, asked):
    """(estimate, actual, how many others begin before it ends): whatever comes, what is spent above the limit is less
    than what those in flight at the last admission cost; and where no estimate is too low, less than one estimate."""
    budget = Budget(Limit(Kind.USD, amount, Window.DAY))
    flying: list[tuple[int, int, int]] = []
    most_in_flight = 0
    for estimate, actual, others in asked:
        if not exhausted([budget], NOON_MS):
            assert budget.spent + budget.held < amount
            budget.hold(estimate)
            flying.append((estimate, actual, others))
            most_in_flight = max(most_in_flight, sum(cost for _, cost, _ in flying))
        for ended in [one for one in flying if one[2] <= 0]:
            flying.remove(ended)
            budget.let_go(budget.start_ms, ended[0])
            budget.book(NOON_MS, ended[1])
        flying = [(estimate, actual, others - 1) for estimate, actual, others in flying]
    for estimate, actual, _ in flying:
        budget.let_go(budget.start_ms, estimate)
        budget.book(NOON_MS, actual)
    assert budget.held == 0
    assert budget.spent <= max(amount - 1, 0) + most_in_flight
    if all(actual <= estimate for estimate, actual, _ in asked):
        assert budget.spent <= max(amount - 1, 0) + max([estimate for estimate, _, _ in asked], default=0)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), max_size=80))
def test_requests_are_never_more_than_allowed_in_any_window(amount, asked):
    budget = Budget(Limit(Kind.REQUESTS, amount, Window.MINUTE))
    now_ms, begun = NOON_MS, {}
    flying = []
    for pause_ms, ends in asked:
        now_ms += pause_ms
        if not exhausted([budget], now_ms):
            budget.hold(1)
            flying.append((budget.start_ms, now_ms))
            begun[budget.start_ms] = begun.get(budget.start_ms, 0) + 1
        if ends and flying:
            start_ms, ts_ms = flying.pop()
            budget.let_go(start_ms, 1)
            budget.book(ts_ms, 1)
        assert 0 <= budget.held
        assert budget.spent + budget.held == begun.get(budget.start_ms, 0)
    assert all(count <= amount for count in begun.values())


def test_a_budget_ends_exactly_at_the_nano_dollar():
    budget = Budget(Limit(Kind.USD, 300, Window.HOUR))
    for cost in (100, 199):
        assert not exhausted([budget], NOON_MS)
        budget.book(NOON_MS, cost)
    assert not exhausted([budget], NOON_MS)  # one is left
    budget.book(NOON_MS, 1)
    assert exhausted([budget], NOON_MS) == [budget]
    assert not exhausted([budget], NOON_MS + 3_600_000)  # the next hour


def test_what_began_before_the_window_does_not_count_in_it():
    budget = Budget(Limit(Kind.USD, 300, Window.HOUR))
    budget.turn(NOON_MS - 1)
    held_in = budget.start_ms
    budget.hold(200)
    budget.turn(NOON_MS)
    budget.hold(50)
    budget.let_go(held_in, 200)
    budget.book(NOON_MS - 1, 280)
    assert (budget.spent, budget.held) == (0, 50)


def test_a_clock_set_back_gives_no_second_budget():
    budget = Budget(Limit(Kind.REQUESTS, 1, Window.MINUTE))
    budget.turn(NOON_MS)
    budget.book(NOON_MS, 1)
    assert exhausted([budget], NOON_MS - 3_600_000) == [budget]


def test_what_is_read_counts_once_with_what_was_booked_meanwhile():
    budget = Budget(Limit(Kind.USD, 1000, Window.DAY))
    budget.turn(NOON_MS)
    budget.book(NOON_MS, 100)  # in the ledger already
    budget.read_begins()
    budget.book(NOON_MS, 7)  # not yet in what is read
    budget.read(budget.start_ms, 350)  # ours and another process's
    assert budget.spent == 357
    budget.read(budget.start_ms - 1, 5)  # of a window that is over
    assert budget.spent == 357


@pytest.mark.parametrize(
    ("limit", "now_ms", "told"),
    [
        (Limit(Kind.USD, 10**10, Window.DAY), NOON_MS, ("budget_exceeded", False, None)),
        (Limit(Kind.USD, 10**10, Window.MINUTE), NOON_MS, ("budget_exceeded", False, 60)),
        (Limit(Kind.REQUESTS, 5, Window.MINUTE), NOON_MS + 59_999, ("rate_limit_exceeded", True, 1)),
        (Limit(Kind.TOKENS, 5, Window.HOUR), NOON_MS, ("rate_limit_exceeded", False, None)),
        (Limit(Kind.TOKENS, 5, Window.HOUR), NOON_MS + 3_480_000, ("rate_limit_exceeded", True, 120)),
    ],
)
def test_a_refusal_says_which_limit_and_whether_waiting_helps(limit, now_ms, told):
    budget = Budget(limit)
    budget.turn(now_ms)
    budget.book(now_ms, limit.amount)
    error = over(budget, now_ms)
    assert error.status == 429
    assert (error.code, error.should_retry, error.retry_after_s) == told
    assert f"limit of {limit} is used up" in error.message
    assert "UTC" in error.message


def test_what_is_only_held_is_worth_another_try():
    budget = Budget(Limit(Kind.USD, 100, Window.DAY))
    budget.turn(NOON_MS)
    budget.hold(100)
    error = over(budget, NOON_MS)
    assert (error.code, error.should_retry, error.retry_after_s) == ("rate_limit_exceeded", True, 1)
    assert "under way" in error.message
