"""A near-miss's answer sent along as `prediction`: the upstream checks its tokens instead of making them.

It buys time and costs money: tokens that are not accepted are billed as output. So a cluster of questions (a scope)
goes on being predicted only while enough of its predicted tokens are accepted, and a model that refuses the field is
not sent it again for a while.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from proxy.core.jsontext import parse
from proxy.core.model import Answer, NearMiss, Usage
from proxy.core.patterns import is_one_of
from proxy.records import Fetch
from proxy.settings.lanes import PredictLane
from proxy.upstreams.sending import Sending, speaks_chat, with_member

MECHANISM: Final = "spec.predict"
TRIALS = 4  # predictions of a cluster before its share decides
DECAY = 0.2
RETRY_AFTER = 50  # questions of a cluster that is switched off, until one is tried again
CLUSTERS = 4096
REFUSALS = 1_024  # remembered, each for REFUSED_S
REFUSED_S = 3600.0
EXCLUDES: Final = frozenset(
    {"prediction", "tools", "functions", "logprobs", "max_completion_tokens", "max_tokens", "presence_penalty",
     "frequency_penalty", "audio", "modalities", "response_format"}
)  # fmt: skip
"""Fields that a prediction does not go with (OpenAI's guide), or beside which its use is not clear."""


class Acceptance:
    """What became of the predictions of one cluster."""

    __slots__ = ("share", "skipped", "tried")

    def __init__(self) -> None:
        self.tried = 0
        self.share = 1.0
        self.skipped = 0

    def may_try(self, least: float) -> bool:
        if self.tried < TRIALS or self.share >= least:
            return True
        self.skipped += 1
        return self.skipped % RETRY_AFTER == 0

    def see(self, accepted: int, rejected: int) -> None:
        if accepted + rejected:
            self.tried += 1
            self.share += (accepted / (accepted + rejected) - self.share) * max(DECAY, 1 / self.tried)


class Predictor:
    """`answer_of(entry id)` gives a stored answer, or None when it is gone."""

    def __init__(self, lane: PredictLane, answer_of: Callable[[int], Awaitable[Answer | None]]) -> None:
        self._lane = lane
        self._answer_of = answer_of
        self._clusters: OrderedDict[bytes, Acceptance] = OrderedDict()
        self._refused_until: dict[tuple[str, str], float] = {}

    async def predict(self, sending: Sending, fetch: Fetch) -> Sending:
        """The call with a prediction, or as it was."""
        query, near = fetch.asked, fetch.lookup.verdict
        if not isinstance(near, NearMiss) or near.similarity < self._lane.min_similarity or not speaks_chat(query):
            return sending
        if query.n > 1 or not is_one_of(sending.model, self._lane.models):
            return sending
        if self._refused_until.get((sending.upstream, sending.model), 0.0) > time.monotonic():
            return sending
        if not EXCLUDES.isdisjoint(_told(parse(sending.body))) or not self._cluster(query.scope).may_try(
            self._lane.min_accept_rate
        ):
            return sending
        answer = await self._answer_of(near.entry_id)
        if answer is None or answer.usage is None or answer.usage.output_tokens < self._lane.min_output_tokens:
            return sending
        content = answer.message.get("content")
        if not isinstance(content, str) or not content:
            return sending
        return with_member(sending, "prediction", {"type": "content", "content": content}, MECHANISM)

    def learn(self, scope: bytes, usage: Usage) -> None:
        """What the upstream made of a prediction."""
        self._cluster(scope).see(usage.accepted_prediction_tokens, usage.rejected_prediction_tokens)

    def refused(self, sending: Sending) -> None:
        """An upstream did not take a call with a prediction that it took without."""
        if MECHANISM in sending.shaped_by:
            if len(self._refused_until) >= REFUSALS:  # the models are of clients' naming
                del self._refused_until[next(iter(self._refused_until))]
            self._refused_until[sending.upstream, sending.model] = time.monotonic() + REFUSED_S

    def share(self, scope: bytes) -> float:
        """Of predicted tokens, those accepted lately."""
        return self._cluster(scope).share

    def _cluster(self, scope: bytes) -> Acceptance:
        known = self._clusters.get(scope)
        if known is None:
            known = self._clusters[scope] = Acceptance()
            if len(self._clusters) > CLUSTERS:
                self._clusters.popitem(last=False)
        self._clusters.move_to_end(scope)
        return known


def _told(body: Mapping[str, Any]) -> list[str]:
    return [name for name, value in body.items() if value not in (None, 0, [], {"type": "text"})]
