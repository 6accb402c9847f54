"""The bundled model, converted once per test run, in a child process so that torch stays out of the tests' own."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from index.artefact import INT8, ONNX, artefact_directory
from index.model import locate
from index.quiet import SILENCE
from tests.waiting import PATIENCE_S


@cache
def converted_data_dir() -> Path:
    """A data directory whose `models` holds both ONNX artefacts.

    IBID_TEST_MODELS names one to keep between runs, and to share between worker processes: `make test` fills it before
    the tests by running this module. Without it a temporary one is made and removed at exit. About 20 s the first
    time, of which most is importing torch and sentence-transformers.
    """
    kept = os.environ.get("IBID_TEST_MODELS")
    data_dir = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="ibid-test-"))
    if not kept:
        atexit.register(shutil.rmtree, data_dir, ignore_errors=True)
    models = data_dir / "models"
    files = locate(None, models)
    absent = [name for name in (ONNX, INT8) if not artefact_directory(models, files.digest, name).exists()]
    if absent:
        command = [sys.executable, "-m", "index.convert", str(files.directory), "--into", str(models)]
        command += ["--digest", files.digest, "--window", str(files.window)]
        for name in absent:
            command += ["--backend", name]
        done = subprocess.run(
            command, env={**os.environ, **SILENCE}, capture_output=True, text=True, timeout=3 * PATIENCE_S
        )
        assert done.returncode == 0, done.stderr
    return data_dir


if __name__ == "__main__":
    converted_data_dir()
