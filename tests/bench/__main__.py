"""All benches, one after the other: `python -m tests.bench`, or `make bench`; `ARGS=agents` for that one alone."""

from __future__ import annotations

import os
import subprocess
import sys

BENCHES = (
    "tests.bench.http", "tests.bench.misses", "tests.bench.streams", "tests.bench.search", "tests.bench.route",
    "tests.bench.capacity", "tests.bench.batch", "tests.bench.agents",
)  # fmt: skip


def main() -> int:
    failed = 0
    wanted = [f"tests.bench.{name}" for name in sys.argv[1:]]
    for bench in wanted or BENCHES:
        print(f"\n## {bench}\n", flush=True)
        failed += subprocess.run([sys.executable, "-m", bench], env=os.environ, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
