"""The life of an embedding request: every input is a question of its own, only those never seen go upstream.

Look up all inputs at once → ask for the missing ones in one call → merge in order → store. An input asked twice in one
request is looked up, asked for and counted once; between concurrent requests identical inputs are not collapsed: each
asks for what was not stored when it looked. Vectors are matched by identity only and kept as float32, little endian;
the same bytes are written as base64 or as the shortest decimals that read back as the same float32.

The upstream is asked for base64, which is smaller and exact. Where it refuses or answers otherwise than it was asked,
the client's own request goes to it, whole, and that answer is passed on: nobody gets an error that they would not have
got without ibid. A refusal of the smaller request is therefore told in terms of the client's own one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import orjson

from proxy import ports
from proxy.core import freshness, policy
from proxy.core.dialects.dialect import JSON, UsageMode
from proxy.core.dialects.openai_embeddings import OpenAIEmbeddings, has_base64
from proxy.core.directives import partial_header
from proxy.core.errors import BadRequest, CacheFault
from proxy.core.model import Answer, Bypass, Draft, Eligibility, Entry, Hit, Input, Level, Miss, Tier
from proxy.core.query import Batch, Query
from proxy.core.units import usd
from proxy.hot import HotRow
from proxy.money.books import Books, added, draft_of
from proxy.records import Client, Fetch, Lookup
from proxy.relay import Relay, Replay
from proxy.request.embedding_rows import Answered, answers_in, are_alike, in_turns, spelled, understood, vector_in
from proxy.request.explanation import explanation
from proxy.request.heads import forward_headers, hit_head
from proxy.request.pipeline import Pipeline
from proxy.request.settle import Request
from proxy.tasks import Tasks
from proxy.upstreams.decoding import readable
from proxy.watch.telemetry import Telemetry

STORED_AT_ONCE = 128
WARM_LIMIT = 256  # inputs of a request whose rows stay in memory: a whole corpus would sweep out all others
BODY_LIMIT_BYTES = 64 * 1024 * 1024  # of an upstream's answer: 2048 rows of 4096 dimensions in base64 are 45 MB
REFUSALS = frozenset({400, 422})
PLAIN_LIMIT = 1024
_OF_THE_BYTES = frozenset(
    {"content-type", "content-encoding", "etag", "content-md5", "digest", "content-digest", "repr-digest"}
)
"""Response headers that speak of the very bytes an upstream sent."""


class Sent(NamedTuple):
    """How a call differs from what the client asked."""

    body: bytes
    is_part: bool  # other inputs: some are stored, or stood there twice
    is_recoded: bool  # in another format

    @property
    def is_own(self) -> bool:
        return not (self.is_part or self.is_recoded)


class Embeddings:
    """Owns nothing it is given. Whole forwards, the hot rows and purges are the pipeline's."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        store: ports.EntryStore,
        books: Books,
        upstream: ports.Upstream,
        telemetry: Telemetry,
        tasks: Tasks,
        usage_on_hit: UsageMode = "original",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline = pipeline
        self._store = store
        self._books = books
        self._upstream = upstream
        self._telemetry = telemetry
        self._tasks = tasks
        self._usage_on_hit = usage_on_hit
        self._clock = clock
        self._plain: set[tuple[str, str]] = set()  # upstreams and models that were seen to refuse base64

    # -- the story ----------------------------------------------------------------------------------------------

    async def answer(self, query: Query, client: Client) -> Replay | Relay:
        """Serve, complete or forward. Raises BadRequest (only-if-cached) and UpstreamError, never a cache fault."""
        request = Request(query, client)
        with self._pipeline.settler.failing(request):
            wanted = _distinct(_batch_of(query))
            lookup, found = await self._look_up(query, client, wanted)
            request.lookup = lookup
            reply = await self._reply(request, lookup, wanted, found)
        return reply if not query.controls.explain else reply.saying(explanation(query, lookup))

    async def find(self, query: Query, client: Client) -> Replay | Lookup:
        """All of it from entries, or what was looked up in vain: for those who ask an upstream in their own way."""
        wanted = _distinct(_batch_of(query))
        lookup, found = await self._look_up(query, client, wanted)
        if found is None or len(found) < len(wanted) or query.controls.shadow:
            return lookup
        return await self._serve(query, client, lookup, found)

    async def landed(self, fetch: Fetch, body: bytes) -> None:
        """What an upstream said to all of a request in another way: its usage and model into `fetch`, its rows kept."""
        wanted = _distinct(_batch_of(fetch.query))
        said = _parsed(body)
        fetch.usage = fetch.query.dialect.find_usage(body)
        if len(wanted) != len(_batch_of(fetch.query).inputs):
            return  # repeats within one request, or nothing to look up: the rows are not the inputs
        answered = await understood(said, tuple(wanted.values()), fetch.query.model, _speech(fetch.query))
        if answered is not None:
            fetch.answer = next(answers_in(answered))
            self._keep_if_storable(fetch, Told(), tuple(wanted), answered)

    async def _reply(
        self, request: Request, lookup: Lookup, wanted: Mapping[bytes, Input], found: dict[bytes, HotRow] | None
    ) -> Replay | Relay:
        query, client = request.query, request.client
        if found is not None and len(found) == len(wanted) and not query.controls.shadow:
            return await self._serve(query, client, lookup, found)
        if query.controls.only_if_cached:
            raise BadRequest(
                "Not all in the cache, and the request asked for cached answers only.", status=504, code="not_cached"
            )
        if found is None:
            return await self._forward_whole(request, lookup)
        return await self._complete(request, lookup, wanted, {} if query.controls.shadow else found)

    async def _look_up(
        self, query: Query, client: Client, wanted: Mapping[bytes, Input]
    ) -> tuple[Lookup, dict[bytes, HotRow] | None]:
        """The rows that may be served, by fingerprint; None when the cache is not to be used, or cannot be."""
        if query.eligibility.level is Level.NONE:
            return Lookup(Bypass(query.eligibility.reason or "bypass")), None
        if not query.controls.read:
            return Lookup(Bypass("refresh" if query.controls.refresh else "no_cache")), {}
        lookup = Lookup(Miss("unseen"))
        started = time.perf_counter()
        try:
            found, has_expired = await self._find(query, client, wanted)
        except ports.CACHE_FAULTS as fault:
            reason = _reason_of(fault)
            self._telemetry.fault(reason)
            return Lookup(Bypass(reason)), None
        lookup.steps_ms["exact"] = (time.perf_counter() - started) * 1e3
        if found and not are_alike([row.answer for row in found.values()]):
            lookup.verdict, found = Miss("asked_whole"), {}
        elif len(found) == len(wanted):
            lookup.verdict = Hit(_oldest([row.entry for row in found.values()]), Tier.EXACT, 1.0, 1.0)
        elif found:
            lookup.verdict = Miss("partial")
        elif has_expired:
            lookup.verdict = Miss("expired")
        return lookup, found

    async def _find(
        self, query: Query, client: Client, wanted: Mapping[bytes, Input]
    ) -> tuple[dict[bytes, HotRow], bool]:
        """Fresh rows of this scope, and whether there were any too old. From memory, then all others by one query."""
        hot = self._pipeline.hot
        found: dict[bytes, HotRow] = {}
        for fingerprint in wanted:
            row = hot.find(fingerprint)
            if row is not None and _is_fresh(row.entry, query, client):
                found[fingerprint] = row
        left = [fingerprint for fingerprint in wanted if fingerprint not in found]
        if not left:
            return found, False
        purges = self._pipeline.entries.purges if len(left) <= WARM_LIMIT else -1  # never now: what is read is not kept
        has_expired = False
        async for entry in in_turns(await self._store.find_many(left)):
            if entry.draft.scope != query.scope:
                continue
            if _is_fresh(entry, query, client):
                found[entry.draft.fingerprint] = self._pipeline.entries.warm(entry, purges)
            else:
                has_expired = True
        return found, has_expired

    # -- serve ----------------------------------------------------------------------------------------------------

    async def _serve(self, query: Query, client: Client, lookup: Lookup, found: Mapping[bytes, HotRow]) -> Replay:
        """All of it from entries."""
        entries = [row.entry for row in found.values()]
        usage = added(*[entry.draft.usage for entry in entries])
        model = next(iter(found.values())).answer.model
        tokens = 0 if usage is None or self._usage_on_hit == "zero" else usage.input_tokens
        vectors = {fingerprint: vector_in(row.answer) for fingerprint, row in found.items()}
        data = await spelled(_batch_of(query), vectors, {})
        body = orjson.dumps(_speech(query).whole(data, model, tokens if usage is not None else None, None))
        self._mark_used(entries, client)
        assert isinstance(lookup.verdict, Hit)
        saved_nusd = self._books.price(query, usage, client.ts_ms)
        head = hit_head(query, client, lookup.verdict, entries, saved_nusd)
        self._books.served(query, client, entries, model, usage, lookup.steps_ms)
        return Replay(head, client.request_id, body)

    # -- complete ---------------------------------------------------------------------------------------------------

    async def _complete(
        self,
        request: Request,
        lookup: Lookup,
        wanted: Mapping[bytes, Input],
        found: Mapping[bytes, HotRow],
    ) -> Replay | Relay:
        """Ask the upstream, in one call, for what was not found."""
        query, client, request.lookup = request.query, request.client, lookup
        missing = {fingerprint: asked for fingerprint, asked in wanted.items() if fingerprint not in found}
        sent = self._sent(query, tuple(missing.values()))
        began = self._pipeline.entries.began(client)
        fetch = request.fetch = Fetch(
            replace(query, forward_body=sent.body), client, lookup, time.perf_counter(), began
        )
        response, raw = await self._call(fetch, sent)
        said = None if raw is None or response.status != 200 else _parsed(raw)
        fetch.usage = _speech(query).usage_of(said)
        size_bytes = BODY_LIMIT_BYTES if raw is None else len(raw)
        fetch.call = self._books.call_of(fetch, response.status, size_bytes, is_stream=False, won=True)
        answered = await understood(said, tuple(missing.values()), query.model, _speech(query))
        if raw is None or (answered is None and not _may_pass_on(sent, response.status, said)):
            reply = await self._forward_whole(request, _spent(fetch))
            if sent.is_recoded and response.status in REFUSALS and isinstance(reply, Relay) and reply.status == 200:
                self._remember_plain(query)
            return reply
        if answered is None:
            return self._relay(request, fetch, response, response.headers, raw)
        if found and not are_alike([*(row.answer for row in found.values()), *answers_in(answered)]):
            # What is stored is another model's by now: ask for all of it, so that what is stored is alike again.
            return await self._complete(request, _spent(fetch), wanted, {})
        fetch.answer = next(answers_in(answered))
        fetch.served = added(*[row.entry.draft.usage for row in found.values()])
        fetch.call = replace(fetch.call, model=answered.model)
        self._keep_if_storable(fetch, response, tuple(missing), answered)
        if sent.is_own:
            return self._relay(request, fetch, response, response.headers, raw)
        body = await self._merged(query, fetch, tuple(missing), answered, found)
        return self._relay(request, fetch, response, self._part_headers(fetch, response, found, len(wanted)), body)

    def _part_headers(
        self, fetch: Fetch, response: ports.UpstreamResponse, found: Mapping[bytes, HotRow], asked: int
    ) -> list[tuple[str, str]]:
        """The upstream's headers, made true of an answer that has its rows and those that were found."""
        headers = [header for header in response.headers if header[0].lower() not in _OF_THE_BYTES]
        headers.append(("Content-Type", JSON))
        if found:
            headers.append(partial_header(len(found), asked))
            headers.append(("x-cache-saved-usd", usd(self._saved_nusd(fetch))))
            self._mark_used([row.entry for row in found.values()], fetch.client)
        return headers

    def _mark_used(self, entries: Iterable[Entry], client: Client) -> None:
        for entry in entries:
            self._store.mark_used(entry.id, client.ts_ms)

    def _sent(self, query: Query, asked: Sequence[Input]) -> Sent:
        batch = _batch_of(query)
        is_part = len(asked) < len(batch.inputs)
        is_recoded = (
            batch.is_open
            and batch.encoding_format != "base64"
            and _speech(query).recodes
            and (query.upstream, query.model) not in self._plain
        )
        wanted = asked if is_part else None
        body = _speech(query).part_body(query.forward_body, query.model, wanted, "base64" if is_recoded else None)
        return Sent(body, is_part, is_recoded)

    async def _call(self, fetch: Fetch, sent: Sent) -> tuple[ports.UpstreamResponse, bytes | None]:
        """The whole answer; its bytes are None beyond BODY_LIMIT_BYTES."""
        query, client = fetch.query, fetch.client
        headers = client.headers
        if not sent.is_own:  # the key names the client's own body
            headers = [line for line in headers if line[0].lower() != b"idempotency-key"]
        response: ports.UpstreamResponse | None = None
        pieces: list[bytes] = []
        size_bytes = 0
        try:
            response = await self._upstream.open(query.upstream, "POST", client.path_qs, headers, sent.body)
            fetch.first_byte_s = time.perf_counter()
            response = await readable(response)
            while piece := await response.read_some():
                pieces.append(piece)
                size_bytes += len(piece)
                if size_bytes > BODY_LIMIT_BYTES:
                    response.abort()
                    return response, None
        except BaseException:
            if response is not None:
                response.abort()
            status = 0 if response is None else response.status
            fetch.call = self._books.call_of(fetch, status, size_bytes, is_stream=False, won=False)
            raise
        response.release()
        return response, pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _saved_nusd(self, fetch: Fetch) -> int:
        """As the ledger has it: the price of all tokens less that of the call's."""
        query, ts_ms = fetch.query, fetch.client.ts_ms
        if fetch.served is None or fetch.call is None:
            return 0
        whole = added(fetch.served, fetch.call.usage)
        return self._books.price(query, whole, ts_ms) - self._books.price(query, fetch.call.usage, ts_ms)

    async def _merged(
        self,
        query: Query,
        fetch: Fetch,
        missing: Sequence[bytes],
        answered: Answered,
        found: Mapping[bytes, HotRow],
    ) -> bytes:
        """The upstream's answer with the stored rows among its own, in the client's order and format."""
        vectors = {fingerprint: vector_in(row.answer) for fingerprint, row in found.items()}
        vectors.update(zip(missing, answered.vectors, strict=True))
        rows = dict(zip(missing, answered.rows, strict=True))
        data = await spelled(_batch_of(query), vectors, rows)
        tokens = None
        if found:
            usage = added(answered.usage, None if self._usage_on_hit == "zero" else fetch.served)
            tokens = 0 if usage is None else usage.input_tokens
        return orjson.dumps(_speech(query).whole(data, answered.model, tokens, answered.said))

    def _relay(
        self,
        request: Request,
        fetch: Fetch,
        response: ports.UpstreamResponse,
        headers: Iterable[tuple[str, str]],
        body: bytes,
    ) -> Relay:
        """What the client gets of a call that has ended."""
        request.headers = [*forward_headers(request, fetch, response.status), *headers]
        settle = partial(self._pipeline.settler.settle, request)
        return Relay(Read(body), request.query.dialect, response.status, request.headers, len(body), None, settle)

    # -- forward whole ----------------------------------------------------------------------------------------------

    async def _forward_whole(self, request: Request, lookup: Lookup) -> Relay:
        """The client's own request, and the upstream's answer as it arrives: neither looked up nor stored."""
        request.lookup = lookup
        request.query = replace(request.query, eligibility=Eligibility(Level.NONE, lookup.verdict.reason))
        return await self._pipeline.boarding.forward(request)

    def _remember_plain(self, query: Query) -> None:
        if len(self._plain) >= PLAIN_LIMIT:
            self._plain.clear()
        self._plain.add((query.upstream, query.model))

    # -- store ------------------------------------------------------------------------------------------------------

    def _keep_if_storable(
        self, fetch: Fetch, response: ports.UpstreamResponse | Told, missing: Sequence[bytes], answered: Answered
    ) -> None:
        query = fetch.query
        self._pipeline.naming.see(query.upstream, query.model, answered.model)
        reason = policy.storable_vectors(
            answered.model,
            fetch.query,
            self._pipeline.rules,
            status=response.status,
            row_bytes=len(answered.vectors[0]),
            header=response.header,
            aliases=self._pipeline.names_of(query),
        )
        if query.controls.shadow and isinstance(fetch.lookup.verdict, Hit):
            return  # what would have been served ends when it would have ended
        if reason is None:
            _ = self._tasks.spawn(self._keep(fetch, missing, answered), "store")
        else:
            self._telemetry.unstored(reason)

    async def _keep(self, fetch: Fetch, missing: Sequence[bytes], answered: Answered) -> None:
        """Commit the rows. Memory takes them when they are asked for again: most inputs are embedded once."""
        now_ms = int(self._clock() * 1000)
        pairs = list(zip(missing, answers_in(answered), strict=True))
        try:
            for start in range(0, len(pairs), STORED_AT_ONCE):
                drafts = [self._draft(fetch, *pair, now_ms) for pair in pairs[start : start + STORED_AT_ONCE]]
                puts = [self._store.put(draft, fetch.began) for draft in drafts]
                stored = await asyncio.gather(*puts, return_exceptions=True)
                replaced = [i for kept in stored if isinstance(kept, ports.Stored) for i in kept.replaced]
                if replaced:
                    self._pipeline.entries.forget(replaced)
                for kept in stored:
                    if isinstance(kept, BaseException):
                        raise kept
                    if kept is None:
                        self._telemetry.unstored("purged")
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(_reason_of(fault))

    def _draft(self, fetch: Fetch, fingerprint: bytes, answer: Answer, now_ms: int) -> Draft:
        own = replace(fetch, query=replace(fetch.query, fingerprint=fingerprint))
        return draft_of(own, answer, "", self._pipeline.rules, now_ms)


