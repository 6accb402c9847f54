"""The provider's own prompt cache: where a request that does not use it could, and when that pays.

Anthropic caches what stands before a breakpoint (`cache_control`), up to four a request, in the order tools, system,
messages; below a minimum length nothing is cached and nothing is said. OpenAI caches by itself and is helped by a
`prompt_cache_key` that requests with the same beginning share. Reads are cheap, writes of some models cost more than
plain input (protocols §2), so a prefix is written only when it is known to come again.

A read saves nine tenths of what plain input costs and a write costs a quarter more, so a write pays from the first time
it is read, or where of ten writes three are: a prefix seen twice within its lifetime is likely to come a third time.
Whether it does is measured: where marked calls have cost more than they would have without, marks rest.

A conversation's end is new at every turn, so its own digest is never seen twice. It is worth writing when what it
grew from, the whole of an earlier request, was seen: the conversation is alive, and the next turn will read it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from proxy.core.jsontext import items, members, set_member
from proxy.core.model import Usage

MOST_BREAKPOINTS = 4
BYTES_PER_TOKEN = 4
DEFAULT_MINIMUM = 1_024
MINIMUMS: tuple[tuple[str, int], ...] = (
    ("*claude-opus-4-[56]*", 4_096),
    ("*claude-haiku-4-5*", 4_096),
    ("*claude-sonnet-4-6*", 2_048),
    ("*claude-3-5-haiku*", 2_048),
    ("*claude-3-haiku*", 2_048),
)
"""Model → tokens below which it caches nothing (Anthropic's documentation of 2026; Sonnet 4.6 as measured in
anthropic-sdk-python#1194)."""

LIFETIME_S = 300.0
MEMORY_LIMIT = 4_096
ACCOUNTS = 1_024
FAIR_NUMBER = 16  # marked calls of which the first ones write and the others read, where marks pay at all
REST_S = 3_600.0

CACHEABLE = frozenset(
    {
        "text", "image", "document", "search_result", "tool_use", "tool_result", "server_tool_use",
        "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
        "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result",
        "container_upload",
    }
)  # fmt: skip
"""Blocks that may carry a breakpoint. Thinking may not, an empty text may not, and of others we do not know."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_MARK = b'{"type":"ephemeral"}'
_MESSAGE_SETTINGS = ("tool_choice", "thinking", "output_config", "speed")  # a change makes the messages' cache void
_OPENAI_TOOLS = ("tools", "functions")
_STANDING = frozenset({"system", "developer"})


class Place(NamedTuple):
    """Where a breakpoint goes: `part` is "tools", "system" or "messages"; a string counts as its one block."""

    part: str
    number: int
    block: int = 0


class Breakpoint(NamedTuple):
    """A prefix that ends at `place`. `tokens` is a guess from its bytes; `follows` is the digest it grew from."""

    place: Place
    digest: bytes
    tokens: int
    follows: bytes | None = None


class Prefixes(NamedTuple):
    """What of a request could be cached, shortest first; `whole` is the digest of all of it."""

    breakpoints: tuple[Breakpoint, ...]
    whole: bytes | None
    why_none: str | None = None


class Decision(NamedTuple):
    """Breakpoints to inject, or why there are none: "own_breakpoints", "nothing_stable", "too_short", "seen_once"."""

    places: tuple[Place, ...]
    why_none: str | None


def minimum_tokens(model: str) -> int:
    return next((tokens for pattern, tokens in MINIMUMS if fnmatchcase(model, pattern)), DEFAULT_MINIMUM)


def anthropic_breakpoints(body: Mapping[str, Any], salt: bytes) -> Prefixes:
    """After the last tool, the last system block, and the last message before the final user turn.

    `salt`: whose cache it is (tenant and upstream): equal prefixes of two tenants have nothing in common.
    """
    if any("cache_control" in holder for holder in _holders(body)):
        return Prefixes((), None, "own_breakpoints")
    chain = _Chain(salt, body.get("model"))
    found = []
    tools, system = _dicts(body.get("tools")), _blocks(body.get("system"))
    for index, tool in enumerate(tools):
        chain.add("tool", tool)
        if index == _last(tools, _may_mark_tool):
            found.append(Breakpoint(Place("tools", index), chain.digest(), chain.tokens))
    for index, block in enumerate(system):
        chain.add("system", block)
        if index == _last(system, _may_mark):
            found.append(Breakpoint(Place("system", index), chain.digest(), chain.tokens))
    messages = _dicts(body.get("messages"))
    stable = _last_stable(messages)
    chain.add("settings", [body.get(name) for name in _MESSAGE_SETTINGS])
    for index, message in enumerate(messages):
        before, blocks = chain.digest(), _blocks(message.get("content"))
        chain.add("role", message.get("role"))
        for place, block in enumerate(blocks):
            chain.add("block", block)
            if index == stable and place == _last(blocks, _may_mark):
                found.append(Breakpoint(Place("messages", index, place), chain.digest(), chain.tokens, before))
    return Prefixes(tuple(found), chain.digest() if messages else None, None if found else "nothing_stable")


def inject(raw: bytes, places: Iterable[Place]) -> bytes:
    """The same body with breakpoints there, a text opened into the one block it is; every other byte as it was."""
    for place in places:
        _, start, end = members(raw)[place.part]
        raw = raw[:start] + _marked(raw[start:end], place) + raw[end:]
    return raw


def _marked(held: bytes, place: Place) -> bytes:
    """The value of a part, or of a message's content, with its breakpoint."""
    if held[:1] == b'"':
        return b'[{"type":"text","text":%b,"cache_control":%b}]' % (held, _MARK)
    start, end = items(held)[place.number]
    item = held[start:end]
    if place.part == "messages":
        _, content, content_end = members(item)["content"]
        marked = _marked(item[content:content_end], Place("content", place.block))
        item = item[:content] + marked + item[content_end:]
    else:
        item = set_member(item, "cache_control", _MARK)
    return held[:start] + item + held[end:]


def openai_cache_key(body: Mapping[str, Any], secret: bytes) -> str | None:
    """A `prompt_cache_key` for chat or Responses, from what stands first in them: instructions and tools.

    None when the client chose one, or when nothing stands first. `secret` is the tenant's: keys tell nobody which
    prompts two tenants share.
    """
    if body.get("prompt_cache_key") is not None:
        return None
    turns = body.get("messages") if "messages" in body else body.get("input")
    standing = []
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict) or turn.get("role") not in _STANDING:
            break
        standing.append([turn["role"], turn.get("content")])
    parts = [standing, body.get("instructions"), body.get("prompt"), *(body.get(name) for name in _OPENAI_TOOLS)]
    if not any(parts):
        return None
    return "ibid-" + hmac.new(secret, _spelled(parts), hashlib.sha256).hexdigest()[:32]


