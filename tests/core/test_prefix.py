"""Breakpoints: where they go, that they change nothing else, and when they are worth their price."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatParams,
)
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming as ResponsesParams,
)
from pydantic import TypeAdapter

from proxy.core.model import Usage
from proxy.core.prefix import (
    CACHEABLE,
    FAIR_NUMBER,
    LIFETIME_S,
    MOST_BREAKPOINTS,
    REST_S,
    Balance,
    Breakpoint,
    Decision,
    Place,
    Prefixes,
    PrefixMemory,
    anthropic_breakpoints,
    minimum_tokens,
    openai_cache_key,
    with_cache_key,
    without_breakpoints,
)
from proxy.core.prefix import inject as inject_into
from proxy.core.rates import Rate, writes_cost_extra
from proxy.money.prices import Prices
from tests.rows import NOON_MS

SALT = b"tenant"
TOOL = {"name": "look", "description": "d" * 400, "input_schema": {"type": "object", "properties": {}}}
MARK = {"type": "ephemeral"}
MARKED = {"type": "text", "text": "q", "cache_control": MARK}


def body(*turns: str, **more) -> dict:
    """Turns alternate from the user on."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"model": "claude-opus-5-5", "max_tokens": 9, "messages": messages, **more}


def inject(asked: dict, where: list[Place]) -> dict:
    return json.loads(inject_into(json.dumps(asked).encode(), where))


def places(asked: dict) -> list[Place]:
    return [one.place for one in anthropic_breakpoints(asked, SALT).breakpoints]


def test_breakpoints_stand_after_tools_system_and_the_last_stable_turn() -> None:
    asked = body("q1", "a1", "q2", system="be brief", tools=[TOOL, {**TOOL, "name": "last"}])
    assert places(asked) == [Place("tools", 1), Place("system", 0), Place("messages", 1)]
    made = inject(asked, places(asked))
    assert made["tools"] == [TOOL, {**TOOL, "name": "last", "cache_control": MARK}]
    assert made["system"] == [{"type": "text", "text": "be brief", "cache_control": MARK}]
    assert made["messages"] == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": [{"type": "text", "text": "a1", "cache_control": MARK}]},
        {"role": "user", "content": "q2"},
    ]
    TypeAdapter(MessageCreateParamsNonStreaming).validate_python(made, strict=True)


def test_the_final_user_turn_may_be_several_messages_and_a_begun_answer_may_follow_it() -> None:
    asked = body("q1", "a1", "q2")
    asked["messages"] += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "Sure:"}]
    assert places(asked) == [Place("messages", 1)]
    assert places(body("only")) == []
    assert anthropic_breakpoints(body("only"), SALT).why_none == "nothing_stable"
    assert places({"model": "m", "messages": []}) == []


def test_a_tool_loop_is_cached_up_to_the_call_that_was_answered() -> None:
    asked = body("q1")
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    asked["messages"] += [
        {"role": "assistant", "content": [thinking, use, {"type": "redacted_thinking", "data": "x"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "42"}]},
    ]
    assert places(asked) == [Place("messages", 1, 1)]
    made = inject(asked, places(asked))
    assert made["messages"][1]["content"] == [
        thinking,
        {**use, "cache_control": MARK},
        asked["messages"][1]["content"][2],
    ]


@pytest.mark.parametrize(
    "asked",
    [
        body("q1", "a1", "q2", cache_control=MARK),
        body("q1", "a1", "q2", tools=[{**TOOL, "cache_control": MARK}]),
        body("q1", "a1", "q2", system=[{"type": "text", "text": "s", "cache_control": MARK}]),
        body("q1", "a1", "q2", tools=[{**TOOL, "cache_control": None}]),
        {**body(), "messages": [{"role": "user", "content": [MARKED]}]},
        {**body(system="s"), "messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [MARKED]},
        ]}]},
    ],
)  # fmt: skip
def test_a_client_that_sets_breakpoints_keeps_them_as_they_are(asked: dict) -> None:
    assert anthropic_breakpoints(asked, SALT) == Prefixes((), None, "own_breakpoints")


