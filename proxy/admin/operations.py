"""What the admin listener can ask of the running program: `admin.Operations` over the pipeline and the store."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from proxy.admin import server as admin
from proxy.admin.reindex import Reindex
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
            Filters(wanted.namespace, wanted.model, wanted.tag, wanted.q),
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

    async def purge(self, selector: Selector, *, dry_run: bool) -> Sequence[int]:
        ids = await self._store.entries.purge(selector, dry_run=dry_run)
        if not dry_run:
            self._pipeline.entries.purged(ids)
            self._store.comparisons.forget(ids)
        return ids

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
        await self._pipeline.auditor.feedback(request_id, found, verdict)
        await self._pipeline.errands.router.feedback(request_id, found, verdict, now_ms)
        if found:
            changed = await self._store.entries.quarantine(found, on=verdict == "wrong")
            if verdict == "wrong":
                self._pipeline.entries.purged([found])
            elif changed:
                await self._reinstate(found)
        return {"entry_id": found or None, "verdict": verdict, "quarantined": bool(found) and verdict == "wrong"}

    async def _reinstate(self, entry_id: int) -> None:
        """An entry that is served again goes back into the index; memory fills itself."""
        entry = await self._store.entries.get(entry_id)
        if entry is not None:
            self._pipeline.entries.propose(entry)

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
        if wanted["max_error"] is not None:
            command += ["--max-error", str(wanted["max_error"])]
        for guard in wanted["without"] or ():
            command += ["--without", guard]
        for name in ("namespace", "limit"):
            if wanted[name] is not None:
                command += [f"--{name}", str(wanted[name])]
        return command

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

    async def query(self, name: str | None, sql: str | None, limit: int) -> admin.Table:
        if sql is not None:
            result = await self._store.queries.run_readonly(sql, row_limit=limit)
        elif name is not None:
            result = await self._store.queries.named(name, row_limit=limit)
        else:
            raise BadRequest("name or sql is needed", code="invalid_value", param="name")
        return admin.Table(result.columns, result.rows, result.truncated)

    async def requests(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return await self._store.queries.requests(**wanted)

    async def request(self, request_id: str) -> Mapping[str, Any] | None:
        return await self._store.queries.request(request_id)


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
