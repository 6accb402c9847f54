"""What a conversation kept at its provider says, where ibid has seen all of it.

A request of OpenAI Responses may continue an answer by its id alone (`previous_response_id`). What was said before is
then known by content only if that answer went through here: the question it answered, with all that the question's own
scope holds (and so on back to the first), and what it said. An id that was not seen, or that another tenant or another
upstream was seen with, stands for nothing here, and the request is not looked up.

The ids of tool calls are part of what was said: what the next request brings for them is told apart by them alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from proxy.core.jsontext import canonical
from proxy.core.model import Answer

KEPT = 32_768


class Chains:
    """(tenant, upstream, id of an answer) → 32 bytes that stand for all that was said up to it. Bounded: what was not
    continued or told again for the longest leaves first."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._said: OrderedDict[tuple[str, str, str], bytes] = OrderedDict()

    def learn(self, tenant: str, upstream: str, fingerprint: bytes, answer: Answer) -> None:
        """An answer to the question of this fingerprint goes to its client. Nothing is learned of one without an id
        that its provider keeps, or of a question that has no fingerprint."""
        kept_id = answer.extra.get("id") if answer.dialect == "responses" else None
        if not isinstance(kept_id, str) or not fingerprint:
            return
        key = tenant, upstream, kept_id
        if key in self._said:
            self._said.move_to_end(key)
            return
        self._said[key] = hashlib.sha256(b"chain\x00" + fingerprint + canonical(answer.message)).digest()
        if len(self._said) > self._limit:
            self._said.popitem(last=False)

    def find(self, tenant: str, upstream: str, kept_id: str) -> bytes | None:
        key = tenant, upstream, kept_id
        if key in self._said:
            self._said.move_to_end(key)
        return self._said.get(key)