def test_what_cannot_carry_a_breakpoint_does_not() -> None:
    deferred = {**TOOL, "defer_loading": True}
    assert places(body("q", tools=[TOOL, deferred])) == [Place("tools", 0)]
    assert places(body("q", tools=[deferred])) == []
    assert places(body("q", system="")) == []
    assert places(body("q", system=[{"type": "text", "text": "s"}, {"type": "text", "text": ""}])) == [
        Place("system", 0)
    ]
    assert places(body("q1", "", "q2")) == []
    unknown = {"role": "assistant", "content": [{"type": "hologram", "text": "x"}]}
    assert places({"model": "m", "messages": [*body("q1")["messages"], unknown, *body("q2")["messages"]]}) == []
    for odd in ({"tools": "x"}, {"tools": [1]}, {"system": 3}, {"messages": "x"}, {"messages": [None]}, {}):
        assert places({"model": "m", **odd}) == []


texts = st.text(max_size=6)
known = st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(sorted(CACHEABLE)), texts)
others = st.builds(
    lambda kind, text: {"type": kind, "thinking": text, "nested": {"cache": [1, None, 2.5]}},
    st.sampled_from(["thinking", "redacted_thinking", "hologram"]), texts,
)  # fmt: skip
content = st.one_of(texts, st.lists(st.one_of(known, others), max_size=4))
bodies = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["claude-opus-5-5", "claude-haiku-4-5"]),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": content}), max_size=6
        ),
    },
    optional={
        "system": content,
        "tools": st.lists(
            st.fixed_dictionaries({"name": texts}, optional={"defer_loading": st.booleans()}), max_size=4
        ),
        "metadata": st.dictionaries(texts, texts, max_size=2),
        "unknown": texts,
    },
)


def as_blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def bare(asked: dict) -> dict:
    """The body without breakpoints, strings opened: what the model reads."""
    plain = copy.deepcopy(asked)
    for part in ("system", "tools"):
        for holder in plain[part] if isinstance(plain.get(part), list) else ():
            holder.pop("cache_control", None)
    for message in plain["messages"]:
        message["content"] = as_blocks(message["content"])
        for block in message["content"]:
            block.pop("cache_control", None)
    return {**plain, **({"system": as_blocks(plain["system"])} if "system" in plain else {})}


def count(value: object) -> int:
    if isinstance(value, dict):
        return ("cache_control" in value) + sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 0


@given(bodies)
def test_injection_adds_breakpoints_and_changes_nothing_else(asked: dict) -> None:
    before = copy.deepcopy(asked)
    found = anthropic_breakpoints(asked, SALT)
    where = [one.place for one in found.breakpoints]
    made = inject(asked, where)
    assert asked == before
    assert bare(made) == bare(asked)
    assert list(made) == list(asked)
    assert count(made) == len(where) <= MOST_BREAKPOINTS
    assert inject(made, where) == made
    if where:
        assert anthropic_breakpoints(made, SALT).why_none == "own_breakpoints"
    tokens = [one.tokens for one in found.breakpoints]
    assert tokens == sorted(tokens)
    assert len({one.digest for one in found.breakpoints}) == len(tokens)
    untouched = [message for index, message in enumerate(made["messages"]) if Place("messages", index) not in
                 [place._replace(block=0) for place in where]]  # fmt: skip
    assert all(any(message == kept for kept in asked["messages"]) for message in untouched)


