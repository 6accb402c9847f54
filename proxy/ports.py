"""What the pipeline needs of its edges, and what they may raise.

Each Protocol is written by the caller's needs; `tests/contracts/` holds one suite per port, run against the fake and
the real edge.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from index.errors import IndexRoomError
from proxy.core.errors import CacheFault
from proxy.core.keys import Cost, Key
from proxy.core.model import Call, Comparison, Draft, Entry, Outcome, RepeatedAnswer, Usage
from proxy.core.purges import Began, Purges
from proxy.core.query import Query
from proxy.core.risk import Counted, LevelName, Tally

Vector = NDArray[np.float32]
Signature = NDArray[np.uint64]

CACHE_FAULTS = (CacheFault, IndexRoomError, TimeoutError)
"""Ours, not the client's: each turns the lookup into a bypass."""


class Embedder(Protocol):
    """Text → unit vector, off the event loop."""

    identity: str  # model checksum, backend and window: vectors of two identities never meet
    dimension: int
    window: int  # tokens

    @property
    def can_verify(self) -> bool:
        """Whether `verify` has a guard to ask."""
        ...

    async def embed(self, text: str, tenant: str = "") -> Vector:
        """Unit float32 (dimension,). What one tenant had embedded is not quicker for another.

        Raises Overloaded at once when full, TextTooLong, EmbedderFault.
        """
        ...

    async def verify(self, asked: str, kept: Sequence[str], tenant: str = "") -> Sequence[float]:
        """A guard's logit for each of 1 to 3 stored texts: it refuses those not above 0, and never recommends.

        +inf where it has no opinion. Raises Overloaded at once when full, EmbedderFault also without a guard.
        """
        ...

    def signature(self, text: str) -> Signature:
        """Token classes of a text as (index.tokens.WIDTH,) uint64."""
        ...


class VectorIndex(Protocol):
    """Unit vectors by scope; one owner thread. Order of add and remove is kept."""

    async def search(
        self, scope: bytes, vector: Vector, signature: Signature, now_ms: int, k: int = 8
    ) -> Sequence[tuple[int, float, int, Signature]]:
        """At most k fresh candidates of this scope, best first: (entry id, similarity, veto bits, its signature).

        Raises IndexFault, Overloaded.
        """
        ...

    def add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> None:
        """Enqueue. Raises Overloaded when the queue is full (the row stays; a rebuild picks it up)."""
        ...

    def remove(self, entry_ids: Sequence[int]) -> None: ...

    def compare(
        self, vector: Vector, signature: Signature, row_vector: bytes, row_signature: bytes
    ) -> tuple[float, int]:
        """Similarity and veto bits against a row's own bytes: the gate. (nan, 0) never passes a judge."""
        ...


class Considered(Protocol):
    """One group of candidates as a learner describes it."""

    @property
    def place(self) -> int: ...  # of its most similar candidate, in the order given
    @property
    def group_id(self) -> int: ...
    @property
    def row(self) -> NDArray[np.float64]: ...  # its features
    @property
    def words(self) -> NDArray[np.int64]: ...  # cells of unmatched words
    @property
    def log_odds(self) -> float: ...


class Learner(Protocol):
    """Memory of what likeness meant in one level of traffic. See `index.learner.Learner`."""

    labelled: int
    names: Sequence[str]  # of the features in a row

    def consider(
        self,
        signature: Signature,
        signatures: Signature,
        similarities: Vector,
        groups: NDArray[np.int64],
    ) -> Sequence[Considered]:
        """Groups of candidates, most probable first."""
        ...

    def see(self, signature: Signature) -> None: ...

    def store(self, group_id: int) -> None: ...

    def learn(
        self,
        row: NDArray[np.float64],
        words: NDArray[np.int64],
        group_id: int,
        wrong: float,
        weight: float = 1.0,
        certain: bool = True,
    ) -> None: ...

    def levels(self) -> Counted:
        """Labelled decisions at or above each level of log-odds, and the wrong ones among them."""
        ...


NewLearner = Callable[[], Learner]
Prior = Callable[[float, float, float], bool]
"""(similarity, logit of the pair guard, budget) → whether pairs like this, and surer ones, were measured to be wrong
within the budget. See `index.guard.prior`."""


class AnswerComparer(Protocol):
    """Whether two answers say the same. See `index.answers`."""

    @property
    def spent_s(self) -> float:
        """Processor time of all comparisons so far."""
        ...

    def by_words(self, a: str, b: str) -> float:
        """A probability without the model: rarely above `judging.judge.SAME_FROM` where the model would say less."""
        ...

    async def compare(self, a: str, b: str, tenant: str = "") -> float:
        """A probability; never raises."""
        ...


class JudgeBooks(Protocol):
    """Where a question to the model that compares answers is booked."""

    def judged(self, query: Query, call: Call, *, ok: bool) -> None: ...


