"""What a request under way carries: who asks, what was looked up, what is fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy import ports
from proxy.core.model import Answer, Call, Usage, Verdict
from proxy.core.purges import Began, Marks
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.judging.audits import Again
from proxy.judging.judge import Opinion
from proxy.upstreams.attempt import Attempt
from proxy.upstreams.sending import Sending, plain


class Client(NamedTuple):
    """Who asks, beyond what the Query says: one per HTTP request."""

    request_id: str
    ts_ms: int
    started_s: float  # time.perf_counter
    path_qs: str
    headers: Sequence[tuple[bytes, bytes]]
    is_retry: bool = False
    tries_again: bool = False  # its library says how often it did


class Stale(NamedTuple):
    """An expired entry, and when it was found."""

    row: HotRow
    found: Began


@dataclass(slots=True)
class Lookup:
    """What a lookup found, kept for the store that may follow it."""

    verdict: Verdict
    row: HotRow | None = None
    vector: ports.Vector | None = None
    signature: ports.Signature | None = None
    opinion: Opinion | None = None
    steps_ms: dict[str, float] = field(default_factory=dict)
    spent: tuple[Call, ...] = ()  # calls whose answers could not be used
    stale: Stale | None = None  # may stand in for an upstream that fails


@dataclass(slots=True)
class Fetch:
    """What a flight is for, and what came of it. `query` is the question as it is asked and its answer stored; `asked`
    is the client's, where a lane chose another model for it."""

    query: Query
    client: Client
    lookup: Lookup
    opened_s: float
    began: Began  # what was purged since keeps its answer from being stored
    first_byte_s: float | None = None
    call: Call | None = None
    answer: Answer | None = None
    usage: Usage | None = None
    served: Usage | None = None  # of the part that entries answered
    unstored: str = ""  # why the answer is not stored; "" when it is
    again: Again | None = None  # set when a served question is asked again, for nobody but the judge
    purpose: str = "answer"  # else why it is made for no client: a key of `EXTRA_CALLS`
    asked_as: Query | None = None
    flight_key: bytes = b""  # under which others find its call
    was_awaited: bool = False  # its call went on for a while when a client had given it up that tries again
    first: Sending | None = None  # the call as it is sent when no lane shapes it
    attempt: Attempt | None = None  # the call whose answer this is
    attempts: list[Attempt] = field(default_factory=list)  # every call made for it
    stand_in: str = ""  # the mechanism that answered in place of an upstream that failed
    stand_in_for: int = 0  # with this status
    extra: tuple[Call, ...] = ()  # calls made for it beside its own, once it has ended
    routed_to: str = ""  # the candidate that the router chose
    neighbour: int = 0  # the entry of the most alike question it knew
    deferred: list[Callable[[], object]] = field(default_factory=list)  # settlements that wait for the call's end

    @property
    def asked(self) -> Query:
        return self.asked_as or self.query

    def ask_as_asked(self) -> None:
        """What another model was chosen for goes to the one that was asked for after all."""
        self.query, self.asked_as, self.first, self.attempt = self.asked, None, None, None
        self.routed_to, self.neighbour = "", 0

    @property
    def marks(self) -> Marks:
        """What a purge would know its answer by, once stored."""
        query, controls = self.query, self.query.controls
        return Marks(
            query.fingerprint, query.tenant, controls.namespace, query.model, self.client.request_id, controls.tags
        )

    @property
    def sending(self) -> Sending:
        """The client's call as it would be sent without a plan."""
        return self.first or plain(self.query, self.client.path_qs)