@given(bodies, bodies)
def test_equal_digests_mean_equal_prefixes(one: dict, other: dict) -> None:
    def prefixes(asked: dict) -> dict[bytes, str]:
        kept = {}
        for point in anthropic_breakpoints(asked, SALT).breakpoints:
            part, index, block = point.place
            read = bare(asked)
            tools = read.get("tools", []) if part != "tools" else read["tools"][: index + 1]
            system = [] if part == "tools" else read.get("system", [])
            system = system[: index + 1] if part == "system" else system
            messages = read["messages"][:index] if part == "messages" else []
            last = [read["messages"][index]["role"], read["messages"][index]["content"][: block + 1]] if messages or (
                part == "messages") else []  # fmt: skip
            kept[point.digest] = json.dumps([asked["model"], tools, system, messages, last])
        return kept

    mine, theirs = prefixes(one), prefixes(other)
    assert {digest: mine[digest] for digest in mine.keys() & theirs} == {
        digest: theirs[digest] for digest in mine.keys() & theirs
    }


def test_a_digest_is_of_the_tenant_the_model_and_all_before_it() -> None:
    asked = body("q1", "a1", "q2", system="s", tools=[TOOL])

    def digests(changed: dict, salt: bytes = SALT) -> list[bytes]:
        return [one.digest for one in anthropic_breakpoints(changed, salt).breakpoints]

    base = digests(asked)
    assert (
        digests({**asked, "max_tokens": 5, "messages": [*asked["messages"][:2], {"role": "user", "content": "x"}]})
        == base
    )
    assert digests({**asked, "system": [{"type": "text", "text": "s"}]}) == base
    for changed in ({**asked, "model": "claude-x"}, {**asked, "tools": [{**TOOL, "name": "x"}]}):
        assert not set(digests(changed)) & set(base)
    assert not set(digests(asked, b"other")) & set(base)
    assert digests({**asked, "system": "t"})[0] == base[0]
    assert not set(digests({**asked, "system": "t"})[1:]) & set(base)
    assert digests({**asked, "tool_choice": {"type": "any"}})[:2] == base[:2]
    assert digests({**asked, "tool_choice": {"type": "any"}})[2] != base[2]


def test_a_picture_is_not_counted_by_its_bytes() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 400_000}}
    asked = {"model": "m", "messages": [{"role": "user", "content": [{"type": "tool_result", "content": [picture]}]},
                                        *body("x", "a", "q")["messages"][1:]]}  # fmt: skip
    (point,) = anthropic_breakpoints(asked, SALT).breakpoints
    assert point.tokens < 100
    assert anthropic_breakpoints(body("x" * 8_000, "a", "q"), SALT).breakpoints[0].tokens in range(2_000, 2_040)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("claude-opus-4-5-20251101", 4_096), ("claude-opus-4-1", 1_024), ("claude-haiku-4-5", 4_096),
     ("claude-3-5-haiku-latest", 2_048), ("claude-sonnet-4-6", 2_048), ("anthropic.claude-3-haiku-v1", 2_048),
     ("claude-opus-5-5", 1_024), ("", 1_024)],
)  # fmt: skip
def test_models_have_their_own_minimum(model: str, tokens: int) -> None:
    assert minimum_tokens(model) == tokens


def decide(memory: PrefixMemory, asked: dict, now_s: float, least: int = 1, extra: bool = True) -> Decision:
    return memory.decide(anthropic_breakpoints(asked, SALT), now_s, least_tokens=least, writes_cost_extra=extra)


def test_a_prefix_is_written_when_it_came_twice_within_its_lifetime() -> None:
    memory, asked = PrefixMemory(), body("q", system="s" * 400)
    assert decide(memory, asked, 0) == Decision((), "seen_once")
    assert decide(memory, asked, 299) == Decision((Place("system", 0),), None)
    assert decide(memory, asked, 598).places == (Place("system", 0),)  # each sight keeps it
    assert decide(memory, asked, 898) == Decision((), "seen_once")  # its lifetime is over
    assert decide(memory, body("q", system="other" * 99), 899).why_none == "seen_once"


def test_where_writing_costs_nothing_more_it_is_written_at_once() -> None:
    assert decide(PrefixMemory(), body("q", system="s" * 400), 0, extra=False).places == (Place("system", 0),)


