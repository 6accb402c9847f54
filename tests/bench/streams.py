"""What sharing, pacing and finding a stream costs: `python -m tests.bench.streams [--rounds 5] [--followers 49]`.

Fan-out: CPU of the server's process for one stream more. For ibid that is a follower of a call in flight, for the
floor, a bare aiohttp relay, a stream with a call of its own; both relay 124 events, one write each, 2 ms apart. Pace:
how far each event of a hit with `x-cache-pace: recorded` is from where it was in the original, as the same client saw
both, counted from the first event; beside it what the bare relay differs from itself between two runs of one question.
Servers on core 0, this client and the model server, which keeps a script of pauses, on core 1. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

import uvloop

from tests.bench.floors import chat_events
from tests.bench.http import CLIENT_CPU, SERVER_CPU, Line, free_port, process
from tests.bench.load import END_OF_CHUNKS, post
from tests.bench.questions import chat, fresh_question

FAN_OUT_HEAD_S = 0.15  # for every follower to arrive
SCRIPTS = ("steady", "pausing", "padded")
TICKS_S = os.sysconf("SC_CLK_TCK")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def script(name: str) -> list[tuple[float, list[bytes]]]:
    """Writes of a stream: seconds after the one before, and the events that go out together.

    steady: an event each 20 ms. pausing: bursts of 1 to 6 events 5 to 80 ms apart, with two silences of a second.
    padded: as steady, each event filled up to one length, as OpenAI's `obfuscation` does; ibid does not keep that.
    fan-out: all 2 ms apart.
    """
    events = chat_events()
    dice = random.Random(7)
    if name == "fan-out":
        return [(FAN_OUT_HEAD_S if i == 0 else 0.002, [event]) for i, event in enumerate(events)]
    if name == "padded":
        longest = max(map(len, events))
        events = [_padded(event, longest) for event in events]
    if name != "pausing":
        return [(0.02, [event]) for event in events]
    writes = []
    while events:
        count = dice.randint(1, 6)
        writes.append((1.0 if len(writes) in (4, 20) else dice.uniform(0.005, 0.08), events[:count]))
        events = events[count:]
    return writes


def _padded(event: bytes, length: int) -> bytes:
    if not event.startswith(b"data: {"):
        return event
    return event.replace(b"data: {", b'data: {"obfuscation":"%b",' % (b"x" * (length - len(event))), 1)


class Model(asyncio.Protocol):
    """Streams the script whose name is in the request's metadata, event by event, as timers fire."""

    calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        length = self.buffer[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if end < 0 or len(self.buffer) < end + 4 + int(length):
            return
        name = next(name for name in (*SCRIPTS, "fan-out") if b'"script":"%b"' % name.encode() in self.buffer)
        self.buffer = b""
        Model.calls += 1
        writes = script(name)
        due = accumulate(pause_s for pause_s, _ in writes)
        self.transport.write(HEAD)
        loop = asyncio.get_running_loop()
        for at_s, (_, events) in zip(due, writes, strict=True):
            is_last = events is writes[-1][1]
            framed = b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events])
            _ = loop.call_later(at_s, self.write, framed + (END_OF_CHUNKS if is_last else b""))

    def write(self, framed: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(framed)


class Reader(asyncio.Protocol):
    """One request at a time on one connection, with the time at which each event of its answer came."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes, *, first_only: bool = False) -> asyncio.Future[list[float]]:
        """Seconds from the write of the request to each event."""
        self.tail = b""
        self.times: list[float] = []
        self.first_only = first_only
        self.done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.sent_s = time.perf_counter()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        came_s = time.perf_counter() - self.sent_s
        seen = self.tail + data
        self.times += [came_s] * (seen.count(b"data: ") - self.tail.count(b"data: "))
        if self.first_only and not self.times and b'{"text"' in seen:  # the bare handler's
            self.times = [came_s]
        self.tail = seen[-5:]
        if not self.done.done() and (seen.endswith(END_OF_CHUNKS) or (self.first_only and self.times)):
            self.done.set_result(self.times)


async def connect(port: int) -> Reader:
    _, reader = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", port)
    return reader


async def stream(port: int, body: bytes, headers: str = "", *, first_only: bool = False) -> list[float]:
    reader = await connect(port)
    try:
        request = post("/v1/chat/completions", body, f"x-cache-mode: exact\r\n{headers}")
        return await asyncio.wait_for(reader.ask(request, first_only=first_only), 60)
    finally:
        reader.transport.close()


def asking(name: str, serial: int) -> bytes:
    return chat(fresh_question(serial), stream=True, metadata={"script": name})


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


async def fan_out(ports: Sequence[int], pids: Sequence[int], rounds: int, followers: int) -> Line:
    """CPU of a follower of ibid's against CPU of a stream of the relay's."""
    repeats = 4  # ticks are 10 ms
    costs: list[list[float]] = [[], []]
    for turn in range(rounds):
        for side, (port, pid) in enumerate(zip(ports, pids, strict=True)):
            spent = []
            for count in (1, 1 + followers):
                readers = [await connect(port) for _ in range(count)]
                before, calls = cpu_s(pid), Model.calls
                for repeat in range(repeats):
                    body = asking("fan-out", 1 + side + 2 * (repeat + repeats * (turn + rounds * (count > 1))))
                    request = post("/v1/chat/completions", body, "x-cache-mode: exact\r\n")
                    told = await asyncio.gather(*(reader.ask(request) for reader in readers))
                    assert {len(times) for times in told} == {len(chat_events()) - (side == 1)}
                assert Model.calls - calls == repeats * (1 if side else count)
                await asyncio.sleep(0.3)  # stores, ledger
                spent.append(cpu_s(pid) - before)
                for reader in readers:
                    reader.transport.close()
            costs[side].append((spent[1] - spent[0]) / repeats / followers * 1e3)
    ratios = [ours / floor for floor, ours in zip(*costs, strict=True)]
    detail = f"floor {statistics.median(costs[0]):.2f} ms of CPU a stream, ibid {statistics.median(costs[1]):.2f} ms"
    return Line(f"a follower / a stream of the bare relay, CPU, {followers} followers", 1.00, ratios, detail, True)


def off_ms(told: Sequence[float], original: Sequence[float]) -> list[float]:
    """How far each event is from where it was, from the first one on."""
    pairs = zip(told, original, strict=True)
    return [abs((at - told[0]) - (was - original[0])) * 1e3 for at, was in pairs]


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def pace(relay: int, ibid: int, rounds: int) -> None:
    print(
        "\n| recorded replay | events, span | off by, median | p95 | largest | p95 as share of the span | the relay "
        "against itself, p95 |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for serial, name in enumerate(SCRIPTS, 1000):
        body = asking(name, serial)
        original = await stream(ibid, body)
        await asyncio.sleep(0.5)
        calls, off = Model.calls, []
        for _ in range(rounds):
            off += off_ms(await stream(ibid, body, "x-cache-pace: recorded\r\n"), original)
        assert Model.calls == calls, "not a hit"
        floor = off_ms(await stream(relay, body), await stream(relay, body))
        span_s, p95 = original[-1] - original[0], quantile(off, 0.95)
        print(
            f"| {name} | {len(original)}, {span_s:.1f} s | {statistics.median(off):.1f} ms | {p95:.1f} ms | "
            f"{max(off):.1f} ms | {p95 / span_s / 10:.2f} % | {quantile(floor, 0.95):.1f} ms |",
            flush=True,
        )


async def first_event(const: int, ibid: int, count: int) -> list[Line]:
    """Time to the first event of a hit, on a connection of its own each, against the answer of a bare handler asked
    just before; what follows the first event is not waited for."""
    lines = []
    body = asking("steady", 0)
    for wanted in ("instant", "recorded", "40"):
        floors, ours, calls = [], [], Model.calls
        for _ in range(count):
            floors.append((await stream(const, body, first_only=True))[0] * 1e3)
            ours.append((await stream(ibid, body, f"x-cache-pace: {wanted}\r\n", first_only=True))[0] * 1e3)
        assert Model.calls == calls, "not a hit"
        (floor, floor_p99), (own, own_p99) = [(statistics.median(x), quantile(x, 0.99)) for x in (floors, ours)]
        detail = (
            f"floor p50 {floor:.1f}, p99 {floor_p99:.1f} ms; ibid p50 {own:.1f}, p99 {own_p99:.1f} ms; {count} each"
        )
        lines.append(Line(f"first event of a hit, {wanted}, ms over a bare handler", 5.0, [own - floor], detail, True))
    return lines


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--followers", type=int, default=49)
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CPU})
    model, relay, const, ibid, admin = (free_port() for _ in range(5))
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", model)
    url = f"http://127.0.0.1:{model}"
    with contextlib.ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (data / "bench.toml").write_text("[cache]\nsemantic = false\n")
        floor = [sys.executable, "-m", "tests.bench.floors", "proxy", "--port", str(relay), "--upstream", url]
        serve = [sys.executable, "-m", "proxy", "serve", "--upstream", url, "--data-dir", str(data)]
        serve += [
            "--config",
            str(data / "bench.toml"),
            "--listen",
            f"127.0.0.1:{ibid}",
            "--admin",
            f"127.0.0.1:{admin}",
        ]
        bare = [sys.executable, "-m", "tests.bench.floors", "const", "--port", str(const)]
        stack.enter_context(process(bare, SERVER_CPU, const))
        pids = [stack.enter_context(process(floor, SERVER_CPU, relay))]
        pids.append(stack.enter_context(process(serve, SERVER_CPU, admin, is_ibid=True)))
        print("| what | goal | median | spread | | absolute |\n| --- | --- | --- | --- | --- | --- |")
        print((await fan_out((relay, ibid), pids, options.rounds, options.followers)).row(), flush=True)
        await stream(ibid, asking("steady", 0))
        await asyncio.sleep(0.5)
        for line in await first_event(const, ibid, 200):
            print(line.row(), flush=True)
        await pace(relay, ibid, options.rounds)
    server.close()


if __name__ == "__main__":
    uvloop.run(main())
