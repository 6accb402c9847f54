"""Loops of agents, replayed: `python -m tests.bench.agents`, or `make bench ARGS=agents`.

Four kinds, each as its client writes it. Every loop runs once, then again to the byte (*exact*), again with an early
turn said otherwise (*changed*), and again by another session of the same person (*session*): a client's own ids differ
there, and nothing of the question. Beside ibid, a cache that is keyed by the SHA-256 of the body and keeps everything.
Both ask the same scripted server; calls and money are its own count, at 3 and 15 dollars a million tokens of 4 bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.flows.running import EXACT_ONLY, running
from tests.providers import Call, say
from tests.upstream import Body, Reply, ScriptedUpstream, Seen

TURNS: Final = 8
CHANGED: Final = 2  # the turn that is said otherwise
TOOLS_BYTES: Final = 80_000
USD_PER_INPUT_BYTE, USD_PER_OUTPUT_BYTE = 3e-6 / 4, 15e-6 / 4
REPLAYS: Final = ("exact", "changed", "session")
MODEL: Final = "m-1"

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


class Kind(NamedTuple):
    path: str
    first: Callable[[str], dict[str, Any]]  # the first request of a session
    goes_on: Callable[[dict[str, Any], Any, str, str], None]  # body, answer, what the tool or the person said, session


def _session(number: str, turn: int = 0) -> str:
    return hashlib.sha256(f"{number} {turn}".encode()).hexdigest()[:24]


def coding(session: str) -> dict[str, Any]:
    description = "What this tool does, when to use it, and when not to. " * 75
    properties = {"path": {"type": "string"}, "command": {"type": "string"}}
    schema = {"type": "object", "properties": properties}
    tools = [{"name": f"tool_{n}", "description": description, "input_schema": schema} for n in range(20)]
    assert len(json.dumps(tools)) >= TOOLS_BYTES
    user = {"device_id": "d1", "account_uuid": "a1", "session_id": _session(session)}
    return {
        "model": MODEL,
        "max_tokens": 32000,
        "metadata": {"user_id": json.dumps(user)},
        "system": [{"type": "text", "text": "You are a coding agent. " * 400}],
        "tools": tools,
        "messages": [{"role": "user", "content": "Find out why the test fails and mend it."}],
    }


def coding_goes_on(body: dict[str, Any], answer: Any, told: str, session: str) -> None:
    (use,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": told}
    body["messages"] += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]


def react(session: str) -> dict[str, Any]:
    system = "Answer with Thought, Action and Action Input; you are given an Observation. " * 20
    asked = [{"role": "system", "content": system}, {"role": "user", "content": "Which city is the warmest?"}]
    return {"model": MODEL, "messages": asked, "stop": ["Observation:"]}


def react_goes_on(body: dict[str, Any], answer: Any, told: str, session: str) -> None:
    said = answer["choices"][0]["message"]["content"]
    body["messages"] += [{"role": "assistant", "content": said}, {"role": "user", "content": f"Observation: {told}"}]


def extraction(session: str) -> dict[str, Any]:
    function = {"name": "record", "parameters": {"type": "object", "properties": {"total": {"type": "string"}}}}
    return {
        "model": MODEL,
        "temperature": 0,
        "metadata": {"run": _session(session)},
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "record"}},
        "messages": [{"role": "system", "content": "Record what the document says."}, {"role": "user", "content": "0"}],
    }


def extraction_goes_on(body: dict[str, Any], answer: Any, told: str, session: str) -> None:
    body["messages"][-1] = {"role": "user", "content": f"{told} " * 400}
    body["metadata"] = {"run": _session(session, len(told))}


def rag(session: str) -> dict[str, Any]:
    passages = "A passage of the handbook that may hold the answer. " * 200
    asked = {"type": "message", "id": f"msg_{_session(session)}", "role": "user", "content": passages + "What holds?"}
    return {"model": MODEL, "store": False, "prompt_cache_key": _session(session), "input": [asked]}


def rag_goes_on(body: dict[str, Any], answer: Any, told: str, session: str) -> None:
    said = answer["output"][-1]["content"][0]["text"]
    number = f"msg_{_session(session, len(body['input']))}"
    turns = [{"role": "assistant", "content": said}, {"role": "user", "id": number, "content": f"And {told}?"}]
    body["input"] += [{"type": "message", **turn} for turn in turns]


KINDS: Final[Mapping[str, Kind]] = {
    "coding agent, 80 kB of tools": Kind("/v1/messages", coding, coding_goes_on),
    "ReAct": Kind("/v1/chat/completions", react, react_goes_on),
    "structured extraction": Kind("/v1/chat/completions", extraction, extraction_goes_on),
    "RAG chat": Kind("/v1/responses", rag, rag_goes_on),
}


class Meter:
    """The scripted server and what it would bill; the id of each call it makes is new, as a provider's is."""

    def __init__(self) -> None:
        self.calls, self.usd = 0, 0.0
        self._ids = itertools.count(1)

    def answer(self, seen: Seen) -> Reply:
        body = seen.json
        tools = body.get("tools")
        name = "tool_3" if "input_schema" in str(tools)[:5000] else "record"
        said = Call(name, {"path": "src/main.py"}) if tools else f"Thought: {hashlib.sha256(seen.body).hexdigest()}"
        reply = say(seen.path, body, said)
        assert isinstance(reply, Body)
        fresh = reply.body.replace(b"toolu_abc", b"toolu_%d" % next(self._ids)).replace(
            b"call_abc", b"call_%d" % self.calls
        )
        self.calls += 1
        self.usd += len(seen.body) * USD_PER_INPUT_BYTE + len(fresh) * USD_PER_OUTPUT_BYTE
        return Body(body=fresh, headers=reply.headers)


