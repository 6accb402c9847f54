"""Whose turn it is: no tenant waits behind more than one text of each other tenant."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from index.turns import Turns


class Text(NamedTuple):
    digest: bytes
    tenant: str


TENANTS = st.sampled_from("abc")
STEPS = st.lists(st.tuples(st.sampled_from(["add", "take", "drop", "full"]), TENANTS))


def names(found: list[Text]) -> list[str]:
    return [one.tenant for one in found]


@given(STEPS)
def test_turns_go_round_and_a_tenants_texts_keep_their_order(steps: list[tuple[str, str]]) -> None:
    turns: Turns[Text] = Turns()
    waiting: dict[str, list[Text]] = {tenant: [] for tenant in "abc"}
    passed_by = dict.fromkeys("abc", 0)  # turns of others since it began to wait, or had its own
    for number, (step, tenant) in enumerate(steps):
        text, others = Text(number.to_bytes(4, "big"), tenant), [one for one in "abc" if one != tenant]
        if step == "add":
            if not waiting[tenant]:
                passed_by[tenant] = 0
            turns.add(text)
            waiting[tenant].append(text)
        elif step == "take" and len(turns):
            (first,) = turns.ahead(1)
            assert waiting[first.tenant].pop(0) is first
            turns.take(first)
            for other in "abc":
                passed_by[other] = 0 if other == first.tenant else passed_by[other] + 1
                assert passed_by[other] <= 2 or not waiting[other]
        elif step == "drop" and waiting[tenant]:
            turns.drop(waiting[tenant].pop())
        elif step == "full" and (late := turns.gives_way(tenant)) is not None:
            assert late is waiting[late.tenant][-1]
            assert len(waiting[late.tenant]) == max(map(len, waiting.values())) > len(waiting[tenant]) + 1
            assert late.tenant in others
        assert len(turns) == sum(map(len, waiting.values())) == len(list(turns))
        assert all(one in turns for texts in waiting.values() for one in texts)
        assert text in turns or step != "add"


def test_what_is_ahead_takes_one_of_each_tenant_then_the_next() -> None:
    turns: Turns[Text] = Turns()
    for number, tenant in enumerate("aaaabbc"):
        turns.add(Text(bytes([number]), tenant))
    assert names(turns.ahead(6)) == list("abcaba")
    assert names(turns.ahead(99)) == list("abcabaa")
    assert turns.gives_way("c") == Text(b"\x03", "a")
    assert turns.gives_way("a") is None
