"""Which lanes a request may take, and in which order they act.

A plan is a set of lanes. Their order is fixed by class, so that any subset composes: what answers without an upstream
comes first (exact, semantic, stale-while-revalidate), then joining a forward in flight (collapse), then what changes
whom or how an upstream is asked (route to prefix), then how it is asked (race to defer), then what stands in for an
upstream that failed. A plan only switches lanes on; their limits are the operator's (`[lane.NAME]`).

Chosen by the first policy that matches, then edited by the virtual key, the model's alias and `x-plan`, in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache

from proxy.core.errors import BadRequest


class Lane(StrEnum):
    """In the order in which they act."""

    EXACT = "exact"
    SEMANTIC = "semantic"
    REVALIDATE = "stale-while-revalidate"
    COLLAPSE = "collapse"
    ROUTE = "route"  # the cheapest candidate whose answers to alike questions were good
    EDGE = "edge"  # the local model, whatever it is worth
    PREFIX = "prefix"
    PREDICT = "predict"
    TIER = "tier"  # a cheaper service tier, back to the default one before the client's deadline
    CASCADE = "cascade"
    RACE = "race"
    HEDGE = "hedge"
    DEFER = "defer"
    PREFETCH = "prefetch"
    RETRY = "retry"  # the same call once more, before anything stands in
    STALE_IF_ERROR = "stale-if-error"
    UPSTREAM_IF_ERROR = "upstream-if-error"
    EDGE_IF_ERROR = "edge-if-error"


ORDER: Mapping[Lane, int] = {lane: place for place, lane in enumerate(Lane)}
SHORT: Mapping[str, tuple[Lane, ...]] = {"stale": (Lane.REVALIDATE, Lane.STALE_IF_ERROR)}
"""A word for several lanes."""
RETRY, STALE, UPSTREAM, EDGE = "retry", "stale", "upstream:", "edge"
STANDS_IN: Mapping[str, Lane] = {
    RETRY: Lane.RETRY, STALE: Lane.STALE_IF_ERROR, UPSTREAM: Lane.UPSTREAM_IF_ERROR, EDGE: Lane.EDGE_IF_ERROR,
}  # fmt: skip
"""Words of a policy's `on_error`, in the order that holds where it gives none; `upstream:` goes before a name."""
WORDS = (*(lane.value for lane in Lane), *SHORT)


DEFER_FROM_S = 3600.0
"""A client that can wait this long, or longer, lets its call go through its provider's batch API."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`policy` names what chose it; "" is the built-in default."""

    lanes: frozenset[Lane]
    policy: str = ""
    ttl_s: float | None = None  # life of what is stored under it, when the client does not say
    on_error: tuple[str, ...] = ()  # what is tried after a failure, in this order: words of `STANDS_IN`
    on_limit: tuple[str, ...] | None = None  # likewise after the upstream's own 429; None: as after any failure
    is_listed: bool = False  # its lanes were listed by somebody, not left to the default

    @property
    def text(self) -> str:
        """Its lanes in order: what `x-plan` says, and takes back."""
        return _text_of(self.lanes)

    def has(self, lane: Lane) -> bool:
        return lane in self.lanes

    def acts(self, lanes: frozenset[Lane]) -> tuple[object, ...]:
        """What of these lanes it does, and what it does of failures: two questions for which this is equal may share a
        call."""
        return self.lanes & lanes, self.on_error, self.on_limit

    @property
    def on_any_error(self) -> tuple[str, ...]:
        return (*self.on_error, *(self.on_limit or ()))

    def standing_in(self, *, is_limit: bool) -> tuple[str, ...]:
        """What is tried, in this order: as the policy says, then by the lanes that something else switched on."""
        says_of_limits = is_limit and self.on_limit is not None
        words = (self.on_limit or ()) if says_of_limits else self.on_error
        told = {lane_of(word) for word in self.on_any_error}
        more = () if says_of_limits else [word for word, lane in STANDS_IN.items() if lane not in told]
        return tuple([word for word in (*words, *more) if lane_of(word) in self.lanes and word != UPSTREAM])


def lane_of(word: str) -> Lane:
    """The lane of a word of `on_error`. Raises KeyError."""
    name, colon, _ = word.partition(":")
    if name + colon not in STANDS_IN:
        raise KeyError(word)
    return STANDS_IN[name + colon]


