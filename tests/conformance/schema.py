"""`python -m tests.conformance.schema`: schemathesis against every endpoint that is not a proxy's.

It reads `/openapi.json` of a running ibid, with entries, ledger rows and feedback in it, and makes requests from it,
good and bad. No answer may be a 5xx, undocumented, or of another form than the schema says. IBID_SCHEMATHESIS names its
command; `make conformance` sets it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.flows.running import TOKEN, Ibid, running
from tests.providers import provider
from tests.upstream import ScriptedUpstream

CHECKS: Final = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
QUESTIONS: Final = 5
EXAMPLES: Final = os.environ.get("IBID_SCHEMA_EXAMPLES", "320")  # of each operation and phase; 5,000 cases and more


async def filled(ibid: Ibid) -> None:
    """Something to find: entries, exact and semantic hits, a wrong mark."""
    for number in range(QUESTIONS):
        for wording in ("How do I repair garden hose number", "How can I repair garden hose number"):
            await ibid.ask(f"{wording} {number}?")
            await ibid.settled()
    reply = await ibid.ask("How do I repair garden hose number 0?")
    await ibid.admin("POST", "/cache/keys", {"project": "red", "limit_usd": ["10/day"]})
    await ibid.admin("POST", "/cache/feedback", {"request_id": reply.headers["x-request-id"], "verdict": "wrong"})
    await ibid.sql("SELECT 1")


async def main() -> int:
    command = os.environ.get("IBID_SCHEMATHESIS")
    if not command:
        sys.stderr.write("IBID_SCHEMATHESIS does not name the command `st`\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="ibid-schema-") as folder:
        async with ScriptedUpstream(provider) as up, running(Path(folder) / "data", up.url) as ibid:
            await filled(ibid)
            arguments = [
                command, "run", f"{ibid.admin_url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}",
                "--checks", CHECKS, "-n", EXAMPLES, "--continue-on-failure", "--workers", "1",
                "--suppress-health-check", "all", "--request-timeout", "60", *sys.argv[1:],
            ]  # fmt: skip
            done = await asyncio.to_thread(subprocess.run, arguments, cwd=folder, check=False)
            async with ibid.session.get(f"{ibid.admin_url}/healthz") as alive:
                assert alive.status == 200
            return done.returncode


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