def with_cache_key(body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    """A new body with the key, unless it has one or there is none."""
    if key is None or body.get("prompt_cache_key") is not None:
        return dict(body)
    return {**body, "prompt_cache_key": key}


def without_breakpoints(billed: Usage) -> Usage:
    """The same call had nothing been injected: all of its input at the plain price.

    As the `before` of a step it may be cheaper than what was paid: the first write costs extra.
    """
    return replace(billed, cache_read_tokens=0, cache_write_tokens=0)


class PrefixMemory:
    """Which prefixes came lately. Bounded: those not seen for the longest leave first."""

    def __init__(self, lifetime_s: float = LIFETIME_S, limit: int = MEMORY_LIMIT) -> None:
        self._lifetime_s = lifetime_s
        self._limit = limit
        self._seen: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # digest → last time, times in a row

    def __len__(self) -> int:
        return len(self._seen)

    def decide(self, found: Prefixes, now_s: float, *, least_tokens: int, writes_cost_extra: bool) -> Decision:
        """What to inject into this request, which is remembered. Every sight keeps a prefix for another lifetime."""
        long = [one for one in found.breakpoints if one.tokens >= least_tokens]
        alive = {one.digest for one in long if one.follows is not None and self._is_alive(one.follows, now_s)}
        again = {one.digest for one in long if self._sight(one.digest, now_s) > 1}
        if found.whole is not None:
            self._sight(found.whole, now_s)
        chosen = [one for one in long if not writes_cost_extra or one.digest in alive | again]
        if chosen:
            return Decision(tuple(one.place for one in chosen[-MOST_BREAKPOINTS:]), None)
        return Decision((), found.why_none or ("seen_once" if long else "too_short"))

    def _is_alive(self, digest: bytes, now_s: float) -> bool:
        last = self._seen.get(digest)
        return last is not None and now_s - last[0] < self._lifetime_s

    def _sight(self, digest: bytes, now_s: float) -> int:
        """How often it was seen in a row, this time included."""
        times = self._seen[digest][1] + 1 if self._is_alive(digest, now_s) else 1
        self._seen[digest] = (now_s, times)
        self._seen.move_to_end(digest)
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return times


class Balance:
    """What marks have brought and cost, by whose they are. Where a fair number of them cost more than they brought,
    they rest for a while, and are then tried again. Bounded: the least used account leaves first."""

    def __init__(self, limit: int = ACCOUNTS) -> None:
        self._limit = limit
        self._accounts: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()  # calls, nano-dollars
        self._rest_until: dict[Hashable, float] = {}

    def see(self, whose: Hashable, gain_nusd: int, now_s: float) -> None:
        """A marked call has ended, which cost so much less than it would have; more when negative."""
        calls, nusd = self._accounts.pop(whose, (0, 0))
        calls, nusd = calls + 1, nusd + gain_nusd
        if calls < FAIR_NUMBER or nusd >= 0:
            self._accounts[whose] = (calls, nusd) if calls < 8 * FAIR_NUMBER else (calls // 2, nusd // 2)
            if len(self._accounts) > self._limit:
                self._accounts.popitem(last=False)
            return
        self._rest_until[whose] = now_s + REST_S
        if len(self._rest_until) > self._limit:
            del self._rest_until[next(iter(self._rest_until))]

    def rests(self, whose: Hashable, now_s: float) -> bool:
        """Whether they were found not to pay."""
        until_s = self._rest_until.get(whose)
        if until_s is not None and until_s <= now_s:
            del self._rest_until[whose]
            return False
        return until_s is not None


class _Chain:
    """A running digest and size of what a request begins with."""

    def __init__(self, salt: bytes, model: object) -> None:
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._hash.update(_spelled([salt.hex(), model]) + b"\n")

    @property
    def tokens(self) -> int:
        return self._bytes // BYTES_PER_TOKEN

    def add(self, kind: str, part: object) -> None:
        spelled = _spelled([kind, part])
        self._hash.update(spelled + b"\n")  # no raw newline inside JSON: frames cannot run together
        if kind in ("tool", "system", "block"):
            self._bytes += len(spelled) - _encoded_bytes(part)

    def digest(self) -> bytes:
        return self._hash.copy().digest()


def _spelled(value: object) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _encoded_bytes(part: object) -> int:
    """Base64 in it: an image costs by its size in pixels, so its bytes are not counted, which errs towards short."""
    if isinstance(part, list):
        return sum(_encoded_bytes(inner) for inner in part)
    if not isinstance(part, dict):
        return 0
    source = part.get("source")
    data = source.get("data") if isinstance(source, dict) and source.get("type") == "base64" else None
    return (len(data) if isinstance(data, str) else 0) + _encoded_bytes(part.get("content"))


def _dicts(value: object) -> list[dict[str, Any]]:
    """The list, when all of it is objects: a place must mean the same there and in the body."""
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []


def _blocks(content: object) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else _dicts(content)


def _holders(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Everything that a client may have put a breakpoint on."""
    yield body
    yield from _dicts(body.get("tools"))
    yield from _nested(body.get("system"))
    for message in _dicts(body.get("messages")):
        yield message
        yield from _nested(message.get("content"))


def _nested(content: object) -> Iterator[Mapping[str, Any]]:
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict):
            yield block
            yield from _nested(block.get("content"))


def _may_mark(block: Mapping[str, Any]) -> bool:
    return block.get("type") in CACHEABLE and (block["type"] != "text" or bool(block.get("text")))


def _may_mark_tool(tool: Mapping[str, Any]) -> bool:
    return not tool.get("defer_loading")  # such a tool is not in the prompt until it is asked for


def _last(items: Sequence[Mapping[str, Any]], may: Any) -> int | None:
    return next((index for index in range(len(items) - 1, -1, -1) if may(items[index])), None)


def _last_stable(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the message before the final user turn, which a begun answer may follow; None when there is none."""
    end = len(messages)
    while end and messages[end - 1].get("role") != "user":
        end -= 1
    while end and messages[end - 1].get("role") == "user":
        end -= 1
    return end - 1 if end else None
