"""From a question and its plan to the response of one upstream call, whatever it takes to get there.

What acts, in this order: the edge in place of the cloud (edge), the edge before it (cascade, race); then, on the
cloud's own call, what is added to it (prefix, predict), and how it is sent (tier, hedge). When all of that fails, what
stands in: a stale entry, then the edge.

Every call made is an `Attempt` on the fetch's list, before it is sent. The one whose answer the client gets becomes the
fetch's own; the others were lost, and the ledger knows what they cost. A call is only ever given up before one byte of
it was relayed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from proxy import ports
from proxy.core.dialects.dialect import JSON
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses
from proxy.core.errors import UpstreamError
from proxy.core.facts import Facts
from proxy.core.hedging import Budget, Times
from proxy.core.jsontext import members, set_member
from proxy.core.model import Answer
from proxy.core.patterns import is_one_of
from proxy.core.plan import Lane
from proxy.core.purges import Began, Purges, asked_ms, marks_of
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.lanes.predict import MECHANISM as PREDICTED
from proxy.lanes.predict import Predictor
from proxy.lanes.prefixes import PrefixMarks
from proxy.lanes.proof import Proof
from proxy.lanes.usage import REFUSALS, UsageAsking, refusal_of
from proxy.records import Fetch
from proxy.settings.lanes import LaneSettings
from proxy.upstreams.attempt import Attempt, LocalResponse, Peeked, whole_of
from proxy.upstreams.decoding import readable
from proxy.upstreams.sending import Sending, headers_for, to_other, with_member

ACTING: Final = frozenset(
    {Lane.EDGE, Lane.PREFIX, Lane.PREDICT, Lane.TIER, Lane.CASCADE, Lane.RACE, Lane.HEDGE, Lane.STALE_IF_ERROR,
     Lane.EDGE_IF_ERROR}
)  # fmt: skip
FAILED: Final = frozenset({429, 500, 502, 503, 504, 529})
"""Answers of an upstream after which something else may stand in (RFC 5861 §4; 429 and 529 are its overload)."""
TIER_REFUSALS: Final = frozenset({400, 408, 429, 500, 502, 503, 504})
STALE_IF_ERROR: Final = "cache.stale-if-error"
EDGE_SAMPLES = 8
_TIMEOUT_HEADER: Final = b"x-stainless-read-timeout"
_NUMBER = re.compile(rb"[0-9]{1,6}(?:\.[0-9]{1,6})?")

Cloud = Callable[[], Coroutine[Any, Any, ports.UpstreamResponse]]


class Forwarder:
    """Owns nothing but what it has learned of times and budgets. Lives on the event loop."""

    def __init__(
        self,
        *,
        upstream: ports.Upstream,
        lanes: LaneSettings,
        facts: Callable[[Query], Facts],
        predictor: Predictor,
        prefixes: PrefixMarks,
        purges: Purges,
    ) -> None:
        self.times = Times()
        self.budget = Budget(lanes.hedge.max_extra_load)
        self._upstream = upstream
        self._lanes = lanes
        self._facts = facts
        self._predictor = predictor
        self._prefixes = prefixes
        self._purges = purges
        self._chat = OpenAIChat()
        self._usage = UsageAsking()

    async def open(self, fetch: Fetch) -> ports.UpstreamResponse:
        """The response the client is given, its head arrived. Raises UpstreamError, BadRequest."""
        lanes = fetch.asked.plan.lanes
        if fetch.routed_to and (response := await self._from_candidate(fetch)) is not None:
            return response
        if lanes.isdisjoint(ACTING):
            if fetch.first is not None:
                return await self._send(fetch, fetch.first)
            attempt = fetch.attempt = Attempt(fetch.sending)  # nearly always
            return await self._open(fetch, attempt)
        try:
            response = await self._ask(fetch, lanes)
        except UpstreamError as error:
            stand_in = await self._stand_in(fetch, lanes, error.status)
            if stand_in is None:
                raise
            return stand_in
        if response.status in FAILED and (stand_in := await self._stand_in(fetch, lanes, response.status)) is not None:
            response.abort()
            return stand_in
        return response

    async def _from_candidate(self, fetch: Fetch) -> ports.UpstreamResponse | None:
        """The answer of the model the router chose; None when it fails, and then the model asked for is asked."""
        try:
            response = await self._send(fetch, fetch.sending)
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
        if Lane.EDGE in lanes and (edge := self._edge_sending(fetch, "edge.local", whole=False)) is not None:
            return await self._send(fetch, edge)

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
        return {"hedge": {"made": self.budget.made, "extra": self.budget.spent}}

    def learn(self, fetch: Fetch) -> None:
        """A fetch has ended: what it showed of the lanes that shaped it."""
        if fetch.attempt is not None and fetch.usage is not None and PREDICTED in fetch.attempt.sending.shaped_by:
            self._predictor.learn(fetch.asked.scope, fetch.usage)

    # -- the client's own call --------------------------------------------------------------------------------------

    async def _send(self, fetch: Fetch, sending: Sending) -> ports.UpstreamResponse:
        """One call, which becomes the fetch's own."""
        attempt = Attempt(sending)
        fetch.attempt = attempt
        response = await self._open(fetch, attempt)
        if not sending.is_translated:
            return response
        answer = await self._read(attempt, response)
        return self._said(fetch, attempt, answer)

    async def _open(self, fetch: Fetch, attempt: Attempt) -> ports.UpstreamResponse:
        fetch.attempts.append(attempt)
        asked = attempt.sending = self._usage.adapted(attempt.sending, fetch.asked)
        response = await self._call(fetch, attempt)
        if response.status not in REFUSALS or (plain := self._usage.plainly(asked, fetch.asked)) is asked:
            return response
        may_be_ours, refusal = await refusal_of(response)
        if not may_be_ours:
            return refusal
        attempt.sending = plain
        response = await self._call(fetch, attempt)
        if response.status < 400:
            self._usage.learn(asked.upstream)
        return response

    async def _call(self, fetch: Fetch, attempt: Attempt) -> ports.UpstreamResponse:
        sending = attempt.sending
        headers = headers_for(sending, fetch.client.headers)
        response = await self._upstream.open(
            sending.upstream, "POST", sending.path_qs, headers, sending.body, attempt.sent
        )
        attempt.first_byte_s = time.perf_counter()
        attempt.status = response.status
        attempt.response = response
        try:
            attempt.response = await readable(response)
        except BaseException:
            response.abort()
            raise
        return attempt.response

    async def _cloud(self, fetch: Fetch, lanes: frozenset[Lane]) -> ports.UpstreamResponse:
        """The client's call with what the plan adds to it. What an upstream refuses because of it is asked plainly."""
        own = fetch.sending
        sending = own
        if Lane.PREFIX in lanes:
            sending = self._prefixes.mark(sending, fetch)
        if Lane.PREDICT in lanes:
            sending = await self._predictor.predict(sending, fetch)
        response = await self._timed(fetch, sending, lanes)
        if response.status == 400 and sending is not own:
            response.abort()
            if fetch.attempt is not None:
                fetch.attempt.end()
            self._predictor.refused(sending)
            self._prefixes.refused(sending)
            return await self._timed(fetch, own, lanes)
        return response

    async def _timed(self, fetch: Fetch, sending: Sending, lanes: frozenset[Lane]) -> ports.UpstreamResponse:
        if Lane.TIER in lanes and (cheap := self._cheaper(fetch, sending)) is not None:
            left_s = self._patience_s(fetch) - self._lanes.tier.margin_s
            if left_s > 0 and (response := await self._in_time(fetch, cheap, left_s)) is not None:
                return response
        if fetch.purpose == "prefetch":  # a guess is not worth the full price
            raise UpstreamError("No cheaper tier took the call.", code="no_cheap_tier")
        if Lane.HEDGE in lanes and not fetch.asked.has_tools and fetch.asked.n == 1:
            return await self._hedged(fetch, sending)
        return await self._send(fetch, sending)

    # -- tier -------------------------------------------------------------------------------------------------------

    def _cheaper(self, fetch: Fetch, sending: Sending) -> Sending | None:
        lane, dialect = self._lanes.tier, fetch.asked.dialect
        if not isinstance(dialect, OpenAIChat | Responses) or not is_one_of(sending.model, lane.models):
            return None
        if "service_tier" in members(sending.body):
            return None  # the client's own choice
        return with_member(sending, "service_tier", lane.name, f"batch.{lane.name}", tier=lane.name)

    def _patience_s(self, fetch: Fetch) -> float:
        """How long the client can wait from now: its deadline, and its own read timeout, whichever ends first."""
        deadline_s = fetch.asked.controls.deadline_s
        told = next((value for name, value in fetch.client.headers if name.lower() == _TIMEOUT_HEADER), b"")
        bounds = [600.0 if deadline_s is None else deadline_s]
        if _NUMBER.fullmatch(told):
            bounds.append(float(told))
        return min(bounds) - (time.perf_counter() - fetch.client.started_s)

    async def _in_time(self, fetch: Fetch, sending: Sending, within_s: float) -> ports.UpstreamResponse | None:
        """The response of the cheaper tier, or None when it refuses, fails, or takes too long."""
        attempt = Attempt(sending)
        try:
            async with asyncio.timeout(within_s):
                response = await self._open(fetch, attempt)
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
            response = await self._open(fetch, attempt)
            first = await response.read_some()
            attempt.first_byte_s = time.perf_counter()
            return Peeked(response, first)

        return asyncio.ensure_future(read())

    # -- edge -------------------------------------------------------------------------------------------------------

    def _edge_sending(self, fetch: Fetch, mechanism: str, *, whole: bool) -> Sending | None:
        edge = self._lanes.edge
        if edge.upstream is None or edge.model is None or fetch.asked.batch is not None:
            return None
        query = fetch.asked
        if query.upstream == edge.upstream and query.model == edge.model:
            return None  # it is the edge that was asked
        return to_other(query, self._facts(query), edge.upstream, edge.model, mechanism, whole=whole)

    async def _proven(self, fetch: Fetch, proof: Proof, mechanism: str, purpose: str) -> ports.UpstreamResponse | None:
        """The edge's answer, if it came and stands the proof. Otherwise what it cost is listed as lost."""
        sending = self._edge_sending(fetch, mechanism, whole=True)
        if sending is None:
            return None
        if proof.min_logprob is not None:
            sending = replace(sending, body=set_member(sending.body, "logprobs", b"true"))
        attempt = Attempt(sending, purpose)
        try:
            async with asyncio.timeout(self._lanes.edge.timeout_s):
                response = await self._open(fetch, attempt)
                answer = await self._read(attempt, response)
            if not proof.failure(answer):
                return self._said(fetch, attempt, _bare(answer))
        except (UpstreamError, TimeoutError) as fault:
            attempt.was_left = isinstance(fault, TimeoutError)
        attempt.end()
        return None

    async def _read(self, attempt: Attempt, response: ports.UpstreamResponse) -> Answer:
        """The whole answer of a translated call. Raises UpstreamError when there is none."""
        body = await whole_of(response)
        attempt.end()
        attempt.size_bytes = len(body)
        recording = self._chat.record(body, is_stream=False, n=1)
        attempt.usage = recording.usage
        if response.status != 200 or recording.answer is None:
            message = "The local model did not give an answer."
            raise UpstreamError(message, code="edge_failed", status=502)
        if attempt.first_byte_s is not None and attempt.ended_s is not None:
            self.times.see(attempt.sending.upstream, (attempt.ended_s - attempt.opened_s) * 1e3)
        return recording.answer

    def _said(self, fetch: Fetch, attempt: Attempt, answer: Answer) -> ports.UpstreamResponse:
        """An answer as a response in the client's dialect. Raises UpstreamError where that cannot say it."""
        query = fetch.asked
        dialect = query.dialect
        if not dialect.expresses(answer, has_stops=query.has_stops, keeps_id=query.keeps_id):
            raise UpstreamError("The local model's answer cannot be said here.", code="edge_failed", status=502)
        template = dialect.render(answer, stream=query.stream, wants_usage=True, usage_mode="original")
        body = template.fill(fetch.client.request_id, fetch.client.ts_ms // 1000)
        fetch.attempt = attempt
        attempt.purpose = "answer"
        fetch.usage = attempt.usage
        return LocalResponse(200, _type_of(query), body)

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

    # -- what stands in ---------------------------------------------------------------------------------------------

    def _stale(self, fetch: Fetch) -> HotRow | None:
        """The expired entry that was found, unless it was purged since."""
        if (stale := fetch.lookup.stale) is None:
            return None
        draft = stale.row.entry.draft
        asked = Began(stale.found.purge, round(asked_ms(draft)))
        return None if self._purges.overtook(marks_of(draft), asked) else stale.row

    async def _stand_in(self, fetch: Fetch, lanes: frozenset[Lane], status: int) -> ports.UpstreamResponse | None:
        """A stale entry, else the edge, else None."""
        query = fetch.asked
        if Lane.STALE_IF_ERROR in lanes and (row := self._stale(fetch)) is not None:
            template = query.dialect.render(row.answer, stream=query.stream, wants_usage=True, usage_mode="original")
            body = template.fill(fetch.client.request_id, fetch.client.ts_ms // 1000)
            fetch.attempt, fetch.usage = None, row.entry.draft.usage
            fetch.stand_in, fetch.stand_in_for = STALE_IF_ERROR, status
            return LocalResponse(200, _type_of(query), body)
        if Lane.EDGE_IF_ERROR not in lanes or (edge := self._edge_sending(fetch, "edge.offline", whole=False)) is None:
            return None
        attempt = Attempt(edge)
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(self._lanes.edge.timeout_s):
                response = await self._open(fetch, attempt)
                if response.status == 200 and edge.is_translated:
                    response = self._said(fetch, attempt, await self._read(attempt, response))
            if response.status == 200:
                fetch.attempt = attempt
                fetch.stand_in, fetch.stand_in_for = "edge.offline", status
                return response
            response.abort()
        attempt.end()
        return None


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


def _type_of(query: Query) -> str:
    return f"{query.dialect.stream_type}; charset=utf-8" if query.stream else JSON
