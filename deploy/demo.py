"""`make demo`: a real local LLM behind ibid, asked by the official OpenAI client; then what headers and SQL say.

    python -m deploy.demo --model WEIGHTS.gguf [--once] [--data-dir DIR]

Starts the model server and `ibid serve` as processes of its own, sends each request of `SCRIPT`, prints what came back
and compares it with what ibid promises. Keeps running until Ctrl-C; with `--once` it ends with status 1 if a promise
was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import openai

from deploy.local_llm import MODEL_NAME, running

SHOWN = (
    "cache-status x-cache x-cache-tier x-cache-similarity x-cache-reason age x-cost-usd x-cache-saved-usd x-upstream"
).split()
PRICES = '[prices.override."openai/*"]\ninput_usd_per_mtok = 0.15\noutput_usd_per_mtok = 0.60\n'
UNHURRIED = "[embedding]\ndeadline_ms = 60000\n"  # on a busy machine a late vector would be a broken promise
SYSTEM = "Answer in one short sentence."
PAUSE_S = 0.5  # a person's; within it a repeat may join the answer that is still being stored, and is then no hit
START_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 1200.0
LEDGER_TIMEOUT_S = 60.0
LEDGER = (
    "SELECT cache_status, lane, reason, stream, in_tok, out_tok, baseline_nusd, actual_nusd,"
    " baseline_nusd - actual_nusd AS saved_nusd, round(total_ms, 1) AS ms FROM request ORDER BY ts, id"
)
STRATEGIES = "SELECT * FROM savings_by_strategy"


class Step(NamedTuple):
    """One request and the tier that must answer it; None: it must reach the model."""

    about: str
    question: str
    tier: str | None
    stream: bool = False


SCRIPT = (
    Step("new question", "What is the capital of France?", None),
    Step("the same again", "What is the capital of France?", "exact"),
    Step("the same again, streamed", "What is the capital of France?", "exact", stream=True),
    Step("other words", "Tell me, what is the capital of France?", "semantic"),
    Step("other words, streamed", "Please tell me: what is the capital of France?", "semantic", stream=True),
    Step("look-alike: the name is changed", "What is the capital of Spain?", None),
    Step("new question, streamed", "How many days are there in 3 weeks?", None, stream=True),
    Step("the same again, whole", "How many days are there in 3 weeks?", "exact"),
    Step("look-alike: the number is changed", "How many days are there in 5 weeks?", None, stream=True),
    Step("new question", "How do I get from Paris to Lyon by train in 2 hours?", None),
    Step("look-alike: another number", "How do I get from Paris to Lyon by train in 3 hours?", None),
    Step("look-alike: another name", "How do I get from Paris to Marseille by train in 2 hours?", None, stream=True),
    Step("look-alike: turned round", "How do I get from Lyon to Paris by train in 2 hours?", None),
)


class Proxy(NamedTuple):
    """A running ibid: its two addresses and the flags that find its files."""

    client: str
    admin: str
    places: list[str]


class DidNotStart(RuntimeError):
    """`ibid serve` ended, or said nothing in time."""


@contextlib.contextmanager
def proxy(upstream: str, data_dir: Path, listen: str, admin: str) -> Iterator[Proxy]:
    """`ibid serve` in a process of its own, ended by SIGTERM on exit. Its log is DATA_DIR/ibid.log."""
    config = data_dir / "demo.toml"
    config.write_text(PRICES + UNHURRIED)
    places = ["--config", str(config), "--data-dir", str(data_dir)]
    command = [sys.executable, "-m", "proxy", "serve", *places]
    command += ["--listen", listen, "--admin", admin, "--upstream", upstream]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with (data_dir / "ibid.log").open("a") as log:
        banner = Banner(process.stderr, log)
        banner.start()
        try:
            found = banner.wait(places)
            wait_until_ready(found, process)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            banner.join()
            process.stderr.close()


def wait_until_ready(found: Proxy, process: subprocess.Popen[str]) -> None:
    """It listens before the model is loaded; a first start converts it."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{found.admin}/readyz", timeout=10) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise DidNotStart("ibid is not ready")


class Banner(threading.Thread):
    """Copies standard error into the log and picks the two addresses out of the banner."""

    def __init__(self, source: IO[str], log: IO[str]) -> None:
        super().__init__(name="demo-log", daemon=True)
        self._source, self._log = source, log
        self._found: dict[str, str] = {}
        self._last = ""
        self._known = threading.Event()

    def run(self) -> None:
        for line in self._source:
            self._log.write(line)
            self._log.flush()
            self._last = line.strip() or self._last
            if found := re.match(r"(ibid serves|admin) +(http://\S+)", line):
                self._found[found[1]] = found[2]
                if len(self._found) == 2:
                    self._known.set()
        self._known.set()

    def wait(self, places: list[str]) -> Proxy:
        if not self._known.wait(START_TIMEOUT_S) or len(self._found) < 2:
            raise DidNotStart(f"ibid did not start: {self._last}")
        return Proxy(self._found["ibid serves"], self._found["admin"], places)