async def loop(kind: Kind, ask: Ask, session: str, *, is_changed: bool = False) -> None:
    body = kind.first(session)
    for turn in range(TURNS):
        answer = await ask(kind.path, body)
        said = f"result {turn}" if not (is_changed and turn == CHANGED) else "another result"
        kind.goes_on(body, answer, said, session)


async def measured(kind: Kind, ask: Ask, meter: Meter) -> dict[str, tuple[int, float]]:
    """Calls and dollars of the first run and of each replay."""
    told = {}
    for replay in ("first", *REPLAYS):
        calls, usd = meter.calls, meter.usd
        await loop(kind, ask, "other" if replay == "session" else "own", is_changed=replay == "changed")
        told[replay] = (meter.calls - calls, meter.usd - usd)
    return told


async def compare(folder: Path) -> list[str]:
    rows = []
    meter = Meter()
    async with ScriptedUpstream(meter.answer) as up, running(folder / "data", up.url, EXACT_ONLY, loaded=False) as ibid:

        async def through(url: str, path: str, data: bytes) -> Any:
            headers = {"Authorization": "Bearer sk-a", "x-api-key": "sk-a", "Content-Type": "application/json"}
            async with ibid.session.post(url + path, data=data, headers=headers) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        async def of_ibid(path: str, body: Mapping[str, Any]) -> Any:
            answer = await through(ibid.url, path, json.dumps(body).encode())
            await ibid.settled()
            return answer

        for name, kind in KINDS.items():
            kept: dict[bytes, Any] = {}

            async def of_hash(path: str, body: Mapping[str, Any], kept: dict[bytes, Any] = kept) -> Any:
                data = json.dumps(body).encode()
                key = hashlib.sha256(data).digest()
                if key not in kept:
                    kept[key] = await through(up.url, path, data)
                return kept[key]

            hashed, ours = await measured(kind, of_hash, meter), await measured(kind, of_ibid, meter)
            for replay in REPLAYS:
                cells = [f"{told[replay][0]} | {1 - told[replay][1] / told['first'][1]:.0%}" for told in (hashed, ours)]
                rows.append(f"| {name} | {replay} | {TURNS} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(compare(Path(folder)))
    print("| loop | replay | calls without a cache | by a hash of the body: calls | saved | ibid: calls | saved |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
