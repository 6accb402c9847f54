"""All benches, one after the other: `python -m tests.bench`, or `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys

BENCHES = (
    "tests.bench.http", "tests.bench.streams", "tests.bench.search", "tests.bench.route", "tests.bench.capacity",
    "tests.bench.batch",
)  # fmt: skip


def main() -> int:
    failed = 0
    for bench in BENCHES:
        print(f"\n## {bench}\n", flush=True)
        failed += subprocess.run([sys.executable, "-m", bench], env=os.environ, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
