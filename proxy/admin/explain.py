"""How a request would be answered: the same reading, lookup and judging as the pipeline, nothing served or stored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from proxy import ports
from proxy.client.handlers import ClientHandler
from proxy.core import identity, policy
from proxy.core.answer import decode_answer
from proxy.core.errors import BadRequest
from proxy.core.keys import Key, tenant_of_project
from proxy.core.model import Candidate, Entry, Level, NearMiss
from proxy.core.query import Query
from proxy.judging.judge import Judged, Opinion, Place, finite, verdict_of
from proxy.lanes.foresight import foresee, plan_of
from proxy.request.lookup import CANDIDATES
from proxy.request.pipeline import Pipeline
from proxy.request.reading import Caller
from proxy.settings.lanes import LaneSettings
from proxy.store.entries import TenantUse
from proxy.store.selection import Filters
from proxy.store.store import Store
from proxy.store.traffic import read_mean_output

TWINS = 20
TENANTS = 8  # named where one has to be chosen


class Explainer:
    """Lent the parts by `app.py`."""

    def __init__(
        self, pipeline: Pipeline, handler: ClientHandler, store: Store, lanes: LaneSettings, prices: ports.PriceBook
    ) -> None:
        self._pipeline = pipeline
        self._handler = handler
        self._store = store
        self._lanes = lanes
        self._prices = prices

    async def explain(
        self, path: str, body: bytes, headers: Mapping[str, str], tenant: str | None
    ) -> Mapping[str, Any]:
        """Raises BadRequest for what the client listener would refuse, and when the tenant must be named."""
        target = self._handler.target(*_split(path))
        if target.dialect is None or target.dialect.operation == "embedding":
            raise BadRequest(f"no question is asked on {path[:80]!r}", code="invalid_value", param="path")
        raw_headers = tuple((name.encode(), value.encode()) for name, value in headers.items())
        owner = tenant or await self._only_tenant()

        def read(headers: tuple[tuple[bytes, bytes], ...]) -> Query:
            counted = identity.scope_headers(headers, self._handler.header_rules)
            caller = Caller(owner, headers, counted, is_json=True, is_retry=False)
            return self._handler.read_query(target, caller, body)

        query = read(raw_headers)
        parted = {
            read(tuple([line for line in raw_headers if line[0].lower() != name.encode()])).scope: name
            for name, _ in identity.scope_headers(raw_headers, self._handler.header_rules)
        }
        now_ms = int(time.time() * 1000)
        exact = await self._store.entries.find(query.fingerprint)
        opinion, note = await self._opinion(query, now_ms)
        rules, judge = self._pipeline.rules, self._pipeline.judge
        found = None if opinion is None else opinion.chosen or verdict_of(opinion, rules.near_floor)
        unfit = None if exact is None else policy.unfit(decode_answer(exact.draft.answer, orjson.loads), query)
        if exact is not None and exact.draft.expires_ms > now_ms and unfit is None:
            verdict: dict[str, Any] = {"verdict": "hit", "tier": "exact", "entry": exact.id}
        elif query.eligibility.level is Level.NONE:
            verdict = {"verdict": "bypass", "reason": query.eligibility.reason}
        elif isinstance(found, Judged):
            verdict = {"verdict": "hit", "tier": "semantic", "entry": found.candidate.entry_id, "reason": found.reason}
        elif isinstance(found, NearMiss):
            verdict = {"verdict": "near-miss", "entry": found.entry_id, "reason": found.reason}
        else:
            reason = note or unfit or query.eligibility.reason or ("nothing_alike" if found is None else found.reason)
            verdict = {"verdict": "miss", "reason": reason}
        return {
            **verdict,
            "plan": plan_of(query),
            "cost": await self._cost(query, verdict, exact, now_ms),
            "tenant": query.tenant,
            "scope": query.scope.hex(),
            "fingerprint": query.fingerprint.hex(),
            "eligibility": {"level": query.eligibility.level.value, "reason": query.eligibility.reason},
            "bound": {
                "max_error_rate": policy.error_bound(rules, query.controls),
                "near_floor": rules.near_floor,
                "start_similarity": rules.start_similarity,
                "proven_from": None if opinion is None else finite(opinion.thresholds.proven),
                "provisional_from": None if opinion is None else finite(opinion.thresholds.provisional),
                "has_room": opinion is not None and opinion.has_room,
            },
            "evidence": None if opinion is None else judge.evidence(opinion.place, opinion.max_error),
            "candidates": []
            if opinion is None
            else [_shown(judged, opinion, judge.feature_names) for judged in opinion.judged],
            "key_diff": await self._key_diff(query, parted),
        }

    async def _cost(
        self, query: Query, verdict: Mapping[str, Any], exact: Entry | None, now_ms: int
    ) -> Mapping[str, Any]:
        usage = None if exact is None else exact.draft.usage
        mean = await read_mean_output(self._store.database, query.upstream, query.model)
        output_tokens = mean if usage is None else usage.output_tokens
        is_hit = verdict["verdict"] == "hit"
        return foresee(query, self._lanes, self._prices, now_ms, output_tokens=output_tokens, is_hit=is_hit)

    async def _only_tenant(self) -> str:
        uses = await self._store.entries.tenants(limit=TENANTS + 1)
        if len(uses) > 1:
            named = await self._named(uses[:TENANTS])
            more = ", and others" if len(uses) > TENANTS else ""
            message = f"More than one tenant has entries: name one (--tenant, or ?tenant=): {'; '.join(named)}{more}."
            raise BadRequest(message, code="invalid_value", param="tenant")
        return uses[0].tenant if uses else "0" * 64

    async def _named(self, uses: Sequence[TenantUse]) -> list[str]:
        """Each tenant with whom it stands for, as far as that is known: of a credential only its digest is."""
        keys: dict[str, list[Key]] = {}
        for key in await self._store.keys.keys():
            keys.setdefault(tenant_of_project(key.project), []).append(key)
        said = []
        for use in uses:
            owners = keys.get(use.tenant, [])
            who = (
                f"project {owners[0].project}, key {owners[0].id}" if owners else "a credential that is passed through"
            )
            last = datetime.fromtimestamp(use.used_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
            said.append(f"{use.tenant} ({who}; {use.entries:,} entries, last used {last})")
        return said

    async def _opinion(self, query: Query, now_ms: int) -> tuple[Opinion | None, str]:
        """What the judge makes of it, or why it is not asked. Pairs refused before are marked; rows are not read."""
        embedder, index = self._pipeline.embedder, self._pipeline.index
        if query.eligibility.level is not Level.FULL:
            return None, ""
        if embedder is None or index is None:
            return None, self._pipeline.semantic_fault
        try:
            vector = await embedder.embed(query.prompt, query.tenant)
            signature = embedder.signature(query.prompt)
            found = await index.search(query.scope, vector, signature, now_ms, CANDIDATES)
            place = Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
            await self._pipeline.auditor.evidence.read(place)
        except ports.CACHE_FAULTS as fault:
            return None, getattr(fault, "reason", "store_down")
        max_error = policy.error_bound(self._pipeline.rules, query.controls)
        candidates = [Candidate(*proposed) for proposed in found]
        opinion = self._pipeline.judge.consider(place, signature, candidates, max_error)
        kept: dict[int, str] = {}
        for judged in opinion.judged:
            entry = await self._store.entries.get(judged.candidate.entry_id)
            if entry is None:
                opinion.refused[judged.candidate.entry_id] = "gone"
            elif await self._pipeline.auditor.is_refused(query.fingerprint, entry.draft.fingerprint):
                opinion.refused[judged.candidate.entry_id] = "refused_before"
            else:
                kept[judged.candidate.entry_id] = entry.draft.prompt
        try:
            await self._ask_guard(opinion, query.prompt, kept)
        except ports.CACHE_FAULTS as fault:
            return None, getattr(fault, "reason", "store_down")
        return opinion, ""

    async def _ask_guard(self, opinion: Opinion, asked: str, kept: Mapping[int, str]) -> None:
        """As the gate does; and what is left of its questions goes to those that are not served anyway."""
        while (chosen := opinion.chosen) is not None:
            entry_id = chosen.candidate.entry_id
            if not (against := await self._pipeline.finder.ask_guard(chosen, opinion, asked, kept[entry_id])):
                break
            opinion.refused[entry_id] = against
        for judged in opinion.judged:
            if judged.candidate.entry_id in kept and opinion.may_ask:
                await self._pipeline.finder.ask_guard(judged, opinion, asked, kept[judged.candidate.entry_id])

    async def _key_diff(self, query: Query, parted: Mapping[bytes, str]) -> list[dict[str, Any]]:
        """Entries of the same tenant with the same prompt that this request's scope keeps apart, and what differs.
        `parted`: the scopes that the request would have without one of its headers, and its name."""
        if not query.prompt:
            return []
        page = await self._store.entries.search(Filters(q=query.prompt[:200]), limit=TWINS)
        found = []
        for listed in page.entries:
            if listed.tenant != query.tenant or (entry := await self._store.entries.get(listed.id)) is None:
                continue
            draft = entry.draft
            if draft.prompt != query.prompt or draft.scope == query.scope:
                continue
            pairs = {
                "model": (draft.model, query.model),
                "upstream": (draft.upstream, query.upstream),
                "operation": (draft.operation, query.dialect.operation),
                "namespace": (draft.namespace, query.controls.namespace),
            }
            if draft.scope in parted:  # and in nothing else
                pairs["header"] = ("", parted[draft.scope])
            differs = {name: {"entry": a, "request": b} for name, (a, b) in pairs.items() if a != b}
            found.append({"entry": entry.id, "differs": differs or "earlier messages, settings, headers or end user"})
        return found


def _split(target: str) -> tuple[str, str]:
    path, mark, query = target.partition("?")
    return path, mark + query


def _shown(judged: Judged, opinion: Opinion, names: Sequence[str]) -> dict[str, Any]:
    """One group's best candidate: its features, each guard's verdict, and what the judge makes of it."""
    candidate = judged.candidate
    guards = {name: bool(candidate.vetoes >> bit & 1) for bit, name in enumerate(policy.GUARDS)}
    refused = opinion.refused.get(candidate.entry_id)
    return {
        "entry": candidate.entry_id,
        "group": judged.group_id,
        "similarity": round(candidate.similarity, 6),
        "probability": round(judged.probability, 6),
        "log_odds": round(judged.log_odds, 4),
        "features": {name: round(float(value), 4) for name, value in zip(names, judged.row, strict=True)},
        "vetoes": [name for name, vetoed in guards.items() if vetoed],
        "pair_guard": _guard_said(opinion.logits.get(candidate.entry_id)),
        "standing": None if judged.standing is None else judged.standing.value,
        "serves": refused is None and judged is opinion.chosen,
        "reason": refused or judged.reason,
    }


def _guard_said(logit: float | None) -> dict[str, Any] | None:
    """None where the pair guard was not asked. Where it has no opinion its logit is null, and it does not refuse."""
    return None if logit is None else {"refuses": logit <= 0, "logit": finite(logit)}
