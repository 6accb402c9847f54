"""The nouns of the program as frozen values. No I/O, no clock: times are arguments.

Units are in the names: `_s` seconds, `_ms` milliseconds since the Unix epoch or of duration, `_nusd` integer
nano-dollars (1e-9 USD).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from proxy.core.option import option
from proxy.core.pace import Pace
from proxy.core.units import DAY_S, MIB

Input = str | tuple[int, ...]
"""What one vector is asked for: a text, or the ids of its tokens."""


class Level(StrEnum):
    """How far a lookup may go. `none` neither reads nor writes the cache."""

    NONE = "none"
    EXACT = "exact"
    FULL = "full"  # exact, then semantic


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What the built-in policy allows for one request (reference table (c)), with the reason it stops there."""

    level: Level
    reason: str | None = None  # machine-readable: "temperature", "tools", "time_words", ...
    ttl_cap_s: float | None = None


@dataclass(frozen=True, slots=True)
class Controls:
    """What the client asked of the cache, in RFC 9111 words where they exist. A client can only narrow."""

    read: bool = True
    write: bool = True
    exact_only: bool = False
    only_if_cached: bool = False
    max_age_s: float | None = None
    max_stale_s: float | None = None
    ttl_s: float | None = None
    namespace: str = ""
    tags: tuple[str, ...] = ()
    max_error: float | None = None
    user: str = ""
    sample: str = ""  # which of several answers to one question; each is kept under its own name
    explain: bool = False
    shadow: bool = False
    refresh: bool = False
    plan: str = ""  # lanes, or changes to them, see `plan.edited`
    deadline_s: float | None = None  # the client can wait that long for a cheaper answer
    pace: Pace | None = None  # of a streamed hit; None: as the operator says


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counters of one answer. `input_tokens` includes cache reads and writes, as OpenAI counts them, and
    `output_tokens` the rejected part of a prediction, which is billed as output."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete model output, to be replayed streamed or whole, in the dialect that recorded it or in another.

    `message` is the assistant message in OpenAI's words with every field the upstream sent (content, reasoning,
    refusal, annotations...). `pieces` are the lengths, in characters of `message["content"]`, of the content deltas
    as they were streamed; empty when the answer was not streamed. `raw_usage`, `extra` and `choice` are in the words of
    `dialect`; what of them another dialect cannot say, see `Dialect.expresses`.
    """

    message: Mapping[str, Any]
    finish_reason: str
    model: str
    usage: Usage | None
    raw_usage: Mapping[str, Any] | None
    extra: Mapping[str, Any] = field(default_factory=dict)  # other top-level fields, e.g. system_fingerprint
    pieces: tuple[int, ...] = ()
    choice: Mapping[str, Any] = field(default_factory=dict)  # other fields of its one choice, e.g. logprobs: null
    dialect: str = "openai"  # that recorded it
    limit: int | None = None  # the output limit it ended under, where no usage says how long it is
    opaque: bool = False  # carries signed or encrypted parts: for the very same question only
    runs: tuple[int, ...] = ()  # how its stream came, see `core.pace`; empty when it was not streamed, or came at once

    @property
    def calls(self) -> list[Any]:
        """The functions it calls, as tools or in the way before there were tools."""
        calls = [call.get("function") for call in self.message.get("tool_calls") or ()]
        legacy = self.message.get("function_call")
        return [*calls, legacy] if legacy and legacy.get("name") else calls


@dataclass(frozen=True, slots=True)
class Draft:
    """A storable answer on its way to SQL; SQL gives it its id."""

    scope: bytes
    fingerprint: bytes
    tenant: str
    namespace: str
    upstream: str
    operation: str
    model: str
    prompt: str  # "" for exact-only entries
    answer: bytes  # `encode_answer`
    usage: Usage | None
    created_ms: int
    expires_ms: int
    request_id: str  # the request that caused it: the writer, for purges
    total_ms: float  # what the upstream took: the time a hit saves
    tags: tuple[str, ...] = ()
    embedding: bytes | None = None  # float32 little endian, unit length
    embedder: str | None = None
    signature: bytes | None = None  # token classes of the prompt, see index.tokens


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer. `checksum` covers every field that decides whether and what to serve."""

    id: int
    draft: Draft
    checksum: bytes


class Candidate(NamedTuple):
    """What the index proposes. `similarity` is the inner product of unit vectors; `vetoes` a bit set of guards."""

    entry_id: int
    similarity: float
    vetoes: int
    signature: Any  # token classes of the stored prompt, an array that core does not look into
    normal: bool = False  # both texts have one normal form


