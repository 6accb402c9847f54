"""Plans: lanes in order, chosen by policy, edited by words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.plan import (
    ALIASES,
    DEFAULT_PLAN,
    ORDER,
    Asked,
    Lane,
    Match,
    Plan,
    Policy,
    choose,
    edited,
    lanes_of,
    split_alias,
)

sets_of_lanes = st.frozensets(st.sampled_from(list(Lane)))


def asked(**changes) -> Asked:
    fields = {
        "model": "gpt-5", "tenant": "t" * 64, "project": "search", "namespace": "", "tags": ("eval", "x"),
        "stream": False, "tools": False, "deadline": False,
    }  # fmt: skip
    return Asked(**{**fields, **changes})


@given(sets_of_lanes)
def test_a_plan_says_itself_in_the_order_in_which_it_acts(lanes):
    text = Plan(lanes).text
    words = text.split(",") if text else []
    assert [ORDER[Lane(word)] for word in words] == sorted(ORDER[lane] for lane in lanes)
    if lanes:
        assert edited(DEFAULT_PLAN, text).lanes == lanes


@given(sets_of_lanes, sets_of_lanes, sets_of_lanes)
def test_changes_add_and_take_away_and_nothing_else(start, added, dropped):
    dropped -= added
    text = ",".join([f"+{lane}" for lane in added] + [f"-{lane}" for lane in dropped])
    assert edited(Plan(start, "p", 5.0), text) == Plan((start | added) - dropped, "p", 5.0)


@pytest.mark.parametrize("text", ["", " , ", "\t"])
def test_nothing_said_changes_nothing(text):
    assert edited(DEFAULT_PLAN, text) == DEFAULT_PLAN


@pytest.mark.parametrize("text", ["warp", "exact,+hedge", "+exact,-exact", "+", "exact;semantic"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"lane|changes|both"):
        edited(DEFAULT_PLAN, text)


def test_stale_is_short_for_both_stale_lanes():
    assert lanes_of(["stale"]) == {Lane.REVALIDATE, Lane.STALE_IF_ERROR}


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        (Match(), True),
        (Match(model="gpt-*"), True),
        (Match(model="claude-*"), False),
        (Match(tenant="search"), True),
        (Match(tenant="t" * 64), True),
        (Match(tenant="ads"), False),
        (Match(tag="eval"), True),
        (Match(tag="eval*", stream=True), False),
        (Match(stream=False, tools=False, deadline=False), True),
        (Match(deadline=True), False),
        (Match(namespace="n*"), False),
        (Match(namespace=""), True),
    ],
)
def test_a_policy_matches_when_all_of_it_holds(match, holds):
    plan = Plan(frozenset({Lane.EXACT}), "first")
    assert (choose([Policy("first", match, plan)], asked()) == plan) is holds


def test_the_first_policy_that_matches_is_the_plan():
    plans = [Plan(frozenset({lane}), lane) for lane in (Lane.EXACT, Lane.HEDGE)]
    policies = [Policy("a", Match(model="x"), plans[0]), Policy("b", Match(), plans[1]), Policy("c", Match(), plans[0])]
    assert choose(policies, asked()) == plans[1]
    assert choose(policies[:1], asked()) == DEFAULT_PLAN


@pytest.mark.parametrize(
    ("named", "model", "edit"),
    [
        ("gpt-5@cheap", "gpt-5", "+route"),
        ("gpt-5@exact", "gpt-5", "-semantic"),
        ("gpt-5@2026-01-01", "gpt-5@2026-01-01", ""),
        ("@cheap", "@cheap", ""),
        ("a@b@batch", "a@b", "+tier,+defer"),
        ("gpt-5", "gpt-5", ""),
    ],
)
def test_only_a_known_alias_is_taken_off_a_models_name(named, model, edit):
    assert split_alias(named, ALIASES) == (model, edit)


def test_every_built_in_alias_is_a_plan():
    for text in ALIASES.values():
        assert edited(DEFAULT_PLAN, text) != DEFAULT_PLAN
