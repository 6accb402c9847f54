"""What the chosen backend embeds alone, one text at a time, on one core. Run as a child of `http`."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

from index.artefact import artefact_directory, open_artefact
from index.embedder import OnnxBackend
from index.model import locate
from tests.bench.questions import fresh_question, reworded


def main() -> None:
    """argv: data directory, seconds, core, "reworded" or "fresh", seconds of rest before each text.

    Prints milliseconds a text: the mean without rest, the median with it. Caches grow cold in a rest.
    """
    data_dir, seconds, cpu, kind = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rest_s = float(sys.argv[5])
    os.sched_setaffinity(0, {cpu})
    files = locate(None, data_dir / "models")
    backend = OnnxBackend(open_artefact(artefact_directory(data_dir / "models", files.digest, "onnx"), files.digest), 1)
    for i in range(20):
        backend.encode(reworded(i, 1))
    count, started = 0, time.perf_counter()
    latencies_ms: list[float] = []
    while (passed := time.perf_counter() - started) < seconds:
        time.sleep(rest_s)
        begun = time.perf_counter()
        backend.encode(fresh_question(count) if kind == "fresh" else reworded(count % 100, count // 100 + 1))
        latencies_ms.append((time.perf_counter() - begun) * 1e3)
        count += 1
    print(statistics.median(latencies_ms) if rest_s else passed * 1e3 / count)


if __name__ == "__main__":
    main()
