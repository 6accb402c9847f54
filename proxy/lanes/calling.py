"""One call at an upstream: opened, made readable, and, where it was put in OpenAI's words, answered in the client's.

Every call is an `Attempt` on the fetch's list before it is sent, so that the ledger knows of it whatever comes after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from proxy import ports
from proxy.core.dialects.dialect import JSON
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.errors import UpstreamError
from proxy.core.facts import Facts
from proxy.core.hedging import Times
from proxy.core.model import Answer
from proxy.core.query import Query
from proxy.lanes.usage import REFUSALS, UsageAsking, refusal_of
from proxy.records import Fetch
from proxy.settings.lanes import EdgeLane
from proxy.upstreams.attempt import Attempt, LocalResponse, whole_of
from proxy.upstreams.decoding import readable
from proxy.upstreams.sending import Sending, headers_for, to_other

_CHAT: Final = OpenAIChat()


class Calls:
    """Owns what it has learned of upstreams that refuse what ibid adds, and of the edge's times."""

    def __init__(self, upstream: ports.Upstream, edge: EdgeLane, facts: Callable[[Query], Facts], times: Times) -> None:
        self._upstream = upstream
        self._edge = edge
        self._facts = facts
        self._times = times
        self._usage = UsageAsking()

    async def send(self, fetch: Fetch, sending: Sending) -> ports.UpstreamResponse:
        """One call, which becomes the fetch's own."""
        attempt = Attempt(sending)
        fetch.attempt = attempt
        response = await self.open(fetch, attempt)
        if not sending.is_translated:
            return response
        answer = await self.read(attempt, response)
        return self.said(fetch, attempt, answer)

    async def open(self, fetch: Fetch, attempt: Attempt) -> ports.UpstreamResponse:
        """Its response, the head arrived. Raises UpstreamError, BadRequest."""
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

    async def read(self, attempt: Attempt, response: ports.UpstreamResponse) -> Answer:
        """The whole answer of a translated call. Raises UpstreamError when there is none."""
        body = await whole_of(response)
        attempt.end()
        attempt.size_bytes = len(body)
        recording = _CHAT.record(body, is_stream=False, n=1)
        attempt.usage = recording.usage
        if response.status != 200 or recording.answer is None:
            message = "The local model did not give an answer."
            raise UpstreamError(message, code="edge_failed", status=502)
        if attempt.first_byte_s is not None and attempt.ended_s is not None:
            self._times.see(attempt.sending.upstream, (attempt.ended_s - attempt.opened_s) * 1e3)
        return recording.answer

    def said(self, fetch: Fetch, attempt: Attempt, answer: Answer) -> ports.UpstreamResponse:
        """An answer as a response in the client's dialect. Raises UpstreamError where that cannot say it."""
        query = fetch.asked
        if not query.dialect.expresses(answer, has_stops=query.has_stops, keeps_id=query.keeps_id):
            raise UpstreamError("The local model's answer cannot be said here.", code="edge_failed", status=502)
        fetch.attempt = attempt
        attempt.purpose = "answer"
        fetch.usage = attempt.usage
        return told(fetch, answer)

    def edge_sending(self, fetch: Fetch, mechanism: str, *, whole: bool) -> Sending | None:
        """The question for the local model, or None where there is none or it cannot be said there."""
        edge, query = self._edge, fetch.asked
        if edge.upstream is None or edge.model is None or query.batch is not None:
            return None
        if query.upstream == edge.upstream and query.model == edge.model:
            return None  # it is the edge that was asked
        return to_other(query, self._facts(query), edge.upstream, edge.model, mechanism, whole=whole)


def told(fetch: Fetch, answer: Answer) -> ports.UpstreamResponse:
    """An answer as the response of a model server in the client's dialect."""
    query = fetch.asked
    template = query.dialect.render(answer, stream=query.stream, wants_usage=True, usage_mode="original")
    body = template.fill(fetch.client.request_id, fetch.client.ts_ms // 1000)
    media = f"{query.dialect.stream_type}; charset=utf-8" if query.stream else JSON
    return LocalResponse(200, media, body)