def test_a_short_prefix_is_left_alone() -> None:
    memory, asked = PrefixMemory(), body("q1", "a" * 8_000, "q2", system="s" * 400)
    for _ in range(3):
        decision = decide(memory, asked, 0, least=1_024)
    assert decision.places == (Place("messages", 1),)
    assert decide(memory, body("q", system="s"), 0, least=1_024) == Decision((), "too_short")
    assert decide(memory, body("q"), 0) == Decision((), "nothing_stable")
    assert decide(memory, {**asked, "cache_control": MARK}, 0).why_none == "own_breakpoints"


def test_a_conversation_is_written_from_its_second_turn_on_while_it_lives() -> None:
    memory = PrefixMemory()
    assert decide(memory, body("q1"), 0).places == ()
    assert decide(memory, body("q1", "a1", "q2"), 60).places == (Place("messages", 1),)
    assert decide(memory, body("q1", "a1", "q2", "a2", "q3"), 120).places == (Place("messages", 3),)
    assert decide(memory, body("q1", "a1", "q2", "a2", "q3", "a3", "q4"), 500).why_none == "seen_once"
    assert decide(memory, body("z1", "a1", "q2"), 501).why_none == "seen_once"


def test_another_tenants_sight_is_none_of_ours() -> None:
    memory, asked = PrefixMemory(), body("q", system="s" * 400)
    for salt in (b"a", b"b"):
        found = anthropic_breakpoints(asked, salt)
        assert memory.decide(found, 0, least_tokens=1, writes_cost_extra=True).why_none == "seen_once"


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = PrefixMemory(limit=10)
    for number in range(100):
        decide(memory, body("q", system=f"s{number}"), 0)
        assert len(memory) <= 10
    assert decide(memory, body("q", system="s99"), 1).places
    assert not decide(memory, body("q", system="s0"), 1).places


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 400)), max_size=40))
def test_nothing_is_written_that_was_not_seen_before_within_the_lifetime(steps) -> None:
    memory, last, now_s = PrefixMemory(), {}, 0.0
    for name, pause_s in steps:
        now_s += pause_s
        point = Breakpoint(Place("system", 0), bytes([name]) * 32, 2_000)
        decision = memory.decide(Prefixes((point,), None), now_s, least_tokens=1_024, writes_cost_extra=True)
        assert bool(decision.places) == (name in last and now_s - last[name] < 300)
        last[name] = now_s


def test_openai_requests_with_one_beginning_share_a_key() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    system = {"role": "system", "content": "be brief"}
    chat = {"model": "m", "messages": [system, {"role": "user", "content": "q"}], "tools": tools}
    key = openai_cache_key(chat, b"secret")
    assert key is not None
    assert key.startswith("ibid-")
    assert len(key) <= 64
    assert openai_cache_key({**chat, "messages": [system, {"role": "user", "content": "other"}]}, b"secret") == key
    assert openai_cache_key({**chat, "temperature": 0.1}, b"secret") == key
    others = [
        openai_cache_key(chat, b"another tenant's"),
        openai_cache_key({**chat, "tools": []}, b"secret"),
        openai_cache_key({**chat, "messages": [{**system, "content": "be long"}]}, b"secret"),
        openai_cache_key({**chat, "messages": [{**system, "role": "developer"}]}, b"secret"),
        openai_cache_key({"model": "m", "input": "q", "instructions": "be brief"}, b"secret"),
        openai_cache_key({"model": "m", "input": [system, {"role": "user", "content": "q"}]}, b"secret"),
    ]
    assert None not in others
    assert len({key, *others}) == 7
    TypeAdapter(ChatParams).validate_python(with_cache_key(chat, key))
    TypeAdapter(ResponsesParams).validate_python(with_cache_key({"model": "m", "input": "q"}, key))


