"""The waterfall balances to the nano-dollar, whatever happened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.model import Usage
from proxy.core.saving import (
    CALL_COLUMNS,
    FAMILIES,
    REQUEST_COLUMNS,
    SAVING_COLUMNS,
    Settlement,
    day_of,
    settle,
)
from tests.rows import NOON_MS, call, hit, list_price, outcome

tokens = st.integers(0, 10**9)
usages = st.none() | st.builds(Usage, tokens, tokens, tokens, tokens, tokens, tokens)
calls = st.builds(
    call,
    st.uuids().map(str),
    upstream=st.sampled_from(["openai", "edge"]),
    model=st.sampled_from(["m", "m-2026-01-01", "free"]),
    purpose=st.sampled_from(["answer", "hedge", "audit", "embedding", "shadow", "prefetch", "race", "unheard-of"]),
    tier=st.sampled_from(["default", "flex", "batch", "priority"]),
    won=st.booleans(),
    usage=usages,
    usage_basis=st.sampled_from(["measured", "estimated", "none"]),
    status=st.sampled_from([0, 200, 429, 500]),
    shaped_by=st.lists(
        st.sampled_from(
            [
                "hybrid.route",
                "hybrid.cascade",
                "edge.local",
                "spec.race",
                "cache.prefix",
                "spec.predict",
                "batch.flex",
                "spec.hedge",
            ]
        ),
        max_size=4,
        unique=True,
    ).map(tuple),
)
outcomes = st.builds(
    outcome,
    st.uuids().map(str),
    mechanism=st.none()
    | st.sampled_from(["cache.exact", "cache.semantic", "stream.coalesce", "edge.offline", "cache.stale-if-error"]),
    tier=st.sampled_from(["default", "flex", "priority"]),
    model_requested=st.sampled_from(["m", "free"]),
    outcome=st.sampled_from(["ok", "error", "cancelled"]),
    cache_status=st.sampled_from(["HIT", "MISS", "BYPASS", "SHADOW"]),
    usage=usages,
    calls=st.lists(calls, max_size=5).map(tuple),
    baseline_ms=st.none() | st.floats(0, 1e6),
)


def request_of(settled: Settlement) -> dict[str, object]:
    return dict(zip(REQUEST_COLUMNS, settled.request, strict=True))


def steps_of(settled: Settlement) -> list[dict[str, object]]:
    return [dict(zip(SAVING_COLUMNS, row, strict=True)) for row in settled.savings]


@given(outcomes)
def test_steps_sum_exactly_to_baseline_minus_actual(any_outcome):
    settled = settle(any_outcome, list_price)
    row, steps = request_of(settled), steps_of(settled)
    assert row["baseline_nusd"] - row["actual_nusd"] == sum(step["saved_nusd"] for step in steps)
    costs = [dict(zip(CALL_COLUMNS, line, strict=True))["cost_nusd"] for line in settled.calls]
    assert row["actual_nusd"] == sum(costs)
    running = row["baseline_nusd"]
    for number, step in enumerate(steps):
        assert step["step"] == number
        assert step["before_nusd"] - step["after_nusd"] == step["saved_nusd"]
        assert step["before_nusd"] == running
        assert step["family"] == FAMILIES[step["mechanism"].partition(".")[0]]
        running = step["after_nusd"]
    assert running == row["actual_nusd"]


def test_a_hit_saves_what_the_answer_would_have_cost():
    settled = settle(hit(usage=Usage(100, 20)), list_price)
    (step,) = steps_of(settled)
    assert (step["mechanism"], step["family"]) == ("cache.exact", "cached")
    assert (step["before_nusd"], step["after_nusd"], step["saved_nusd"]) == (180_000, 0, 180_000)
    assert step["saved_ms"] == 798.0
    assert step["basis"] == "measured"
    assert request_of(settled)["lane"] == "cache.exact"


def test_an_answer_from_the_cache_in_part_is_a_forward_that_saved_that_part():
    asked = call("rest", usage=Usage(10, 0))
    settled = settle(
        outcome(mechanism="cache.exact", reason="partial", usage=Usage(100, 0), calls=(asked,)), list_price
    )
    (step,) = steps_of(settled)
    assert (step["mechanism"], step["before_nusd"], step["after_nusd"]) == ("cache.exact", 100_000, 10_000)
    row = request_of(settled)
    assert (row["lane"], row["baseline_nusd"], row["actual_nusd"]) == ("forward", 100_000, 10_000)


def test_a_plain_forward_saves_nothing_and_has_no_step():
    settled = settle(outcome(), list_price)
    row = request_of(settled)
    assert settled.savings == []
    assert row["baseline_nusd"] == row["actual_nusd"] == 180_000
    assert row["lane"] == "forward"


def test_a_cancelled_forward_is_its_own_baseline():
    settled = settle(outcome(outcome="cancelled", usage=None, calls=(call(won=False),)), list_price)
    assert settled.savings == []
    assert request_of(settled)["baseline_nusd"] == 180_000


def test_a_lost_hedge_is_booked_as_a_negative_step():
    lost = call("lost", purpose="hedge", won=False, usage=Usage(100, 5))
    (step,) = steps_of(settle(outcome(calls=(call(), lost)), list_price))
    assert (step["family"], step["mechanism"], step["saved_nusd"]) == ("speculative", "spec.hedge", -120_000)


def test_an_audit_costs_against_the_hit_it_audits():
    settled = settle(hit(calls=(call(purpose="audit", won=False),)), list_price)
    saved = [step["saved_nusd"] for step in steps_of(settled)]
    assert saved == [180_000, -180_000]


def test_a_cheaper_tier_earns_the_difference():
    (step,) = steps_of(settle(outcome(calls=(call(tier="flex"),)), list_price))
    assert (step["mechanism"], step["saved_nusd"]) == ("batch.flex", 90_000)


def test_an_unknown_price_saves_nothing_and_says_so():
    settled = settle(hit(model_requested="free"), list_price)
    (step,) = steps_of(settled)
    assert (step["saved_nusd"], step["basis"]) == (0, "unpriced")
    assert request_of(settled)["baseline_basis"] == "unpriced"


def test_a_request_refused_before_any_call_costs_nothing():
    settled = settle(outcome(calls=(), outcome="error", cache_status="BYPASS", usage=None), list_price)
    row = request_of(settled)
    assert (row["baseline_nusd"], row["actual_nusd"], row["baseline_basis"], row["lane"]) == (0, 0, "none", "bypass")


@pytest.mark.parametrize(("ts_ms", "day"), [(NOON_MS, "2026-11-22"), (0, "1970-01-01"), (86_399_999, "1970-01-01")])
def test_days_are_utc(ts_ms, day):
    assert day_of(ts_ms) == day


def test_a_call_shaped_to_where_no_price_is_known_saves_nothing_and_says_so():
    edge = call(upstream="local", model="free", shaped_by=("edge.local",))
    settled = settle(outcome(calls=(edge,)), list_price)
    (step,) = steps_of(settled)
    assert (step["mechanism"], step["saved_nusd"], step["basis"]) == ("edge.local", 0, "unpriced")
    assert request_of(settled)["baseline_basis"] == "unpriced"


def test_each_lane_that_shaped_a_call_is_a_step_from_the_call_before_it_to_the_call_after():
    used = Usage(1_000, 200, cache_read_tokens=600, accepted_prediction_tokens=50, rejected_prediction_tokens=80)
    shaped = call(tier="flex", usage=used, shaped_by=("cache.prefix", "spec.predict", "batch.flex"))
    settled = settle(outcome(calls=(shaped,)), list_price)
    found = [(step["mechanism"], step["before_nusd"], step["after_nusd"]) for step in steps_of(settled)]
    plain = 1_000 * 1_000 + 120 * 4_000
    read = plain - 600 * 900
    predicted = read + 80 * 4_000
    assert found == [
        ("cache.prefix", plain, read), ("spec.predict", read, predicted), ("batch.flex", predicted, predicted // 2)
    ]  # fmt: skip
    assert request_of(settled)["baseline_nusd"] == plain


def test_an_answer_of_another_model_is_measured_against_the_one_asked_for():
    settled = settle(outcome(calls=(call(upstream="edge", model="x", shaped_by=("hybrid.cascade",)),)), list_price)
    row, (step,) = request_of(settled), steps_of(settled)
    assert (row["lane"], row["baseline_nusd"], row["baseline_basis"]) == ("hybrid.cascade", 180_000, "estimated")
    assert (step["mechanism"], step["after_nusd"]) == ("hybrid.cascade", 560)  # 0.8 s at 700 a second


@pytest.mark.parametrize("mechanism", ["edge.offline", "cache.stale-if-error"])
def test_what_stands_in_for_a_failed_upstream_saves_no_money(mechanism):
    failed = call("failed", won=False, usage=None, usage_basis="none", status=503)
    local = call("local", upstream="edge", model="x") if mechanism == "edge.offline" else None
    calls = (failed,) if local is None else (failed, local)
    settled = settle(outcome(mechanism=mechanism, calls=calls, cache_status="STALE"), list_price)
    row = request_of(settled)
    assert (row["baseline_nusd"], row["baseline_basis"], row["lane"]) == (0, "failed", mechanism)
    assert [step["saved_nusd"] for step in steps_of(settled)] == [0 if local is None else -560]


@given(outcomes)
def test_no_row_is_without_the_basis_of_its_price(any_outcome):
    settled = settle(any_outcome, list_price)
    known = {"measured", "estimated", "none", "unpriced", "failed"}
    assert request_of(settled)["baseline_basis"] in known
    assert {dict(zip(CALL_COLUMNS, line, strict=True))["cost_basis"] for line in settled.calls} <= known
    assert {step["basis"] for step in steps_of(settled)} <= known
