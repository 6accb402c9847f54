"""What it takes to choose a model: `python -m tests.bench.route [ENTRIES...]`.

A decision reads the request again, writes it for the candidate, searches the requested model's answered questions and
the candidate's, counts the votes of the 50 nearest and takes the bound. Floor, in turn with it: one search of the same
index for 50 entries. Every question is new, so that no conversation is held; half of the entries are each model's.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import uvloop

from index.kernels import compile_kernels
from index.tokens import signature
from index.vectors import VectorOwner
from proxy.core.dialects.routes import Routes
from proxy.core.model import Limits, Miss, Rules
from proxy.core.plan import Lane, Plan
from proxy.lanes.route import Router
from proxy.meaning import Meaning, Parts
from proxy.ports import Vote
from proxy.records import Client, Lookup
from proxy.request.reading import Caller, Reader, Steering
from proxy.settings.lanes import RouteLane
from tests.bench.search import DIMENSION, FAR, unit

CANDIDATE = "edge/small"
DECISIONS = 400
HEADERS = ((b"authorization", b"Bearer sk-bench"), (b"content-type", b"application/json"))


class Places:
    """Of the upstreams only where they are."""

    def route(self, path: str, headers: Any, model: str | None) -> str:
        return "openai"

    def place(self, upstream: str) -> str:
        return f"http://{upstream}.example"


class NoRows:
    async def record(self, vote: Vote) -> None:
        pass

    async def newest(self, limit: int, after_id: int = 0) -> list[tuple[int, Vote]]:
        return []


def question(number: int) -> bytes:
    text = f"Which of the {number} ships that left in the year {1500 + number % 400} came back with all of their crew?"
    return orjson.dumps({"model": "large", "messages": [{"role": "user", "content": text}]})


async def measure(entries: int) -> str:
    plan = Plan(frozenset({Lane.EXACT, Lane.ROUTE, Lane.COLLAPSE}))
    steering = Steering(ready=frozenset(Lane))
    reader = Reader(Routes(orjson.loads), Places(), Rules(), Limits(), steering)  # type: ignore[arg-type]
    target = reader.target("/v1/chat/completions")
    caller = Caller("t" * 64, HEADERS, (), is_json=True, is_retry=False)
    caller.controls = None
    first = reader.read(target, caller, question(0))
    other = reader.variant(first, HEADERS, *CANDIDATE.split("/"))
    rng = np.random.default_rng(5)
    index = VectorOwner("bench", DIMENSION)
    index.start()
    try:
        vectors = unit(entries, rng, 0.6)
        signs = signature("Which ships came back?")
        for number, vector in enumerate(vectors):
            index.add_now(number, first.scope if number % 2 else other.scope, vector, signs, FAR)
        router = Router(
            RouteLane(candidates=(CANDIDATE,), min_similarity=-1.0, min_neighbours=20),
            reader=reader,
            votes=NoRows(),
            meaning=Meaning(Parts(object(), index)),  # type: ignore[arg-type]  # what it would give is at hand
        )
        dice = random.Random(3)
        for number in range(entries):
            router._count(Vote(0, number, CANDIDATE, dice.random() < 0.97, "shadow", ""))
        floor, chosen, routed = [], [], 0
        for number in range(DECISIONS):
            vector = vectors[dice.randrange(entries)]
            query = replace(reader.read(target, caller, question(number)), plan=plan)
            client = Client(f"r{number}", 0, time.perf_counter(), query.path_qs, HEADERS)
            lookup = Lookup(Miss("bench"), vector=vector, signature=signs)
            started = time.perf_counter()
            await index.search(query.scope, vector, signs, 0, 50)
            searched = time.perf_counter()
            choice = await router.choose(query, client, lookup)
            chosen.append(time.perf_counter() - searched)
            floor.append(searched - started)
            routed += choice is not None
    finally:
        index.close()
    ratio = statistics.median(chosen) / statistics.median(floor)
    p99 = sorted(chosen)[int(0.99 * len(chosen))]
    return (
        f"| choosing a model, {entries:,} answered questions / one search for 50 | {ratio:.2f} | "
        f"floor p50 {statistics.median(floor) * 1e6:,.0f} µs, ibid p50 {statistics.median(chosen) * 1e6:,.0f} µs, "
        f"p99 {p99 * 1e6:,.0f} µs | {routed} of {DECISIONS} routed |"
    )


async def main(sizes: list[int]) -> int:
    compile_kernels()
    print("| what | median | absolute | |\n| --- | --- | --- | --- |")
    for entries in sizes:
        print(await measure(entries), flush=True)
    return 0


if __name__ == "__main__":
    uvloop.install()
    sys.exit(asyncio.run(main([int(size) for size in sys.argv[1:]] or [1_000, 10_000, 100_000])))