@lru_cache(maxsize=1024)
def _text_of(lanes: frozenset[Lane]) -> str:
    return ",".join(lane for lane in Lane if lane in lanes)


DEFAULT_PLAN = Plan(frozenset({Lane.EXACT, Lane.SEMANTIC, Lane.COLLAPSE}))
"""Nothing in it changes what the upstream is sent, what the client waits for, or who answers."""


@lru_cache(maxsize=256)
def marked(plan: Plan) -> Plan:
    """The plan of a request whose provider caches a marked beginning: marks are on unless its lanes were listed."""
    return plan if plan.is_listed else replace(plan, lanes=plan.lanes | {Lane.PREFIX})


ALIASES: Mapping[str, str] = {"exact": "-semantic", "cheap": "+route", "batch": "+tier,+defer"}
"""Built-in suffixes of a model's name, `gpt-x@cheap`, for clients that can set nothing else."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a policy applies to: all that is given must hold."""

    model: str | None = None  # pattern of fnmatch, as the others
    tenant: str | None = None  # its digest, or the project of its virtual key
    namespace: str | None = None
    tag: str | None = None  # one of the request's
    stream: bool | None = None
    tools: bool | None = None
    deadline: bool | None = None  # the client named one


@dataclass(frozen=True, slots=True)
class Asked:
    """What a policy is matched with."""

    model: str
    tenant: str
    project: str
    namespace: str
    tags: Sequence[str]
    stream: bool
    tools: bool
    deadline: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """One `[[policy]]`."""

    name: str
    match: Match
    plan: Plan


def choose(policies: Sequence[Policy], asked: Asked) -> Plan:
    """The plan of the first policy that matches, else the default one."""
    return next((policy.plan for policy in policies if matches(policy.match, asked)), DEFAULT_PLAN)


def matches(match: Match, asked: Asked) -> bool:
    return (
        _is_like(match.model, (asked.model,))
        and _is_like(match.tenant, (asked.tenant, asked.project))
        and _is_like(match.namespace, (asked.namespace,))
        and _is_like(match.tag, asked.tags)
        and match.stream in (None, asked.stream)
        and match.tools in (None, asked.tools)
        and match.deadline in (None, asked.deadline)
    )


def _is_like(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is None or any(fnmatchcase(name, pattern) for name in names)


def lanes_of(words: Iterable[str]) -> frozenset[Lane]:
    """Lanes by their words. Raises ValueError naming the first that is none."""
    return frozenset(lane for word in words for lane in _lanes_of(word))


def _lanes_of(word: str) -> tuple[Lane, ...]:
    try:
        return SHORT.get(word) or (Lane(word),)
    except ValueError:
        raise ValueError(f"{word[:40]!r} is no lane; lanes are {', '.join(WORDS)}") from None


def edited(plan: Plan, text: str) -> Plan:
    """A plan changed as `text` says: `exact,edge` replaces its lanes, `+hedge,-semantic` edits them.

    Raises ValueError for an unknown lane, or for a mixture of both forms.
    """
    words = [word for part in text.lower().split(",") if (word := part.strip())]
    signed = [word for word in words if word[0] in "+-"]
    if signed and len(signed) != len(words):
        raise ValueError("either lanes, or changes that all begin with + or -")
    if not signed:
        return replace(plan, lanes=lanes_of(words), is_listed=True) if words else plan
    added = lanes_of(word[1:].strip() for word in signed if word[0] == "+")
    dropped = lanes_of(word[1:].strip() for word in signed if word[0] == "-")
    if both := added & dropped:
        raise ValueError(f"{min(both)!r} is both added and taken away")
    return replace(plan, lanes=(plan.lanes | added) - dropped)


def refuse_unready(plan: Plan, ready: frozenset[Lane], param: str) -> None:
    """Raises BadRequest when a client asks for a lane that needs what this installation does not have."""
    if missing := plan.lanes - ready:
        named = min(missing, key=ORDER.__getitem__)
        message = f"Invalid value for '{param}': the lane {named.value!r} is not configured here."
        raise BadRequest(message, code="invalid_value", param=param)


def split_alias(model: str, aliases: Mapping[str, str]) -> tuple[str, str]:
    """(model without its alias, what the alias does to the plan); a suffix that is no alias belongs to the name."""
    name, at, suffix = model.rpartition("@")
    edit = aliases.get(suffix) if at and name else None
    return (model, "") if edit is None else (name, edit)
