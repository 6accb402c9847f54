"""One line of a batch, or one deferred call: found in the cache, asked for, or landed from a provider's batch.

A line is read, looked up, booked and stored exactly as the same request would be if it came alone; only who carries it
to the model server differs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import orjson

from proxy.core import policy
from proxy.core.batches import RETRIABLE
from proxy.core.dialects.dialect import JSON, Dialect, UsageMode
from proxy.core.errors import BadRequest, IbidError, UpstreamError
from proxy.core.model import Bypass, Level, Rules, Usage
from proxy.core.purges import Began
from proxy.core.query import Query
from proxy.money.books import Books
from proxy.money.keys import KeyRing
from proxy.records import Client, Fetch, Lookup
from proxy.relay import Ending, Relay, Replay
from proxy.request.embeddings import Embeddings, Told
from proxy.request.heads import forward_headers
from proxy.request.pipeline import Pipeline
from proxy.request.settle import Request

ATTEMPTS = 5
PAUSE_S = 1.0  # before the second attempt; doubled before each further one
PAUSE_LIMIT_S = 60.0
POLL_S, POLL_LIMIT_S = 0.02, 1.0  # between two looks at what is left of a key's limits; doubled up to the limit
BUSY = 8  # texts before the model from which on a batch waits: live traffic goes first
BUSY_WAIT_S = 5.0
BACK_OFF_S = (0.25, 0.5, 1.0)  # before a line is looked up again that the model had no room for

Headers = Sequence[tuple[str, str]]


class Answered(NamedTuple):
    """What a line got. `body` is JSON on one line unless `is_stream`."""

    request_id: str
    status: int
    headers: Headers
    body: bytes
    is_stream: bool = False

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Lines:
    """Owns nothing it is given."""

    pipeline: Pipeline
    embeddings: Embeddings
    books: Books
    rules: Rules
    model_aliases: Mapping[str, Collection[str]]
    keys: KeyRing
    usage_on_hit: UsageMode = "original"
    embedding: Callable[[], int] = lambda: 0  # texts before the model
    clock: Callable[[], float] = time.time

    def client(self, path_qs: str, headers: Sequence[tuple[bytes, bytes]]) -> Client:
        """A request of its own, made now."""
        return Client(new_id(), int(self.clock() * 1000), time.perf_counter(), path_qs, headers)

    # -- by leave of its key ----------------------------------------------------------------------------------------

    def admit(self, query: Query, client: Client) -> BadRequest | None:
        """`KeyRing.admit` for a line: what it may take is set aside under the client's id until it is booked."""
        if query.key_id is None:
            return None
        return self.keys.admit(self.keys.grant_of(query.key_id), query, client.request_id, client.ts_ms)

    def let_go(self, client: Client) -> None:
        self.keys.let_go(client.request_id)

    async def let_in(
        self,
        query: Query,
        path_qs: str,
        headers: Sequence[tuple[bytes, bytes]],
        may_wait: Callable[[BadRequest], bool],
    ) -> tuple[Client, Answered | None]:
        """Who may ask now, what it may take set aside; or, where only money is spent, the cache's answer.

        Waits for limits that soon let more in, while `may_wait`. Raises BadRequest: 401, 403, 429.
        """
        pause_s, looked = POLL_S, False
        while True:
            client = self.client(path_qs, headers)
            try:
                spent = self.admit(query, client)
                if spent is None:
                    return client, None
                if not looked and isinstance(found := await self._find_or_let_go(query, client), Answered):
                    return client, found
                looked = True
                self.let_go(client)
                raise spent
            except BadRequest as refused:
                if not refused.should_retry or not may_wait(refused):
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, POLL_LIMIT_S)

    async def _find_or_let_go(self, query: Query, client: Client) -> Answered | Lookup:
        try:
            return await self.find(query, client)
        except BaseException:
            self.let_go(client)
            raise

    # -- from the cache ---------------------------------------------------------------------------------------------

    async def find(self, query: Query, client: Client) -> Answered | Lookup:
        """An answer from the cache, or what was looked up in vain."""
        found: Replay | Lookup | None
        if query.batch is not None:
            found = await self.embeddings.find(query, client)
        elif (found := self.pipeline.recall(query, client)) is None:
            found = await self._compared(query, client)
        return found if isinstance(found, Lookup) else _of_replay(found, query)

    async def _compared(self, query: Query, client: Client) -> Replay | Lookup:
        """As `Pipeline.find`; a model that is busy with others is waited for, rather than passed by."""
        if not self.pipeline.finder.compares(query):
            return await self.pipeline.find(query, client)
        for pause_s in BACK_OFF_S:
            await self.model_is_free()
            found = await self.pipeline.find(query, client)
            if not isinstance(found, Lookup) or found.verdict.reason != "embedder_busy":
                return found
            await asyncio.sleep(pause_s)
        return await self.pipeline.find(query, client)

    async def model_is_free(self) -> None:
        """Return when the model has little to do, or after BUSY_WAIT_S."""
        for _ in range(int(BUSY_WAIT_S / POLL_S)):
            if self.embedding() < BUSY:
                return
            await asyncio.sleep(POLL_S)

    async def look_up(self, query: Query, client: Client) -> Lookup:
        """What the store of an answer has to know of its question."""
        if query.batch is not None:
            return Lookup(Bypass(query.eligibility.reason or "batch"))
        found = await self.pipeline.find(query, client, serve=False)
        assert isinstance(found, Lookup)
        return found

    # -- from an upstream -------------------------------------------------------------------------------------------

    async def ask(self, query: Query, client: Client, deadline_s: float | None = None) -> Answered:
        """The cache, then the upstream as for a request of its own; again after a while where that may help.

        `client` was let in. `deadline_s`: of `self.clock`. Every attempt but the last leaves a row of its own in the
        ledger, and is let in by its key on its own.
        """
        for attempt in itertools.count(1):
            pause_s = min(PAUSE_S * 2 ** (attempt - 1), PAUSE_LIMIT_S)
            is_last = attempt == ATTEMPTS or (deadline_s is not None and self.clock() + pause_s >= deadline_s)
            refused = None if attempt == 1 else self._refused(query, client)
            if refused is None:
                answered = await self._try(query, client)
            else:
                is_last = is_last or not refused.should_retry
                answered = refusal(query.dialect, client.request_id, refused)
            if answered.status not in RETRIABLE or is_last:
                return answered
            await asyncio.sleep(max(pause_s, min(_retry_after_s(answered.headers), PAUSE_LIMIT_S)))
            client = self.client(client.path_qs, client.headers)
        raise AssertionError("unreachable")

    def _refused(self, query: Query, client: Client) -> BadRequest | None:
        """What a key's limits have against one more attempt."""
        try:
            spent = self.admit(query, client)
        except BadRequest as error:
            return error
        if spent is not None:
            self.let_go(client)
        return spent

    async def _try(self, query: Query, client: Client) -> Answered:
        try:
            reply = await (self.embeddings if query.batch is not None else self.pipeline).answer(query, client)
            return _of_replay(reply, query) if isinstance(reply, Replay) else await _read(reply, client)
        except (BadRequest, UpstreamError) as error:
            return refusal(query.dialect, client.request_id, error)
        finally:
            self.let_go(client)

    async def landed(
        self, query: Query, client: Client, lookup: Lookup, status: int, body: bytes, began: Began
    ) -> Answered:
        """A provider's batch has answered: book it at the batch's price, store it if it may be stored.

        `began`: when the batch was handed in.
        """
        fetch = Fetch(query, client, lookup, time.perf_counter(), began)
        stored = None
        if status == 200 and query.batch is not None:
            await self.embeddings.landed(fetch, body)
        elif status == 200 and query.eligibility.level is Level.NONE:
            fetch.usage = query.dialect.find_usage(body)
        elif status == 200:
            recording = query.dialect.record(body, is_stream=False, n=query.n, keeps_id=query.keeps_id)
            fetch.usage, stored = recording.usage, recording.answer
            reason = policy.storable(
                stored or recording.refusal_reason, query, self.rules, status=200, size_bytes=len(body),
                header=Told().header, aliases=self.model_aliases,
            )  # fmt: skip
            stored = stored if reason is None else None
            if stored is not None and stored.usage is None and query.output_limit is not None:
                stored = replace(stored, limit=query.output_limit)
            fetch.answer = stored
        call = self.books.call_of(fetch, status, len(body), is_stream=False, won=True)
        tier = self.books.batch_tier(query, call.usage, client.ts_ms)
        # A line has no time of its own in a provider's batch: what it would save a later hit is not known.
        fetch.call = replace(call, tier=tier, ttft_ms=None, total_ms=0.0)
        if call.usage_basis == "estimated":
            fetch.usage = call.usage
        request = Request(query, client, lookup, fetch)
        request.headers = forward_headers(request, fetch, status)
        self.pipeline.settler.settle(request, Ending("ok" if status == 200 else "error", status))
        if stored is not None:
            await self.pipeline.landing.keep(fetch, stored)
        return Answered(client.request_id, status, [*request.headers, ("Content-Type", JSON)], one_line(body))

    def lost(self, query: Query, client: Client, word: str, status: int) -> None:
        """Book a line that nobody answered."""
        self.pipeline.settler.settle(Request(query, client, Lookup(Bypass("batch"))), Ending(word, status))

    # -- the same once more -------------------------------------------------------------------------------------------

    def repeater(self, query: Query, answered: Answered) -> Callable[[Client], Answered]:
        """Gives the answer of one line to others that ask the same: each with ids of its own, booked as saved."""
        usage, model, fill = self._parts_of(query, answered)
        word = "ok" if answered.is_ok else "error"

        def repeat(client: Client) -> Answered:
            self.books.repeated(query, client, usage, model, word, answered.status)
            headers = [(name, client.request_id if name == "x-request-id" else value)
                       for name, value in answered.headers]  # fmt: skip
            body = fill(client.request_id, client.ts_ms // 1000)
            return Answered(client.request_id, answered.status, headers, body)

        return repeat

    def _parts_of(self, query: Query, answered: Answered) -> tuple[Usage | None, str, Callable[[str, int], bytes]]:
        body = answered.body
        if not answered.is_ok:
            return None, query.model, lambda _token, _created: body
        if query.batch is not None:
            return query.dialect.find_usage(body), query.model, lambda _token, _created: body
        recording = query.dialect.record(body, is_stream=False, n=query.n, keeps_id=query.keeps_id)
        if recording.answer is None:
            return recording.usage, query.model, lambda _token, _created: body
        template = query.dialect.render(
            recording.answer, stream=False, wants_usage=query.wants_usage, usage_mode=self.usage_on_hit
        )
        return recording.usage, recording.answer.model, template.fill


def refusal(dialect: Dialect, request_id: str, error: IbidError) -> Answered:
    """An error as the answer of a line."""
    headers = [("Content-Type", JSON), ("x-request-id", request_id)]
    if error.should_retry is not None:
        headers.append(("x-should-retry", "true" if error.should_retry else "false"))
    if error.retry_after_s is not None:
        headers.append(("Retry-After", str(error.retry_after_s)))
    return Answered(request_id, error.status, headers, one_line(dialect.error_body(error, request_id)))


def one_line(body: bytes) -> bytes:
    """A JSON body without line ends; text that is no JSON becomes a JSON string."""
    if b"\n" not in body and b"\r" not in body and body[:1] in (b"{", b"["):
        return body
    try:
        return orjson.dumps(orjson.loads(body))
    except ValueError:
        return orjson.dumps(body.decode("utf-8", "replace")[:4096])


def _of_replay(replay: Replay, query: Query) -> Answered:
    replay = replay.at_once()
    headers = [*replay.head.pairs, ("x-request-id", replay.request_id)]
    body = replay.body if query.stream else one_line(replay.body)
    return Answered(replay.request_id, 200, headers, body, query.stream)


async def _read(relay: Relay, client: Client) -> Answered:
    """All of a relayed answer."""
    outcome = "cancelled"
    try:
        if relay.is_stream:
            pieces = []
            while piece := await relay.next():
                pieces.append(piece)
            body = b"".join(pieces)
        else:
            body = one_line(await relay.whole())
        outcome = "ok" if relay.status < 400 else "error"
    except UpstreamError:
        outcome = "error"
        raise
    finally:
        relay.close(outcome)
    return Answered(client.request_id, relay.status, relay.headers, body, relay.is_stream)


def _retry_after_s(headers: Headers) -> float:
    said = next((value for name, value in headers if name.lower() == "retry-after"), "0")
    return float(said) if said.isdigit() else 0.0


_PREFIX = os.urandom(10).hex()
_NUMBERS = itertools.count(int.from_bytes(os.urandom(3), "big"))


def new_id() -> str:
    return f"{_PREFIX}{next(_NUMBERS):012x}"
