"""The converter ends with whoever started it, and what a crash leaves half done is taken away."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from index import artefact, lifeline
from index.model import TEMPORARY, ModelFiles, claim, settle_directory

PATIENCE_S = 60.0
ROOT = Path(__file__).parents[2]
CHILD = "import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
# Said outright, because a test run in the background of a script inherits an interrupt that is ignored.
STARTER = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
child = subprocess.Popen([sys.executable, "-m", "index.lifeline", "sleeper"], stdin=subprocess.PIPE)
child.wait()
"""


def gone(pid: int) -> None:
    """Wait until no such process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while (place := Path(f"/proc/{pid}")).exists() and b"State:\tZ" not in (place / "status").read_bytes():
        assert time.monotonic() < deadline, "it runs on"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_with_its_starter(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(CHILD)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", STARTER], env=env, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        os.kill(starter.pid, number)
        gone(child)


async def test_a_conversion_that_is_given_up_leaves_no_process_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is the real lifeline, running a module that makes what the converter makes and then hangs."""
    models = tmp_path / "models"
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom index.convert import _scratch\n"
        f"models = Path({str(models)!r})\nmodels.mkdir()\n"
        "with _scratch(models) as scratch:\n"
        "    (scratch / 'pid').write_text(str(os.getpid()))\n    (scratch / 'made').touch()\n    time.sleep(600)\n"
    )
    started = asyncio.create_subprocess_exec

    async def start(*command: str, **how: object) -> asyncio.subprocess.Process:
        assert command[1:5] == ("-P", "-m", lifeline.MODULE, "index.convert")
        how["env"] = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        return await started(command[0], "-m", lifeline.MODULE, "stand_in", **how)  # type: ignore[arg-type]

    monkeypatch.setattr(artefact.asyncio, "create_subprocess_exec", start)
    files = ModelFiles("model", tmp_path, "0" * 64, 8)
    converting = asyncio.create_task(artefact.converted(files, models, "onnx", PATIENCE_S))
    async with asyncio.timeout(PATIENCE_S):
        while not list(models.glob(f"{TEMPORARY}*/made")):
            assert not converting.done()
            await asyncio.sleep(0.01)
    (noted,) = models.glob(f"{TEMPORARY}*/pid")
    pid = int(noted.read_text())
    converting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await converting
    await asyncio.to_thread(gone, pid)
    assert list(models.iterdir()) == []


def test_what_a_crash_left_is_removed_and_what_is_under_way_is_not(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in (".tmp-dead", ".tmp-alive", ".damaged-dead", "0123456789abcdef-onnx-v2"):
        (models / name).mkdir(parents=True)
        (models / name / "model.onnx").write_bytes(b"graph")
    (models / ".tmp-file").write_bytes(b"half a record")
    alive = os.open(models / ".tmp-alive", os.O_RDONLY)
    try:
        assert claim(alive)
        settle_directory(models)
        assert {path.name for path in models.iterdir()} == {".tmp-alive", "0123456789abcdef-onnx-v2"}
    finally:
        os.close(alive)
    settle_directory(models)
    assert {path.name for path in models.iterdir()} == {"0123456789abcdef-onnx-v2"}


def test_files_of_earlier_releases_are_closed_to_others(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "artefact").mkdir(parents=True)
    (models / "artefact" / "model.onnx").write_bytes(b"graph")
    for path in (models, models / "artefact"):
        path.chmod(0o755)
    (models / "artefact" / "model.onnx").chmod(0o644)
    settle_directory(models)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (models, *models.rglob("*"))}
    assert modes == {"models": 0o700, "artefact": 0o700, "model.onnx": 0o600}
    settle_directory(tmp_path / "nothing here")
