"""How a request would be answered: the same reading, lookup and judging as the pipeline, nothing served or stored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from proxy import ports
from proxy.core import identity, policy
from proxy.core.errors import BadRequest
from proxy.core.model import Candidate, Level, NearMiss, Query
from proxy.handlers import CHAT_UPSTREAM_PATH, Caller, ClientHandler, Target
from proxy.pipeline import CANDIDATES, Pipeline
from proxy.store.selection import Filters
from proxy.store.store import Store

TARGET = Target(CHAT_UPSTREAM_PATH, CHAT_UPSTREAM_PATH, "", True)
TWINS = 20


class Explainer:
    """Lent the parts by `app.py`."""

    def __init__(self, pipeline: Pipeline, handler: ClientHandler, store: Store) -> None:
        self._pipeline = pipeline
        self._handler = handler
        self._store = store

    async def explain(self, body: bytes, headers: Mapping[str, str], tenant: str | None) -> Mapping[str, Any]:
        """Raises BadRequest for what the client listener would refuse, and when the tenant must be named."""
        raw_headers = tuple((name.encode(), value.encode()) for name, value in headers.items())
        caller = Caller(
            tenant or await self._only_tenant(),
            raw_headers,
            identity.scope_headers(raw_headers),
            is_json=True,
            is_retry=False,
        )
        query = self._handler.read_query(TARGET, caller, body)
        now_ms = int(time.time() * 1000)
        exact = await self._store.entries.find(query.fingerprint)
        candidates, note = await self._candidates(query, now_ms)
        rules, controls = self._pipeline.rules, query.controls
        chosen = policy.choose(candidates, rules, controls)
        if exact is not None and exact.draft.expires_ms > now_ms:
            verdict: dict[str, Any] = {"verdict": "hit", "tier": "exact", "entry": exact.id}
        elif query.eligibility.level is Level.NONE:
            verdict = {"verdict": "bypass", "reason": query.eligibility.reason}
        elif isinstance(chosen, policy.Choice):
            verdict = {
                "verdict": "hit",
                "tier": "semantic",
                "entry": chosen.entry_id,
                "reason": chosen.judgement.reason,
            }
        elif isinstance(chosen, NearMiss):
            verdict = {"verdict": "near-miss", "entry": chosen.entry_id, "reason": chosen.reason}
        else:
            verdict = {"verdict": "miss", "reason": note or query.eligibility.reason or chosen.reason}
        return {
            **verdict,
            "tenant": query.tenant,
            "scope": query.scope.hex(),
            "fingerprint": query.fingerprint.hex(),
            "eligibility": {"level": query.eligibility.level.value, "reason": query.eligibility.reason},
            "bound": {
                "max_error_rate": policy.error_bound(rules, controls),
                "near_floor": rules.near_floor,
            },
            "candidates": [self._shown(candidate, query) for candidate in candidates],
            "key_diff": await self._key_diff(query),
        }

    async def _only_tenant(self) -> str:
        tenants = await self._store.entries.tenants(limit=2)
        if len(tenants) > 1:
            raise BadRequest("More than one tenant has entries: name one.", code="invalid_value", param="tenant")
        return tenants[0] if tenants else "0" * 64

    async def _candidates(self, query: Query, now_ms: int) -> tuple[Sequence[Candidate], str]:
        embedder, index = self._pipeline.embedder, self._pipeline.index
        if query.eligibility.level is not Level.FULL:
            return [], ""
        if embedder is None or index is None:
            return [], self._pipeline.semantic_fault
        try:
            vector = await embedder.embed(query.prompt, query.tenant)
            signature = embedder.signature(query.prompt)
            found = await index.search(query.scope, vector, signature, now_ms, CANDIDATES)
        except ports.CACHE_FAULTS as fault:
            return [], getattr(fault, "reason", "store_down")
        return [Candidate(*proposed) for proposed in found], ""

    def _shown(self, candidate: Candidate, query: Query) -> dict[str, Any]:
        judgement = policy.judge(candidate.similarity, candidate.vetoes, self._pipeline.rules, query.controls)
        guards = {name: bool(candidate.vetoes >> bit & 1) for bit, name in enumerate(policy.GUARDS)}
        return {
            "entry": candidate.entry_id,
            "similarity": round(candidate.similarity, 6),
            "probability_if_no_veto": round(policy.probability_of(candidate.similarity), 6),
            "vetoes": [name for name, vetoed in guards.items() if vetoed],
            "serves": judgement.serves,
            "reason": judgement.reason,
        }

    async def _key_diff(self, query: Query) -> list[dict[str, Any]]:
        """Entries of the same tenant with the same prompt that this request's scope keeps apart, and what differs."""
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
                "operation": (draft.operation, query.operation),
                "namespace": (draft.namespace, query.controls.namespace),
            }
            differs = {name: {"entry": a, "request": b} for name, (a, b) in pairs.items() if a != b}
            found.append({"entry": entry.id, "differs": differs or "earlier messages, settings, headers or end user"})
        return found
