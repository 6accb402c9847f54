"""How long each page of the dashboard takes with many requests in the ledger, in a real Chromium.

    python -m tests.bench.dashboard [--requests 100000]

From the click to the last of what is shown; the best of three, because the machine is shared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import uvloop

from tests.flows import months
from tests.flows.browsing import chromium, looking
from tests.flows.running import EXACT_ONLY, running
from tests.upstream import ScriptedUpstream

PAGES = (
    "overview", "overview?since=24h", "overview?since=90d", "requests", "requests?lane=stream.coalesce",
    "requests?reason=nobody", "requests?entry_id=3", "requests/m-1-50", "entries", "review", "keys", "batches",
    "health", "docs",
)  # fmt: skip


async def main(requests: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        data_dir = Path(place) / "data"
        data_dir.mkdir(mode=0o700)
        async with ScriptedUpstream() as up, running(data_dir, up.url, EXACT_ONLY) as ibid, chromium() as browser:
            for number in range(20):
                await ibid.fill(f"question {number}")
            ids = [entry["id"] for entry in await ibid.entries()]
            await months.write(ibid.app.store.ledger, months.outcomes(int(time.time() * 1000), 60, requests, ids))
            ((n,),) = [row.values() for row in await ibid.sql("SELECT COUNT(*) AS n FROM request")]
            print(f"{n:,} requests in the ledger")
            async with looking(browser, ibid) as watched:
                for path in PAGES:
                    taken = []
                    for _ in range(3):
                        await watched.open("docs/index")
                        began = time.perf_counter()
                        await watched.open(path)
                        taken.append(time.perf_counter() - began)
                    print(f"{path:28} {min(taken) * 1000:6.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    uvloop.run(main(parser.parse_args().requests))
