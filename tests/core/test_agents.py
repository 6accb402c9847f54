"""What agents send: one conversation under other ids, and noise that only names a session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.fields import person_in
from proxy.core.dialects.routes import Routes
from proxy.core.facts import Facts
from proxy.core.fingerprint import fingerprint_of, scope_of
from proxy.core.model import Controls, Level, Rules
from proxy.core.policy import classify

ROUTES = Routes(orjson.loads)
PATHS = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "responses": "/v1/responses",
    "gemini": "/v1beta/models/m:generateContent",
    "ollama": "/api/chat",
}


def dialect(name: str) -> Dialect:
    found = ROUTES.find(PATHS[name]).dialect
    assert found is not None
    return found


def facts_of(name: str, body: Mapping[str, Any]) -> Facts:
    return dialect(name).read(body, model="m" if name == "gemini" else "")


def print_of(name: str, body: Mapping[str, Any], controls: Controls | None = None) -> bytes:
    facts = facts_of(name, body)
    scope = scope_of(facts, tenant="t", upstream="u", operation="chat", controls=controls or Controls())
    return fingerprint_of(scope, facts.prompt)


def loop(name: str, one: str, two: str, *, swapped: bool = False, city: str = "Lyon") -> dict[str, Any]:
    """A conversation of two calls of a tool and their results, or each result given for the other call."""
    told = [(two, "9"), (one, "7")] if swapped else [(one, "9"), (two, "7")]
    asked = {"role": "user", "content": "How warm is it?"}
    if name == "openai":
        function = {"name": "warmth", "arguments": json.dumps({"call_id": city})}
        calls = [{"id": i, "type": "function", "function": function} for i in (one, two)]
        results = [{"role": "tool", "tool_call_id": i, "content": text} for i, text in told]
        return {
            "model": "m",
            "messages": [asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results],
        }
    if name == "anthropic":
        uses = [{"type": "tool_use", "id": i, "name": "warmth", "input": {"id": city}} for i in (one, two)]
        back = [{"type": "tool_result", "tool_use_id": i, "content": text} for i, text in told]
        turns = [asked, {"role": "assistant", "content": uses}, {"role": "user", "content": back}]
        return {"model": "m", "max_tokens": 9, "messages": turns}
    if name == "responses":
        made = [
            {"type": "function_call", "id": f"fc_{i}", "call_id": i, "name": "warmth", "arguments": city}
            for i in (one, two)
        ]
        outputs = [{"type": "function_call_output", "call_id": i, "output": text} for i, text in told]
        return {"model": "m", "store": False, "input": [asked, *made, *outputs]}
    if name == "gemini":
        said = [{"functionCall": {"id": i, "name": "warmth", "args": {"id": city}}} for i in (one, two)]
        given = [{"functionResponse": {"id": i, "name": "warmth", "response": {"id": text}}} for i, text in told]
        contents = [{"role": "user", "parts": [{"text": "How warm?"}]}, {"role": "model", "parts": said}]
        return {"contents": [*contents, {"role": "user", "parts": given}]}
    called = [{"id": i, "function": {"name": "warmth", "arguments": {"id": city}}} for i in (one, two)]
    results = [{"role": "tool", "tool_call_id": i, "content": text} for i, text in told]
    return {"model": "m", "messages": [asked, {"role": "assistant", "content": "", "tool_calls": called}, *results]}


@pytest.mark.parametrize("name", PATHS)
def test_a_conversation_is_the_same_under_any_ids_of_its_calls(name: str) -> None:
    own = print_of(name, loop(name, "call_1", "call_2"))
    assert own == print_of(name, loop(name, "toolu_9", "x"))
    assert own == print_of(name, loop(name, "call_2", "call_1"))


@pytest.mark.parametrize("name", PATHS)
def test_but_not_when_the_results_belong_to_other_calls_or_the_calls_say_otherwise(name: str) -> None:
    own = print_of(name, loop(name, "a", "b"))
    assert own != print_of(name, loop(name, "a", "b", swapped=True))
    assert own != print_of(name, loop(name, "a", "a"))
    assert own != print_of(name, loop(name, "a", "b", city="Brest")), "what a call says is no id, whatever it is called"


def test_messages_without_calls_are_as_they_were() -> None:
    part = {"type": "text", "text": "x", "id": "y"}
    messages = ({"role": "user", "content": "id"}, {"role": "user", "content": [part]})
    assert named_in_order(messages) == messages


@pytest.mark.parametrize("name", PATHS)
def test_a_tool_loop_is_looked_up_exactly_and_never_by_meaning(name: str) -> None:
    found = classify(facts_of(name, loop(name, "a", "b")), Controls(), Rules())
    assert (found.level, found.reason) == (Level.EXACT, "tool_results")


CLAUDE = "user_ab12_account_0b1c-22_session_"
SAME_PERSON = [
    (CLAUDE + "1111-22", CLAUDE + "3333-44", "user_ab12_account_0b1c-22"),
    (
        json.dumps({"device_id": "d", "account_uuid": "a", "session_id": "1"}),
        json.dumps({"session_id": "2", "account_uuid": "a", "device_id": "d"}),
        '{"account_uuid":"a","device_id":"d"}',
    ),
    ("ann", "ann", "ann"),
    ("session_master", "session_master", "session_master"),
    ('{"odd', '{"odd', '{"odd'),
]


@pytest.mark.parametrize(("one", "other", "person"), SAME_PERSON)
def test_the_session_in_an_end_users_id_is_none_of_the_person(one: str, other: str, person: str) -> None:
    assert person_in(one) == person_in(other) == person
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    prints = {print_of("anthropic", {**body, "metadata": {"user_id": user}}) for user in (one, other)}
    assert len(prints) == 1
    assert print_of("anthropic", {**body, "metadata": {"user_id": "somebody else"}}) not in prints


def test_two_people_in_one_kind_of_id_stay_two() -> None:
    assert person_in("user_ab_session_1") != person_in("user_cd_session_1")
    assert person_in('{"account_uuid":"a","session_id":"1"}') != person_in('{"account_uuid":"b","session_id":"1"}')


@pytest.mark.parametrize("name", ["openai", "responses"])
@pytest.mark.parametrize("field", ["client_metadata", "session_id", "trace", "trace_id", "turn_id"])
def test_a_field_that_names_a_session_is_delivery(name: str, field: str) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]} if name == "openai" else {"input": "hi", "store": False}
    plain = print_of(name, {"model": "m", **said})
    assert plain == print_of(name, {"model": "m", **said, field: {"x-codex-turn": "1"}})
    assert plain != print_of(name, {"model": "m", **said, "session_seed": 1}), "what is merely alike is not"


def test_claude_codes_checksum_is_no_instruction() -> None:
    def asked(check: str, system: str = "You are Claude Code.") -> bytes:
        blocks = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.15; cch={check};"},
            {"type": "text", "text": system, "cache_control": {"type": "ephemeral"}},
        ]
        messages = [{"role": "user", "content": "hi"}]
        return print_of("anthropic", {"model": "m", "max_tokens": 9, "system": blocks, "messages": messages})

    assert asked("aaaa1") == asked("bbbb2")
    assert asked("aaaa1") != asked("aaaa1", "You are somebody else.")


RUNS = [
    ("Chunk ID: ff8cde\nWall time: 0.0004 seconds\nProcess exited with code 0\nOutput:\nwarm\n",
     "Chunk ID: 425fed\nWall time: 0.0019 seconds\nProcess exited with code 0\nOutput:\nwarm\n"),
    ("Exit code: 0\nWall time: 0.1 seconds\nOutput:\nwarm\n", "Exit code: 0\nWall time: 0 seconds\nOutput:\nwarm\n"),
    ("Output: warm\nProcess Group PGID: 4500", "Output: warm\nProcess Group PGID: 71"),
    ('{"output":"warm","metadata":{"exit_code":0,"duration_seconds":0.1}}',
     '{"output":"warm","metadata":{"exit_code":0,"duration_seconds":0.2}}'),
]  # fmt: skip
OTHER_RUNS = [
    ("Chunk ID: ff8cde\nWall time: 1.2 seconds\nOutput:\n", "Chunk ID: 425fed\nWall time: 2.2 seconds\nOutput:\n"),
    ("Exit code: 0\nWall time: 0.1 seconds\nOutput:\nwarm", "Exit code: 1\nWall time: 0.1 seconds\nOutput:\nwarm"),
    ("Chunk ID: ff8cde\nOutput:\nwarm", "Chunk ID: 425fed\nOutput:\nwarm"),
    ("it said\nChunk ID: ff8cde\nWall time: 0.1 seconds\n", "it said\nChunk ID: 425fed\nWall time: 0.1 seconds\n"),
    ("Process Group PGID: 4500\nOutput: warm", "Process Group PGID: 71\nOutput: warm"),
]  # fmt: skip


def told(name: str, output: str) -> dict[str, Any]:
    """A conversation of one call and its output."""
    body = loop(name, "a", "b")
    if name == "openai":
        body["messages"][-1]["content"] = output
    elif name == "anthropic":
        body["messages"][-1]["content"][-1]["content"] = output
    elif name == "responses":
        body["input"][-1]["output"] = output
    elif name == "gemini":
        body["contents"][-1]["parts"][-1]["functionResponse"]["response"] = {"output": output}
    else:
        body["messages"][-1]["content"] = output
    return body


@pytest.mark.parametrize("name", PATHS)
def test_what_an_agent_writes_of_one_run_around_an_output_is_noise(name: str) -> None:
    for one, other in RUNS:
        assert print_of(name, told(name, one)) == print_of(name, told(name, other)), one
    for one, other in OTHER_RUNS:
        assert print_of(name, told(name, one)) != print_of(name, told(name, other)), one


def test_an_output_in_parts_is_read_too() -> None:
    def said(chunk: str) -> dict[str, Any]:
        text = f"Chunk ID: {chunk}\nWall time: 0.1 seconds\nOutput:\nwarm"
        body = told("responses", text)
        body["input"][-1]["output"] = [{"type": "input_text", "text": text}]
        return body

    assert print_of("responses", said("ff8cde")) == print_of("responses", said("425fed"))


# --- another sample -------------------------------------------------------------------------------------------------


def level(controls: Controls | None = None, rules: Rules | None = None, **fields: Any) -> tuple[Level, str | None]:
    messages = [{"role": "user", "content": "Which river runs through Lyon?"}]
    facts = facts_of("openai", {"model": "m", "messages": messages, **fields})
    found = classify(facts, controls or Controls(), rules or Rules())
    return found.level, found.reason


def test_a_high_temperature_wishes_for_another_sample_unless_it_is_named() -> None:
    assert level(temperature=1.0) == (Level.EXACT, "temperature")
    assert level(temperature=1.01) == (Level.NONE, "temperature")
    assert level(temperature=1.01, rules=Rules(exact_temperature_max=2.0)) == (Level.EXACT, "temperature")
    assert level(Controls(sample="3"), temperature=1.5) == (Level.EXACT, "exact_only")
    assert level(Controls(sample="3")) == (Level.EXACT, "exact_only")


def test_each_sample_is_a_question_of_its_own() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    asked = [Controls(), Controls(sample="1"), Controls(sample="2"), Controls(namespace="1")]
    asked.append(Controls(namespace="1", sample="1"))
    assert len({print_of("openai", body, controls) for controls in asked}) == len(asked)
    assert print_of("openai", body, asked[1]) == print_of("openai", body, Controls(sample="1"))


# --- tools that the provider runs -----------------------------------------------------------------------------------

OFFERS = [
    ("responses", {"type": "web_search"}, False),
    ("responses", {"type": "file_search", "vector_store_ids": ["v"]}, False),
    ("responses", {"type": "code_interpreter", "container": {"type": "auto"}}, True),
    ("responses", {"type": "mcp", "server_label": "x"}, True),
    ("responses", {"type": "local_shell"}, True),
    ("anthropic", {"type": "web_search_20250305", "name": "web_search"}, False),
    ("anthropic", {"type": "web_fetch_20250910", "name": "web_fetch"}, False),
    ("anthropic", {"type": "code_execution_20250825", "name": "code_execution"}, True),
    ("anthropic", {"type": "bash_20250124", "name": "bash"}, True),
    ("openai", {"type": "code_interpreter"}, False),
    ("openai", {"type": "custom", "custom": {"name": "x"}}, True),
    ("gemini", {"googleSearch": {}}, False),
    ("gemini", {"function_declarations": [{"name": "f"}]}, True),
]


@pytest.mark.parametrize(("name", "tool", "is_looked_up"), OFFERS, ids=lambda value: str(value)[:40])
def test_an_offered_tool_that_shows_when_it_ran_is_judged_by_the_answer(
    name: str, tool: dict[str, Any], is_looked_up: bool
) -> None:
    said: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    if name == "responses":
        said = {"model": "m", "store": False, "input": "hi"}
    if name == "gemini":
        said = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
    found = classify(facts_of(name, {**said, "tools": [tool]}), Controls(), Rules())
    assert found.level is (Level.EXACT if is_looked_up else Level.NONE), found.reason


SEARCHES = {
    "responses": [{"type": "web_search", "external_web_access": True}, {"type": "file_search", "vector_store_ids": []}],
    "anthropic": [{"type": "web_search_20250305", "name": "web_search"}, {"type": "web_fetch_20250910", "name": "f"}],
    "openai": [{"type": "browser_search"}],
    "gemini": [{"googleSearch": {}}],
}
OWN = {
    "responses": {"type": "function", "name": "exec_command", "parameters": {}},
    "anthropic": {"name": "Bash", "input_schema": {}},
    "openai": {"type": "function", "function": {"name": "bash"}},
    "gemini": {"functionDeclarations": [{"name": "bash"}]},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_in_a_box_of_the_clients_own_tools_is_judged_by_an_answer_that_shows_it(name: str) -> None:
    """Codex offers it in every request. Alone, or named by the choice of tool, it is asked for."""
    said: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    if name == "responses":
        said = {"model": "m", "store": False, "input": "hi"}
    if name == "gemini":
        said = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
    shows_use = name in ("responses", "anthropic")
    for search in SEARCHES[name]:
        choices: list[tuple[dict[str, Any], bool]] = [({}, shows_use)]
        if name == "responses":
            allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": search["type"]}]}
            choices += [({"tool_choice": "auto"}, True), ({"tool_choice": {"type": search["type"]}}, False)]
            choices += [({"tool_choice": allowed}, False)]
        if name == "anthropic":
            choices += [({"tool_choice": {"type": "tool", "name": search["name"]}}, False)]
            choices += [
                ({"tool_choice": {"type": "tool", "name": "Bash"}}, True),
                ({"tool_choice": {"type": "auto"}}, True),
            ]
        for more, is_looked_up in choices:
            found = classify(facts_of(name, {**said, "tools": [OWN[name], search], **more}), Controls(), Rules())
            assert (found.level is Level.EXACT) is is_looked_up, (search, more, found)
        alone = classify(facts_of(name, {**said, "tools": [search]}), Controls(), Rules())
        assert (alone.level, alone.reason) == (Level.NONE, "web_search"), search