class Told:
    """The head of an answer that came without one."""

    status = 200

    def header(self, _name: str) -> str | None:
        return None


def _spent(fetch: Fetch) -> Lookup:
    """The lookup once more, after a call in vain: what that cost is booked with the request."""
    assert fetch.call is not None
    calls = (*fetch.lookup.spent, replace(fetch.call, won=False))
    return replace(fetch.lookup, verdict=Miss("asked_whole"), spent=calls)


class Read:
    """`Source` of a body that is all here."""

    __slots__ = ("_at", "_body")

    PIECE_BYTES = 256 * 1024

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    async def next(self) -> bytes:
        piece = self._body[self._at : self._at + self.PIECE_BYTES]
        self._at += len(piece)
        return piece

    async def whole(self) -> bytes:
        return self._body

    def leave(self) -> None:
        """Nothing is held."""


def _may_pass_on(sent: Sent, status: int, said: object) -> bool:
    """Whether an answer that was not understood is what the client would have got without ibid."""
    if sent.is_own:
        return True
    if status != 200:
        return status not in REFUSALS
    return not sent.is_part and not has_base64(said)


def _parsed(raw: bytes) -> object:
    """What a body says as JSON; None when it is none."""
    try:
        return orjson.loads(raw)
    except ValueError:
        return None


def _batch_of(query: Query) -> Batch:
    assert query.batch is not None
    return query.batch


def _speech(query: Query) -> OpenAIEmbeddings:
    assert isinstance(query.dialect, OpenAIEmbeddings)
    return query.dialect


def _distinct(batch: Batch) -> dict[bytes, Input]:
    """Each input once, in order of its first place; without fingerprints none is looked up."""
    return dict(zip(batch.fingerprints, batch.inputs, strict=True)) if batch.fingerprints else {}


def _oldest(entries: Sequence[Entry]) -> Entry:
    return min(entries, key=lambda entry: entry.draft.created_ms)


def _is_fresh(entry: Entry, query: Query, client: Client) -> bool:
    return freshness.is_fresh(entry.draft.created_ms, entry.draft.expires_ms, client.ts_ms, query.controls.max_age_s)


def _reason_of(fault: BaseException) -> str:
    return fault.code if isinstance(fault, CacheFault) else "timeout"
