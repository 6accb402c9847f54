"""`python -m tests.conformance`: every client against ibid and against the provider itself, as a matrix.

    make conformance                        # installs the clients, runs all of them
    python -m tests.conformance --only js   # those whose name begins so
    python -m tests.conformance --llm       # the same against a real server, llama.cpp, as far as it goes

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
from typing import Any, Final, NamedTuple

from deploy.local_llm import MODEL_NAME
from deploy.local_llm import running as llm_running
from tests.flows.running import Ibid, running
from tests.llm import WEIGHTS
from tests.providers import MODEL, provider
from tests.upstream import ScriptedUpstream

HERE: Final = Path(__file__).parent
SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
VOLATILE: Final = frozenset(
    {"created", "service_tier", "system_fingerprint", "id", "_request_id", "request_id",
     # of the real server: times, and what its own prefix cache spared it
     "timings", "prompt_tokens_details", "cache_read_input_tokens", "input_token_details", "input_tokens",
     "prompt_progress"}
)  # fmt: skip
FOLLOWERS: Final = 20


class Talk(NamedTuple):
    """What is asked of a server, and what of it it can do."""

    model: str
    asked: str
    reworded: str
    streamed: str
    together: str
    refused: str
    scenarios: Sequence[str]


@dataclass
class Server:
    """The provider: where it is, how it is talked to, and what counts the requests it gets."""

    url: str
    talk: Talk
    count: Callable[[], Awaitable[int]]


@dataclass
class Client:
    """A client in a process of its own, one task at a time."""

    name: str
    command: Sequence[str]
    lacks: frozenset[str] = frozenset()  # what it cannot be asked
    speaks: str = "openai"
    child: asyncio.subprocess.Process | None = None

    async def ask(self, url: str, key: str, model: str, prompt: str, **task: Any) -> list[dict[str, Any]]:
        if self.child is None:
            pipe = asyncio.subprocess.PIPE
            self.child = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, cwd=HERE, limit=1 << 26, env={**os.environ, "PYTHONPATH": ""}
            )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        whole = {"url": url, "key": key, "model": model, "prompt": prompt, "stream": False, "tools": False,
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
    server: Server
    ibid: Ibid
    key: str
    notes: list[str] = field(default_factory=list)

    @property
    def talk(self) -> Talk:
        return self.server.talk

    async def direct(self, prompt: str, **task: Any) -> dict[str, Any]:
        return (await self.client.ask(self.server.url, self.key, self.talk.model, prompt, **task))[0]

    async def through(self, prompt: str, *, calls: int, **task: Any) -> list[dict[str, Any]]:
        """Ask through ibid; `calls` is how many requests must reach the provider for it."""
        before = await self.server.count()
        said = await self.client.ask(self.ibid.url, self.key, self.talk.model, prompt, **task)
        await self.ibid.settled()
        if (made := await self.server.count() - before) != calls:
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
    direct = await bench.direct(bench.talk.asked)
    (said,) = await bench.through(bench.talk.asked, calls=1)
    bench.claim("error" not in direct, f"the provider itself fails: {direct}")
    bench.same(said, direct, "miss")


async def hit(bench: Bench) -> None:
    direct = await bench.direct(bench.talk.asked)
    (said,) = await bench.through(bench.talk.asked, calls=0)
    bench.same(said, direct, "hit")


async def streamed_miss(bench: Bench) -> None:
    direct = await bench.direct(bench.talk.streamed, stream=True)
    (said,) = await bench.through(bench.talk.streamed, calls=1, stream=True)
    bench.same(said, direct, "streamed miss")


async def streamed_hit(bench: Bench) -> None:
    """What was streamed comes again in the same pieces, and ends as it ended; counters told on the way are not kept."""
    direct = await bench.direct(bench.talk.streamed, stream=True)
    (said,) = await bench.through(bench.talk.streamed, calls=0, stream=True)
    told, expected = said.get("objects", []), direct["objects"]
    bench.same(said.get("text"), direct["text"], "text of a streamed hit")
    bench.same(told[-1:], expected[-1:], "last event of a streamed hit")
    bench.claim(len(told) == len(expected), f"{len(told)} events instead of {len(expected)}")


async def semantic(bench: Bench) -> None:
    (said,) = await bench.through(bench.talk.reworded, calls=0)
    bench.same(said.get("text"), (await bench.direct(bench.talk.asked))["text"], "semantic hit")


async def collapse(bench: Bench) -> None:
    said = await bench.through(bench.talk.together, calls=1, times=FOLLOWERS)
    direct = await bench.direct(bench.talk.together)
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
    bench.claim("city" in json.dumps(said), "no object came")


async def long(bench: Bench) -> None:
    asked = "long story about the garden hose"
    for calls in (1, 0):
        (said,) = await bench.through(asked, calls=calls, stream=True)
        bench.claim(said.get("text", "").endswith("word 599 of a long answer. "), f"cut: {str(said)[:200]}")


async def error(bench: Bench) -> None:
    for stream in (False, True):
        before = await bench.server.count()
        direct = await bench.direct(bench.talk.refused, stream=stream)
        tries = await bench.server.count() - before  # some clients try again; of the real server only ibid's are seen
        (said,) = await bench.through(bench.talk.refused, calls=tries or 1, stream=stream)
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
        Client("anthropic (py)", [own, python, "anthropic"], speaks="anthropic"),
        Client("google-genai (py)", [own, python, "gemini"], speaks="gemini"),
        Client("ollama (py)", [own, python, "ollama"], speaks="ollama"),
    ]
    if older:
        found.insert(1, Client("openai 2 (py)", [older, python, "openai"]))
    if (HERE / "node_modules").exists():
        named = {"openai": "openai", "@anthropic-ai/sdk": "anthropic", "@google/genai": "gemini", "ollama": "ollama"}
        found += [Client(f"js {package}", [*js, client], speaks=client) for package, client in named.items()]
    if frameworks:
        found += [
            Client("langchain-openai", [frameworks, python, "langchain-openai"]),
            Client("langchain-anthropic", [frameworks, python, "langchain-anthropic"], speaks="anthropic"),
            Client("llama-index", [frameworks, python, "llama-index"], speaks="gpt-4o-mini alone"),
            Client("pydantic-ai", [frameworks, python, "pydantic-ai"], TOOLS),
            Client("instructor", [frameworks, python, "instructor"], frozenset(SCENARIOS) - {"structured"}),
        ]
    return found


def _python(variable: str) -> str:
    return os.environ.get(variable, "")


Found = dict[str, dict[str, list[str] | None]]
"""Client → scenario → what was wrong; None where it does not apply."""

SCRIPTED: Final = Talk(
    model=MODEL,
    asked="How do I repair a leaking garden hose?",
    reworded="How can I repair a leaking garden hose?",
    streamed="How do I fold a paper crane?",
    together="How do I tell a wasp from a bee at first sight?",
    refused="fail please",
    scenarios=tuple(SCENARIOS),
)
REAL: Final = Talk(  # questions that a model of this size answers and ends
    model=MODEL_NAME,
    asked="What is the capital of France? Answer in one word.",
    reworded="",
    streamed="How many days are in a week?",
    together="What is the capital of Italy? Answer in one word.",
    refused="word " * 6000,
    scenarios=("miss", "hit", "stream miss", "stream hit", "collapse", "structured", "error"),
)
"""Left out: what a real server does not do on demand (tool calls, long answers, breaking off), and semantic hits, whose
text would not be that of the other wording."""


async def run(chosen: Sequence[Client]) -> Found:
    """Against the scripted providers."""
    with tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder:
        async with ScriptedUpstream(provider) as up, running(Path(folder) / "data", up.url) as ibid:

            async def count() -> int:
                return len(up.requests)

            return await compare(chosen, Server(up.url, SCRIPTED, count), ibid)


async def run_real(chosen: Sequence[Client]) -> Found:
    """Against llama.cpp, which speaks OpenAI and Anthropic."""
    with tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder, (Path(folder) / "llm.log").open("w") as log:
        with llm_running(WEIGHTS, log, temperature=0.0) as address:
            async with running(Path(folder) / "data", address, {"cache": {"semantic": False}}) as ibid:

                async def count() -> int:
                    (row,) = await ibid.sql("SELECT COUNT(*) AS made FROM upstream_call")
                    return int(row["made"])

                return await compare(chosen, Server(address, REAL, count), ibid)


async def compare(chosen: Sequence[Client], server: Server, ibid: Ibid) -> Found:
    found: Found = {}
    for number, client in enumerate(chosen):
        row = found[client.name] = {}
        try:
            for name in server.talk.scenarios:
                bench = Bench(client, server, ibid, f"sk-conformance-{number}")
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
    parser.add_argument("--llm", action="store_true", help="against a real model server instead")
    chosen = parser.parse_args()
    named = [client for client in clients() if client.name.startswith(chosen.only)]
    if chosen.llm:
        named = [client for client in named if client.speaks in ("openai", "anthropic")]
        for client in named:
            if client.speaks == "anthropic":  # llama.cpp takes a schema from OpenAI's clients alone
                client.lacks |= {"structured"}
    names = (REAL if chosen.llm else SCRIPTED).scenarios
    found = asyncio.run((run_real if chosen.llm else run)(named))
    sys.stdout.write(table(found, names) + "\n")
    wrong = [(c, name, note) for c, row in found.items() for name in names for note in row[name] or ()]
    for client, name, note in wrong:
        sys.stdout.write(f"\n{client}, {name}: {note}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
