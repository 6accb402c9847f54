"""ibid against its floors over HTTP, in turn, in one run: `python -m tests.bench.http [--seconds 3] [--rounds 3]`.

Servers run on core 0 (one worker), this client and the mock model server on core 1. Every line is the median of the
rounds' ratios of ibid to the floor measured just before it in the same round, with the smallest and largest ratio as
spread: machines drift, ratios do not. Hits are checked by the mock's own call counter, not by a header.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.load import Result, post, run
from tests.bench.questions import chat, fresh_question, question, reworded

SERVER_CPU, CLIENT_CPU = 0, 1
REST_S = 0.03  # between two requests where a latency is measured, so that the last one's store is over


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(
    arguments: list[str], cpu: int, ready_port: int, env: dict[str, str] | None = None, *, is_ibid: bool = False
) -> Iterator[int]:
    """A child pinned to one core, ready when its port accepts, or where it is ibid when its admin port says that all is
    loaded; ended by its id."""
    child = subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        stdout=subprocess.DEVNULL,
        stderr=None,
    )
    try:
        deadline = time.monotonic() + 600
        while True:
            if is_ready(ready_port, is_ibid):
                break
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{arguments} did not start")
            time.sleep(0.05)
        yield child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def is_ready(port: int, is_ibid: bool) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        if not is_ibid:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as link:
            link.request("GET", "/readyz")
            return link.getresponse().status == 200
    return False


@dataclass
class Line:
    name: str
    goal: float
    ratios: list[float]
    detail: str
    smaller_is_better: bool = False

    def row(self) -> str:
        median = statistics.median(self.ratios)
        met = median <= self.goal if self.smaller_is_better else median >= self.goal
        sign = "≤" if self.smaller_is_better else "≥"
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"
        verdict = "met" if met else "**missed**"
        return f"| {self.name} | {sign} {self.goal:.2f} | {median:.2f} | {spread} | {verdict} | {self.detail} |"


@dataclass
class Ports:
    mock: int
    const: int
    proxy: int
    ibid: int
    admin: int


class Bench:
    def __init__(self, ports: Ports, seconds: float, rounds: int) -> None:
        self.ports = ports
        self.seconds = seconds
        self.rounds = rounds
        self.lines: list[Line] = []
        self.serial = itertools.count(1)

    def calls(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.mock}/__calls", timeout=5) as answer:
            return int(answer.read())

    async def load(
        self, port: int, requests: Callable[[], bytes], connections: int, seconds: float = 0.0, pause_s: float = 0.0
    ) -> Result:
        result = await run(port, requests, connections, seconds or self.seconds, pause_s)
        if result.errors:
            raise SystemExit(f"{result.errors} answers were not 200")
        return result

    async def hits(self, requests: Callable[[], bytes], connections: int, seconds: float = 0.0) -> Result:
        """Load ibid with what must all be answered without the model server."""
        before = self.calls()
        result = await self.load(self.ports.ibid, requests, connections, seconds)
        leaked = self.calls() - before
        if leaked > 0.01 * result.count:
            raise SystemExit(f"{leaked} of {result.count} supposed hits reached the model server")
        if (behind := stats(self.ports.admin)["ledger"]["waiting"]) > result.count / result.seconds:
            raise SystemExit(f"the ledger is {behind} rows behind, more than a second of this load")
        return result

    async def prime(self, bodies: list[bytes]) -> None:
        """Ask each, one after the other, until all are hits."""
        requests = [post("/v1/chat/completions", body) for body in bodies]
        for _ in range(50):
            before = self.calls()
            await _ask_each(self.ports.ibid, requests)
            if self.calls() == before:
                return
        raise SystemExit("priming did not settle")

    async def compare(
        self,
        name: str,
        goal: float,
        floor: Callable[[], Awaitable[Result]],
        ours: Callable[[], Awaitable[Result]],
        value: Callable[[Result], float] = lambda result: result.rps,
        unit: str = "/s",
        *,
        smaller_is_better: bool = False,
    ) -> list[tuple[Result, Result]]:
        pairs = [(await floor(), await ours()) for _ in range(self.rounds)]
        medians = [statistics.median(value(pair[side]) for pair in pairs) for side in (0, 1)]
        detail = f"floor {medians[0]:,.2f}{unit}, ibid {medians[1]:,.2f}{unit}"
        ratios = [value(ours_) / value(floor_) for floor_, ours_ in pairs]
        self.lines.append(Line(name, goal, ratios, detail, smaller_is_better))
        print(self.lines[-1].row(), flush=True)
        return pairs


async def _ask_each(port: int, requests: list[bytes]) -> None:
    """On one connection, each after the answer to the last."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        if at >= 0:
            await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
        else:
            await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    await writer.wait_closed()


