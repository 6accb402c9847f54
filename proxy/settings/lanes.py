"""The limits of the lanes, `[lane.NAME]`, and what switches lanes on: `[alias.NAME]` and `[[policy]]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from proxy.core.option import option
from proxy.core.plan import Match


@dataclass(frozen=True, slots=True)
class StaleLane:
    """Both stale lanes. RFC 5861; expired entries are kept for the longer of the two windows."""

    while_revalidate_s: float = option(0.0, "how long after its end an entry is served while a new answer is fetched")
    if_error_s: float = option(0.0, "how long after its end an entry stands in for an upstream that failed")


@dataclass(frozen=True, slots=True)
class FailoverLane:
    """Retries, and upstreams that stand in. What moves at all is the policies' `on_error` and `on_rate_limit`."""

    retries: int = option(2, "further calls of one request at the upstream it asks, before the first byte", least=1)
    within_s: float = option(10.0, "time from a request's begin in which they may begin, pauses included", least=0.001)
    max_extra_load: float = option(0.05, "retries, as a share of the calls made; 8 more to begin with; 0: none", most=1)
    probe_timeout_s: float = option(
        10.0, "how long an upstream with an open circuit has for its first byte, where something stands in", least=0.001
    )


@dataclass(frozen=True, slots=True)
class EdgeLane:
    """The local model: lanes edge, edge-if-error, cascade and race need it."""

    upstream: str | None = option(None, "upstream of the local model, of the OpenAI dialect; unset: no edge lanes")
    model: str | None = option(None, "its name there; required with upstream")
    timeout_s: float = option(60.0, "longest wait for its whole answer", least=0.001)


@dataclass(frozen=True, slots=True)
class CascadeLane:
    """The edge first, where its failure can be proven: JSON asked for, or one of these two."""

    pattern: str | None = option(None, "regular expression the whole answer must match, for answers in text")
    min_logprob: float | None = option(None, "least mean log-probability of the answer's tokens", least=-100, most=0)
    max_output_tokens: int = option(1024, "requests that allow longer answers are not tried at the edge", least=1)


@dataclass(frozen=True, slots=True)
class RouteLane:
    """Route by the k nearest answered questions."""

    candidates: tuple[str, ...] = option((), '"upstream/model", cheapest first; of the dialect asked, or OpenAI\'s')
    k: int = option(50, "answered questions asked for their votes", least=1, most=64)
    min_similarity: float = option(0.35, "less alike questions have no vote", least=-1, most=1)
    min_neighbours: int = option(20, "with fewer votes the requested model answers", least=1)
    accept_quality: float = option(0.9, "share of good answers that the lower bound must reach", most=1)
    confidence_z: float = option(1.645, "of Wilson's lower bound; 1.645 is 95 %, one-sided", most=5)
    explore_share: float = option(0.02, "share of requests also put to the other model, off the client's path", most=1)
    sticky_s: float = option(3600.0, "how long a conversation stays with its model")


@dataclass(frozen=True, slots=True)
class PrefixLane:
    """Marks for the provider's own prefix cache."""

    lifetime_s: float = option(300.0, "how long a provider keeps a prefix; seen again within it, it is marked", least=1)
    by_default: bool = option(
        True, "on Anthropic requests whose policy lists no lanes; false: where a plan says prefix"
    )


@dataclass(frozen=True, slots=True)
class PredictLane:
    """A near-miss's answer sent along as `prediction`: it buys time, never money."""

    models: tuple[str, ...] = option((), "models that take a prediction, with * and ?; none: the lane is off")
    min_similarity: float = option(0.8, "of the near-miss", least=-1, most=1)
    min_output_tokens: int = option(64, "shorter answers gain nothing", least=1)
    min_accept_rate: float = option(0.5, "share of predicted tokens that must be accepted", most=1)


@dataclass(frozen=True, slots=True)
class TierLane:
    """A cheaper service tier first."""

    name: Literal["flex"] = option("flex", "service_tier sent")
    models: tuple[str, ...] = option((), "models that have it, with * and ?; none: the lane is off")
    margin_s: float = option(15.0, "time kept for the default tier before the client's deadline")


@dataclass(frozen=True, slots=True)
class RaceLane:
    """Edge and cloud at once; the edge wins only with a proven answer."""

    head_start_s: float = option(0.5, "how long the edge has alone, until its own times are known")


@dataclass(frozen=True, slots=True)
class HedgeLane:
    """One more call when the first is slow to say its first token."""

    quantile: float = option(0.95, "of the times to first token seen, after which to send one more", least=0.5, most=1)
    min_samples: int = option(20, "times to be seen first", least=1)
    min_delay_s: float = option(0.05, "never sooner than this")
    max_extra_load: float = option(0.05, "further calls, as a share of the calls made", most=1)


@dataclass(frozen=True, slots=True)
class PrefetchLane:
    """Ask the likely next question before it is asked, on cheap lanes only."""

    min_count: int = option(3, "times a question must have followed another", least=1)
    min_share: float = option(0.5, "share of times it must have followed", most=1)
    within_s: float = option(120.0, "a question later than this does not follow")
    ttl_s: float = option(600.0, "life of what was prefetched", least=1)


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """`[lane.NAME]`: the limits of every lane that has some."""

    stale: StaleLane = field(default_factory=StaleLane)
    failover: FailoverLane = field(default_factory=FailoverLane)
    edge: EdgeLane = field(default_factory=EdgeLane)
    cascade: CascadeLane = field(default_factory=CascadeLane)
    route: RouteLane = field(default_factory=RouteLane)
    prefix: PrefixLane = field(default_factory=PrefixLane)
    predict: PredictLane = field(default_factory=PredictLane)
    tier: TierLane = field(default_factory=TierLane)
    race: RaceLane = field(default_factory=RaceLane)
    hedge: HedgeLane = field(default_factory=HedgeLane)
    prefetch: PrefetchLane = field(default_factory=PrefetchLane)


@dataclass(frozen=True, slots=True)
class AliasSettings:
    """`[alias.NAME]`: what `model@NAME` does to the plan."""

    plan: str = option("", "lanes, or changes to them, as x-plan says them")


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """One `[[policy]]`; the first that matches is the plan."""

    name: str = option("", "shown by explain; unset: its number")
    match: Match | None = option(
        None, "all of it must hold: model, tenant, namespace, tag as patterns; stream, tools, deadline as true or false"
    )
    plan: tuple[str, ...] = option((), "lanes; unset: exact, semantic, collapse")
    on_error: tuple[str, ...] = option(
        (), "what is tried when an upstream fails, in this order: retry, stale, upstream:NAME, edge"
    )
    on_rate_limit: tuple[str, ...] | None = option(
        None, "the same after an upstream's own 429, which may be its word to one key alone; unset: as on_error"
    )
    ttl_s: float | None = option(None, "life of what is stored, when the client does not say")


LANES: Mapping[str, type[Any]] = get_type_hints(LaneSettings)
