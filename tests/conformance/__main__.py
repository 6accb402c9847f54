"""`python -m tests.conformance`: every client against ibid and against the provider itself, as a matrix.

    make conformance                        # installs the clients, runs all of them
    python -m tests.conformance --only js   # those whose name begins so

A scripted server speaks as each provider; each client asks it directly and through ibid, and what the client makes of
the two is compared field by field, ids and times apart. Whether ibid asked the provider is read from the provider's own
count. Each client has a credential of its own, so it starts with nothing cached. Ends with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.flows.running import Ibid, running
from tests.providers import MODEL, provider
from tests.upstream import ScriptedUpstream

HERE: Final = Path(__file__).parent
SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
VOLATILE: Final = frozenset({"created", "service_tier", "system_fingerprint", "id", "_request_id", "request_id"})
ASKED: Final = "How do I repair a leaking garden hose?"
REWORDED: Final = "How can I repair a leaking garden hose?"
STREAMED: Final = "How do I fold a paper crane?"
FOLLOWERS: Final = 20


@dataclass
class Client:
    """A client in a process of its own, one task at a time."""

    name: str
    command: Sequence[str]
    lacks: frozenset[str] = frozenset()  # what it cannot be asked
    child: asyncio.subprocess.Process | None = None

    async def ask(self, url: str, key: str, prompt: str, **task: Any) -> list[dict[str, Any]]:
        if self.child is None:
            pipe = asyncio.subprocess.PIPE
            self.child = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, cwd=HERE, limit=1 << 26, env={**os.environ, "PYTHONPATH": ""}
            )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        whole = {"url": url, "key": key, "model": MODEL, "prompt": prompt, "stream": False, "tools": False,
                 "schema": None, "times": 1, **task}  # fmt: skip
        self.child.stdin.write(json.dumps(whole).encode() + b"\n")
        async with asyncio.timeout(60):
            line = await self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process has ended")
        said: list[dict[str, Any]] = json.loads(line)["said"]
        return said

    async def close(self) -> None:
        if self.child is not None and self.child.returncode is None:
            assert self.child.stdin is not None
            self.child.stdin.close()
            await self.child.wait()


@dataclass
class Bench:
    """What a scenario has to work with."""

    client: Client
    up: ScriptedUpstream
    ibid: Ibid
    key: str
    notes: list[str] = field(default_factory=list)

    async def direct(self, prompt: str, **task: Any) -> dict[str, Any]:
        return (await self.client.ask(self.up.url, self.key, prompt, **task))[0]

    async def through(self, prompt: str, *, calls: int, **task: Any) -> list[dict[str, Any]]:
        """Ask through ibid; `calls` is how many requests must reach the provider for it."""
        before = len(self.up.requests)
        said = await self.client.ask(self.ibid.url, self.key, prompt, **task)
        await self.ibid.settled()
        if (made := len(self.up.requests) - before) != calls:
            self.notes.append(f"{made} calls instead of {calls}: {prompt[:30]!r}")
        return said

    def same(self, one: Any, other: Any, what: str) -> None:
        left, right = steady(one), steady(other)
        if left != right:
            self.notes.append(f"{what}: {json.dumps(left)[:400]} is not {json.dumps(right)[:400]}")

    def claim(self, is_true: bool, what: str) -> None:
        if not is_true:
            self.notes.append(what)


def steady(value: Any) -> Any:
    """All that two answers to one question have in common."""
    if isinstance(value, dict):
        return {name: steady(inner) for name, inner in value.items() if name not in VOLATILE}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


# -- scenarios --------------------------------------------------------------------------------------------------------


async def miss(bench: Bench) -> None:
    direct = await bench.direct(ASKED)
    (said,) = await bench.through(ASKED, calls=1)
    bench.claim("error" not in direct, f"the provider itself fails: {direct}")
    bench.same(said, direct, "miss")


async def hit(bench: Bench) -> None:
    direct = await bench.direct(ASKED)
    (said,) = await bench.through(ASKED, calls=0)
    bench.same(said, direct, "hit")


async def streamed_miss(bench: Bench) -> None:
    direct = await bench.direct(STREAMED, stream=True)
    (said,) = await bench.through(STREAMED, calls=1, stream=True)
    bench.same(said, direct, "streamed miss")


async def streamed_hit(bench: Bench) -> None:
    """What was streamed comes again in the same pieces, and ends as it ended; counters told on the way are not kept."""
    direct = await bench.direct(STREAMED, stream=True)
    (said,) = await bench.through(STREAMED, calls=0, stream=True)
    told, expected = said.get("objects", []), direct["objects"]
    bench.same(said.get("text"), direct["text"], "text of a streamed hit")
    bench.same(told[-1:], expected[-1:], "last event of a streamed hit")
    bench.claim(len(told) == len(expected), f"{len(told)} events instead of {len(expected)}")


async def semantic(bench: Bench) -> None:
    (said,) = await bench.through(REWORDED, calls=0)
    bench.same(said.get("text"), (await bench.direct(ASKED))["text"], "semantic hit")


async def collapse(bench: Bench) -> None:
    asked = "How do I tell a wasp from a bee at first sight?"
    said = await bench.through(asked, calls=1, times=FOLLOWERS)
    direct = await bench.direct(asked)
    for one in said:
        bench.same(one, direct, "collapsed")


async def tools(bench: Bench, **task: Any) -> None:
    asked = "call for the weather in Paris"
    (said,) = await bench.through(asked, calls=1, tools=True, **task)
    bench.same(said, await bench.direct(asked, tools=True, **task), "tool call")
    bench.claim("Paris" in json.dumps(said), "no tool call came")


async def structured(bench: Bench) -> None:
    asked = "json of a trip to Paris for three days"
    direct = await bench.direct(asked, schema=SCHEMA)
    for calls in (1, 0):
        (said,) = await bench.through(asked, calls=calls, schema=SCHEMA)
        bench.same(said, direct, "structured")
    bench.claim("Paris" in json.dumps(said), "no object came")


async def long(bench: Bench) -> None:
    asked = "long story about the garden hose"
    for calls in (1, 0):
        (said,) = await bench.through(asked, calls=calls, stream=True)
        bench.claim(said.get("text", "").endswith("word 599 of a long answer. "), f"cut: {str(said)[:200]}")


async def error(bench: Bench) -> None:
    for stream in (False, True):
        before = len(bench.up.requests)
        direct = await bench.direct("fail please", stream=stream)
        tries = len(bench.up.requests) - before  # some clients try again
        (said,) = await bench.through("fail please", calls=tries, stream=stream)
        bench.claim("error" in direct, "the provider's error is none")
        bench.same(said, direct, "error")


async def truncated(bench: Bench) -> None:
    (said,) = await bench.through("break off this stream", calls=1, stream=True)
    bench.claim("error" in said, f"a broken stream looks whole: {str(said)[:200]}")
    (again,) = await bench.through("break off this stream", calls=1, stream=True)
    bench.claim("error" in again, "a broken stream was stored")


Scenario = Callable[[Bench], Awaitable[None]]
SCENARIOS: Mapping[str, Scenario] = {
    "miss": miss,
    "hit": hit,
    "stream miss": streamed_miss,
    "stream hit": streamed_hit,
    "semantic": semantic,
    "collapse": collapse,
    "tools": tools,
    "stream tools": lambda bench: tools(bench, stream=True),
    "structured": structured,
    "long": long,
    "error": error,
    "truncated": truncated,
}


# -- clients ----------------------------------------------------------------------------------------------------------

STREAMS: Final = frozenset({"stream miss", "stream hit", "long", "truncated"})
TOOLS: Final = frozenset({"tools", "stream tools"})


def clients() -> list[Client]:
    own, frameworks, older = sys.executable, _python("IBID_FRAMEWORKS_PYTHON"), _python("IBID_OPENAI2_PYTHON")
    python, js = str(HERE / "driver.py"), ["node", str(HERE / "driver.mjs")]
    found = [
        Client("openai 3 (py)", [own, python, "openai"]),
        Client("anthropic (py)", [own, python, "anthropic"]),
        Client("google-genai (py)", [own, python, "gemini"]),
        Client("ollama (py)", [own, python, "ollama"]),
    ]
    if older:
        found.insert(1, Client("openai 2 (py)", [older, python, "openai"]))
    if (HERE / "node_modules").exists():
        named = {"openai": "openai", "@anthropic-ai/sdk": "anthropic", "@google/genai": "gemini", "ollama": "ollama"}
        found += [Client(f"js {package}", [*js, client]) for package, client in named.items()]
    if frameworks:
        found += [
            Client("langchain-openai", [frameworks, python, "langchain-openai"]),
            Client("langchain-anthropic", [frameworks, python, "langchain-anthropic"]),
            Client("llama-index", [frameworks, python, "llama-index"]),
            Client("pydantic-ai", [frameworks, python, "pydantic-ai"], TOOLS),
            Client("instructor", [frameworks, python, "instructor"], frozenset(SCENARIOS) - {"structured"}),
        ]
    return found


def _python(variable: str) -> str:
    return os.environ.get(variable, "")


async def run(chosen: Sequence[Client], names: Sequence[str]) -> dict[str, dict[str, list[str] | None]]:
    """Client → scenario → what was wrong; None where it does not apply."""
    found: dict[str, dict[str, list[str] | None]] = {}
    with tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder:
        async with ScriptedUpstream(provider) as up, running(Path(folder) / "data", up.url) as ibid:
            for number, client in enumerate(chosen):
                row = found[client.name] = {}
                try:
                    for name in names:
                        bench = Bench(client, up, ibid, f"sk-conformance-{number}")
                        if name in client.lacks:
                            row[name] = None
                            continue
                        try:
                            await SCENARIOS[name](bench)
                        except (TimeoutError, RuntimeError, LookupError, ValueError) as fault:
                            bench.notes.append(f"{type(fault).__name__}: {fault}")
                        row[name] = bench.notes
                finally:
                    await client.close()
    return found


def table(found: Mapping[str, Mapping[str, list[str] | None]], names: Sequence[str]) -> str:
    lines = ["| client | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for client, row in found.items():
        cells = ["-" if row[name] is None else "FAILS" if row[name] else "ok" for name in names]
        lines.append(f"| {client} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--only", default="", help="clients whose name begins so")
    chosen = parser.parse_args()
    names = list(SCENARIOS)
    found = asyncio.run(run([c for c in clients() if c.name.startswith(chosen.only)], names))
    sys.stdout.write(table(found, names) + "\n")
    wrong = [(c, name, note) for c, row in found.items() for name in names for note in row[name] or ()]
    for client, name, note in wrong:
        sys.stdout.write(f"\n{client}, {name}: {note}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
