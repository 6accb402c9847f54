"""From a question and its plan to the response of one upstream call, whatever it takes to get there.

What acts, in this order: the edge in place of the cloud (edge), the edge before it (cascade, race); then, on the
cloud's own call, what is added to it (prefix, predict), and how it is sent (tier, hedge). What happens when all of that
fails is `proxy.lanes.failover`.

Every call made is an `Attempt` on the fetch's list, before it is sent. The one whose answer the client gets becomes the
fetch's own; the others were lost, and the ledger knows what they cost. A call is only ever given up before one byte of
it was relayed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from proxy import ports
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses
from proxy.core.errors import UpstreamError
from proxy.core.failover import FAILED
from proxy.core.hedging import Budget, Times
from proxy.core.jsontext import members, set_member
from proxy.core.model import Answer
from proxy.core.patterns import is_one_of
from proxy.core.plan import Lane
from proxy.core.purges import Purges
from proxy.lanes.calling import Calls
from proxy.lanes.failover import STANDING_IN, Failover, Reads
from proxy.lanes.patience import patience_s
from proxy.lanes.predict import MECHANISM as PREDICTED
from proxy.lanes.predict import Predictor
from proxy.lanes.prefixes import MECHANISM as MARKED
from proxy.lanes.prefixes import PrefixMarks
from proxy.lanes.proof import Proof
from proxy.lanes.usage import REFUSALS
from proxy.records import Fetch
from proxy.settings.lanes import LaneSettings
from proxy.upstreams.attempt import Attempt, Peeked
from proxy.upstreams.sending import Sending, with_member

ACTING: Final = STANDING_IN | {
    Lane.EDGE, Lane.PREFIX, Lane.PREDICT, Lane.TIER, Lane.CASCADE, Lane.RACE, Lane.HEDGE,
}  # fmt: skip
TIER_REFUSALS: Final = frozenset({400, 408, 429, 500, 502, 503, 504})
EDGE_SAMPLES = 8

Cloud = Callable[[], Coroutine[Any, Any, ports.UpstreamResponse]]


class Forwarder:
    """Owns nothing but what it has learned of times and budgets. Lives on the event loop."""

    def __init__(
        self,
        *,
        upstream: ports.Upstream,
        lanes: LaneSettings,
        reader: Reads,
        predictor: Predictor,
        prefixes: PrefixMarks,
        purges: Purges,
    ) -> None:
        self.times = Times()
        self.budget = Budget(lanes.hedge.max_extra_load)
        self._lanes = lanes
        self._facts = reader.facts
        self._predictor = predictor
        self._prefixes = prefixes
        self._calls = Calls(upstream, lanes.edge, reader.facts, self.times)
        self._failover = Failover(self._calls, lanes, upstream=upstream, reader=reader, purges=purges)

    async def open(self, fetch: Fetch) -> ports.UpstreamResponse:
        """The response the client is given, its head arrived. Raises UpstreamError, BadRequest."""
        lanes = fetch.asked.plan.lanes
        if fetch.routed_to and (response := await self._from_candidate(fetch)) is not None:
            return response
        if lanes.isdisjoint(ACTING):
            if fetch.first is not None:
                return await self._calls.send(fetch, fetch.first)
            attempt = fetch.attempt = Attempt(fetch.sending)  # nearly always
            return await self._calls.open(fetch, attempt)
        if fetch.purpose == "answer" and not lanes.isdisjoint(STANDING_IN):
            return await self._failover.open(fetch, partial(self._ask, fetch, lanes))
        return await self._ask(fetch, lanes)

    async def _from_candidate(self, fetch: Fetch) -> ports.UpstreamResponse | None:
        """The answer of the model the router chose; None when it fails, and then the model asked for is asked."""
        try:
            response = await self._calls.send(fetch, fetch.sending)
            if response.status == 200:
                return response
            response.abort()
        except UpstreamError:
            pass
        if fetch.attempt is not None:
            fetch.attempt.end()
        fetch.ask_as_asked()
        return None

    async def _ask(self, fetch: Fetch, lanes: frozenset[Lane]) -> ports.UpstreamResponse:
        if Lane.EDGE in lanes and (edge := self._calls.edge_sending(fetch, "edge.local", whole=False)) is not None:
            return await self._calls.send(fetch, edge)

        async def cloud() -> ports.UpstreamResponse:
            return await self._cloud(fetch, lanes)

        if not lanes.isdisjoint((Lane.RACE, Lane.CASCADE)):
            proof = Proof(self._facts(fetch.asked), self._lanes.cascade)
            if proof and Lane.RACE in lanes:
                return await self._race(fetch, proof, cloud)
            if proof and (proven := await self._proven(fetch, proof, "hybrid.cascade", "cascade")) is not None:
                return proven
        return await cloud()

    def status(self) -> Mapping[str, object]:
        """For people: calls that could be hedged, and how often one was."""
        retries = self._failover.budget
        return {
            "hedge": {"made": self.budget.made, "extra": self.budget.spent},
            "retry": {"made": retries.made, "extra": retries.spent},
        }

    def learn(self, fetch: Fetch) -> None:
        """A fetch has ended: what it showed of the lanes that shaped it."""
        if fetch.attempt is None or fetch.usage is None or not fetch.attempt.sending.shaped_by:
            return
        sending = fetch.attempt.sending
        if PREDICTED in sending.shaped_by:
            self._predictor.learn(fetch.asked.scope, fetch.usage)
        if MARKED in sending.shaped_by:
            self._prefixes.learn(fetch, sending, fetch.usage)

    # -- the client's own call --------------------------------------------------------------------------------------

    async def _cloud(self, fetch: Fetch, lanes: frozenset[Lane]) -> ports.UpstreamResponse:
        """The client's call with what the plan adds to it. What an upstream refuses because of it is asked plainly."""
        own = fetch.sending
        sending = own
        if Lane.PREFIX in lanes:
            sending = self._prefixes.mark(sending, fetch)
        if Lane.PREDICT in lanes:
            sending = await self._predictor.predict(sending, fetch)
        response = await self._timed(fetch, sending, lanes)
        if response.status not in REFUSALS or sending is own:
            return response
        response.abort()
        if fetch.attempt is not None:
            fetch.attempt.end()
        response = await self._timed(fetch, own, lanes)
        if response.status < 400:  # else it was not for what was added
            self._predictor.refused(sending)
            self._prefixes.refused(sending)
        return response

    async def _timed(self, fetch: Fetch, sending: Sending, lanes: frozenset[Lane]) -> ports.UpstreamResponse:
        if Lane.TIER in lanes and (cheap := self._cheaper(fetch, sending)) is not None:
            left_s = patience_s(fetch) - self._lanes.tier.margin_s
            if left_s > 0 and (response := await self._in_time(fetch, cheap, left_s)) is not None:
                return response
        if fetch.purpose == "prefetch":  # a guess is not worth the full price
            raise UpstreamError("No cheaper tier took the call.", code="no_cheap_tier")
        if Lane.HEDGE in lanes and not fetch.asked.has_tools and fetch.asked.n == 1:
            return await self._hedged(fetch, sending)
        return await self._calls.send(fetch, sending)

    # -- tier -------------------------------------------------------------------------------------------------------

    def _cheaper(self, fetch: Fetch, sending: Sending) -> Sending | None:
        lane, dialect = self._lanes.tier, fetch.asked.dialect
        if not isinstance(dialect, OpenAIChat | Responses) or not is_one_of(sending.model, lane.models):
            return None
        if "service_tier" in members(sending.body):
            return None  # the client's own choice
        return with_member(sending, "service_tier", lane.name, f"batch.{lane.name}", tier=lane.name)

    async def _in_time(self, fetch: Fetch, sending: Sending, within_s: float) -> ports.UpstreamResponse | None:
        """The response of the cheaper tier, or None when it refuses, fails, or takes too long."""
        attempt = Attempt(sending)
        try:
            async with asyncio.timeout(within_s):
                response = await self._calls.open(fetch, attempt)
        except (TimeoutError, UpstreamError) as fault:
            attempt.was_left = isinstance(fault, TimeoutError)
            attempt.end()
            return None
        if response.status in TIER_REFUSALS:
            attempt.end()
            response.abort()
            return None
        fetch.attempt = attempt
        return response

    # -- hedge ------------------------------------------------------------------------------------------------------

    async def _hedged(self, fetch: Fetch, sending: Sending) -> ports.UpstreamResponse:
        """The first token of one call, or of two."""
        lane, kind = self._lanes.hedge, (sending.upstream, sending.model, fetch.asked.stream)
        self.budget.earn()
        late_ms = self.times.quantile(kind, lane.quantile, lane.min_samples)
        attempts = [Attempt(sending)]
        tasks = [self._first_token(fetch, attempts[0])]
        try:
            if late_ms is not None:
                await asyncio.wait(tasks, timeout=max(late_ms / 1e3, lane.min_delay_s))
                if not tasks[0].done() and self.budget.spend():
                    attempts.append(Attempt(sending.by("spec.hedge"), "hedge"))
                    tasks.append(self._first_token(fetch, attempts[1]))
            winner = await _first_good(tasks)
        except BaseException:
            await _cancel(tasks)
            raise
        own = fetch.attempt = attempts[winner]
        for attempt in attempts:  # the ledger calls what lost by what it was for, whichever of them won
            attempt.purpose = "answer" if attempt is own else "hedge"
        await _cancel([task for i, task in enumerate(tasks) if i != winner])
        for i, attempt in enumerate(attempts):
            if i != winner and (tasks[i].cancelled() or tasks[i].exception() is None):
                attempt.leave()
        if own.first_byte_s is not None and own.status == 200:
            self.times.see(kind, (own.first_byte_s - own.opened_s) * 1e3)
        return tasks[winner].result()

    def _first_token(self, fetch: Fetch, attempt: Attempt) -> asyncio.Task[ports.UpstreamResponse]:
        async def read() -> ports.UpstreamResponse:
            response = await self._calls.open(fetch, attempt)
            first = await response.read_some()
            attempt.first_byte_s = time.perf_counter()
            return Peeked(response, first)

        return asyncio.ensure_future(read())

    # -- edge -------------------------------------------------------------------------------------------------------

    async def _proven(self, fetch: Fetch, proof: Proof, mechanism: str, purpose: str) -> ports.UpstreamResponse | None:
        """The edge's answer, if it came and stands the proof. Otherwise what it cost is listed as lost."""
        sending = self._calls.edge_sending(fetch, mechanism, whole=True)
        if sending is None:
            return None
        if proof.min_logprob is not None:
            sending = replace(sending, body=set_member(sending.body, "logprobs", b"true"))
        attempt = Attempt(sending, purpose)
        try:
            async with asyncio.timeout(self._lanes.edge.timeout_s):
                response = await self._calls.open(fetch, attempt)
                answer = await self._calls.read(attempt, response)
            if not proof.failure(answer):
                return self._calls.said(fetch, attempt, _bare(answer))
        except (UpstreamError, TimeoutError) as fault:
            attempt.was_left = isinstance(fault, TimeoutError)
        attempt.end()
        return None

    async def _race(self, fetch: Fetch, proof: Proof, cloud: Cloud) -> ports.UpstreamResponse:
        """Edge and cloud at once, the cloud later by what the edge usually takes; the edge wins only when proven."""
        edge = asyncio.ensure_future(self._proven(fetch, proof, "spec.race", "race"))
        asked: asyncio.Task[ports.UpstreamResponse] | None = None
        usual_ms = self.times.quantile(self._lanes.edge.upstream, 0.5, EDGE_SAMPLES)
        head_start_s = self._lanes.race.head_start_s if usual_ms is None else usual_ms / 1e3
        try:
            await asyncio.wait([edge], timeout=head_start_s)
            if edge.done() and (proven := edge.result()) is not None:
                return proven
            asked = asyncio.ensure_future(cloud())
            while not edge.done():
                await asyncio.wait([edge, asked], return_when=asyncio.FIRST_COMPLETED)
                if edge.done() and (proven := edge.result()) is not None:
                    await self._leave_cloud(fetch, asked)
                    return proven
                if asked.done() and asked.exception() is None and asked.result().status not in FAILED:
                    await _cancel([edge])
                    return asked.result()
                if asked.done():
                    await asyncio.wait([edge])
            return edge.result() or await asked
        except BaseException:
            await _cancel([task for task in (edge, asked) if task is not None])
            raise

    async def _leave_cloud(self, fetch: Fetch, asked: asyncio.Task[ports.UpstreamResponse]) -> None:
        """The edge was sooner: give up the cloud's calls."""
        await _cancel([asked])
        if not asked.cancelled() and asked.exception() is None:
            asked.result().abort()
        for attempt in fetch.attempts:
            if attempt is not fetch.attempt:
                attempt.purpose = "race"
                attempt.leave()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel and wait, however often this is cancelled itself."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)


async def _first_good(tasks: Sequence[asyncio.Task[ports.UpstreamResponse]]) -> int:
    """Index of the first call whose first token came; a failure counts only when all fail. Raises what that raised."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for i, task in enumerate(tasks):
            if task in done and task.exception() is None and task.result().status not in FAILED:
                return i
    for i, task in enumerate(tasks):
        if task.exception() is None:
            return i
    raise tasks[0].exception() or UpstreamError("The upstream did not answer.")


def _bare(answer: Answer) -> Answer:
    """Without the log-probabilities that were asked for the proof alone."""
    return replace(answer, choice={name: value for name, value in answer.choice.items() if name != "logprobs"})
