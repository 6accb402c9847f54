"""One way to put a question to a model server: whom, with which bytes, and what made it differ from the client's own.

Every transforming lane takes a `Sending` and gives another. The client's bytes are spliced, not written anew, so what
a lane does not touch stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from proxy.core.dialects.openai_chat import OpenAIChat, forward_body
from proxy.core.dialects.routes import CHAT_PATH, without_key
from proxy.core.facts import Facts
from proxy.core.identity import CREDENTIALS
from proxy.core.jsontext import drop_member, parse, set_member
from proxy.core.query import Query

CHAT_SETTINGS = frozenset(
    {"frequency_penalty", "logit_bias", "parallel_tool_calls", "presence_penalty", "reasoning_effort",
     "response_format", "seed", "stop", "temperature", "tool_choice", "tools", "top_p", "verbosity"}
)  # fmt: skip
"""Settings in OpenAI's words that any server of its dialect is asked with. One beyond them may change the answer in a
way the other server does not know, so the question is not put to it."""

_ASKING = frozenset({"content-type", "traceparent", "tracestate"})
_OF_THE_DIALECT = _ASKING | {"anthropic-version", "anthropic-beta", "openai-beta"}
_AS_JSON = ((b"content-type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Sending:
    """`shaped_by`: the mechanisms that acted, in order. `is_foreign`: another server than the client asked, which is
    not shown the client's credential. `is_other`: another model than the one asked, whose answer is not stored as its.
    `is_translated`: said in OpenAI chat, not streamed, whatever the client speaks."""

    upstream: str
    model: str
    path_qs: str
    body: bytes
    tier: str = "default"
    shaped_by: tuple[str, ...] = ()
    is_foreign: bool = False
    is_other: bool = False
    is_translated: bool = False

    def by(self, mechanism: str, **changes: Any) -> Sending:
        """The same after one more mechanism."""
        return replace(self, shaped_by=(*self.shaped_by, mechanism), **changes)


def plain(query: Query, path_qs: str) -> Sending:
    """What the client itself would have sent."""
    return Sending(query.upstream, query.model, path_qs, query.forward_body, query.tier)


def speaks_chat(query: Query) -> bool:
    return isinstance(query.dialect, OpenAIChat)


def to_other(query: Query, facts: Facts, upstream: str, model: str, mechanism: str, *, whole: bool) -> Sending | None:
    """The question for a server of the OpenAI dialect, or None when it cannot be said there.

    `whole`: not streamed, to be looked at before the client is given it. Otherwise a chat client's bytes go on as they
    are, for the other model; another client's answer has to be whole to be said in its dialect.
    """
    if speaks_chat(query) and not whole:
        body = set_member(query.forward_body, "model", orjson.dumps(model))
        return Sending(upstream, model, CHAT_PATH, body, "default", (mechanism,), is_foreign=True, is_other=True)
    said = chat_body(query, facts, model)
    if said is None:
        return None
    return Sending(
        upstream, model, CHAT_PATH, said, "default", (mechanism,), is_foreign=True, is_other=True, is_translated=True
    )


def elsewhere(variant: Query, mechanism: str) -> Sending:
    """A question as it is asked of another server of its dialect, its target without a credential."""
    path, mark, rest = variant.path_qs.partition("?")
    return Sending(
        variant.upstream,
        variant.model,
        path + without_key(mark + rest),
        variant.forward_body,
        variant.tier,
        (mechanism,),
        is_foreign=True,
        is_other=True,
    )


def chat_body(query: Query, facts: Facts, model: str) -> bytes | None:
    """The question as a whole OpenAI chat request for another model; None when it is more than that can say."""
    if speaks_chat(query):
        body = drop_member(drop_member(query.forward_body, "stream"), "stream_options")
        return set_member(body, "model", orjson.dumps(model))
    if facts.unknown or facts.inputs or query.dialect.operation != "chat" or not CHAT_SETTINGS >= facts.settings.keys():
        return None
    if facts.previous_response or facts.background:
        return None  # what was said before is kept elsewhere
    messages: list[Mapping[str, Any]] = [*facts.context]
    if not all([isinstance(message.get("role"), str) for message in messages]):
        return None
    if facts.prompt is not None:
        messages.append({"role": "user", "content": facts.prompt})
    said = {"model": model, "messages": messages, **facts.settings}
    if facts.output_limit is not None:
        said["max_tokens"] = facts.output_limit
    return orjson.dumps(said)


def headers_for(sending: Sending, headers: Sequence[tuple[bytes, bytes]]) -> Sequence[tuple[bytes, bytes]]:
    """The client's headers; to a server it did not ask, only those that say nothing of it."""
    if not sending.is_foreign:
        return headers
    asking = _ASKING if sending.is_translated else _OF_THE_DIALECT
    kept = [line for line in headers if (low := line[0].lower()) not in CREDENTIALS and low.decode("latin-1") in asking]
    return kept or list(_AS_JSON)


def with_member(sending: Sending, name: str, value: Any, mechanism: str, **changes: Any) -> Sending:
    """The same with one more member in the body."""
    return sending.by(mechanism, body=set_member(sending.body, name, orjson.dumps(value)), **changes)


def again(body: bytes) -> bytes:
    """A chat body after a change, as it goes upstream: its usage asked for."""
    return forward_body(body, parse(body))