async def exact_hits(bench: Bench) -> None:
    bodies = [chat(question(i)) for i in range(100)]
    await bench.prime(bodies)
    turn = itertools.cycle([post("/v1/chat/completions", body) for body in bodies])
    streamed = itertools.cycle([post("/v1/chat/completions", chat(question(i), stream=True)) for i in range(100)])
    for connections in (16, 64):
        pairs = await bench.compare(
            f"exact hit, {connections} connections, answers/s",
            0.70,
            lambda c=connections: bench.load(bench.ports.const, lambda: next(turn), c),
            lambda c=connections: bench.hits(lambda: next(turn), c),
        )
        ratios = [ours.quantile(0.99) / floor.quantile(0.99) for floor, ours in pairs]
        p99 = [statistics.median(pair[side].quantile(0.99) for pair in pairs) for side in (0, 1)]
        detail = f"floor {p99[0]:.1f} ms, ibid {p99[1]:.1f} ms"
        bench.lines.append(Line(f"exact hit, {connections} connections, p99", 2.0, ratios, detail, True))
        print(bench.lines[-1].row(), flush=True)
    await bench.compare(
        "streamed hit / non-streamed hit, 16 connections",
        0.70,
        lambda: bench.hits(lambda: next(turn), 16),
        lambda: bench.hits(lambda: next(streamed), 16),
    )


