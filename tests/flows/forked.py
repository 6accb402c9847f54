"""`ibid serve` forked off a process that has imported it already: two seconds less CPU a start than a new interpreter.

For tests that start it many times. What is forked has no thread, no loop and no open file of ours yet: everything that
serves is made after the fork, and dies with the process as in any other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

_context = get_context("forkserver")
_context.set_forkserver_preload(["proxy.commands.serve", "proxy.commands.main", "proxy.upkeep.loading"])


class Forked:
    """The part of subprocess.Popen that `Process` uses. `arguments` are those of the command line."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        log_path.write_bytes(b"")
        self._process = _context.Process(target=_run, args=(list(arguments), dict(env), str(log_path)), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("ibid serve", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], env: dict[str, str], log_path: str) -> None:
    """In the fork: the command line, with this environment and its standard error in a file."""
    from proxy.commands import main as cli

    os.environ.clear()
    os.environ.update(env)
    log = os.open(log_path, os.O_WRONLY)
    os.dup2(log, 2)
    os.close(log)
    sys.exit(cli.main(arguments))
