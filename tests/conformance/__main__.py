"""`python -m tests.conformance`: every client against ibid and against the provider itself, as a matrix.

    make conformance                        # installs the clients, runs all of them
    python -m tests.conformance --only js   # those whose name begins so
    python -m tests.conformance --llm       # the same against a real server, llama.cpp, as far as it goes
    python -m tests.conformance --loops     # agents and command lines, which ask more than once for a task

A scripted server speaks as each provider; each client asks it directly and through ibid, and what the client makes of
the two is compared field by field, ids and times apart. Whether ibid asked the provider is read from the provider's own
count. Each client has a credential of its own, so it starts with nothing cached. A cell that does not apply is n/a, and
the reason stands below the matrix. Ends with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deploy.local_llm import MODEL_NAME
from deploy.local_llm import running as llm_running
from tests.conformance import loops_matrix
from tests.conformance.matrix import (
    HERE,
    SCHEMA,
    VOLATILE,
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
    report,
)
from tests.faultproxy import Fault, FaultProxy
from tests.flows.running import EXACT_ONLY, Ibid, running
from tests.llm import WEIGHTS
from tests.providers import MODEL, provider
from tests.upstream import ScriptedUpstream

REAL_VOLATILE: Final = frozenset(
    {"timings", "prompt_progress",
     # what its own prefix cache spared it
     "prompt_tokens_details", "cache_read_input_tokens", "input_token_details", "input_tokens", "input_tokens_details",
     # where it does not keep to the API, and a replay does: events without a number, rows that name their format
     "sequence_number", "encoding_format"}
)  # fmt: skip
FOLLOWERS: Final = 20
CUT_BYTES: Final = 1500  # of what the real server sends: behind its head, before the end of any answer


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
    if bench.client.speaks.endswith("embeddings"):
        return await many_inputs(bench)
    direct = await bench.direct(bench.talk.long, stream=True)
    text = direct.get("text", "")
    bench.claim(len(text) >= bench.talk.long_chars, f"the provider itself says {len(text)} characters only")
    for calls in (1, 0):
        (said,) = await bench.through(bench.talk.long, calls=calls, stream=True)
        bench.same(said.get("text"), text, "long")
        if calls:  # of a hit: `streamed_hit`
            bench.same(said.get("objects", [])[-1:], direct.get("objects", [])[-1:], "last event of a long stream")


async def many_inputs(bench: Bench) -> None:
    """Of a hundred inputs 90 were seen before: one call for ten, and all in their order."""
    inputs = [f"passage {number} of a corpus" for number in range(100)]
    await bench.through("", calls=1, inputs=[text for n, text in enumerate(inputs) if n % 10])
    direct = await bench.direct("", inputs=inputs)
    for calls in (1, 0):
        (said,) = await bench.through("", calls=calls, inputs=inputs)
        bench.same(said, direct, "a hundred inputs")


async def error(bench: Bench) -> None:
    for stream in (False, True):
        before = await bench.server.count(bench.ibid)
        direct = await bench.direct(bench.talk.refused, stream=stream)
        tries = await bench.server.count(bench.ibid) - before  # some clients try again; of the real server ibid's alone
        (said,) = await bench.through(bench.talk.refused, calls=tries or 1, stream=stream)
        bench.claim("error" in direct, "the provider's error is none")
        bench.same(said, direct, "error")


async def truncated(bench: Bench) -> None:
    asked = "break off this stream, which is a long story about the garden hose"
    for what in ("a broken stream looks whole", "a broken stream was stored"):
        (said,) = await bench.through(asked, calls=1, ibid=bench.server.cut, stream=True)
        bench.claim("error" in said, f"{what}: {str(said)[:200]}")


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

TOOLS: Final = ("tools", "stream tools")
EMBEDDINGS_LACK: Final[Lacks] = {
    **dict.fromkeys(("stream miss", "stream hit"), "vectors are not streamed"),
    "semantic": "vectors are found by identity alone",
    "collapse": "identical inputs in flight are asked for each time",
    **dict.fromkeys((*TOOLS, "structured"), "vectors have none"),
}
COMPLETIONS_LACK: Final[Lacks] = dict.fromkeys((*TOOLS, "structured"), "legacy completions have none")
OPENAI: Final[Mapping[str, Lacks]] = {
    "openai": {}, "responses": {}, "completions": COMPLETIONS_LACK, "embeddings": EMBEDDINGS_LACK,
}  # fmt: skip
"""The operations of OpenAI's own clients, each with a row of its own."""


def clients() -> list[Client]:
    own, frameworks, older = sys.executable, python_of("IBID_FRAMEWORKS_PYTHON"), python_of("IBID_OPENAI2_PYTHON")
    python, js = str(HERE / "driver.py"), ["node", str(HERE / "driver.mjs")]
    found = _openai("openai 3 (py)", [own, python])
    if older:
        found += _openai("openai 2 (py)", [older, python])
    found += [
        Client("anthropic (py)", [own, python, "anthropic"], "anthropic"),
        *_with_embeddings("google-genai (py)", [own, python], "gemini"),
        *_with_embeddings("ollama (py)", [own, python], "ollama"),
    ]
    if (HERE / "node_modules").exists():
        found += _openai("js openai", js)
        found.append(Client("js @anthropic-ai/sdk", [*js, "anthropic"], "anthropic"))
        found += _with_embeddings("js @google/genai", js, "gemini")
        found += _with_embeddings("js ollama", js, "ollama")
    if frameworks:
        found += [
            Client("langchain-openai", [frameworks, python, "langchain-openai"]),
            Client("langchain-anthropic", [frameworks, python, "langchain-anthropic"], "anthropic"),
            Client("llama-index", [frameworks, python, "llama-index"]),
            Client("pydantic-ai", [frameworks, python, "pydantic-ai"]),
            Client("instructor", [frameworks, python, "instructor"], "instructor"),
        ]
    return found


