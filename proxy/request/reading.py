"""A body and the headers it came with → the question, with its scope, its fingerprint and its plan.

Everything here is a pure function of what the client sent and of the configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from proxy.core import fingerprint, identity, jsontext, keys, policy
from proxy.core.answer import to_json
from proxy.core.batches import Place, place_of
from proxy.core.chains import Chains
from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.fields import CACHE_TWIN
from proxy.core.dialects.routes import Routes, family_of, keys_in, without_key
from proxy.core.directives import controls_of
from proxy.core.errors import BadRequest
from proxy.core.facts import Facts
from proxy.core.identity import BUILT_IN, HeaderRules
from proxy.core.memo import Memo, size_of
from proxy.core.model import Controls, Level, Limits, Rules
from proxy.core.plan import (
    ALIASES,
    DEFAULT_PLAN,
    DEFER_FROM_S,
    Asked,
    Lane,
    Plan,
    Policy,
    choose,
    edited,
    marked,
    refuse_unready,
    split_alias,
)
from proxy.core.query import Batch, Query
from proxy.money.keys import Grant
from proxy.ports import Upstream

MODEL_LIMIT = 2048
"""Characters of a model's name: it is a label of metrics, a column of the ledger, and part of many keys in memory."""

_TIERS: Mapping[object, str] = {None: "default", "auto": "default", "standard": "default", "standard_only": "default"}
"""Names of the tier that everyone gets."""


class Target(NamedTuple):
    """Where a raw request target leads."""

    path: str
    path_qs: str  # as it goes upstream
    query: str  # what of it may change the answer
    dialect: Dialect | None = None  # without one the request passes through
    model: str = ""  # where the path says it
    stream: bool = False  # likewise
    keys: tuple[bytes, ...] = ()  # credentials in the query, as Gemini allows
    is_keyless: bool = False  # of a dialect whose own server asks for no credential
    place: Place | None = None  # in the batch API


class Caller:
    """What a header block says. Compared by identity: one object per distinct block."""

    __slots__ = (
        "controls", "grant", "headers", "is_deferring", "is_json", "is_retry", "origin", "scope_headers", "tenant",
        "tries_again",
    )  # fmt: skip

    def __init__(
        self,
        tenant: str,
        headers: tuple[tuple[bytes, bytes], ...],
        scope_headers: tuple[tuple[str, str], ...],
        *,
        is_json: bool,
        is_retry: bool,
        tries_again: bool = False,
        grant: Grant | None = None,
        is_deferring: bool = False,
        origin: str = "",
    ) -> None:
        self.origin = origin  # of the web page that asks, if it is one
        self.is_deferring = is_deferring  # wants its answer later
        self.controls: Controls | None = None  # read with the first body that leaves them to the headers
        self.tenant = tenant
        self.headers = headers
        self.scope_headers = scope_headers
        self.is_json = is_json
        self.is_retry = is_retry
        self.tries_again = tries_again  # its library says how often it did
        self.grant = grant  # of a virtual key; `headers` are without it

    @property
    def key_id(self) -> str | None:
        return None if self.grant is None else self.grant.live.key.id

    @property
    def team(self) -> str:
        return "" if self.grant is None else self.grant.live.key.project

    @property
    def plan(self) -> str:
        """What the key says of the plan of its requests; "" when it leaves that to the policy."""
        return "" if self.grant is None else self.grant.live.key.plan


@dataclass(frozen=True, slots=True)
class Steering:
    """What the operator configured of plans."""

    policies: Sequence[Policy] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: ALIASES)
    ready: frozenset[Lane] = DEFAULT_PLAN.lanes
    marks: bool = False  # mark beginnings for Anthropic's own cache by default


