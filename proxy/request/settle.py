"""The one way out of a request: whatever happened to it, here it is booked and what it held is let go of.

`Books.settle` writes the row, the counters and the line of the log; here stand when that is done, and what a hit
teaches. A request that follows a call is settled when the call's own end is known: others may still read what this
client started, and what it cost is told last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from proxy.core.model import Hit, Miss, Tier, Verdict
from proxy.core.plan import Lane
from proxy.core.purges import Began
from proxy.core.query import Query
from proxy.core.units import usd
from proxy.hot import Alias
from proxy.money.books import COLLAPSED
from proxy.records import Client, Fetch, Lookup
from proxy.relay import Ending
from proxy.request.collapse import Flight
from proxy.request.errands import Errands
from proxy.request.explanation import recorded
from proxy.request.parts import Parts

GROWTH: Final = 4  # of the uses of an alias, each time it was judged anew
UNFINISHED: Final = Miss("unfinished")
"""Of a question whose client left while it was looked up."""


@dataclass(slots=True)
class Request:
    """A question on its way; each stage completes it and hands it on."""

    query: Query
    client: Client
    lookup: Lookup | None = None  # once it was looked up, or needs not be
    fetch: Fetch | None = None  # the call that answers it, its own or another's
    is_collapsed: bool = False  # another's
    has_joined: bool = False  # another's, were it in vain
    flight: Flight[Fetch] | None = None  # whose bytes it is given as they arrive
    headers: list[tuple[str, str]] = field(default_factory=list)  # of its reply, until that is written

    @property
    def verdict(self) -> Verdict:
        if self.is_collapsed:
            return COLLAPSED
        assert self.lookup is not None
        return self.lookup.verdict


class Settler:
    """Owns nothing it is given."""

    def __init__(self, parts: Parts, errands: Errands) -> None:
        self._store = parts.store
        self._books = parts.books
        self._hot = parts.hot
        self._auditor = parts.auditor
        self._errands = errands

    @contextmanager
    def failing(self, request: Request) -> Iterator[None]:
        """Settle a request that ends without a reply: refused, cancelled, or with its upstream's error."""
        try:
            yield
        except BaseException as cause:
            self.settle(request, Ending.of(cause))
            raise

    def settle(self, request: Request, ending: Ending) -> None:
        """Of a request that was not answered from entries, or not all of it."""
        flight, fetch = request.flight, request.fetch or self._unsent(request)
        if flight is None or flight.ended:
            self._book(request, fetch, ending)
        else:
            flight.context.deferred.append(partial(self._book, request, fetch, ending))

    def _unsent(self, request: Request) -> Fetch:
        """The call that was not made."""
        client, lookup = request.client, request.lookup or Lookup(UNFINISHED)
        began = Began(self._store.purges.newest, client.ts_ms)
        return Fetch(request.query, client, lookup, time.perf_counter(), began)

    def _book(self, request: Request, fetch: Fetch, ending: Ending) -> None:
        looked = recorded(request.query, fetch, request.is_collapsed)
        cost_nusd = self._books.forwarded(
            request.query, request.client, fetch, ending, collapsed=request.is_collapsed, looked=looked
        )
        request.headers.append(("x-cost-usd", usd(cost_nusd)))  # in time for an answer that is not a stream

    def learn_again(self, query: Query, client: Client, hit: Hit) -> None:
        """A hit that was not looked up, for its wording is known, is about to be served: what feedback will be on."""
        self._auditor.remember(client.request_id, query.fingerprint, hit.entry.id)

    def learn(self, query: Query, client: Client, lookup: Lookup, *, refetches: bool = True) -> None:
        """A hit that was looked up is about to be served: remember the wording, and perhaps ask again upstream.
        `refetches`: what is stale too."""
        hit, opinion = lookup.verdict, lookup.opinion
        assert isinstance(hit, Hit)
        if hit.tier is Tier.SEMANTIC:
            assert opinion is not None
            assert opinion.chosen is not None
            before = self._hot.alias(query.fingerprint)
            uses = 1 if before is None else GROWTH * before.uses
            alias = Alias(hit.entry.id, hit.similarity, hit.probability, self._auditor.judge.epoch, uses)
            self._hot.add_alias(query.fingerprint, alias)
            may_ask = not query.controls.only_if_cached
            hits = 1 if before is None else 1 + before.used
            again = self._auditor.served(opinion, opinion.chosen, client.request_id, hits, may_ask=may_ask)
            if again is not None:
                self._errands.audit(query, client, lookup, again)
        elif hit.tier is Tier.STALE and refetches:
            if Lane.REVALIDATE in query.plan.lanes and not query.controls.only_if_cached:
                self._errands.revalidate(query, client, hit.entry)
