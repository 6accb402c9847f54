"""Vector search: latency, recall, memory and upkeep of the index at 10 000 and 100 000 entries.

Run: python -m tests.bench.search [topics|random|FILE.npy] [ENTRIES...]. Queries lie at cosine 0.93 of a member, as a
reworded question does; recall is against the exact scan of the same index. `topics`: unit vectors around 2 000 centres
at cosine 0.6 to their own. `random`: no structure at all, the worst case for an approximate index, which then probes
more lists. FILE.npy: embeddings (n, 384) of real texts, from which an entry is made by moving one of them towards one
of its 10 nearest by a share of 0 to 0.5, adding 0.3 of the difference of two others, and scaling to unit length.

Times are of the owner thread: CPU (`thread_time`) and wall, and of the floor taken in turn with every search, one
float32 matrix-vector product of 1 000 rows. Machines are shared; the ratio of the CPU medians says more than a p99.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from index import kernels
from index.features import compile_features
from index.learner import Learner
from index.levels import LEVELS
from index.partition import perturbed
from index.tokens import WIDTH, signature
from index.vectors import VectorOwner
from proxy.core.model import Candidate, Rules
from proxy.judging.judge import Judge, Place
from proxy.request.pipeline import CANDIDATES

DIMENSION = 384
FAR = 1 << 60
BIG = b"L" * 32
LIKENESS = 0.6
BASE: np.ndarray | None = None
FLOOR = np.random.default_rng(4).standard_normal((1000, DIMENSION), dtype=np.float32)

CENTRES = np.random.default_rng(12).standard_normal((2000, DIMENSION), dtype=np.float32)
CENTRES /= np.linalg.norm(CENTRES, axis=1, keepdims=True)
STRUCTURE = {"random": 0.0, "topics": 0.6}


def mixed(base: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Entries made of real embeddings (m, d), as the head of this file says."""
    some = rng.choice(len(base), min(len(base), 2000), replace=False)
    near = some[np.argsort(-(base[some] @ base[some].T), axis=1)[:, 1:11]]
    pick = rng.integers(0, len(some), n)
    share = rng.uniform(0, 0.5, n).astype(np.float32)[:, None]
    left, right = rng.integers(0, len(base), (2, n))
    vectors = (1 - share) * base[some[pick]] + share * base[near[pick, rng.integers(0, near.shape[1], n)]]
    vectors += np.float32(0.3) * (base[left] - base[right])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def unit(n: int, rng: np.random.Generator, likeness: float = 0.0) -> np.ndarray:
    if BASE is not None:
        return mixed(BASE, n, rng)
    vectors = rng.standard_normal((n, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if likeness:
        vectors = likeness * CENTRES[rng.integers(0, len(CENTRES), n)] + np.sqrt(1 - likeness**2) * vectors
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def spread(seconds: list[float]) -> str:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
    return f"p50 {p50:.0f} µs, p99 {p99:.0f} µs"


async def fill(owner: VectorOwner, first: int, scopes: list[bytes], seed: int) -> float:
    """Seconds to add one vector per scope given, in bulk, in parts so that the source takes no memory."""
    rng = np.random.default_rng(seed)
    signs = np.tile(signature("how do I reset the password of my account"), (4096, 1))
    took = 0.0
    for at in range(0, len(scopes), 4096):
        part = scopes[at : at + 4096]
        vectors = unit(len(part), rng, LIKENESS)
        started = time.perf_counter()
        ids = np.arange(first + at, first + at + len(part), dtype=np.int64)
        await owner.add_many(ids, part, vectors, signs[: len(part)], np.full(len(part), FAR))
        took += time.perf_counter() - started
    return took


def members(n: int, seed: int, wanted: np.ndarray) -> np.ndarray:
    """The vectors `fill` added at these positions, made again."""
    rng = np.random.default_rng(seed)
    parts = []
    for at in range(0, n, 4096):
        vectors = unit(min(4096, n - at), rng, LIKENESS)
        parts.append(vectors[wanted[(wanted >= at) & (wanted < at + 4096)] - at])
    return np.concatenate(parts)


async def search(owner: VectorOwner, n: int, seed: int) -> None:
    rng = np.random.default_rng(99)
    wanted = np.sort(rng.choice(n, min(1000, n), replace=False))
    queries = perturbed(members(n, seed, wanted), rng)
    sign = signature("how can I reset the password of my account")
    wall, cpu, floor, hop, found = [], [], [], [], 0

    def timed(query: np.ndarray) -> int:
        at, used = time.perf_counter(), time.thread_time()
        candidates = owner.find_now(BIG, query, sign, 0, 8)
        wall.append(time.perf_counter() - at)
        cpu.append(time.thread_time() - used)
        used = time.thread_time()
        FLOOR @ query
        floor.append(time.thread_time() - used)
        return candidates[0].entry_id if candidates else -1

    def exactly(query: np.ndarray) -> int:
        arena = owner._arena
        number = arena.scope_ids[BIG]
        return arena.rank(arena.slots_of(number), number, 0, query, sign, 1)[0].entry_id

    firsts = [await asyncio.wrap_future(owner._ask(lambda query=query: timed(query))) for query in queries]
    for query, first in zip(queries, firsts, strict=True):  # apart: a scan of everything empties the caches
        found += first == await asyncio.wrap_future(owner._ask(lambda query=query: exactly(query)))
    for query in queries[:500]:
        started = time.perf_counter()
        await owner.search(BIG, query, sign, 0, 8)
        hop.append(time.perf_counter() - started)
    judge, place, judged = Judge(Rules(), Learner, LEVELS), Place(BIG, "", "", b""), []
    for query in queries[:500]:
        started = time.perf_counter()
        near = await owner.search(BIG, query, sign, 0, CANDIDATES)
        judge.consider(place, sign, [Candidate(*one) for one in near], 0.01)
        judged.append(time.perf_counter() - started)
    print(f"  search, filter and judge k={CANDIDATES}, with the hop: {spread(judged)}")
    print(f"  search k=8: CPU {spread(cpu)}; wall {spread(wall)}; with the hop {spread(hop)}")
    print(f"  floor: CPU {spread(floor)}; ratio of medians {np.median(cpu) / np.median(floor):.1f}")
    states = list((await owner.states()).values())
    print(
        f"  recall@1 {found / len(queries):.4f} of {len(queries)} queries; entries, probes, recall when built: {states}"
    )


async def upkeep(owner: VectorOwner, n: int) -> None:
    rng = np.random.default_rng(5)
    sign = signature("x y z")
    fresh = unit(500, rng)
    for name, act in (
        ("add", lambda i: owner._add(10**9 + i, BIG, fresh[i], sign, FAR)),
        ("remove", lambda i: owner._remove(np.array([10**9 + i]))),
    ):
        took = []
        for i in range(500):
            started = await asyncio.wrap_future(owner._ask(lambda i=i, act=act: (time.perf_counter(), act(i))[0]))
            took.append(await asyncio.wrap_future(owner._ask(time.perf_counter)) - started)
        print(f"  {name} one, to the next command: {spread(took)}")


async def run(n: int, small: int = 20_000) -> None:
    print(f"{n} entries in one scope, {small} scopes of 5")
    kernels.compile_kernels(DIMENSION)
    compile_features()
    warm = VectorOwner("bench", DIMENSION, promote_above=1500)
    warm.start()
    await fill(warm, 0, [BIG] * 4000, 3)
    await warm.settled()
    warm.close()
    del warm
    gc.collect()
    before = resident()
    owner = VectorOwner("bench", DIMENSION)
    owner.start()
    started = time.perf_counter()
    took = await fill(owner, 0, [BIG] * n, 1)
    print(f"  bulk add {n / took:.0f}/s")
    worst = 0.0
    probe = unit(1, np.random.default_rng(8))[0]
    waiting = asyncio.ensure_future(owner.settled())
    while not waiting.done():
        at = time.perf_counter()
        await owner.search(BIG, probe, signature("x"), 0, 8)
        worst = max(worst, time.perf_counter() - at)
        await asyncio.sleep(0)
    took = time.perf_counter() - started
    print(f"  promoted {took:.1f} s after the first add; slowest search meanwhile {worst * 1e3:.0f} ms")
    gc.collect()
    bare = DIMENSION * 2 + WIDTH * 8
    print(f"  resident {(resident() - before) / n:.0f} B per entry ({bare} B are vector and signature)")
    await search(owner, n, 1)
    await upkeep(owner, n)
    before = resident()
    scopes = [i.to_bytes(32, "big") for i in range(small) for _ in range(5)]
    took = await fill(owner, 2 * 10**9, scopes, 2)
    gc.collect()
    print(f"  small scopes: bulk add {len(scopes) / took:.0f}/s, {(resident() - before) / len(scopes):.0f} B per entry")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.snapshot"
        started = time.perf_counter()
        await owner.snapshot(path)
        took = time.perf_counter() - started
        print(f"  snapshot of {owner.size}: {took:.2f} s, {path.stat().st_size / owner.size:.0f} B per entry")
        owner.close()
        started = time.perf_counter()
        loaded = VectorOwner.load(path, "bench", DIMENSION)
        print(f"  load: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        loaded.start()
        await loaded.search(BIG, probe, signature("x"), 0, 8)
        print(f"  first search after start, kernels compiled: {time.perf_counter() - started:.2f} s")
        await loaded.settled()
        print(f"  approximate again after {time.perf_counter() - started:.1f} s")
        loaded.close()


def main() -> None:
    global LIKENESS, BASE
    words = sys.argv[1:]
    sizes = [int(word) for word in words if word.isdigit()] or [10_000, 100_000]
    for kind in [word for word in words if not word.isdigit()] or list(STRUCTURE):
        LIKENESS = STRUCTURE.get(kind, 0.0)
        BASE = None if kind in STRUCTURE else np.load(kind).astype(np.float32)
        for n in sizes:
            print(f"{kind}, load {os.getloadavg()[0]:.1f}: ", end="")
            asyncio.run(run(n))


if __name__ == "__main__":
    main()