class Comparison(NamedTuple):
    """Two answers compared: the one given anew to a question, and the one that was, or would have been, served.

    `features`, `words` and `signature` are arrays of the learner's, as bytes: float32, int16, uint64.
    """

    ts_ms: int
    source: str  # "forward": a miss brought the new answer; "audit"; "feedback"
    request_id: str
    tenant: str
    namespace: str
    scope: bytes
    fingerprint: bytes  # of the question asked
    embedder: str
    entry_id: int  # of the answer it was compared with
    group_id: int
    similarity: float
    log_odds: float
    standing: str  # how it was, or would have been, served; "" when it would not
    served: bool
    region: str  # of texts whose hits need no proof: "normal", "alike"; "" for none
    comparer: str  # what compared the answers; "" for somebody who knows
    p_same: float  # that one answer serves both questions
    p_null: float | None  # that the kept question, asked again, was answered as before; None: it was not asked
    weight: float  # decisions like it that this one stands for; 0 when the pair guard would not have let it be served
    features: bytes
    words: bytes
    signature: bytes


class RepeatedAnswer(NamedTuple):
    """A question that had an answer was answered anew, for whatever reason, and both answers were compared."""

    ts_ms: int
    request_id: str  # of the one that was answered anew
    entry_id: int
    comparer: str
    p_same: float


class Tier(StrEnum):
    EXACT = "exact"
    SEMANTIC = "semantic"
    COLLAPSED = "collapsed"
    STALE = "stale"
    EDGE = "edge"
    FAILOVER = "failover"


@dataclass(frozen=True, slots=True)
class Hit:
    entry: Entry
    tier: Tier
    similarity: float
    probability: float
    reason: str = "hit"


@dataclass(frozen=True, slots=True)
class NearMiss:
    entry_id: int
    similarity: float
    probability: float
    reason: str  # the guard, or "below_bound"


@dataclass(frozen=True, slots=True)
class Miss:
    reason: str


@dataclass(frozen=True, slots=True)
class Bypass:
    reason: str