class Arbiter(Protocol):
    """A language model that says whether two answers say the same. See `proxy.judging.arbiter`."""

    async def compare(
        self,
        query: Query,
        headers: Sequence[tuple[bytes, bytes]],
        request_id: str,
        *,
        answer: str,
        kept_prompt: str,
        kept_answer: str,
    ) -> float | None:
        """Probability that `kept_answer`, once given to `kept_prompt`, answers the query as `answer` does.

        None when it gave no verdict; never raises for what an upstream does.
        """
        ...


class RefusedPair(NamedTuple):
    """The entry of fingerprint `kept` is never served for the question of fingerprint `asked` again."""

    asked: bytes
    kept: bytes
    ts_ms: int
    request_id: str
    entry_id: int
    source: str  # "audit" | "feedback"


class SeenComparison(NamedTuple):
    """A comparison as its row: its id, and whether this process wrote it."""

    id: int
    own: bool
    comparison: Comparison


class Comparisons(Protocol):
    """What the judge learned from, as rows. Every method raises CacheFault when the database cannot answer."""

    def record(self, found: Comparison | None, entry_id: int = 0, group_id: int = 0) -> None:
        """Keep a comparison, and that an entry's answer is the same as another's. Never blocks, never raises."""
        ...

    def repeated(self, found: RepeatedAnswer) -> None:
        """Keep how alike two answers to one question were. Never blocks, never raises."""
        ...

    def note(self, embedder: str, level: LevelName, change: Tally) -> None:
        """Add to what is written down of a level. Never blocks, never raises."""
        ...

    async def tallies(self, embedder: str, levels: Sequence[LevelName]) -> Mapping[LevelName, Tally]:
        """What was noted of each of these levels in all: true at the moment this returns."""
        ...

    async def of_level(self, embedder: str, level: LevelName, limit: int) -> Sequence[Comparison]:
        """The last `limit` comparisons of a level, oldest first."""
        ...

    async def keep(self, found: Comparison) -> None:
        """As `record`, and written when it returns."""
        ...

    async def newest(self, embedder: str, limit: int) -> Sequence[SeenComparison]:
        """The last `limit` comparisons made with this embedder, oldest first."""
        ...

    async def after(self, embedder: str, row_id: int) -> Sequence[SeenComparison]:
        """Comparisons with a higher id, oldest first, a bounded number."""
        ...

    async def judged(self, request_id: str | None, entry_id: int) -> Sequence[SeenComparison]:
        """Comparisons that a verdict overrules: of this served request, or those of feedback on this entry."""
        ...

    async def correct(self, row_id: int, p_same: float, source: str) -> None: ...

    async def refuse(self, pair: RefusedPair) -> None: ...

    async def allow(self, asked: bytes, kept: bytes) -> bool:
        """Undo `refuse`; whether there was such a pair."""
        ...

    async def refused(self, since_ms: int = 0) -> Sequence[RefusedPair]:
        """Pairs refused at or after an instant, a bounded number of the newest, oldest first."""
        ...

    async def is_refused(self, asked: bytes, kept: bytes) -> bool: ...

    async def refused_for(self, request_id: str | None, entry_id: int) -> Sequence[RefusedPair]:
        """Pairs refused on account of this request, or by feedback on this entry."""
        ...

    def groups(self) -> AsyncIterator[tuple[int, int]]:
        """(entry id, group id) of every entry in a group that another one founded."""
        ...


class Vote(NamedTuple):
    """Whether a candidate's answer to the question of an entry was, or would have been, good."""

    ts_ms: int
    entry_id: int
    candidate: str  # "upstream/model"
    good: bool
    source: str  # "shadow", "feedback", "rephrase", or what was wrong with the answer
    request_id: str


class RouteVotes(Protocol):
    """Votes of the router, as rows. Every method raises CacheFault when the database cannot answer."""

    async def record(self, vote: Vote) -> None: ...

    async def newest(self, limit: int, after_id: int = 0) -> Sequence[tuple[int, Vote]]:
        """(row id, vote) of the newest rows with a higher id, oldest first."""
        ...


class Stored(NamedTuple):
    entry: Entry
    replaced: tuple[int, ...]  # ids of earlier entries with the same fingerprint, now gone


class EntryStore(Protocol):
    """SQL rows of answers. Every method raises CacheFault when the database cannot answer."""

    @property
    def purges(self) -> Purges:
        """What was purged, as far as it is known here: what begins now began after these."""
        ...

    async def follow(self) -> None:
        """Take up what other processes have purged."""
        ...

    async def find(self, fingerprint: bytes) -> Entry | None:
        """The entry of this exact identity, its checksum verified (a damaged row reads as absent and is counted)."""
        ...

    async def find_many(self, fingerprints: Sequence[bytes]) -> Sequence[Entry]:
        """As `find`, for many at once: those that are there, in any order, by one query at most."""
        ...

    async def get(self, entry_id: int) -> Entry | None: ...

    def mark_used(self, entry_id: int, now_ms: int) -> None:
        """Remember that an entry gave a part of an answer: what is used is not evicted. Never blocks, never raises."""
        ...

    async def put(self, draft: Draft, began: Began) -> Stored | None:
        """Commit: returns when the row is durable. None: a purge made since `began` reaches it, and it is not stored.

        Raises CacheFault (store_busy) at once when the queue is full.
        """
        ...

    async def touch(self, entry_id: int, expires_ms: int) -> None: ...


