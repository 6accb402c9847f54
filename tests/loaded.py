"""Runs a command beside busy loops, which end with it: `python -m tests.loaded python -m pytest tests/edge`.

A test that waits for a clock instead of an event fails here sooner or later.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def main() -> int:
    """The exit status of the command. The loops run at its own niceness: each takes as much of a core as it does."""
    parser = argparse.ArgumentParser(prog="python -m tests.loaded", description=__doc__)
    parser.add_argument("--loops", type=int, default=4, help="busy loops beside the command (default: %(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    loops = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(asked.loops)]
    try:
        return subprocess.run(asked.command).returncode
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())
