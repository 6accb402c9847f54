"""A model server for clients that wrap what they were told, offer tools of their own and run them.

    python -m tests.conformance.loops_upstream --log FILE   # prints its address; a line of JSON for each request

What is asked is known by one of TASKS within the user's words. LOOP is answered by a call of a tool that the client
offers, until its result has come; TRIP by a tool that takes a city and days where there is one, else as JSON. A client
that marks its fields, as DSPy does, is answered in its marks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.providers import Call, say, text_for
from tests.upstream import Json, Reply, ScriptedUpstream, Seen

ASKED: Final = "How do I repair a leaking garden hose?"
REWORDED: Final = "How can I repair a leaking garden hose?"
STREAMED: Final = "How do I fold a paper crane?"
LOOP: Final = "Run the tool that you have once and tell me what it says about Paris."
TRIP: Final = "Plan a trip to Paris for three days."
REFUSED: Final = "This one the server turns down."
TASKS: Final = (ASKED, REWORDED, STREAMED, LOOP, TRIP, REFUSED)
SHELL: Final = {"command": "echo warm", "cmd": "echo warm", "description": "Say it is warm"}
PLANNED: Final = {"city": "Paris", "days": 3}
_FIELD: Final = re.compile(r"\[\[ ## (\w+) ## \]\]")
_FIELDS_WANTED: Final = "Respond with the corresponding output fields"


def loop_provider(seen: Seen) -> Reply:
    """The answer of the provider whose path this is."""
    path, body = seen.path.partition("?")[0], seen.json
    task = task_of(body)
    if task == REFUSED:
        error = {"message": "Turned down.", "type": "invalid_request_error"}
        return Json(400, {"type": "error", "error": error} if path.endswith("/messages") else {"error": error})
    return say(path, body, _said(body, task))


def _said(body: Mapping[str, Any], task: str) -> str | Call:
    told = list(_texts(turns_of(body)[-1:]))
    if any([_FIELDS_WANTED in text for text in told]):
        return _marked(told[-1], task, is_done=any(["observation_0" in text for text in told]))
    tools = tools_of(body)
    is_done = _is_result(turns_of(body)[-1])
    answer = _ending(task, " ".join(told) if is_done else "")
    if task == LOOP and not is_done and (call := _call(tools)) is not None:
        return call
    for name, takes in tools.items():
        if takes.keys() >= PLANNED.keys() and task == TRIP and not is_done:
            return Call(name, PLANNED)
        if name == "final_answer":
            return Call(name, {"answer": answer})
    return json.dumps(PLANNED) if task == TRIP else answer


def _ending(task: str, told: str) -> str:
    """The last words on a task, and in them what a tool told."""
    return text_for(task) + (" The tool says it is warm." if "warm" in told else "")


def _call(tools: Mapping[str, Mapping[str, Any]]) -> Call | None:
    """A call of the first tool that tells the weather or runs a command."""
    for name in tools:
        if "weather" in name:
            return Call(name, {"city": "Paris"})
    for name, takes in tools.items():
        if name.lower() in ("bash", "shell", "exec_command", "shell_command"):
            given = {field: SHELL[field] for field in SHELL if field in takes}
            is_list = takes.get("command", {}).get("type") == "array"
            return Call(name, {**given, "command": ["echo", "warm"]} if is_list else given)
    return None


def _marked(text: str, task: str, *, is_done: bool) -> str:
    wanted = dict.fromkeys(_FIELD.findall(text.partition(_FIELDS_WANTED)[2]))
    tool = "finish" if is_done else "weather"
    values = {
        **{"city": "Paris", "days": "3", "next_thought": "So be it.", "next_tool_name": tool},
        "next_tool_args": json.dumps({} if is_done else {"city": "Paris"}),
    }
    answer = _ending(task, text)
    lines = [f"[[ ## {name} ## ]]\n{values.get(name, answer)}\n" for name in wanted if name != "completed"]
    return "\n".join([*lines, "[[ ## completed ## ]]"])


def task_of(body: Mapping[str, Any]) -> str:
    """Which of TASKS was given last; "" for what a client asks for itself, such as a title."""
    for turn in reversed(turns_of(body)):
        if turn.get("role") == "user":
            told = "\n".join(_texts(turn))
            found = max(TASKS, key=told.rfind)
            if found in told:
                return found
    return ""


def turns_of(body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What was said, in the words of the body's dialect, oldest first."""
    said = body.get("messages") or body.get("input") or ()
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


def tools_of(body: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name → what each of its arguments is."""
    found = {}
    for tool in body.get("tools") or ():
        function = tool.get("function", tool)
        schema = function.get("parameters") or function.get("input_schema") or {}
        found[function.get("name", "")] = schema.get("properties") or {}
    return found


def _is_result(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content")
    kinds = [part.get("type") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    is_plain = any([text.startswith("Observation:") for text in _texts(content or "")])  # smolagents'
    return (
        turn.get("role") == "tool" or turn.get("type") == "function_call_output" or "tool_result" in kinds or is_plain
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def logged(log: Path | None) -> Callable[[Seen], Reply]:
    """The provider; it writes each request to `log`, a line of JSON each, where there is one."""

    def answer(seen: Seen) -> Reply:
        if log is not None:
            told = {"method": seen.method, "path": seen.path, "headers": dict(seen.headers)}
            with log.open("a") as lines:
                lines.write(json.dumps({**told, "body": seen.body.decode(errors="replace")}) + "\n")
        return loop_provider(seen)

    return answer


async def serve(port: int, log: Path | None) -> None:
    async with ScriptedUpstream(logged(log), port=port) as up:
        print(up.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    chosen = parser.parse_args()
    asyncio.run(serve(chosen.port, chosen.log))