class KeyStore(Protocol):
    """Rows of virtual keys, and what the ledger says they spent. Every method raises CacheFault when the database
    cannot answer."""

    @property
    def is_shared(self) -> bool:
        """Other processes may write to this database."""
        ...

    async def mark(self) -> object:
        """Differs from an earlier one when keys were made, changed or removed since."""
        ...

    async def keys(self) -> Sequence[Key]: ...

    async def create(self, key: Key) -> None: ...

    async def revoke(self, key_id: str, now_ms: int) -> Key | None:
        """The key as it is now; None when there is none."""
        ...

    async def rotate(self, key_id: str, digest: bytes, now_ms: int) -> Key | None:
        """The key as it is now; None when there is none, or it is revoked."""
        ...

    def settled(self) -> AbstractAsyncContextManager[bool]:
        """Inside, the ledger writes nothing; True when all that was recorded before is in the database."""
        ...

    async def unwritten(self) -> Sequence[Outcome]:
        """Inside `settled`: what keys caused that is on file and not in the database."""
        ...

    async def spent(self, key_ids: Sequence[str], starts: Mapping[str, int]) -> Mapping[tuple[str, str], Cost]:
        """(key id, window) → what its requests took that began at or after the window's start."""
        ...


class Ledger(Protocol):
    """Where lookups and savings are written, off the request's path."""

    def record(self, outcome: Outcome) -> None:
        """Never blocks, never raises."""
        ...

    def record_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> None:
        """`record(again(recurring, …))` for a hit, its first byte at its end. `recurring` is one object a form."""
        ...


class Price(NamedTuple):
    nusd: int
    basis: str  # "list" | "override" | "unpriced"
    price_id: str  # source, version and model


class PriceBook(Protocol):
    def price(self, upstream: str, model: str, usage: Usage, tier: str, ts_ms: int, seconds: float = 0.0) -> Price:
        """`seconds`: how long the call took, for models that are paid by time."""
        ...


class UpstreamResponse(Protocol):
    """An open response of a model server. The caller ends it by `release` (whole) or `abort` (cut)."""

    status: int
    headers: Sequence[tuple[str, str]]  # end-to-end headers that may reach the client
    content_type: str  # media type, lower case, without its parameters
    content_length: int | None

    def header(self, name: str) -> str | None: ...

    async def read_some(self) -> bytes:
        """Next bytes as they arrive; b"" at a clean end. Raises UpstreamError when the body is cut or stalls."""
        ...

    def abort(self) -> None: ...

    def release(self) -> None: ...


class WebSocket(Protocol):
    """One side of a WebSocket, as aiohttp has it on either."""

    async def receive(self) -> Any: ...

    async def send_str(self, data: str) -> None: ...

    async def send_bytes(self, data: bytes) -> None: ...

    async def ping(self, message: bytes) -> None: ...

    async def pong(self, message: bytes) -> None: ...

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool: ...


class FarSocket(WebSocket, Protocol):
    """The upstream's side, its handshake done."""

    @property
    def protocol(self) -> str | None: ...


class Upstream(Protocol):
    """Forwards to the model servers."""

    def route(self, path: str, headers: Mapping[str, str], model: str | None) -> str:
        """Name of the configured upstream that serves this path and model. "" is a request that names no model, None
        one that asks nothing of any: reading a list, deleting a file.

        Raises BadRequest (404: model_not_served, dialect_not_served): nothing is sent where nobody said it may go.
        """
        ...

    def is_divided(self, path: str, headers: Mapping[str, str]) -> bool:
        """Whether some upstream of this path's dialect names its models, so that a request's model decides."""
        ...

    def serves(self, upstream: str, model: str) -> bool:
        """Whether this model may be asked for there."""
        ...

    def dialect(self, upstream: str) -> str:
        """ "openai", "anthropic", "gemini" or "ollama"."""
        ...

    def named_there(self, upstream: str, model: str) -> str | None:
        """What it calls a model that is asked elsewhere; None where it does not stand in for it."""
        ...

    def is_failing(self, upstream: str) -> bool:
        """Whether its circuit is open: most requests are refused at once, one now and then is a probe."""
        ...

    def place(self, upstream: str) -> str:
        """Where it is: part of the scope, so that two dialects of one model server share its answers."""
        ...

    async def open(
        self,
        upstream: str,
        method: str,
        path_qs: str,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        on_sent: Callable[[], None] | None = None,
    ) -> UpstreamResponse:
        """Send and wait for the response head. `headers` are the client's raw headers; only the allow-list leaves.
        `on_sent` is called when the request is on its way: until then, giving it up costs nothing.

        Raises UpstreamError (upstream_unreachable, upstream_timeout, upstream_reset, upstream_redirect, circuit_open).
        """
        ...

    async def connect(
        self, upstream: str, path_qs: str, headers: Sequence[tuple[bytes, bytes]], protocols: Sequence[str]
    ) -> FarSocket:
        """A WebSocket to the upstream. Raises UpstreamError, also with the status of a refused handshake."""
        ...