Verdict = Hit | NearMiss | Miss | Bypass


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt at an upstream, as it will be billed."""

    id: str
    ts_ms: int
    upstream: str
    model: str
    purpose: str  # "answer", or why one more was made: a key of `saving.EXTRA_CALLS`
    tier: str  # service tier: "default" | "flex" | "batch" | "priority"
    won: bool  # its answer reached a client
    usage: Usage | None
    usage_basis: str  # "measured" | "estimated" | "none"
    status: int  # 0 when no response came
    ttft_ms: float | None
    total_ms: float
    shaped_by: tuple[str, ...] = ()  # mechanisms that made it another call than the client's, in order of action


class Outcome(NamedTuple):
    """One finished request: all that the ledger needs, no prompt text.

    `mechanism` names the lane that answered without a call of its own ("cache.exact", "cache.semantic",
    "stream.coalesce") or in place of an upstream that failed ("edge.offline", "hybrid.failover",
    "cache.stale-if-error"), or is None for a forward. A tuple, because a hit makes one per request: what differs
    between two hits of one entry stands first and last, see `again`.
    """

    request_id: str
    ts_ms: int
    tenant: str
    namespace: str
    tag: str
    dialect: str
    endpoint: str
    stream: bool
    model_requested: str
    model_served: str
    upstream: str
    mechanism: str | None = None
    outcome: str = "ok"  # or "error", or "cancelled"
    cache_status: str = "MISS"  # "HIT" | "MISS" | "BYPASS" | "REFRESH" | "STALE" | "SHADOW" | "AUDIT"
    reason: str = ""
    status: int = 200
    similarity: float | None = None
    entry_id: int | None = None
    retry_of: str | None = None
    usage: Usage | None = None  # client-visible
    usage_basis: str = "none"
    calls: tuple[Call, ...] = ()
    baseline_ms: float | None = None  # what the upstream took when the entry was made
    tier: str = "default"  # service tier asked for
    key_id: str | None = (
        None  # the virtual key that asked, and its project; None and "" for a credential passed through
    )
    team: str = ""
    looked: str = ""  # how the lookup came to its verdict, compact JSON without any text; "" where nothing was judged
    ttft_ms: float | None = None
    total_ms: float = 0.0

    @property
    def is_partial(self) -> bool:
        """The cache gave a part of the answer and an upstream call the rest: inputs of an embedding request."""
        return self.mechanism == "cache.exact" and bool(self.calls)

    @property
    def recurring(self) -> tuple[Any, ...]:
        """All that is the same whenever this happens again."""
        return self[2:-2]


def again(recurring: tuple[Any, ...], request_id: str, ts_ms: int, ttft_ms: float | None, total_ms: float) -> Outcome:
    """The same outcome at another time."""
    return Outcome._make((request_id, ts_ms, *recurring, ttft_ms, total_ms))


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the client listener (reference (d), default limits)."""

    body_bytes: int = option(4 * MIB, "largest request body, decoded", above=0)
    json_depth: int = option(64, "deepest nesting of a body", above=0)
    messages: int = option(2048, "longest conversation", above=0)
    headers: int = option(128, "header lines of one request", above=0)
    header_line_bytes: int = option(8190, "longest header line", above=0)
    header_timeout_s: float = option(10.0, "time to send the whole head; ends slow senders", above=0)
    heads_bytes: int = option(
        32 * MIB, "memory for heads that are still arriving, together; beyond it the oldest is ended", above=0
    )
    head_share: float = option(
        0.25, "part of it for one address, once three quarters are taken", above=0, between=(0.001, 1.0)
    )
    body_timeout_s: float = option(
        30.0, "how long a request body may be silent, or in all behind body_bytes_per_s", above=0
    )
    body_bytes_per_s: int = option(
        4096, "least rate of a request body; a slower one is cut after body_timeout_s", above=0
    )
    upload_timeout_s: float = option(3600.0, "longest wait for one request body in all, however fast", above=0)
    bodies: int = option(
        512, "request bodies arriving at once, at most half of in_flight; whole ones need no place", above=0
    )
    body_share: float = option(
        0.25,
        "part of those places for one credential or address, once three quarters are taken",
        above=0,
        between=(0.001, 1.0),
    )
    bodies_bytes: int = option(256 * MIB, "memory for bodies that are still arriving, together", above=0)
    keep_alive_s: float = option(75.0, "idle time before a client's connection is closed", above=0)
    connections: int = option(4096, "open client connections", above=0)
    in_flight: int = option(1024, "requests worked on at once", above=0)
    queued: int = option(256, "requests waiting for a turn; beyond it 503 at once")
    queue_timeout_s: float = option(10.0, "longest wait for a turn", above=0)
    write_stall_s: float = option(60.0, "longest time a client may leave an answer unread", above=0)
    memo_bytes: int = option(
        8 * MIB,
        "memory for what was read of repeated requests, in each of the places that remember it",
        above=0,
        between=(64 * 1024, 1024 * MIB),
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """The built-in policy's numbers: all that core receives of the configuration."""

    max_error_rate: float = option(
        0.01, "share of hits that may be wrong: the budget the judge keeps", between=(0.0, 0.5)
    )
    ttl_s: float = option(float(DAY_S), "life of an entry when nobody says otherwise")
    max_ttl_s: float = option(30.0 * DAY_S, "longest life a client may ask for")
    volatile_ttl_s: float = option(60.0, "life of an answer to a question about now")
    semantic_temperature_max: float = option(
        0.3, "explicit temperature above this: exact only, the client wants variety", between=(0.0, 2.0)
    )
    exact_temperature_max: float = option(
        1.0, "explicit temperature above this: never served, the client wants another sample", between=(0.0, 2.0)
    )
    cache_seeded: bool = option(False, "exact hits even for a request that gives a seed")
    cache_tools: bool = option(True, "exact hits for requests that carry tools and were answered in text")
    cache_tool_calls: bool = option(
        True, "exact hits whose answer is a tool call, with new ids: a repeated question repeats the call"
    )
    cache_refusals: bool = option(False, "keep answers that refuse in plain words, a short no in five languages")
    semantic: bool = option(True, "look for reworded questions at all")
    shadow: bool = option(
        False, "look everything up, tell what would have been served, and serve nothing: `ibid report` says what for"
    )
    min_words: int = option(3, "shorter prompts say too little to compare")
    near_floor: float = option(0.80, "similarity from which a miss is listed as a near-miss", between=(0.0, 1.0))
    start_similarity: float = option(
        0.95, "similarity that serves before a scope has evidence, if no guard objects", between=(0.8, 1.0)
    )
    audit_share: float = option(
        0.05, "share of proven hits asked again upstream, off the client's path", between=(0.0, 1.0)
    )
    learning_share: float = option(
        0.1, "share of what semantic hits saved that may be spent on learning from them", between=(0.0, 1.0)
    )
    pair_guard: bool = option(
        True, "ask the pair guard about every semantic hit; false serves more, and more of it wrong"
    )
    alpha: float = option(0.1, "chance that the bound on the error rate is ever too low", between=(0.001, 0.5))
    search_models: tuple[str, ...] = option(
        (), "more models that search at their provider, with * and ?, lower case; never stored, as the known ones"
    )
    search_fields: tuple[str, ...] = option((), "more request fields that make a provider search; never stored")
    answer_limit_bytes: int = option(MIB, "longer answers are not stored")
    prompt_limit_bytes: int = option(256 * 1024, "longer prompts are not looked up")