async def semantic_hits(bench: Bench, embed_alone: Callable[[], float]) -> None:
    bodies = [chat(question(i)) for i in range(100)]
    await bench.prime(bodies)

    def fresh() -> bytes:
        serial = next(bench.serial)
        return post("/v1/chat/completions", chat(reworded(serial % 100, serial // 100 + 1)))

    async def floor() -> Result:
        embed_ms = await asyncio.to_thread(embed_alone)
        return Result(count=int(1e6 / embed_ms), seconds=1000.0)

    await bench.compare("semantic hit on fresh wording / embedding alone", 0.80, floor, lambda: bench.hits(fresh, 16))
    seen = [post("/v1/chat/completions", chat(reworded(i, 1000))) for i in range(100)]
    await bench.prime([chat(reworded(i, 1000)) for i in range(100)])
    exact = itertools.cycle([post("/v1/chat/completions", body) for body in bodies])
    paraphrases = itertools.cycle(seen)
    await bench.compare(
        "paraphrase seen before / exact hit",
        0.90,
        lambda: bench.hits(lambda: next(exact), 16),
        lambda: bench.hits(lambda: next(paraphrases), 16),
    )


async def misses(bench: Bench, embed_alone: Callable[[], float]) -> None:
    def bypass() -> bytes:
        body = chat(question(next(bench.serial) % 9000), temperature=0.9)
        return post("/v1/chat/completions", body, "cache-control: no-store\r\n")

    def stream(**fields: object) -> bytes:
        text = fresh_question(next(bench.serial))
        return post("/v1/chat/completions", chat(text, stream=True, **fields), "x-cache-mode: exact\r\n")

    def fresh() -> bytes:
        return post("/v1/chat/completions", chat(fresh_question(next(bench.serial))))

    await bench.compare(
        "bypass / bare reverse proxy, 16 connections",
        0.70,
        lambda: bench.load(bench.ports.proxy, bypass, 16),
        lambda: bench.load(bench.ports.ibid, bypass, 16),
    )
    await bench.compare(
        "streamed miss, recorded and stored / bare relay, 16 connections",
        0.75,
        lambda: bench.load(bench.ports.proxy, stream, 16),
        lambda: bench.load(bench.ports.ibid, stream, 16),
    )
    over = []
    floors, ours = [], []
    for _ in range(bench.rounds):
        embed_ms = await asyncio.to_thread(embed_alone)
        floors.append((await bench.load(bench.ports.proxy, fresh, 1, pause_s=REST_S)).quantile(0.5) + embed_ms)
        ours.append((await bench.load(bench.ports.ibid, fresh, 1, pause_s=REST_S)).quantile(0.5))
        over.append(ours[-1] - floors[-1])
    detail = f"proxy + embedding {statistics.median(floors):.2f} ms, ibid {statistics.median(ours):.2f} ms"
    bench.lines.append(
        Line(
            "miss with embedding, ms over (bare proxy + one embedding), p50, 1 connection, 30 ms apart",
            0.5,
            over,
            detail,
            True,
        )
    )
    print(bench.lines[-1].row(), flush=True)


async def mixed(bench: Bench) -> None:
    """Exact hits on 8 connections alone, then the same while 4 others send what must be embedded."""
    bodies = [post("/v1/chat/completions", chat(question(i))) for i in range(100)]
    turn = itertools.cycle(bodies)

    def fresh() -> bytes:
        return post("/v1/chat/completions", chat(fresh_question(next(bench.serial))))

    async def beside() -> Result:
        result, _ = await asyncio.gather(
            bench.load(bench.ports.ibid, lambda: next(turn), 8), bench.load(bench.ports.ibid, fresh, 4)
        )
        return result

    await bench.compare(
        "p99 of exact hits while others embed / alone",
        3.0,
        lambda: bench.hits(lambda: next(turn), 8),
        beside,
        lambda result: result.quantile(0.99),
        " ms",
        smaller_is_better=True,
    )


def stats(admin_port: int) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{admin_port}/cache/stats", headers={"authorization": "Bearer " + "b" * 40}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def embed_alone(data_dir: Path, seconds: float, kind: str, rest_s: float) -> float:
    """Milliseconds a text of the chosen backend alone, on the server's core; see `tests.bench.embedding`."""
    code = "from tests.bench.embedding import main; main()"
    output = subprocess.run(
        [sys.executable, "-c", code, str(data_dir), str(seconds), str(SERVER_CPU), kind, str(rest_s)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return float(output)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="exact,semantic,miss,mixed")
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CPU})
    ports = Ports(*(free_port() for _ in range(5)))
    floors = [sys.executable, "-m", "tests.bench.floors"]
    mock_url = f"http://127.0.0.1:{ports.mock}"
    with contextlib.ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = os.environ.get("IBID_BENCH_DATA")
        data_dir = Path(models) if models else data
        stack.enter_context(process([*floors, "mock", "--port", str(ports.mock)], CLIENT_CPU, ports.mock))
        stack.enter_context(
            process([*floors, "const", "--port", str(ports.const), "--size", "1000"], SERVER_CPU, ports.const)
        )
        stack.enter_context(
            process([*floors, "proxy", "--port", str(ports.proxy), "--upstream", mock_url], SERVER_CPU, ports.proxy)
        )
        serve = [sys.executable, "-m", "proxy", "serve", "--upstream", mock_url, "--data-dir", str(data_dir)]
        cache = "[cache]\naudit_share = 0.0\nsemantic_misses_per_min = 0\n"
        (data_dir / "bench.toml").write_text(cache)  # an audit is a call that is no client's
        serve += ["--config", str(data_dir / "bench.toml")]
        serve += ["--listen", f"127.0.0.1:{ports.ibid}", "--admin", f"127.0.0.1:{ports.admin}"]
        stack.enter_context(process(serve, SERVER_CPU, ports.admin, {"IBID_ADMIN_TOKEN": "b" * 40}, is_ibid=True))
        bench = Bench(ports, options.seconds, options.rounds)
        print("| what | goal | median | spread | | absolute |\n| --- | --- | --- | --- | --- | --- |")
        wanted = options.only.split(",")
        if "exact" in wanted:
            await exact_hits(bench)
        if "semantic" in wanted:
            await semantic_hits(bench, lambda: embed_alone(data_dir, options.seconds, "reworded", 0.0))
        if "miss" in wanted:
            await misses(bench, lambda: embed_alone(data_dir, options.seconds, "fresh", REST_S))
        if "mixed" in wanted:
            await mixed(bench)
        stalls = [
            float((await asyncio.to_thread(stats, ports.admin))["loop_stall_ms_max"])
        ]  # as ibid measured it itself
        bench.lines.append(Line("longest stall of the event loop in this run, ms", 50, stalls, "", True))
        print(bench.lines[-1].row())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"\n{machine}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    uvloop.run(main())
