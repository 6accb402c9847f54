"""What becomes of a request whose upstream failed, as its policy says: the same call again, a stale entry, another
upstream, the edge. Each in the order of `on_error`, or after its own 429 of `on_rate_limit`, until one answers.

All of it happens before the first byte reached the client: the first bytes of a 200 are looked at here, so that a body
that breaks before them, or begins with an error, is a failure like any other. When nothing helps the client gets the
last failure of the upstream it asked, as it came.

A retry is one more call at the same upstream: within a time, within a share of all calls, not where it might do twice
what the provider does for a request beside answering it, and not sooner than the upstream said. Another upstream never
sees the client's credential; it is asked in the same dialect, or in OpenAI's where the question can be said in it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from proxy import ports
from proxy.core import failover as rules
from proxy.core.errors import BadRequest, UpstreamError
from proxy.core.facts import Facts
from proxy.core.hedging import BURST, Budget
from proxy.core.plan import EDGE, RETRY, STALE, UPSTREAM, Lane
from proxy.core.purges import Began, Purges, asked_ms, marks_of
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.lanes.calling import Calls, told
from proxy.lanes.patience import patience_s
from proxy.records import Fetch
from proxy.settings.lanes import LaneSettings
from proxy.upstreams.attempt import Attempt, Peeked
from proxy.upstreams.sending import Sending, elsewhere, speaks_chat, to_other

STANDING_IN: Final = frozenset({Lane.RETRY, Lane.STALE_IF_ERROR, Lane.UPSTREAM_IF_ERROR, Lane.EDGE_IF_ERROR})
STALE_IF_ERROR: Final = "cache.stale-if-error"
MOVED: Final = "hybrid.failover"
OFFLINE: Final = "edge.offline"
LATE: Final = 504

Ask = Callable[[], Coroutine[Any, Any, ports.UpstreamResponse]]


class Reads(Protocol):
    """What this needs of `Reader`."""

    def facts(self, query: Query) -> Facts: ...

    def variant(self, query: Query, headers: tuple[tuple[bytes, bytes], ...], upstream: str, model: str) -> Query: ...


@dataclass(slots=True)
class Failure:
    """What an upstream said, or why it said nothing. `attempt`: the call it was, if one was made."""

    status: int
    response: ports.UpstreamResponse | None
    error: UpstreamError | None
    attempt: Attempt | None

    def drop(self) -> None:
        """Nobody will be told of it."""
        if self.response is not None:
            self.response.abort()
            if self.attempt is not None:
                self.attempt.end()  # one that broke off stays open for the books: it may be billed

    def tell(self) -> ports.UpstreamResponse:
        if self.response is None:
            assert self.error is not None
            raise self.error
        return self.response


class Failover:
    """Owns the budget of retries. Lives on the event loop."""

    def __init__(
        self,
        calls: Calls,
        lanes: LaneSettings,
        *,
        upstream: ports.Upstream,
        reader: Reads,
        purges: Purges,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.budget = Budget(lanes.failover.max_extra_load, BURST)
        self._calls = calls
        self._lane = lanes.failover
        self._edge_timeout_s = lanes.edge.timeout_s
        self._upstream = upstream
        self._reader = reader
        self._purges = purges
        self._chance = chance
        self._clock = clock
        self._pause = pause

    async def open(self, fetch: Fetch, ask: Ask) -> ports.UpstreamResponse:
        """The response of the upstream, or of what stands in for it. Raises UpstreamError."""
        self.budget.earn()
        if self._upstream.is_failing(fetch.sending.upstream):
            failure = await self._probed(fetch, ask)
        else:
            failure = await self._tried(fetch, ask)
        if not isinstance(failure, Failure):
            return failure
        try:
            for word in fetch.asked.plan.standing_in(is_limit=failure.status == rules.LIMITED):
                if word == RETRY:
                    outcome = await self._again(fetch, ask, failure)
                    if not isinstance(outcome, Failure):
                        return outcome
                    failure = outcome
                elif (response := await self._by(word, fetch, failure.status)) is not None:
                    failure.drop()
                    return response
        except BaseException:
            failure.drop()
            raise
        fetch.attempt = failure.attempt
        return failure.tell()

    # -- the upstream that was asked --------------------------------------------------------------------------------

    async def _tried(self, fetch: Fetch, ask: Ask) -> ports.UpstreamResponse | Failure:
        try:
            response = await ask()
            start_status = response.status
            if response.status == 200:
                response, start_status = await _begun(response)
        except UpstreamError as error:
            return Failure(error.status, None, error, fetch.attempt)
        if start_status in rules.FAILED:
            return Failure(start_status, response, None, fetch.attempt)
        return response

    async def _probed(self, fetch: Fetch, ask: Ask) -> ports.UpstreamResponse | Failure:
        """The same of an upstream that is known to fail, and is asked to see whether it still does. When that takes
        too long, what stands in is asked meanwhile; where nothing does, the client waits on."""
        probe = asyncio.ensure_future(self._tried(fetch, ask))
        try:
            await asyncio.wait([probe], timeout=self._lane.probe_timeout_s)
            if not probe.done():
                own = fetch.attempt
                for word in fetch.asked.plan.standing_in(is_limit=False):
                    if word != RETRY and (response := await self._by(word, fetch, LATE)) is not None:
                        await _leave(probe, own)
                        return response
            return await probe
        except BaseException:
            await _leave(probe, None)
            raise

    def _probe_s(self, upstream: str) -> float | None:
        """How long a stand-in has that is known to fail itself."""
        return self._lane.probe_timeout_s if self._upstream.is_failing(upstream) else None

    async def _again(self, fetch: Fetch, ask: Ask, failure: Failure) -> ports.UpstreamResponse | Failure:
        """The same call once more, as often as it may be; the last failure when that does not help."""
        for tried in range(self._lane.retries):
            pause_s = self._may_repeat(fetch, failure, tried)
            if pause_s is None or not self.budget.spend():
                break
            failure.drop()
            await self._pause(pause_s)
            outcome = await self._tried(fetch, ask)
            if not isinstance(outcome, Failure):
                return outcome
            failure = outcome
        return failure

    def _may_repeat(self, fetch: Fetch, failure: Failure, tried: int) -> float | None:
        """Seconds after which it may be asked again, or None."""
        error, response, attempt = failure.error, failure.response, failure.attempt
        told_s: float | None = None
        if error is not None and (error.should_retry is False or self._upstream.is_failing(fetch.sending.upstream)):
            return None
        if response is not None:
            told_s = rules.retry_after_s(response.header, self._clock())
        was_sent = attempt is not None and attempt.was_sent
        if not rules.may_repeat(self._reader.facts(fetch.asked), failure.status if response else 0, was_sent=was_sent):
            return None
        pause_s = rules.pause_s(tried, told_s, self._chance())
        spent_s = time.perf_counter() - fetch.client.started_s
        left_s = min(self._lane.within_s - spent_s, patience_s(fetch))
        return pause_s if pause_s <= left_s else None

    # -- what stands in ---------------------------------------------------------------------------------------------

    async def _by(self, word: str, fetch: Fetch, status: int) -> ports.UpstreamResponse | None:
        """The answer of one stand-in, or None."""
        if word == STALE:
            return self._by_stale(fetch, status)
        if word == EDGE:
            edge = self._calls.edge_sending(fetch, OFFLINE, whole=False)
            return await self._by_call(fetch, edge, status, self._edge_timeout_s)
        name = word.removeprefix(UPSTREAM)
        return await self._by_call(fetch, self._elsewhere(fetch, name), status, self._probe_s(name))

    def _by_stale(self, fetch: Fetch, status: int) -> ports.UpstreamResponse | None:
        if (row := self._stale(fetch)) is None:
            return None
        fetch.attempt, fetch.usage = None, row.entry.draft.usage
        fetch.stand_in, fetch.stand_in_for = STALE_IF_ERROR, status
        return told(fetch, row.answer)

    def _stale(self, fetch: Fetch) -> HotRow | None:
        """The expired entry that was found, unless it was purged since."""
        if (stale := fetch.lookup.stale) is None:
            return None
        draft = stale.row.entry.draft
        asked = Began(stale.found.purge, round(asked_ms(draft)))
        return None if self._purges.overtook(marks_of(draft), asked) else stale.row

    def _elsewhere(self, fetch: Fetch, name: str) -> Sending | None:
        """The question as another upstream is asked it; None where it takes no such model or cannot be asked this."""
        query = fetch.asked
        model = self._upstream.named_there(name, query.model)
        if model is None or (name, model) == (query.upstream, query.model):
            return None
        facts = self._reader.facts(query)
        if not rules.may_move(facts, query.body):
            return None
        dialect = self._upstream.dialect(name)
        if dialect == self._upstream.dialect(query.upstream):
            variant = self._reader.variant(query, tuple(fetch.client.headers), name, model)
            return elsewhere(variant, MOVED)
        if dialect != "openai":
            return None  # nobody here translates into that
        return to_other(query, facts, name, model, MOVED, whole=not speaks_chat(query))

    async def _by_call(
        self, fetch: Fetch, sending: Sending | None, status: int, within_s: float | None
    ) -> ports.UpstreamResponse | None:
        """The answer of a call in place of the one that failed. Only a 200 will do."""
        if sending is None:
            return None
        attempt = Attempt(sending)
        try:
            async with asyncio.timeout(within_s):
                response = await self._calls.open(fetch, attempt)
                begun_status = response.status
                if response.status == 200 and sending.is_translated:
                    response = self._calls.said(fetch, attempt, await self._calls.read(attempt, response))
                elif response.status == 200:
                    response, begun_status = await _begun(response)
        except TimeoutError:
            attempt.leave()
            return None
        except (UpstreamError, BadRequest):
            return None
        if begun_status != 200:
            attempt.end()
            response.abort()
            return None
        fetch.attempt = attempt
        fetch.stand_in, fetch.stand_in_for = sending.shaped_by[-1], status
        return response


async def _leave(probe: asyncio.Task[ports.UpstreamResponse | Failure], attempt: Attempt | None) -> None:
    """Give up a call whose outcome nobody waits for any more."""
    probe.cancel()
    await asyncio.wait([probe], timeout=1.0)
    if probe.done() and not probe.cancelled() and probe.exception() is None:
        outcome = probe.result()
        outcome.drop() if isinstance(outcome, Failure) else outcome.abort()
    if attempt is not None:
        attempt.leave()


async def _begun(response: ports.UpstreamResponse) -> tuple[ports.UpstreamResponse, int]:
    """A 200 whose first bytes have come, and the status that they show it to be. Raises UpstreamError."""
    try:
        start = await response.read_some()
    except BaseException:
        response.abort()
        raise
    return Peeked(response, start), (rules.error_in(start) or 200) if start else 502