class Reader:
    """Reads bodies into queries. Owns nothing it is given."""

    def __init__(
        self,
        routes: Routes,
        upstream: Upstream,
        rules: Rules,
        limits: Limits,
        steering: Steering | None = None,
        header_rules: HeaderRules = BUILT_IN,
        chains: Chains | None = None,
    ) -> None:
        self._routes = routes
        self._upstream = upstream
        self._rules = rules
        self._limits = limits
        self._steering = steering or Steering()
        self._header_rules = header_rules
        self._chains = chains or Chains()
        self._forms: Memo[tuple[object, ...], int] = Memo(limits.memo_bytes)
        self._numbers = itertools.count(1)

    def target(self, path: str, query: str = "") -> Target:
        """Where a path leads, and the query behind it, its question mark included."""
        found = keys_in(query)
        if any([keys.is_virtual(key) for key in found]):  # a key of ours goes nowhere
            query = without_key(query)
        route = self._routes.find(path, query)
        return Target(
            path,
            route.path + query,
            route.scope_query,
            route.dialect,
            route.model,
            route.stream,
            found,
            is_keyless=family_of(path, {}) == "ollama",
            place=place_of(path),
        )

    def read(self, target: Target, caller: Caller, raw: bytes) -> Query:
        """The question in a body. Raises BadRequest."""
        body = jsontext.parse(raw, self._limits.json_depth)
        target, raw, body, edit = self._without_alias(target, raw, body)
        facts = _facts(target, body)
        if len(facts.model) > MODEL_LIMIT:
            message = f"Invalid value for 'model': expected at most {MODEL_LIMIT} characters."
            raise BadRequest(message, code="invalid_value", param="model")
        controls = _controls(caller, body.get(CACHE_TWIN), shadow=self._rules.shadow)
        plan = self._plan(facts, controls, caller, edit, marks=isinstance(target.dialect, Messages))
        upstream = self._upstream.route(target.path, {}, facts.model)
        return self._query(target, caller, raw, body, facts, _narrowed(controls, plan), plan, upstream)

    def variant(self, query: Query, headers: tuple[tuple[bytes, bytes], ...], upstream: str, model: str) -> Query:
        """The same question asked of another model, with the scope and the fingerprint it has there."""
        path, mark, rest = query.path_qs.partition("?")
        target = self.target(path, mark + rest)
        caller = Caller(
            query.tenant,
            headers,
            identity.scope_headers(headers, self._header_rules),
            is_json=True,
            is_retry=False,
        )
        body = jsontext.parse(query.body, self._limits.json_depth)
        target, raw, body = _renamed(target, query.body, body, model)
        facts = _facts(target, body)
        found = self._query(target, caller, raw, body, facts, query.controls, query.plan, upstream)
        return replace(found, key_id=query.key_id, team=query.team)

    def facts(self, query: Query) -> Facts:
        """What a query's body says, once more."""
        path, mark, rest = query.path_qs.partition("?")
        return _facts(self.target(path, mark + rest), jsontext.parse(query.body, self._limits.json_depth))

    def _without_alias(
        self, target: Target, raw: bytes, body: dict[str, Any]
    ) -> tuple[Target, bytes, dict[str, Any], str]:
        named = target.model or body.get("model")
        if not isinstance(named, str) or "@" not in named:
            return target, raw, body, ""
        model, edit = split_alias(named, self._steering.aliases)
        if model == named:
            return target, raw, body, ""
        return *_renamed(target, raw, body, model), edit

    def _plan(self, facts: Facts, controls: Controls, caller: Caller, alias: str, *, marks: bool) -> Plan:
        steering = self._steering
        plan = DEFAULT_PLAN
        if steering.policies:
            asked = Asked(
                facts.model,
                caller.tenant,
                caller.team,
                controls.namespace,
                controls.tags,
                facts.stream,
                facts.has_tools,
                controls.deadline_s is not None,
            )
            plan = choose(steering.policies, asked)
        if marks and steering.marks:
            plan = marked(plan)
        for edit in filter(None, (caller.plan, alias)):  # of what is not configured here these take nothing
            plan = edited(plan, edit)
            plan = replace(plan, lanes=plan.lanes & steering.ready)
        if controls.plan:
            plan = edited(plan, controls.plan)
            refuse_unready(plan, steering.ready, "x-plan")
        if controls.deadline_s is not None:
            patient = {Lane.TIER, Lane.DEFER} if controls.deadline_s >= DEFER_FROM_S else {Lane.TIER}
            plan = replace(plan, lanes=plan.lanes | (patient & steering.ready))
        return plan

    def _query(
        self,
        target: Target,
        caller: Caller,
        raw: bytes,
        body: Mapping[str, Any],
        facts: Facts,
        controls: Controls,
        plan: Plan,
        upstream: str,
    ) -> Query:
        dialect = target.dialect
        assert dialect is not None
        facts = self._continued(facts, caller.tenant, upstream) if facts.continues else facts
        eligibility = policy.classify(facts, controls, self._rules)
        scope = digest = b""
        if eligibility.level is not Level.NONE:
            scope = fingerprint.scope_of(
                facts,
                tenant=caller.tenant,
                upstream=self._upstream.place(upstream),
                operation=dialect.operation,
                controls=controls,
                headers=caller.scope_headers,
                query=target.query,
            )
            digest = b"" if facts.inputs else fingerprint.fingerprint_of(scope, facts.prompt)
        tier = facts.settings.get("service_tier")
        endpoint = target.path_qs.partition("?")[0]
        asked = (dialect, endpoint, facts.stream, facts.wants_usage, upstream, facts.model, controls.tags)
        return Query(
            dialect=dialect,
            endpoint=endpoint,
            upstream=upstream,
            tenant=caller.tenant,
            model=facts.model,
            stream=facts.stream,
            wants_usage=facts.wants_usage,
            prompt=facts.prompt or "",
            scope=scope,
            fingerprint=digest,
            eligibility=eligibility,
            controls=controls,
            body=raw,
            forward_body=dialect.forward_body(raw, body),
            n=facts.n,
            wants_json=facts.response_format in ("json_object", "json_schema"),
            output_limit=facts.output_limit,
            has_stops=facts.has_stops,
            batch=_batch_of(facts, scope),
            keeps_id=facts.keeps_id,
            plan=plan,
            tier=_TIERS.get(tier, tier) if isinstance(tier, str) else "default",
            has_tools=facts.has_tools,
            path_qs=target.path_qs,
            is_placed=bool(target.model),
            form=self._form_of((*asked, plan.lanes, caller.key_id)),
            key_id=caller.key_id,
            team=caller.team,
        )

    def _continued(self, facts: Facts, tenant: str, upstream: str) -> Facts:
        """The same with what was said before in its identity, where that is known; it is never compared by meaning."""
        before = self._chains.find(tenant, upstream, facts.continues)
        if before is None:
            return facts
        settings = {**facts.settings, "previous_response_id": before.hex()}
        return replace(facts, settings=settings, previous_response=False, first_turn=False)

    def _form_of(self, asked: tuple[object, ...]) -> int:
        """A number for what decides how a hit is told and booked; never one for two."""
        form = self._forms.get(asked)
        if form is None:
            form = next(self._numbers)
            self._forms.put(asked, form, size_of(asked))
        return form


