"""Lines of one batch that ask the same in other words, found before both are sent.

A line that is about to be sent is compared with those of its scope that were chosen before it. Where the judge would
now serve the earlier one's answer for it, were that stored, it waits: once the answer is there, it is looked up like
any other. What the judge or the pair guard refuses now does not wait.
"""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from proxy import ports
from proxy.core import policy
from proxy.core.model import Candidate
from proxy.core.query import Query
from proxy.judging.judge import LEARN_FROM, Place
from proxy.request.lookup import CANDIDATES
from proxy.request.pipeline import Pipeline

LINES = 16_384  # of a batch that later ones are compared with: 25 MB, and 3 ms for the last of them
ASIDE = 2048  # rows from which on a comparison leaves the event loop


class Chosen:
    """Lines of one scope that will be sent, by meaning. Rows are never taken out."""

    def __init__(self, dimension: int) -> None:
        self.lines: list[tuple[int, Query, ports.Signature]] = []
        self._vectors: NDArray[np.float32] = np.empty((16, dimension), np.float32)

    def add(self, number: int, query: Query, vector: ports.Vector, signature: ports.Signature) -> None:
        at = len(self.lines)
        if at == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
        self._vectors[at] = vector
        self.lines.append((number, query, signature))

    async def near(self, vector: ports.Vector, start: int, end: int, floor: float) -> list[int]:
        """At most CANDIDATES rows of a range, the most similar first, none below `floor`."""
        rows = self._vectors[start:end]
        similarities = await asyncio.to_thread(rows.dot, vector) if end - start >= ASIDE else rows @ vector
        found = np.flatnonzero(similarities >= floor)
        best = found[np.argsort(-similarities[found], kind="stable")[:CANDIDATES]]
        return [start + int(row) for row in best]

    def row(self, at: int) -> bytes:
        return bytes(self._vectors[at].astype("<f4").tobytes())


class Alike:
    """What one run has chosen to send. Owns nothing it is given."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._scopes: dict[bytes, Chosen] = {}
        self._count = 0

    def takes(self, query: Query) -> bool:
        """Whether a line may wait for another, or another for it."""
        pipeline, controls = self._pipeline, query.controls
        if pipeline.embedder is None or pipeline.index is None or not pipeline.finder.compares(query):
            return False
        return controls.read and controls.write and not (controls.shadow or controls.only_if_cached)

    async def meaning(self, query: Query) -> tuple[ports.Vector, ports.Signature] | None:
        """Of a line that was not looked up; None for one that need not be compared, or cannot be now."""
        embedder = self._pipeline.embedder
        assert embedder is not None
        try:
            if await self._pipeline.entries.knows(query):
                return None
            return await embedder.embed(query.prompt, query.tenant), embedder.signature(query.prompt)
        except ports.CACHE_FAULTS:
            return None

    def choose(self, number: int, query: Query, vector: ports.Vector, signature: ports.Signature) -> None:
        """This line is sent."""
        if self._count < LINES:
            self._count += 1
            self._scope(query, vector).add(number, query, vector, signature)

    async def earlier(
        self, number: int, query: Query, vector: ports.Vector, signature: ports.Signature
    ) -> tuple[int, Query] | None:
        """The line whose answer this one should wait for; None: this one is chosen to be sent itself."""
        scope = self._scope(query, vector)
        at, floor = 0, self._floor(query, signature)
        while at < (end := len(scope.lines)):  # more may be chosen while these are compared
            rows = await scope.near(vector, at, end, floor)
            at = end
            try:
                if rows and (row := await self._served_by(rows, scope, query, vector, signature)) is not None:
                    return scope.lines[row][:2]
            except ports.CACHE_FAULTS:
                break
        self.choose(number, query, vector, signature)
        return None

    def _scope(self, query: Query, vector: ports.Vector) -> Chosen:
        scope = self._scopes.get(query.scope)
        if scope is None:
            scope = self._scopes[query.scope] = Chosen(len(vector))
        return scope

    def _floor(self, query: Query, signature: ports.Signature) -> float:
        """The similarity below which the judge serves nothing now."""
        rules = self._pipeline.rules
        max_error = policy.error_bound(rules, query.controls)
        bounds = self._pipeline.judge.consider(_place(query), signature, (), max_error).thresholds
        return LEARN_FROM if np.isfinite(min(bounds)) else rules.start_similarity

    async def _served_by(
        self, rows: list[int], scope: Chosen, query: Query, vector: ports.Vector, signature: ports.Signature
    ) -> int | None:
        """The row whose answer the judge would serve, were it an entry."""
        pipeline = self._pipeline
        assert pipeline.index is not None
        candidates = []
        for row in rows:
            own = scope.lines[row][2]
            similarity, vetoes = pipeline.index.compare(vector, signature, scope.row(row), own.astype("<u8").tobytes())
            candidates.append(Candidate(-1 - row, similarity, vetoes, own))  # no entry has such an id
        max_error = policy.error_bound(pipeline.rules, query.controls)
        await pipeline.auditor.evidence.read(_place(query))
        opinion = pipeline.judge.consider(_place(query), signature, candidates, max_error)
        while (chosen := opinion.chosen) is not None:
            row = -1 - chosen.candidate.entry_id
            kept = scope.lines[row][1]
            if await pipeline.auditor.is_refused(query.fingerprint, kept.fingerprint):
                against = "refused_before"
            else:
                against = await pipeline.finder.ask_guard(chosen, opinion, query.prompt, kept.prompt)
            if not against:
                return row
            opinion.refused[chosen.candidate.entry_id] = against
        return None


def _place(query: Query) -> Place:
    return Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
