"""`make demo`, ended after its script: the real LLM, the real proxy, the official client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.demo import SCRIPT
from tests.llm import WEIGHTS
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent


def test_the_demo_keeps_every_promise_and_shows_the_ledger(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.demo", "--model", str(WEIGHTS), "--once", "--data-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENCE_S, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SCRIPT)} of {len(SCRIPT)} requests as promised" in done.stdout
    for word in ("x-cache-tier: exact", "x-cache-tier: semantic", "cache.semantic", "savings_by_strategy", "admin  "):
        assert word in done.stdout
    for guard in ("numbers", "entities", "direction"):
        assert f"x-cache-reason: {guard}" in done.stdout
    token = (tmp_path / "admin-token").read_text().strip()
    assert token not in done.stdout + (tmp_path / "ibid.log").read_text()
