"""What the chosen backend embeds alone: texts per second, one at a time, on one core. Run as a child of `http`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from index.convert import artefact_directory, open_artefact
from index.embedder import OnnxBackend
from index.model import locate
from tests.bench.questions import fresh_question, reworded


def main() -> None:
    """argv: data directory, seconds, core, "reworded" or "fresh". Prints texts per second."""
    data_dir, seconds, cpu, kind = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.sched_setaffinity(0, {cpu})
    files = locate(None, data_dir / "models")
    backend = OnnxBackend(open_artefact(artefact_directory(data_dir / "models", files.digest, "onnx"), files.digest), 1)
    for i in range(20):
        backend.encode(reworded(i, 1))
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        backend.encode(fresh_question(count) if kind == "fresh" else reworded(count % 100, count // 100 + 1))
        count += 1
    print(count / passed)


if __name__ == "__main__":
    main()