@pytest.mark.parametrize(
    "asked",
    [{"messages": [{"role": "user", "content": "q"}]}, {"input": "q"}, {"input": "q", "tools": []}, {},
     {"messages": "x"}, {"messages": [None]}, {"instructions": "s", "prompt_cache_key": "mine"}],
)  # fmt: skip
def test_no_key_where_the_client_has_one_or_nothing_stands_first(asked: dict) -> None:
    assert openai_cache_key(asked, b"secret") is None
    assert with_cache_key(asked, None) == asked
    mine = {"prompt_cache_key": "mine"}
    assert with_cache_key(mine, "ours") == mine


def test_without_breakpoints_all_input_is_plain_and_the_first_write_is_a_loss() -> None:
    book = Prices()

    def nusd(usage: Usage) -> int:
        return book.price("anthropic", "claude-opus-5-5", usage, "default", NOON_MS).nusd

    write, read = Usage(10_000, 5, 0, 8_000), Usage(10_000, 5, 8_000, 0)
    assert without_breakpoints(write) == without_breakpoints(read) == Usage(10_000, 5)
    assert nusd(without_breakpoints(write)) - nusd(write) == -8_000 * 1_000  # 1.25 times $4 a million
    assert nusd(without_breakpoints(read)) - nusd(read) == 8_000 * 3_800  # 0.05 times
    rates = book.rates("anthropic", "claude-opus-5-5", "default", NOON_MS)
    assert writes_cost_extra(rates)
    assert not writes_cost_extra(book.rates("openai", "gpt-4o-mini", "default", NOON_MS))
    assert writes_cost_extra(None)
    assert not writes_cost_extra([Rate(-1, 5, 9, 1, 5)])


def test_marks_that_cost_more_than_they_bring_rest_and_are_tried_again() -> None:
    balance = Balance()
    for number in range(FAIR_NUMBER):
        assert not balance.rests("a", number)
        balance.see("a", -1, number)
    assert balance.rests("a", FAIR_NUMBER)
    assert not balance.rests("b", FAIR_NUMBER)
    assert balance.rests("a", FAIR_NUMBER + REST_S - 2)
    assert not balance.rests("a", FAIR_NUMBER + REST_S)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-100, 100)), max_size=400))
def test_nobody_loses_much_by_marks_and_accounts_are_bounded(calls: list[tuple[int, int]]) -> None:
    balance, lost = Balance(limit=4), dict.fromkeys(range(10), 0)
    for whose, gain in calls:
        if not balance.rests(whose, 0.0):
            balance.see(whose, gain, 0.0)
            lost[whose] += gain
    assert all(nusd >= -100 * FAIR_NUMBER * 9 for nusd in lost.values())


def share_saved(per_lifetime: float, seed: int) -> float:
    """Of the price of a prefix that comes by chance so often: what marks save, with Anthropic's factors."""
    chance, memory, balance = random.Random(seed), PrefixMemory(), Balance()
    point = Breakpoint(Place("system", 0), b"p", 2_000)
    now_s, cached_until_s, plain, paid = 0.0, -1.0, 0.0, 0.0
    for _ in range(4_000):
        now_s += chance.expovariate(per_lifetime / LIFETIME_S)
        is_marked = not balance.rests("a", now_s) and bool(
            memory.decide(Prefixes((point,), None), now_s, least_tokens=1_024, writes_cost_extra=True).places
        )
        cost = (0.1 if now_s < cached_until_s else 1.25) if is_marked else 1.0
        if is_marked:
            cached_until_s = now_s + LIFETIME_S
            balance.see("a", round(1000 * (1 - cost)), now_s)
        plain, paid = plain + 1, paid + cost
    return 1 - paid / plain


@pytest.mark.parametrize(
    ("per_lifetime", "least"), [(10, 0.85), (3, 0.7), (1, 0.2), (0.5, 0.0), (0.2, -0.02), (0.02, -0.02)]
)
def test_marks_pay_from_where_a_prefix_comes_once_in_two_lifetimes(per_lifetime: float, least: float) -> None:
    assert share_saved(per_lifetime, 1) >= least
