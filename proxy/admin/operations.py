"""What the admin listener can ask of the running program: `admin.Operations` over the pipeline and the store."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from proxy.admin import server as admin
from proxy.admin.reindex import Reindex
from proxy.admin.roles import Who
from proxy.admin.telling import bill, tell
from proxy.admin.transfer import Importer, written
from proxy.core.answer import decode_answer
from proxy.core.errors import BadRequest, CacheFault
from proxy.core.model import Draft
from proxy.core.purges import Selector
from proxy.money.keys import KeyRing
from proxy.request.pipeline import Pipeline
from proxy.settings.config import Settings
from proxy.store.selection import Filters
from proxy.store.store import Store
from proxy.store.views import DESCRIBED
from proxy.watch.health import Health
from proxy.watch.telemetry import Telemetry

SIMULATE_S = 300.0
SIMILAR_MOST = 10_000  # entries that one purge by meaning may name
Explainer = Callable[[str, bytes, Mapping[str, str], str | None], Any]


class Operator:
    """Owns nothing it is given."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        store: Store,
        telemetry: Telemetry,
        health: Health,
        explain: Explainer,
        gauges: Callable[[], Mapping[str, Any]],
        settings: Settings,
        keys: KeyRing,
        reindex: Callable[[], Reindex | None],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        is_stopping: Callable[[], bool],
        installation: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline = pipeline
        self._store = store
        self._telemetry = telemetry
        self._health = health
        self._explain = explain
        self._gauges = gauges
        self._settings = settings
        self._keys = keys
        self._reindex = reindex
        self._spawn = spawn
        self._is_stopping = is_stopping
        self._installation = installation  # tells it from others, and says nothing of its secret
        self._clock = clock

    def readiness(self) -> Mapping[str, Any]:
        degraded, step = self._health.reasons(), self._pipeline.meaning.step
        if self._is_stopping():
            return {"ready": False, "degraded": {**degraded, "listener": "stopping"}}
        if not self._pipeline.meaning.is_loading:
            return {"ready": True, "degraded": degraded}
        return {"ready": False, "degraded": degraded, "loading": None if step is None else step._asdict()}

    async def ping(self) -> Mapping[str, Any]:
        started = time.perf_counter()
        await self._store.ping()
        return {"status": "healthy", "database_ms": round((time.perf_counter() - started) * 1e3, 3)}

    async def stats(self) -> Mapping[str, Any]:
        entries = await self._store.entries.stats()
        requests = {word.lower(): self._telemetry.count(word) for word in ("HIT", "MISS", "BYPASS", "STALE", "REFRESH")}
        return {
            "entries": entries._asdict(),
            "requests": {"all": self._telemetry.count(), **requests},
            "hot": {"rows": len(self._pipeline.hot), "bytes": self._pipeline.hot.size_bytes},
            "flights": len(self._pipeline.flights),
            "judge": self._pipeline.auditor.status(),
            "lanes": {**self._pipeline.forwarder.status(), **self._pipeline.errands.status()},
            "reindex": None if (reindex := self._reindex()) is None else reindex.progress(),
            "degraded": self._health.told(),
            "ledger": {
                name: getattr(self._store.ledger, name)
                for name in ("state", "waiting", "written", "spilled", "dropped", "refused", "journal_bytes")
            },
            **self._gauges(),
        }

    async def entries(self, wanted: admin.EntryFilter) -> Sequence[Mapping[str, Any]]:
        page = await self._store.entries.search(
            Filters(wanted.namespace, wanted.model, wanted.tag, wanted.q, ids=wanted.ids),
            limit=wanted.limit,
            cursor=None if wanted.cursor is None else str(wanted.cursor),
        )
        return [{name: getattr(entry, name) for name in entry.__slots__} for entry in page.entries]

    async def entry(self, entry_id: int) -> Mapping[str, Any] | None:
        entry = await self._store.entries.get(entry_id)
        if entry is None:
            return None
        draft = entry.draft
        shown = {name: getattr(draft, name) for name in Draft.__slots__ if name not in _UNSHOWN}
        answer = decode_answer(draft.answer)
        return {
            "id": entry.id,
            **shown,
            "scope": draft.scope.hex(),
            "fingerprint": draft.fingerprint.hex(),
            "usage": None if draft.usage is None else {n: getattr(draft.usage, n) for n in draft.usage.__slots__},
            "answer": {"message": dict(answer.message), "finish_reason": answer.finish_reason, "model": answer.model},
        }

    async def amend(self, entry_id: int, ttl_s: int | None, tags: Sequence[str] | None) -> Mapping[str, Any] | None:
        expires_ms = None if ttl_s is None else int(self._clock() * 1000) + ttl_s * 1000
        amended = await self._store.entries.amend(entry_id, expires_ms=expires_ms, tags=tags)
        if amended is None:
            return None
        self._pipeline.entries.purged([entry_id])  # what memory and index hold of it is of before
        self._pipeline.entries.propose(amended)
        return await self.entry(entry_id)

    async def purge(self, selector: Selector, *, dry_run: bool) -> Sequence[int]:
        ids = await self._store.entries.purge(selector, dry_run=dry_run)
        if not dry_run:
            self._pipeline.entries.purged(ids)
            self._store.comparisons.forget(ids)
        return ids

    async def similar(self, text: str, above: float) -> admin.Similar:
        """Over the vectors in SQL: an index answers for one scope, and for its nearest alone."""
        embedder = self._pipeline.embedder
        if embedder is None:
            raise CacheFault("there is no embedding model to compare with", code=self._pipeline.semantic_fault)
        vector = await embedder.embed(text)
        entries = self._store.entries
        found = await entries.alike(embedder.identity, vector, above, SIMILAR_MOST)
        return admin.Similar(found, await entries.count_lacking(embedder.identity))

    async def explain(
        self, path: str, body: bytes, headers: Mapping[str, str], tenant: str | None
    ) -> Mapping[str, Any]:
        explained: Mapping[str, Any] = await self._explain(path, body, headers, tenant)
        return explained

    async def feedback(self, request_id: str | None, entry_id: int | None, verdict: str) -> Mapping[str, Any] | None:
        now_ms = int(self._clock() * 1000)
        found = await self._store.feedback(verdict=verdict, ts_ms=now_ms, request_id=request_id, entry_id=entry_id)
        if found is None:
            return None
        was_served = request_id is None or await self._was_served(request_id)
        await self._pipeline.auditor.feedback(request_id, found, verdict)
        await self._pipeline.errands.router.feedback(request_id, found, verdict, now_ms)
        if found and was_served:
            changed = await self._store.entries.quarantine(found, on=verdict == "wrong")
            if verdict == "wrong":
                self._pipeline.entries.purged([found])
            elif changed:
                await self._reinstate(found)
        return {
            "entry_id": found or None,
            "verdict": verdict,
            "quarantined": bool(found and was_served) and verdict == "wrong",
        }

    async def _was_served(self, request_id: str) -> bool:
        """Whether the entry of a request answered it; a near-miss names the one that did not."""
        row = await self._store.queries.request(request_id)
        return row is not None and str(row["lane"]).startswith("cache.")

    async def _reinstate(self, entry_id: int) -> None:
        """An entry that is served again goes back into the index; memory fills itself."""
        entry = await self._store.entries.get(entry_id)
        if entry is not None:
            self._pipeline.entries.propose(entry)

    async def compare(self, comparison_id: int, verdict: str) -> Mapping[str, Any] | None:
        seen = await self._store.comparisons.near_miss(comparison_id)
        if seen is None:
            return None
        await self._pipeline.auditor.near_miss(seen, verdict)
        return {"comparison_id": comparison_id, "verdict": verdict}

    async def comparisons(self, limit: int, cursor: int | None, *, near_misses: bool) -> Sequence[Mapping[str, Any]]:
        return await self._store.comparisons.recent(limit=limit, before_id=cursor, near_misses=near_misses)

    def policy(self) -> Mapping[str, Any]:
        rules, judge = self._pipeline.rules, self._pipeline.judge
        purse = self._pipeline.auditor.purse
        learning = {
            "share": purse.share,
            "earned": purse.earned,
            "hits": purse.hits,
            "spent": purse.spent,
            "audits": purse.audits,
        }
        return {
            "rules": asdict(rules),
            "comparer": judge.comparer,
            "learning": learning | {"has_room": purse.has_room},
            "evidence": judge.status(),
        }

    def reindex(self) -> Mapping[str, Any]:
        reindex = self._reindex()
        if reindex is None:
            raise CacheFault("there is no embedding model to index with", code=self._pipeline.semantic_fault)
        if not reindex.running:
            self._spawn(reindex.run(), "reindex")
        return reindex.progress()

    async def simulate(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """In a process of its own: it computes for seconds, which this one's loop must not."""
        environment = dict(os.environ)
        if self._settings.store.database_url:
            environment["IBID_DATABASE_URL"] = self._settings.store.database_url  # may hold a password: no argument
        code, out, errors = await _run_beside(self._simulation(wanted), environment)
        if code != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            raise BadRequest(lines[-1][:500] if lines else "the simulation failed", code="simulation_failed")
        found: Mapping[str, Any] = orjson.loads(out)
        return found

    def _simulation(self, wanted: Mapping[str, Any]) -> list[str]:
        """Its command line."""
        command = [sys.executable, "-m", "index.lifeline", "proxy", "simulate", "--json"]
        command += ["--data-dir", str(self._settings.data_dir)]
        if self._settings.source is not None:
            command += ["--config", str(self._settings.source)]
        for budget in wanted["max_errors"] or [wanted["max_error"]]:
            command += [] if budget is None else ["--max-error", str(budget)]
        for guard in wanted["without"] or ():
            command += ["--without", guard]
        for name in ("namespace", "limit"):
            if wanted[name] is not None:
                command += [f"--{name}", str(wanted[name])]
        return command

    def export(self, after_id: int, namespace: str | None) -> AsyncIterator[tuple[str, bytes]]:
        return written(self._store.entries, self._installation, after_id, namespace)

    async def take_in(self, pieces: AsyncIterator[bytes], *, dry_run: bool, with_purged: bool) -> Mapping[str, Any]:
        """What it stores has no vector yet: the reindex in the background is told."""
        importer = Importer(
            self._store.entries,
            self._installation,
            int(self._clock() * 1000),
            self._pipeline.entries.propose,
            dry_run=dry_run,
            with_purged=with_purged,
        )
        try:
            report = await importer.take(pieces)
        finally:
            if importer.report.stored and not dry_run:
                self._pipeline.entries.on_lacking()
        return {"dry_run": dry_run, **asdict(report)}

    async def begin_act(self, who: Who, route: str, parameters: Mapping[str, Any]) -> int:
        return await self._store.acts.begin(int(self._clock() * 1000), who.name, str(who.role), route, parameters)

    async def end_act(self, act_id: int, outcome: str, touched: int | None) -> None:
        await self._store.acts.end(act_id, outcome, touched)

    async def acts(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return await self._store.acts.recent(limit=wanted["limit"], before_id=wanted["cursor"], about=wanted["about"])

    def keys(self) -> Sequence[Mapping[str, Any]]:
        return self._keys.listed()

    def key(self, key_id: str) -> Mapping[str, Any] | None:
        return self._keys.described(key_id)

    async def create_key(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return await self._keys.create(wanted)

    async def revoke_key(self, key_id: str) -> Mapping[str, Any] | None:
        return await self._keys.revoke(key_id)

    async def rotate_key(self, key_id: str) -> Mapping[str, Any] | None:
        return await self._keys.rotate(key_id)

    async def savings(self, group_by: Sequence[str], since_ms: int | None, until_ms: int | None) -> admin.Table:
        result = await self._store.queries.savings(
            group_by or ("day",), since_day=_day(since_ms, ""), until_day=_day(until_ms, "9999")
        )
        return admin.Table(result.columns, result.rows, result.truncated)

    def queries(self) -> Sequence[Mapping[str, Any]]:
        return [
            {"name": query.name, "about": query.title, "columns": query.columns} for query in self._store.queries.list()
        ]

    def views(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": name, "about": view.title, "columns": view.columns} for name, view in DESCRIBED.items()]

    async def named(self, name: str, limit: int, since_ms: int | None, until_ms: int | None) -> admin.Table:
        result = await self._store.queries.named(
            name, since_day=_day(since_ms, ""), until_day=_day(until_ms, "9999"), row_limit=limit
        )
        return admin.Table(result.columns, result.rows, result.truncated)

    async def query(self, sql: str, limit: int) -> admin.Table:
        result = await self._store.queries.run_readonly(sql, row_limit=limit)
        return admin.Table(result.columns, result.rows, result.truncated)

    async def requests(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return await self._store.queries.requests(**wanted)

    async def request(self, request_id: str) -> Mapping[str, Any] | None:
        found = await self._store.queries.request(request_id)
        return None if found is None else {**found, "story": tell(found), "bill": bill(found)}

    async def batches(self, limit: int, cursor: str | None) -> Sequence[Mapping[str, Any]]:
        return await self._store.batches.recent(limit=limit, before=cursor)


_UNSHOWN = frozenset({"scope", "fingerprint", "usage", "answer", "embedding", "signature"})


async def _run_beside(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int | None, bytes, bytes]:
    """Exit code and both outputs of a process that does not outlive this one, nor SIMULATE_S."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,  # open while this process lives
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(SIMULATE_S):
            assert process.stdout is not None
            assert process.stderr is not None
            out, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out, errors


def _day(ms: int | None, default: str) -> str:
    if ms is None:
        return default
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).date().isoformat()
