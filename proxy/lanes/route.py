"""Which model answers: the cheapest candidate whose answers to the most alike questions were good enough.

The neighbours come from the index that also serves the semantic cache: questions that the requested model answered, and
questions that the candidate did (its answers are entries under its own scope). Votes come from shadow comparisons (a
share of requests is put to the other model too, off the client's path, and the answers are compared), from feedback,
and, only against a candidate, from what an answer shows for free: a refusal, broken JSON, a cut end, or a client that
asks nearly the same again within two minutes. That nobody complained is no vote.

Too few votes, a question without a vector, a fault of ours: the requested model answers. A conversation stays with the
model that began it, for the sake of the provider's prefix cache.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from proxy import ports
from proxy.core.facts import Facts
from proxy.core.model import Answer, Entry, Level
from proxy.core.query import Query
from proxy.core.routing import REPHRASE_MS, REPHRASE_SIMILARITY, Votes, conversation_of, is_refusal
from proxy.meaning import Meaning
from proxy.ports import Vote
from proxy.records import Client, Fetch, Lookup
from proxy.settings.lanes import RouteLane
from proxy.upstreams.sending import Sending, speaks_chat, to_other

MECHANISM: Final = "hybrid.route"
LOADED = 50_000
CONVERSATIONS = 16_384
REMEMBERED = 16_384
BAD_ANSWERS: Final = frozenset(
    {"refusal", "invalid_json", "content_filter", "empty", "finish_length", "truncated", "tool_calls"}
)
"""Reasons against storing an answer that speak against who gave it."""
AGREES_FROM = 0.5


class Reads(Protocol):
    """What the router needs of `Reader`."""

    def facts(self, query: Query) -> Facts: ...

    def variant(self, query: Query, headers: tuple[tuple[bytes, bytes], ...], upstream: str, model: str) -> Query: ...


class Choice(NamedTuple):
    """Another model for a question: as it is asked and stored there, and how it is sent."""

    candidate: str  # "upstream/model"
    query: Query
    sending: Sending
    neighbour: int  # entry id of the most alike question, 0 when there is none


class _Last(NamedTuple):
    """The last question of a scope that a candidate answered."""

    ts_ms: int
    fingerprint: bytes
    vector: ports.Vector | None
    entry_id: int
    candidate: str
    request_id: str


class Router:
    """Owns what it has learned; `proxy.parts` lends it the rest. Lives on the event loop."""

    def __init__(
        self,
        lane: RouteLane,
        *,
        reader: Reads,
        votes: ports.RouteVotes,
        meaning: Meaning,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.lane = lane
        self.routed = 0
        self.kept = 0
        self._reader = reader
        self._rows = votes
        self._meaning = meaning
        self._chance = chance
        self._votes: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])  # good, total
        self._sticky: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._last: OrderedDict[bytes, _Last] = OrderedDict()  # by scope asked
        self._answered: OrderedDict[str, tuple[int, str]] = OrderedDict()  # request → entry, candidate
        self._candidate_of: dict[int, str] = {}  # entry → who answered it

    # -- choosing -----------------------------------------------------------------------------------------------------

    async def choose(self, query: Query, client: Client, lookup: Lookup) -> Choice | None:
        """Another model for this question, or None: the one that was asked for."""
        facts = self._reader.facts(query)
        conversation = conversation_of(facts, query.tenant)
        await self._notice_rephrase(query, client, lookup)
        held = self._sticky.get(conversation)
        if held is not None and held[1] > time.monotonic():
            return self._choice(held[0], query, client, facts, 0) if held[0] else None
        choice = await self._best(query, client, lookup, facts)
        self._sticky[conversation] = ("" if choice is None else choice.candidate, time.monotonic() + self.lane.sticky_s)
        self._sticky.move_to_end(conversation)
        if len(self._sticky) > CONVERSATIONS:
            self._sticky.popitem(last=False)
        if choice is None:
            self.kept += 1
        else:
            self.routed += 1
        return choice

    async def _best(self, query: Query, client: Client, lookup: Lookup, facts: Facts) -> Choice | None:
        embedder = self._meaning.embedder
        if query.eligibility.level is not Level.FULL or embedder is None:
            return None
        if lookup.vector is None:
            try:
                lookup.signature = embedder.signature(query.prompt)
                lookup.vector = await embedder.embed(query.prompt, query.tenant)
            except ports.CACHE_FAULTS:
                return None
        for candidate in self.lane.candidates:
            if candidate == f"{query.upstream}/{query.model}":
                return None  # from here on they are dearer
            choice = self._choice(candidate, query, client, facts, 0)
            if choice is None:
                continue
            votes, neighbour = await self.votes(query, choice.query, candidate, lookup, client.ts_ms)
            if votes.total >= self.lane.min_neighbours and (
                votes.lower_bound(self.lane.confidence_z) >= self.lane.accept_quality
            ):
                return choice._replace(neighbour=neighbour)
        return None

    async def votes(
        self, query: Query, variant: Query, candidate: str, lookup: Lookup, now_ms: int
    ) -> tuple[Votes, int]:
        """What the nearest answered questions say of a candidate, and the entry of the nearest; none on a fault."""
        index = self._meaning.index
        if index is None or lookup.vector is None or lookup.signature is None:
            return Votes(0, 0), 0
        near: dict[int, float] = {}
        try:
            for scope in (query.scope, variant.scope):
                found = await index.search(scope, lookup.vector, lookup.signature, now_ms, self.lane.k)
                near.update({row[0]: row[1] for row in found if row[1] >= self.lane.min_similarity})
        except ports.CACHE_FAULTS:
            return Votes(0, 0), 0
        ranked = sorted(near, key=near.__getitem__, reverse=True)
        counted = [self._votes[entry_id, candidate] for entry_id in ranked if (entry_id, candidate) in self._votes]
        counted = counted[: self.lane.k]
        good = sum([2 * votes[0] > votes[1] for votes in counted])
        return Votes(good, len(counted)), ranked[0] if ranked else 0

    def _choice(self, candidate: str, query: Query, client: Client, facts: Facts, neighbour: int) -> Choice | None:
        upstream, _, model = candidate.partition("/")
        variant = self._reader.variant(query, tuple(client.headers), upstream, model)
        if upstream == query.upstream:
            sending = Sending(upstream, model, variant.path_qs, variant.forward_body, query.tier, (MECHANISM,))
        else:
            other = to_other(query, facts, upstream, model, MECHANISM, whole=not speaks_chat(query))
            if other is None:
                return None
            sending = other
        return Choice(candidate, variant, sending, neighbour)

    # -- learning -----------------------------------------------------------------------------------------------------

    def stored(self, fetch: Fetch, entry: Entry) -> None:
        """An answer became an entry: remember who gave it, for feedback and for a client that asks again."""
        if fetch.purpose != "answer" or not fetch.routed_to:
            return
        asked = fetch.asked
        self._candidate_of[entry.id] = fetch.routed_to
        if len(self._candidate_of) > REMEMBERED:
            del self._candidate_of[next(iter(self._candidate_of))]
        self._remember(fetch.client.request_id, entry.id, fetch.routed_to)
        self._last[asked.scope] = _Last(
            fetch.client.ts_ms,
            asked.fingerprint,
            fetch.lookup.vector,
            entry.id,
            fetch.routed_to,
            fetch.client.request_id,
        )
        self._last.move_to_end(asked.scope)
        if len(self._last) > CONVERSATIONS:
            self._last.popitem(last=False)

    async def unstored(self, fetch: Fetch) -> None:
        """A candidate's answer is not kept: where that speaks against it, the most alike question gets the vote."""
        if fetch.routed_to and fetch.neighbour and fetch.unstored in BAD_ANSWERS:
            await self.vote(fetch.neighbour, fetch.routed_to, False, fetch.unstored, fetch)

    async def judge(self, entry: Entry, answer: Answer, fetch: Fetch) -> None:
        """What an answer that was stored shows by itself."""
        content = answer.message.get("content")
        if fetch.routed_to and isinstance(content, str) and is_refusal(content):
            await self.vote(entry.id, fetch.routed_to, False, "refusal", fetch)

    async def _notice_rephrase(self, query: Query, client: Client, lookup: Lookup) -> None:
        last = self._last.get(query.scope)
        if last is None or client.ts_ms - last.ts_ms > REPHRASE_MS:
            return
        is_same = last.fingerprint == query.fingerprint and query.controls.refresh
        if not is_same and (last.fingerprint == query.fingerprint or lookup.vector is None or last.vector is None):
            return
        alike = is_same or float(lookup.vector @ last.vector) >= REPHRASE_SIMILARITY  # type: ignore[operator]
        if alike:
            del self._last[query.scope]
            await self._record(Vote(client.ts_ms, last.entry_id, last.candidate, False, "rephrase", last.request_id))

    def wants_shadow(self) -> bool:
        """Draw whether this question is also put to the other model."""
        return self._meaning.comparer is not None and self._chance() < self.lane.explore_share

    def shadow_of(self, fetch: Fetch) -> Choice | None:
        """Whom a shadow asks: after a candidate the model asked for, else the first candidate."""
        query, client = fetch.asked, fetch.client
        facts = self._reader.facts(query)
        if fetch.routed_to:
            plain = Sending(query.upstream, query.model, client.path_qs, query.forward_body, query.tier)
            return Choice(fetch.routed_to, query, plain, 0)
        named = f"{query.upstream}/{query.model}"
        candidate = next((candidate for candidate in self.lane.candidates if candidate != named), None)
        return None if candidate is None else self._choice(candidate, query, client, facts, 0)

    async def compare(self, entry: Entry, candidate: str, one: Answer, other: Answer, fetch: Fetch) -> None:
        """Two models answered one question: whether the candidate did as well."""
        comparer = self._meaning.comparer
        assert comparer is not None
        texts = [answer.message.get("content") or "" for answer in (one, other)]
        agrees = await comparer.compare(texts[0], texts[1], fetch.asked.tenant) >= AGREES_FROM
        await self.vote(entry.id, candidate, agrees, "shadow", fetch)

    async def feedback(self, request_id: str | None, entry_id: int, verdict: str, now_ms: int) -> None:
        """Somebody who knows, on a routed request or on an entry that a candidate answered."""
        found = self._answered.get(request_id or "")
        if found is None and entry_id in self._candidate_of:
            found = (entry_id, self._candidate_of[entry_id])
        if found is not None:
            await self._record(Vote(now_ms, found[0], found[1], verdict == "right", "feedback", request_id or ""))

    async def vote(self, entry_id: int, candidate: str, good: bool, source: str, fetch: Fetch) -> None:
        await self._record(Vote(fetch.client.ts_ms, entry_id, candidate, good, source, fetch.client.request_id))

    async def _record(self, vote: Vote) -> None:
        self._count(vote)
        await self._rows.record(vote)

    def _count(self, vote: Vote) -> None:
        votes = self._votes[vote.entry_id, vote.candidate]
        votes[0] += vote.good
        votes[1] += 1
        if len(self._votes) > LOADED:
            del self._votes[next(iter(self._votes))]

    def _remember(self, request_id: str, entry_id: int, candidate: str) -> None:
        self._answered[request_id] = (entry_id, candidate)
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    async def load(self) -> None:
        """Votes of earlier runs. Raises CacheFault."""
        for _, vote in await self._rows.newest(LOADED):
            self._count(vote)

    def status(self) -> dict[str, object]:
        """For people: votes by candidate, and what was decided."""
        by_candidate: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (_, candidate), (good, total) in self._votes.items():
            by_candidate[candidate][0] += good
            by_candidate[candidate][1] += total
        return {"routed": self.routed, "kept": self.kept, "votes": dict(by_candidate)}
