"""What the cache has for a question: the very same one, else one that is alike enough for the judge and the guard.

The index proposes, the row decides.
"""

from __future__ import annotations

import time

import numpy as np

from proxy import ports
from proxy.core import freshness, policy
from proxy.core.allowance import Allowance
from proxy.core.model import Bypass, Candidate, Draft, Entry, Hit, Level, Miss, NearMiss, Tier
from proxy.core.normal import bare, normal_form
from proxy.core.plan import Lane
from proxy.core.purges import Began
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.judging.judge import Judged, Opinion, Place, objection, verdict_of
from proxy.records import Client, Lookup, Stale
from proxy.request.entries import Entries
from proxy.request.errands import reason_of
from proxy.request.parts import Parts

CANDIDATES = 16
ROUNDING = 1e-3  # between a similarity of the index, in fixed point, and one of the row


class Finder:
    """Owns nothing it is given."""

    def __init__(self, parts: Parts, entries: Entries) -> None:
        self._rules = parts.rules
        self._store = parts.store
        self._hot = parts.hot
        self._meaning = parts.meaning
        self._entries = entries
        self._auditor = parts.auditor
        self._judge = parts.auditor.judge
        self._stale = parts.stale
        self._telemetry = parts.telemetry
        self.misses = Allowance(parts.semantic_misses_per_min)

    def compares(self, query: Query) -> bool:
        """Whether a question is looked up by its meaning as well."""
        if query.eligibility.level is not Level.FULL or query.controls.exact_only:
            return False
        return Lane.SEMANTIC in query.plan.lanes

    async def look_up(self, query: Query, client: Client, *, is_capped: bool = False) -> Lookup:
        """`is_capped`: semantic misses count against the key's allowance; a batch's lines do not."""
        eligibility, controls = query.eligibility, query.controls
        if eligibility.level is Level.NONE:
            return Lookup(Bypass(eligibility.reason or "bypass"))
        lookup = Lookup(Miss(eligibility.reason or "nothing_alike"))
        try:
            if controls.read and await self.find_exact(query, client, lookup):
                return lookup
            if self.compares(query):
                unfit = lookup.verdict.reason
                if not is_capped or self._may_compare(query, client, lookup):
                    await self._find_alike(query, client, lookup)
                if is_capped and lookup.opinion is not None and not isinstance(lookup.verdict, Hit):
                    self.misses.count(_prober(query), client.started_s)
                if isinstance(lookup.verdict, Miss) and unfit in policy.UNFIT:
                    lookup.verdict = Miss(unfit)
        except ports.CACHE_FAULTS as fault:
            reason = reason_of(fault)
            if reason == "too_long":  # a property of the text, not a fault
                lookup.verdict = Miss(reason)
            else:
                self._telemetry.fault(reason)
                lookup.verdict = Bypass(reason)
        if not controls.read and not isinstance(lookup.verdict, Bypass):
            lookup.verdict = Bypass("refresh" if controls.refresh else "no_cache")
        return lookup

    def _may_compare(self, query: Query, client: Client, lookup: Lookup) -> bool:
        """Whether the key has semantic misses left; whoever sends near copies in bulk maps what is stored."""
        if self.misses.has_room(_prober(query), client.started_s):
            return True
        lookup.verdict = Miss("too_many_misses")
        return False

    async def find_exact(self, query: Query, client: Client, lookup: Lookup) -> bool:
        started = time.perf_counter()
        purges, began = self._entries.purges, self._entries.began(client)
        entry = await self._store.find(query.fingerprint)
        lookup.steps_ms["exact"] = (time.perf_counter() - started) * 1e3
        if entry is None or entry.draft.scope != query.scope:
            return False
        if not is_fresh(entry, query, client):
            lookup.verdict = Miss("expired")
            return self._may_serve_stale(entry, query, client, lookup, purges, began)
        row = self._entries.warm(entry, purges)
        if (reason := policy.unfit(row.answer, query)) is not None:
            lookup.verdict = Miss(reason)
            return False
        lookup.row = row
        lookup.verdict = Hit(entry, Tier.EXACT, 1.0, 1.0)
        return True

    def _may_serve_stale(
        self, entry: Entry, query: Query, client: Client, lookup: Lookup, purges: int, began: Began
    ) -> bool:
        """Whether an expired entry is served now; if only in place of an upstream that fails, it is kept for that."""
        lanes, controls = query.plan.lanes, query.controls
        allowed_s = [controls.max_stale_s] if controls.max_stale_s is not None else []
        if Lane.REVALIDATE in lanes:
            allowed_s.append(self._stale.while_revalidate_s)
        if not (allowed_s or Lane.STALE_IF_ERROR in lanes):
            return False
        row = self._entries.warm(entry, purges)
        if policy.unfit(row.answer, query) is not None:
            return False
        draft = entry.draft
        times = (draft.created_ms, draft.expires_ms, client.ts_ms)
        if freshness.may_serve_stale(*times, max(allowed_s, default=None), controls.max_age_s):
            lookup.row = row
            lookup.verdict = Hit(entry, Tier.STALE, 1.0, 1.0, "stale")
            return True
        may_stand_in = Lane.STALE_IF_ERROR in lanes and not controls.shadow
        if may_stand_in and freshness.may_serve_stale(*times, self._stale.if_error_s):
            lookup.stale = Stale(row, began)
        return False

    async def _find_alike(self, query: Query, client: Client, lookup: Lookup) -> None:
        """Embed, search, judge, and pass the gate: the index proposes, the row decides."""
        if self._meaning.embedder is None or self._meaning.index is None:
            lookup.verdict = Bypass(self._meaning.reason)
            return
        started = time.perf_counter()
        lookup.signature = signature = self._meaning.embedder.signature(query.prompt)
        normal_id = self._entries.normals.find_alike(query.scope, query.prompt) if query.controls.read else None
        if normal_id is not None and await self._try_normal(normal_id, query, client, lookup):
            return
        lookup.vector = vector = await self._meaning.embedder.embed(query.prompt, query.tenant)
        embedded = time.perf_counter()
        lookup.steps_ms["embed"] = (embedded - started) * 1e3
        if not query.controls.read:
            return
        found = await self._meaning.index.search(query.scope, vector, signature, client.ts_ms, CANDIDATES)
        searched = time.perf_counter()
        lookup.steps_ms["search"] = (searched - embedded) * 1e3
        place = Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
        max_error = policy.error_bound(self._rules, query.controls)
        if found:
            await self._auditor.evidence.read(place)
        opinion = self._judge.consider(place, signature, [Candidate(*proposed) for proposed in found], max_error)
        lookup.opinion = opinion
        self._judge.see(place, signature)
        while (chosen := opinion.chosen) is not None:
            row = await self._pass_gate(chosen, opinion, query, client, lookup)
            if isinstance(row, HotRow):
                self._draw(opinion, chosen, query)
                lookup.row = row
                lookup.verdict = Hit(row.entry, Tier.SEMANTIC, chosen.candidate.similarity, chosen.probability)
                break
            else:
                opinion.refused[chosen.candidate.entry_id] = row
        else:
            lookup.verdict = verdict_of(opinion, self._rules.near_floor)
            if isinstance(lookup.verdict, NearMiss):
                self._telemetry.veto(lookup.verdict.reason)
        lookup.steps_ms["judge"] = (time.perf_counter() - searched) * 1e3 - lookup.steps_ms.get("guard", 0.0)

    async def _try_normal(self, entry_id: int, query: Query, client: Client, lookup: Lookup) -> bool:
        """Serve an entry of the same normal form, if the judge lets it.

        Both texts are compared without their pleasantries, and so the pair guard has nothing to look at: their words
        are the same.
        """
        embedder, index = self._meaning.embedder, self._meaning.index
        assert embedder is not None
        assert index is not None
        row = self._hot.get(entry_id)
        entry = row.entry if row is not None else await self._store.get(entry_id)
        if entry is None or entry.draft.embedding is None or entry.draft.embedder != embedder.identity:
            return False
        vector = np.frombuffer(entry.draft.embedding, np.float32)
        signature, kept = (embedder.signature(bare(text)) for text in (query.prompt, entry.draft.prompt))
        similarity, vetoes = index.compare(vector, signature, entry.draft.embedding, kept.tobytes())
        place = Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
        await self._auditor.evidence.read(place)
        candidate = Candidate(entry_id, similarity, vetoes, kept, normal=True)
        opinion = self._judge.consider(place, signature, [candidate], policy.error_bound(self._rules, query.controls))
        if (chosen := opinion.chosen) is None:
            return False
        found = await self._pass_gate(chosen, opinion, query, client, lookup)
        if not isinstance(found, HotRow):
            return False
        self._draw(opinion, chosen, query)
        self._judge.see(place, signature)
        lookup.opinion, lookup.row = opinion, found
        lookup.verdict = Hit(found.entry, Tier.SEMANTIC, similarity, chosen.probability)
        return True

    def _draw(self, opinion: Opinion, chosen: Judged, query: Query) -> None:
        """Whether to audit this; the more a wording was asked since it was judged last, the likelier."""
        known = self._hot.alias(query.fingerprint)
        self._auditor.draw(opinion, chosen, 1 if known is None else known.uses)

    def _is_as_proposed(self, chosen: Judged, opinion: Opinion, query: Query, lookup: Lookup, draft: Draft) -> bool:
        """Whether the row is still what was judged: of the query's normal form where nothing was embedded, else as
        similar, with the same vetoes."""
        assert self._meaning.index is not None
        assert draft.embedding is not None
        assert draft.signature is not None
        if lookup.vector is None:
            return (form := normal_form(query.prompt)) is not None and normal_form(draft.prompt) == form
        similarity, vetoes = self._meaning.index.compare(
            lookup.vector, opinion.signature, draft.embedding, draft.signature
        )
        return abs(similarity - chosen.candidate.similarity) <= ROUNDING and vetoes == chosen.candidate.vetoes

    async def _pass_gate(
        self, chosen: Judged, opinion: Opinion, query: Query, client: Client, lookup: Lookup
    ) -> HotRow | str:
        """The row, if SQL still has it, its own scope, times, embedder, vector and token classes agree, nobody said
        that it is wrong for this question, and the pair guard lets it pass; else why not."""
        assert self._meaning.embedder is not None
        assert self._meaning.index is not None
        entry_id = chosen.candidate.entry_id
        row, purges, epoch = self._hot.get(entry_id), self._entries.purges, self._judge.epoch
        if row is not None and row.entry.draft.embedder != self._meaning.embedder.identity:
            row = None  # it was given its vector since
        entry = row.entry if row is not None else await self._store.get(entry_id)
        if entry is None:
            self._meaning.index.remove([entry_id])
            return "gone"
        draft = entry.draft
        if (
            draft.scope != query.scope
            or draft.embedder != self._meaning.embedder.identity
            or draft.embedding is None
            or draft.signature is None
        ):
            return "changed"
        if not is_fresh(entry, query, client):
            return "expired"
        if not self._is_as_proposed(chosen, opinion, query, lookup, draft):
            return "changed"
        row = row if row is not None else self._entries.warm(entry, purges)
        if (reason := policy.unfit(row.answer, query)) is not None:
            return reason
        if await self._auditor.is_refused(query.fingerprint, draft.fingerprint):
            return "refused_before"
        asked = time.perf_counter()
        against = await self.ask_guard(chosen, opinion, query.prompt, draft.prompt)
        lookup.steps_ms["guard"] = lookup.steps_ms.get("guard", 0.0) + (time.perf_counter() - asked) * 1e3
        if against:
            return against
        if (purges, epoch) != (
            self._entries.purges,
            self._judge.epoch,
        ):  # while the guard was asked; its answer is remembered
            return await self._pass_gate(chosen, opinion, query, client, lookup)
        return row

    async def ask_guard(self, judged: Judged, opinion: Opinion, asked: str, kept: str) -> str:
        """What the pair guard has against serving `kept`'s answer for `asked`, or ""."""
        assert self._meaning.embedder is not None
        against = objection(opinion, judged, self._judge, can_verify=self._meaning.embedder.can_verify)
        if against is None:
            (logit,) = await self._meaning.embedder.verify(asked, [kept], opinion.place.tenant)
            opinion.logits[judged.candidate.entry_id] = logit
            against = objection(opinion, judged, self._judge, can_verify=True)
        return against or ""


def is_fresh(entry: Entry, query: Query, client: Client) -> bool:
    return freshness.is_fresh(entry.draft.created_ms, entry.draft.expires_ms, client.ts_ms, query.controls.max_age_s)


def _prober(query: Query) -> str:
    return query.key_id or query.tenant
