"""What a miss costs that has candidates: `python -m tests.bench.misses [--rounds 3] [--requests 400]`.

Every question is new, resembles many that are stored, and is answered in words of its own: nothing is served, and there
is always an answer to compare with. Counted is the processor time of ibid's process until nothing is left to do, so
that other programs on the machine do not show, against that of embedding the same questions alone, measured just before
in the same round; beside it what a bypass costs, which is neither embedded nor stored. ibid has one core. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import uvloop
from aiohttp import ClientSession

from index.batcher import load_backend
from index.embedder import Backend
from tests.bench.http import SERVER_CPU, Line, free_port, process, stats
from tests.bench.questions import WORDS, fresh_question
from tests.upstream import Chat, ScriptedUpstream, Seen

GOAL: Final = 0.80
WARM_UP: Final = 300  # questions, before anything is counted: more than the comparisons that may be made at once
TICKS_S: Final = os.sysconf("SC_CLK_TCK")
ANSWER_WORDS: Final = 90
KEY: Final = {"authorization": "Bearer sk-bench"}


def answer_to(text: str) -> str:
    """Some sentences about what was asked, in the question's words and others."""
    pick = random.Random(text)
    words = [pick.choice((*WORDS, *text.split())) for _ in range(ANSWER_WORDS)]
    return ". ".join(" ".join(words[at : at + 15]).capitalize() for at in range(0, ANSWER_WORDS, 15)) + "."


def reply(seen: Seen) -> Chat:
    return Chat(text=answer_to(seen.json["messages"][-1]["content"]))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def embed_s(backend: Backend, texts: list[str]) -> float:
    """Processor time of one text."""
    started = time.process_time()
    for text in texts:
        backend.encode(text)
    return (time.process_time() - started) / len(texts)


class Server:
    """ibid under load, one request after the other."""

    def __init__(self, session: ClientSession, pid: int, port: int, admin: int) -> None:
        self._session = session
        self._pid = pid
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._admin = admin

    async def ask(self, texts: list[str], headers: dict[str, str] | None = None) -> set[str]:
        """What the cache said of them."""
        said = set()
        for text in texts:
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}
            async with self._session.post(self._url, json=body, headers=KEY | (headers or {})) as got:
                answer = await got.read()
                if got.status != 200:
                    raise SystemExit(answer.decode())
                said.add(got.headers.get("x-cache", ""))
        return said

    async def cost_s(self, texts: list[str], headers: dict[str, str] | None = None) -> float:
        """Processor time of one of them, until nothing is left to do."""
        before = cpu_s(self._pid)
        said = await self.ask(texts, headers)
        if said & {"HIT"}:
            raise SystemExit("a question was served")
        await self._rest()
        return (cpu_s(self._pid) - before) / len(texts)

    async def _rest(self) -> None:
        """Until it has taken no time for a while and its ledger is written."""
        before_s, now_s = -1.0, cpu_s(self._pid)
        while before_s != now_s or (await asyncio.to_thread(stats, self._admin))["ledger"]["waiting"]:
            await asyncio.to_thread(time.sleep, 0.5)
            before_s, now_s = now_s, cpu_s(self._pid)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.misses", description="Misses that have candidates.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    serial = itertools.count(1)
    port, admin = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        home = os.environ.get("IBID_BENCH_DATA") or stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(home) / "misses.toml"
        config.write_text("[cache]\nsemantic_misses_per_min = 0\n[embedding]\ndeadline_ms = 10000\n")
        backend = await load_backend(Path(home), threads=1)
        async with ScriptedUpstream(reply) as up, ClientSession() as session:
            serve = [sys.executable, "-m", "proxy", "serve", "--upstream", up.url, "--data-dir", home]
            serve += ["--config", str(config), "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}"]
            token = {"IBID_ADMIN_TOKEN": "b" * 40}
            pid = await asyncio.to_thread(stack.enter_context, process(serve, SERVER_CPU, admin, token, is_ibid=True))
            server = Server(session, pid, port, admin)
            await server.ask([fresh_question(next(serial)) for _ in range(WARM_UP)])
            alone, ours, passing = [], [], []
            for _ in range(options.rounds):
                texts = [fresh_question(next(serial)) for _ in range(options.requests)]
                alone.append(embed_s(backend, texts))
                passing.append(await server.cost_s(texts, {"cache-control": "no-store"}))
                ours.append(await server.cost_s(texts))
    ratios = [floor / cost for floor, cost in zip(alone, ours, strict=True)]
    milliseconds = [1e3 * statistics.median(found) for found in (alone, ours, passing)]
    detail = "embedding {:.2f} ms of CPU, a miss {:.2f} ms, a bypass {:.2f} ms".format(*milliseconds)
    print("| what | goal | median | spread | | absolute |\n| --- | --- | --- | --- | --- | --- |")
    print(Line("miss with candidates / embedding alone, CPU", GOAL, ratios, detail).row())
    print(json.dumps({"alone": alone, "ours": ours, "bypass": passing}))


if __name__ == "__main__":
    uvloop.run(main())
