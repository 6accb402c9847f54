"""Batches: from `POST /v1/batches` to the last byte of the results. `python -m tests.bench.batch [LINES]`

ibid, its client and its upstream share one process and one loop here, so the upstream's own work is in the two rows
that send lines. Of the lines, 60 % repeat one of the others. Floor, taken in turn with each row: one pass over the same
file without HTTP, SQL or a ledger, that reads each line with orjson, looks its body up in a dict by digest, and writes
the line of a result. Lines a second are by the clock; the ratio is of CPU times, which a busy machine changes less.
"""

from __future__ import annotations

import hashlib
import io
import random
import sys
import tempfile
import time
from pathlib import Path

import orjson
import uvloop

from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, ended, hand_in, jsonl, line, rows, sdk
from tests.flows.running import running
from tests.upstream import ScriptedUpstream

LINES = 10_000
REPEATS = 0.6


def lines_of(count: int) -> bytes:
    chance = random.Random(5)
    own = [f"What is part number {n} of the great machine for?" for n in range(round(count * (1 - REPEATS)))]
    asked = own + [chance.choice(own) for _ in range(count - len(own))]
    chance.shuffle(asked)
    return jsonl([line(f"line-{n}", prompt) for n, prompt in enumerate(asked)])


def floor_s(raw: bytes) -> float:
    """Seconds for the bare pass; every body has an answer of 400 bytes."""
    answers = {hashlib.sha256(orjson.dumps(orjson.loads(one)["body"])).digest(): b'"%b"' % (b"x" * 398)
               for one in raw.splitlines()}  # fmt: skip
    out = io.BytesIO()
    began = time.process_time()
    for one in raw.splitlines():
        said = orjson.loads(one)
        answer = answers[hashlib.sha256(orjson.dumps(said["body"])).digest()]
        out.write(b'{"custom_id":%b,"response":%b}\n' % (orjson.dumps(said["custom_id"]), answer))
    return time.process_time() - began


async def batch_s(client, raw: bytes, count: int) -> tuple[float, float]:
    """Seconds by the clock, and of CPU."""
    began, began_cpu = time.perf_counter(), time.process_time()
    batch = await ended(client, await hand_in(client, raw), 300)
    found = await rows(client, batch.output_file_id)
    took = time.perf_counter() - began, time.process_time() - began_cpu
    assert len(found) == count, batch
    return took


def show(name: str, took_s: tuple[float, float], bare_s: float, count: int) -> None:
    clock_s, cpu_s = took_s
    print(f"| {name} | {count / clock_s:,.0f} | {cpu_s / count * 1e6:.0f} | {cpu_s / bare_s:.0f} |", flush=True)


async def measure(count: int) -> None:
    raw = lines_of(count)
    print(f"{count:,} lines, {len(raw) / 1e6:.1f} MB, {REPEATS:.0%} of them repeats\n")
    print("| lines | a second | CPU µs each | times the floor |")
    print("| --- | --- | --- | --- |")
    bare_s = min(floor_s(raw) for _ in range(3))
    show("floor: read, look up, write", (bare_s, bare_s), bare_s, count)
    for has_api in (True, False):
        async with ScriptedUpstream() as up:
            if has_api:
                BatchUpstream(up)
            with tempfile.TemporaryDirectory(prefix="ibid-bench-") as folder:
                async with running(Path(folder) / "data", up.url, QUICK) as ibid, sdk(ibid) as client:
                    how = "through a provider's batch" if has_api else "by ordinary calls"
                    bare_s = min(floor_s(raw) for _ in range(3))
                    show(f"new, {how}", await batch_s(client, raw, count), bare_s, count)
                    if has_api:
                        bare_s = min(floor_s(raw) for _ in range(3))
                        show("all of them cached", await batch_s(client, raw, count), bare_s, count)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else LINES
    uvloop.run(measure(count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