def ask(client: openai.OpenAI, step: Step) -> tuple[Mapping[str, str], str, float]:
    """Headers, text and milliseconds of one request."""
    started = time.perf_counter()
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL_NAME,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": step.question}],
        temperature=0,
        max_tokens=200,
        stream=step.stream,
    )
    answer: Any = raw.parse()
    if step.stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        text = answer.choices[0].message.content
    return raw.headers, text, (time.perf_counter() - started) * 1e3


def broken_promise(step: Step, headers: Mapping[str, str]) -> str:
    """What a response does other than promised; "" when it keeps the promise."""
    served = headers.get("x-cache") == "HIT"
    if step.tier is None:
        return "was served from the cache" if served else ""
    if not served:
        return f"was not served from the cache: {headers.get('cache-status')}"
    return "" if headers.get("x-cache-tier") == step.tier else f"was served by {headers.get('x-cache-tier')}"


def play(client: openai.OpenAI) -> list[str]:
    """Send the script; the promises that were broken."""
    broken = []
    for number, step in enumerate(SCRIPT, 1):
        headers, text, ms = ask(client, step)
        print(f"\n{number}. {step.about}: {step.question!r}{' (stream)' if step.stream else ''}")
        print(f"   {ms:8.1f} ms  {' '.join(text.split())[:90]}")
        for name in SHOWN:
            if name in headers:
                print(f"   {name}: {headers[name]}")
        if problem := broken_promise(step, headers):
            broken.append(f"{number}. {step.about}: {problem}")
            print(f"   NOT AS PROMISED: {problem}")
        time.sleep(PAUSE_S)
    return broken


def ibid(proxy: Proxy, *arguments: str) -> str:
    """What a command prints. Raises CalledProcessError."""
    command = [sys.executable, "-m", "proxy", *arguments, "--data-dir", proxy.places[-1], "--config", proxy.places[1]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL).stdout


def show_ledger(proxy: Proxy) -> None:
    deadline = time.monotonic() + LEDGER_TIMEOUT_S
    while _written(proxy) < len(SCRIPT) and time.monotonic() < deadline:
        time.sleep(0.2)  # the ledger is written in batches, off the request's path
    for statement in (LEDGER, STRATEGIES):
        print(f'\n$ ibid sql "{statement}"')
        print(ibid(proxy, "sql", statement).rstrip())


def _written(proxy: Proxy) -> int:
    rows = json.loads(ibid(proxy, "sql", "SELECT count(*) AS n FROM request", "--format", "json"))
    return int((rows["rows"] if isinstance(rows, dict) else rows)[0]["n"])


def main() -> int:
    parser = argparse.ArgumentParser(description="a real local LLM behind ibid")
    parser.add_argument("--model", type=Path, required=True, help="GGUF weights of the local LLM")
    parser.add_argument("--once", action="store_true", help="end after the script; status 1 if a promise was broken")
    parser.add_argument("--data-dir", type=Path, help="keep ibid's files here (a temporary folder)")
    parser.add_argument("--listen", help="client listener (127.0.0.1:4141, with --once any free port)")
    parser.add_argument("--admin", help="admin listener (127.0.0.1:4142, with --once any free port)")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started ends with it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # it keeps running: a pipe's reader would wait for ever
    free = "127.0.0.1:0" if chosen.once else ""
    listen, admin = chosen.listen or free or "127.0.0.1:4141", chosen.admin or free or "127.0.0.1:4142"
    with contextlib.ExitStack() as stack:
        data_dir = chosen.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ibid-demo-")))
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = stack.enter_context((data_dir / "llm.log").open("a"))
        address = stack.enter_context(running(chosen.model, log))
        print(f"local LLM     {address}/v1  ({MODEL_NAME}, one thread; priced at 0.15/0.60 USD per Mtok as an example)")
        running_proxy = stack.enter_context(proxy(address, data_dir, listen, admin))
        print(f"ibid          {running_proxy.client}  log and database in {data_dir}")
        client = openai.OpenAI(base_url=running_proxy.client, api_key="sk-demo-0123456789", max_retries=0)
        broken = play(client)
        show_ledger(running_proxy)
        print(f"\nadmin             {running_proxy.admin}  (token in {data_dir / 'admin-token'})")
        if chosen.once:
            print(f"{len(SCRIPT) - len(broken)} of {len(SCRIPT)} requests as promised")
            return 1 if broken else 0
        print(f"client            {running_proxy.client}  (set it as base_url; any API key)\nCtrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
