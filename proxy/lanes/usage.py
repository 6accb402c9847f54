"""Asking streams for their usage, which ibid does on its own: an upstream that refuses that is asked without it.

What shapes a call must never break it. The refused call is not booked: nobody bills a 400.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from proxy.core.dialects.dialect import JSON
from proxy.core.dialects.openai_chat import as_asked
from proxy.core.query import Query
from proxy.ports import UpstreamResponse
from proxy.upstreams.attempt import LocalResponse
from proxy.upstreams.sending import Sending

REFUSALS: Final = frozenset({400, 422})
REFUSAL_LIMIT_BYTES: Final = 256 * 1024
_OF_A_FIELD: Final = re.compile(
    rb"stream_options|include_usage|unrecognized|unrecognised|unknown|unexpected|unsupported|not support"
    rb"|extra|additional propert|not permitted|not allowed|forbidden",
    re.IGNORECASE,
)
"""What a refusal says that may be about a field nobody knows there; one that says nothing at all may be, too."""


class UsageAsking:
    """Knows which upstreams refuse it. Lives as long as the process."""

    def __init__(self) -> None:
        self._refusing: set[str] = set()

    def adapted(self, sending: Sending, query: Query) -> Sending:
        """The call as this upstream takes it."""
        return self.plainly(sending, query) if sending.upstream in self._refusing else sending

    @staticmethod
    def plainly(sending: Sending, query: Query) -> Sending:
        """The call without what ibid added to ask for its usage; the very same when it added nothing."""
        if not query.stream or query.wants_usage or b'"stream_options"' not in sending.body:
            return sending
        return replace(sending, body=as_asked(sending.body, query.body))

    def learn(self, upstream: str) -> None:
        """That a call was taken without it which was refused with it."""
        self._refusing.add(upstream)


async def refusal_of(response: UpstreamResponse) -> tuple[bool, UpstreamResponse]:
    """Whether a refusal may be about a field that was added, and the same refusal, whole. Its connection is given up:
    a server that closes it behind a refusal must not meet the next call there. Raises UpstreamError."""
    body = b""
    try:
        while len(body) < REFUSAL_LIMIT_BYTES and (piece := await response.read_some()):
            body += piece
    finally:
        response.abort()
    kept = [line for line in response.headers if line[0].lower() != "content-type"]
    told = LocalResponse(response.status, response.header("content-type") or JSON, body, kept)
    return not body.strip() or _OF_A_FIELD.search(body) is not None, told
