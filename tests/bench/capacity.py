"""ibid with many entries: start to ready, memory per entry, and whether it still finds what it holds.

Run: python -m tests.bench.capacity [--entries 100000] [--searches 2000] [--starts 3] [--models DATA_DIR]. All entries
are in one scope, the worst case. 200 are asked through the proxy, so that reworded questions hit them; the others are
rows with unit vectors around 2 000 centres. "Ready" is the first moment at which /readyz answers 200 and the client
port accepts, from the exec of `python -m proxy serve`. Memory is VmRSS after the searches less that of the same server
with the 200 entries alone after the same searches, so it holds whatever a search leaves behind. Requests that were not
hits (a deadline passed, on a busy machine) are counted and shown. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from index.tokens import signature
from proxy.core.fingerprint import fingerprint_of
from proxy.core.model import Draft, Usage
from proxy.store.entries import checksum_of
from tests.bench.http import free_port
from tests.bench.questions import chat, question, reworded
from tests.bench.search import STRUCTURE, unit

ASKED = 200
GOAL_S, GOAL_KIB = 10.0, 2.2
FIRST = 1000  # number of the first question that is only a row
HEADERS = {"content-type": "application/json", "authorization": "Bearer bench-key"}
ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Because it is so. " * 40, "refusal": None},
                 "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 200, "total_tokens": 220},
}  # fmt: skip


class Mock(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@dataclass
class Server:
    pid: int
    ready_s: float
    port: int
    admin: int

    def resident(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    def vectors(self) -> int:
        link = http.client.HTTPConnection("127.0.0.1", self.admin)
        link.request("GET", "/metrics", headers={"authorization": "Bearer " + "b" * 40})
        lines = link.getresponse().read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("ibid_vectors ")).split()[1]))


def accepts(server: Server) -> bool:
    with contextlib.suppress(OSError):
        link = http.client.HTTPConnection("127.0.0.1", server.admin, timeout=1)
        link.request("GET", "/readyz")
        if link.getresponse().status == 200:
            with socket.create_connection(("127.0.0.1", server.port), 1):
                return True
    return False


@contextlib.contextmanager
def serving(data_dir: Path, upstream: str) -> Iterator[Server]:
    server = Server(0, 0.0, free_port(), free_port())
    command = [sys.executable, "-m", "proxy", "serve", "--upstream", upstream, "--data-dir", str(data_dir)]
    config = data_dir / "bench.toml"
    cache = "[cache]\naudit_share = 0.0\nsemantic_misses_per_min = 0\n"
    config.write_text(f"{cache}[store]\nmax_entries = 200_000\n")  # what is asked is stored, too
    command += ["--config", str(config)]
    command += ["--listen", f"127.0.0.1:{server.port}", "--admin", f"127.0.0.1:{server.admin}"]
    started = time.perf_counter()
    child = subprocess.Popen(
        command, env={**os.environ, "IBID_ADMIN_TOKEN": "b" * 40}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not accepts(server):
            if child.poll() is not None or time.perf_counter() - started > 180:
                raise SystemExit(f"{command} did not become ready")
            time.sleep(0.01)
        server.pid, server.ready_s = child.pid, time.perf_counter() - started
        yield server
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(120)


def ask(link: http.client.HTTPConnection, text: str) -> str:
    link.request("POST", "/v1/chat/completions", chat(text), HEADERS)
    answer = link.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {body[:200]!r}")
    return answer.headers["x-cache"] + " " + (answer.headers["x-cache-tier"] or "-")


def search(server: Server, count: int, serial: int) -> tuple[list[float], int]:
    """Milliseconds of requests that embed and search, and how many were no semantic hit."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    took: list[float] = []
    missed = 0
    for i in range(count):
        before = time.perf_counter()
        missed += ask(link, reworded(i % ASKED, serial + i // ASKED)) != "HIT semantic"
        took.append((time.perf_counter() - before) * 1e3)
    return took, missed


def fill(data_dir: Path, entries: int) -> None:
    """Rows as `Entries.put` would write them, in the scope and by the tenant of those that were asked."""
    database = sqlite3.connect(data_dir / "ibid.db", isolation_level=None)
    database.row_factory = sqlite3.Row
    pattern = dict(database.execute("SELECT * FROM entry WHERE embedding IS NOT NULL LIMIT 1").fetchone())
    (held,) = database.execute("SELECT count(*) FROM entry").fetchone()
    del pattern["id"]
    statement = f"INSERT INTO entry ({', '.join(pattern)}) VALUES ({', '.join(':' + name for name in pattern)})"
    same = ("scope", "tenant", "namespace", "upstream", "operation", "model", "answer", "created_ms", "expires_ms")
    usage = Usage(pattern["in_tok"], pattern["out_tok"], pattern["cache_read_tok"], pattern["cache_write_tok"])
    rng = np.random.default_rng(3)
    for first in range(0, entries - held, 2000):
        count = min(2000, entries - held - first)
        rows = []
        for i, vector in enumerate(unit(count, rng, STRUCTURE["topics"])):
            prompt = question(FIRST + first + i)
            draft = Draft(
                **{name: pattern[name] for name in same}, fingerprint=fingerprint_of(pattern["scope"], prompt),
                prompt=prompt, usage=usage, request_id=f"bench-{first + i}", total_ms=pattern["total_ms"], tags=(),
                embedding=vector.astype("<f4").tobytes(), embedder=pattern["embedder"],
                signature=signature(prompt).astype("<u8").tobytes(),
            )  # fmt: skip
            changed = ("fingerprint", "prompt", "request_id", "embedding", "signature")
            rows.append({**pattern, **{name: getattr(draft, name) for name in changed}, "checksum": checksum_of(draft)})
        database.execute("BEGIN")
        database.executemany(statement, rows)
        database.execute("COMMIT")
    database.close()


def starts(data_dir: Path, upstream: str, options: argparse.Namespace, snapshot: bool, empty: int, serial: int) -> str:
    """A row of the table."""
    ready_s: list[float] = []
    kib = 0.0
    searched = ""
    for turn in range(options.starts):
        if not snapshot:
            (data_dir / "index.snapshot").unlink(missing_ok=True)
        with serving(data_dir, upstream) as server:
            ready_s.append(server.ready_s)
            if server.vectors() != options.entries:
                raise SystemExit(f"ready with {server.vectors()} vectors of {options.entries}")
            link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            for i in np.linspace(FIRST, FIRST + options.entries - ASKED - 1, 50).astype(int).tolist():
                if (verdict := ask(link, question(i))) != "HIT exact":
                    raise SystemExit(f"stored question {i}: {verdict}")
            if turn == 0:
                early_ms, missed = search(server, 100, serial)
                later_ms, missed_later = search(server, options.searches, serial + 1)
                kib = (server.resident() - empty) / (options.entries - ASKED) / 1024
                searched = f"{statistics.median(early_ms):.1f} / {statistics.median(later_ms):.1f}"
                searched += f" | {missed + missed_later} of {options.searches + 100}"
    median = statistics.median(ready_s)
    marks = ["" if met else " **missed**" for met in (median <= GOAL_S, kib <= GOAL_KIB)]
    spread = f"{min(ready_s):.1f}-{max(ready_s):.1f}"
    return f"{median:.1f} ({spread}){marks[0]} | {kib:.2f}{marks[1]} | {searched}"


def run(options: argparse.Namespace, data_dir: Path, upstream: str) -> None:
    with serving(data_dir, upstream) as server:  # converts the model, which no later start does
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for i in range(ASKED):
            ask(link, question(i))
    with serving(data_dir, upstream) as server:
        took_ms, missed = search(server, options.searches + 100, 1)
        empty = server.resident()
        alone = f"ready in {server.ready_s:.1f} s, {empty >> 20} MiB"
    fill(data_dir, options.entries)
    print(f"{options.entries} entries in one scope; with {ASKED}: {alone}, semantic hit p50 "
          f"{statistics.median(took_ms):.1f} ms, {missed} not hit; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"| start | ready, s (goal {GOAL_S}) | KiB per entry (goal {GOAL_KIB}) "
          "| semantic hit p50, at once / later, ms | not hit |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    for serial, (name, snapshot) in enumerate((("rebuilt from SQL", False), ("from the snapshot", True)), 1):
        print(f"| {name} | {starts(data_dir, upstream, options, snapshot, empty, 1000 * serial)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="ibid with many entries in one scope")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--models", type=Path, help="a data directory whose converted model is copied")
    options = parser.parse_args()
    mock = ThreadingHTTPServer(("127.0.0.1", 0), Mock)
    threading.Thread(target=mock.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="ibid-capacity-") as folder:
        if options.models is not None:
            shutil.copytree(options.models / "models", Path(folder) / "models")
        run(options, Path(folder), f"http://127.0.0.1:{mock.server_port}")
    mock.shutdown()


if __name__ == "__main__":
    main()
