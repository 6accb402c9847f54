"""A real LLM server on the loopback for `make demo` and the tests: llama.cpp with one GGUF file, OpenAI compatible.

    python deploy/local_llm.py MODEL.gguf [--port 0] [--threads 1] [--temperature T] [--template FILE] [--embeds]

Prints one line, `listening http://127.0.0.1:PORT`, when it accepts requests, and ends when its standard input closes,
so it cannot outlive the program that started it. Never part of the product: ibid only sees it as an upstream.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

MODEL_NAME = "smollm2-135m-instruct"
START_TIMEOUT_S = 60.0


class DidNotStart(RuntimeError):
    """The server process ended, or did not answer in time; the message ends with what it wrote to stderr."""


@contextlib.contextmanager
def running(
    model: Path,
    log: TextIO,
    *,
    threads: int = 1,
    temperature: float | None = None,
    template: Path | None = None,
    embeds: bool = False,
) -> Iterator[str]:
    """Address of a server in a process of its own, `http://127.0.0.1:PORT`, stopped by its own pid on exit.

    `log` takes its output and is owned by the caller; `temperature` holds where a request names none; `template` is a
    chat template in place of the model's own; with `embeds` it gives vectors as well as answers. Raises DidNotStart.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(model), "--threads", str(threads)]
    if temperature is not None:
        command += ["--temperature", str(temperature)]
    if template is not None:
        command += ["--template", str(template)]
    if embeds:
        command.append("--embeds")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield _address(process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("listening "):
            return line.split()[1]
    raise DidNotStart(f"the local LLM server ended with status {process.wait()}")


def _serve(asked: argparse.Namespace) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(asked.model)
    params.model_alias = {MODEL_NAME}
    params.hostnames = ["127.0.0.1"]
    params.port = asked.port
    params.n_ctx = 4096
    params.n_parallel = 2
    params.n_threads_http = 4
    params.cpuparams.n_threads = asked.threads
    params.cpuparams_batch.n_threads = asked.threads
    params.sampling.seed = 7
    if asked.temperature is not None:
        params.sampling.temp = asked.temperature
    if asked.template is not None:
        params.chat_template = asked.template.read_text()
    if asked.embeds:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.offline = True
    params.ui = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    _await_ready(server.listening_address)
    print(f"listening {server.listening_address}", flush=True)
    sys.stdin.read()


def _await_ready(address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
                if json.load(response).get("status") == "ok":
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise DidNotStart(f"{address}/health did not answer in {START_TIMEOUT_S:.0f} s: {error}") from error
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description="OpenAI-compatible llama.cpp server on the loopback")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--template", type=Path, help="a chat template, in Jinja, in place of the model's own")
    parser.add_argument("--embeds", action="store_true", help="give vectors as well as answers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this one
    _serve(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