def _facts(target: Target, body: Mapping[str, Any]) -> Facts:
    assert target.dialect is not None
    return target.dialect.read(body, model=target.model, stream=target.stream)


def _controls(caller: Caller, twin: object, *, shadow: bool) -> Controls:
    controls = caller.controls if twin is None else None
    if controls is None:
        controls = controls_of(caller.headers, twin)
        if shadow:
            controls = replace(controls, shadow=True)
        if twin is None:
            caller.controls = controls
    return controls


def _narrowed(controls: Controls, plan: Plan) -> Controls:
    """What a plan without some answering lane asks of the cache. Where the exact lane is off but the semantic one is
    on, an entry of the very same question is still the most similar one."""
    if plan.ttl_s is not None and controls.ttl_s is None:
        controls = replace(controls, ttl_s=plan.ttl_s)
    if Lane.SEMANTIC in plan.lanes or (Lane.ROUTE in plan.lanes and Lane.EXACT in plan.lanes):
        return controls  # a question that may be compared, if only to route it
    if Lane.EXACT in plan.lanes:
        return controls if controls.exact_only else replace(controls, exact_only=True)
    return replace(controls, read=False, exact_only=True)


def _renamed(target: Target, raw: bytes, body: Mapping[str, Any], model: str) -> tuple[Target, bytes, dict[str, Any]]:
    """The same request for another model: in the body, and where the path names it."""
    if not target.model:
        name = to_json(model)
        return target, jsontext.set_member(raw, "model", name), {**body, "model": model}
    path = target.path.replace(f"/{target.model}", f"/{model}", 1)
    path_qs = target.path_qs.replace(f"/{target.model}", f"/{model}", 1)
    return target._replace(path=path, path_qs=path_qs, model=model), raw, dict(body)


def _batch_of(facts: Facts, scope: bytes) -> Batch | None:
    """The inputs of an embedding request, each a question of its own; without a scope none is looked up."""
    if not facts.encoding_format:
        return None
    prints = tuple([fingerprint.fingerprint_of(scope, asked) for asked in facts.inputs]) if scope else ()
    return Batch(facts.inputs, prints, facts.encoding_format, is_open=not facts.unknown)
