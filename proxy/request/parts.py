"""What the stages of a request work with."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from proxy import ports
from proxy.core.chains import Chains
from proxy.core.dialects.dialect import UsageMode
from proxy.core.model import Rules
from proxy.core.naming import Naming
from proxy.core.pace import Pace
from proxy.core.query import Query
from proxy.hot import HotRows
from proxy.judging.audits import Auditor
from proxy.lanes.forwarding import Forwarder
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.route import Router
from proxy.meaning import Meaning
from proxy.money.books import Books
from proxy.records import Fetch
from proxy.request.collapse import Flight
from proxy.request.leaving import Finisher
from proxy.settings.lanes import StaleLane
from proxy.tasks import Tasks
from proxy.watch.telemetry import Telemetry


@dataclass(eq=False, repr=False, kw_only=True)
class Parts:
    """Owns nothing it is given; `app.py` opens and closes the edges."""

    rules: Rules
    store: ports.EntryStore
    books: Books
    telemetry: Telemetry
    tasks: Tasks
    hot: HotRows
    meaning: Meaning
    auditor: Auditor
    forwarder: Forwarder
    router: Router
    prefetcher: Prefetcher
    stale: StaleLane
    usage_on_hit: UsageMode = "original"
    pace: Pace = "instant"
    finisher: Finisher | None = None
    model_aliases: Mapping[str, Collection[str]] = field(default_factory=dict)
    naming: Naming = field(default_factory=Naming)
    chains: Chains = field(default_factory=Chains)
    semantic_misses_per_min: int = 0
    clock: Callable[[], float] = time.time
    flights: dict[bytes, Flight[Fetch]] = field(init=False, default_factory=dict)  # that others may join

    def names_of(self, query: Query) -> Mapping[str, Collection[str]]:
        """With which names its upstream may answer a question's model: those that were configured, and those learnt."""
        configured = self.model_aliases.get(query.model, ())
        return {query.model: (*configured, *self.naming.of(query.upstream, query.model))}