def _openai(name: str, command: Sequence[str]) -> list[Client]:
    return [
        Client(name if operation == "openai" else f"{name} {operation}", [*command, operation], operation, lacks)
        for operation, lacks in OPENAI.items()
    ]


def _with_embeddings(name: str, command: Sequence[str], speaks: str) -> list[Client]:
    vectors = f"{speaks}-embeddings"
    return [
        Client(name, [*command, speaks], speaks),
        Client(f"{name} embeddings", [*command, vectors], vectors, EMBEDDINGS_LACK),
    ]


SCRIPTED: Final = Talk(
    model=MODEL,
    asked="How do I repair a leaking garden hose?",
    reworded="How can I repair a leaking garden hose?",
    streamed="How do I fold a paper crane?",
    together="How do I tell a wasp from a bee at first sight?",
    long="long story about the garden hose",
    long_chars=15_000,
    refused="fail please",
    phrasings={"instructor": "json {}"},
)
ALIASES: Final = [f"gpt-4o-mini={MODEL_NAME}"]  # llama-index asks for no model that it does not know
TURN, TURN_END = "<|im_start|>{}\n", "<|im_end|>\n"
REAL: Final = Talk(  # questions that a model of this size answers and ends
    model=MODEL_NAME,
    asked="What is the capital of France? Answer in one word.",
    reworded="Tell me, what is the capital of France? Answer in one word.",
    streamed="How many days are in a week?",
    together="What is the capital of Italy? Answer in one word.",
    long="Why is the sky blue? Explain in three paragraphs.",
    long_chars=1000,
    refused="word " * 6000,
    phrasings={
        "completions": f"{TURN.format('system')}You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"{TURN_END}{TURN.format('user')}{{}}{TURN_END}{TURN.format('assistant')}",
        "instructor": "A trip to Paris for three days. {}",
    },
)


def real_lacks(client: Client) -> Lacks:
    """What llama.cpp or the model cannot do."""
    match client.speaks:
        case "gemini" | "ollama" | "gemini-embeddings" | "ollama-embeddings":
            return dict.fromkeys(SCENARIOS, "llama.cpp does not speak this dialect")
        case "anthropic":
            return {"structured": "llama.cpp takes a schema from OpenAI's clients alone"}
        case "responses":
            return {"structured": "llama.cpp leaves the schema of Responses unread"}
        case "completions":
            return {
                "stream hit": "llama.cpp ends a completion with an empty piece and counters nobody asked for",
                "semantic": "the marks of a chat template, which the model needs to end, make a prompt exact only",
            }
        case "embeddings":
            return {"long": "llama.cpp gives an input another vector in another batch"}
        case "instructor":
            return {"long": "the model fills no object with a long text"}
    return {}


async def run(chosen: Sequence[Client]) -> Found:
    """Against the scripted providers."""
    with tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder:
        async with ScriptedUpstream(provider) as up, running(data_dir(folder), up.url) as ibid:
            up.vectors = provider

            async def count(_: Ibid) -> int:
                return len(up.requests)

            return await compare(chosen, Server(up.url, SCRIPTED, count, lambda client: {}, ibid), ibid, SCENARIOS)


async def run_real(chosen: Sequence[Client]) -> Found:
    """Against llama.cpp, which speaks OpenAI and Anthropic. Its answers break off on the way to another ibid."""

    async def count(ibid: Ibid) -> int:
        (row,) = await ibid.sql("SELECT COUNT(*) AS made FROM upstream_call")
        return int(row["made"])

    with (
        tempfile.TemporaryDirectory(prefix="ibid-conformance-") as folder,
        (Path(folder) / "llm.log").open("w") as log,
        llm_running(WEIGHTS, log, temperature=0.0, template=HERE / "tools.jinja", embeds=True) as address,
    ):
        async with (
            FaultProxy("127.0.0.1", int(address.rpartition(":")[2])) as faulty,
            running(data_dir(folder), address, {"forward": {"model_aliases": ALIASES}}) as ibid,
            running(Path(folder) / "cut", faulty.url, EXACT_ONLY) as cut,
        ):
            faulty.downstream = Fault(cut_at=CUT_BYTES)
            return await compare(
                chosen, Server(address, REAL, count, real_lacks, cut, VOLATILE | REAL_VOLATILE), ibid, SCENARIOS
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--only", default="", help="clients whose name begins so")
    parser.add_argument("--llm", action="store_true", help="against a real model server instead")
    parser.add_argument("--loops", action="store_true", help="the clients that run tools themselves")
    chosen = parser.parse_args()
    started = time.monotonic()
    if chosen.loops:
        found = asyncio.run(loops_matrix.run(chosen.only))
    else:
        named = [client for client in clients() if client.name.startswith(chosen.only)]
        found = asyncio.run((run_real if chosen.llm else run)(named))
    return report(found, time.monotonic() - started)


if __name__ == "__main__":
    raise SystemExit(main())
