"""Virtual keys in memory: who asks, what the key may do, and what of its limits is spent. No SQL on a request's path.

The ring holds every key and is read anew when the table changed, which is looked for every FOLLOW_S; a change through
this process's own admin listener counts at once. What a key has spent is recomputed from the ledger at the start and
then counted here: `MeteredLedger` stands before the ledger, so whatever is written down is counted, by the same price.
Where several processes share a database, what the others spent is read from the ledger every few seconds.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from proxy import ports
from proxy.core.errors import BadRequest
from proxy.core.identity import Credential
from proxy.core.keys import (
    PREFIX,
    Budget,
    Cost,
    Key,
    Kind,
    Limit,
    check_model,
    check_standing,
    digest_of,
    exhausted,
    over,
    read_expiry,
    read_limit,
    read_plan,
    refused,
    tenant_of_project,
    virtual_key_in,
)
from proxy.core.model import Outcome, Usage, again
from proxy.core.policy import estimate_usage
from proxy.core.query import Query
from proxy.core.saving import Pricing, paid_nusd
from proxy.core.units import usd

FOLLOW_S = 2.0
SECRET_BYTES = 24
READ_ALL_S = 30.0  # between two readings of every key, whether or not a change was noticed
READ_SHARE = 0.05  # of the time, at most, that goes into reading what was spent
OUTPUT_TOKENS = 512  # taken for granted where a request names no limit of its own
_KEY_ID = Outcome._fields.index("key_id") - 2  # in `Outcome.recurring`
_NOTHING, _ONE = Cost(0, 0, 0), Cost(0, 1, 0)


def cost_of(outcome: Outcome, price: Pricing) -> Cost:
    """What a ledger row counts against its key's limits; `KeyStore.spent` reads the same of the rows.

    An audit counts its money only: its question is ours. A hit or a joined call costs no money and is a request like
    any other. Tokens are those the client saw; where none were told it, those its calls were billed for.
    """
    nusd = paid_nusd(outcome, price)
    if outcome.cache_status == "AUDIT":
        return Cost(nusd, 0, 0)
    usages = [outcome.usage] if outcome.usage is not None else [call.usage for call in outcome.calls]
    return Cost(nusd, 1, sum([usage.input_tokens + usage.output_tokens for usage in usages if usage is not None]))


class LiveKey:
    """A key and its budgets. One object for the life of the process: callers remember it and see what changes."""

    __slots__ = ("budgets", "key", "tenant")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.tenant = tenant_of_project(key.project)
        self.budgets = tuple([Budget(limit) for limit in key.limits])


class Grant(NamedTuple):
    """What a presented secret opened."""

    live: LiveKey
    digest: bytes


class Held(NamedTuple):
    """What is set aside for one request in flight: per budget the window's beginning and the amount."""

    live: LiveKey
    parts: tuple[tuple[int, int], ...]


class KeyRing:
    """Owned by the composition root; `keyed` are the upstreams that have a key of their own, or need none; `only`: no
    other credential is served."""

    def __init__(
        self,
        store: ports.KeyStore,
        prices: ports.PriceBook,
        *,
        keyed: Collection[str] = (),
        only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._prices = prices
        self._keyed = frozenset(keyed)
        self._only = only
        self._clock = clock
        self._by_id: dict[str, LiveKey] = {}
        self._by_digest: dict[bytes, LiveKey] = {}
        self.held: dict[str, Held] = {}  # by request
        self._changing = asyncio.Lock()
        self._mark: object = None
        self._all_read_s = 0.0
        self._spent_read_s = 0.0
        self._pause_s = 0.0
        self.is_stale = False  # what other processes did could not be read

    # -- who asks -------------------------------------------------------------------------------------------------

    def grant(self, who: Credential) -> Grant | None:
        """What the virtual key among a request's credentials opens; None without one. Raises BadRequest (401)."""
        secret = virtual_key_in(who)
        if secret is None:
            if self._only:
                raise refused("Only keys issued by this ibid are served here.")
            return None
        digest = digest_of(secret)
        live = self._by_digest.get(digest)
        if live is None:
            raise refused("No such ibid key.")
        check_standing(live.key, digest, self._now_ms())
        return Grant(live, digest)

    def opens(self, grant: Grant) -> bool:
        """Whether `grant`, asked again, would say the same."""
        key = grant.live.key
        is_over = key.revoked_ms is not None or (key.expires_ms is not None and self._now_ms() >= key.expires_ms)
        return not is_over and self._by_digest.get(grant.digest) is grant.live

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    # -- what it may do -------------------------------------------------------------------------------------------

    def admit(self, grant: Grant, query: Query, request_id: str, ts_ms: int) -> BadRequest | None:
        """Let a question in and set aside what it may take. Raises BadRequest: 401, 403, 429.

        With its money spent it may be answered from the cache only: then the refusal is returned, to be raised when the
        cache has no answer.
        """
        self._check(grant, query.upstream, ts_ms)
        check_model(grant.live.key, query.model)
        budgets = grant.live.budgets
        if not budgets:
            return None
        cost = self._estimate(query, ts_ms) if any([b.limit.kind is not Kind.REQUESTS for b in budgets]) else _ONE
        return self._hold(grant.live, request_id, ts_ms, cost)

    def check(self, grant: Grant) -> None:
        """Whether a key still opens what is ibid's own. Raises BadRequest: 401."""
        check_standing(grant.live.key, grant.digest, self._now_ms())

    def check_query(self, grant: Grant, query: Query) -> None:
        """Whether a key may ask this at all, whatever is left of its limits. Raises BadRequest: 401, 403."""
        self._check(grant, query.upstream, self._now_ms())
        check_model(grant.live.key, query.model)

    def grant_of(self, key_id: str) -> Grant:
        """What a key opens that left work behind: nothing when there is no such key any more. A new secret in place of
        the old one does not end it."""
        live = self._by_id.get(key_id) or LiveKey(Key(key_id, b"", "", "", 0, revoked_ms=0))
        return Grant(live, live.key.digest)

    def barred(self, key_id: str) -> BadRequest | None:
        """Why a key's work must end, if it must."""
        try:
            self.check(self.grant_of(key_id))
        except BadRequest as error:
            return error
        return None

    def hold_again(self, query: Query, request_id: str, since_ms: int) -> None:
        """Set aside what a call may take that is under way since before this process, whatever is left."""
        live = self._by_id.get(query.key_id or "")
        if live is None or not live.budgets:
            return
        now_ms = self._now_ms()
        cost, parts = self._estimate(query, since_ms), []
        for budget in live.budgets:
            budget.turn(now_ms)
            amount = cost.of(budget.limit.kind) if since_ms >= budget.start_ms else 0
            budget.hold(amount)
            parts.append((budget.start_ms, amount))
        self.held[request_id] = Held(live, tuple(parts))

    def admit_passing(
        self,
        grant: Grant,
        upstream: str,
        model: str | None,
        request_id: str,
        ts_ms: int,
        *,
        is_free: bool,
        is_told: bool,
    ) -> None:
        """Let a request pass through. `model` None: whatever it is; `is_free`: it costs nothing upstream;
        `is_told`: what it costs can be known. Raises BadRequest: 401, 403, 429."""
        self.check_passing(grant, ts_ms, is_free=is_free, is_told=is_told)
        self._check(grant, upstream, ts_ms)
        if model is not None:
            check_model(grant.live.key, model)
        self._hold(grant.live, request_id, ts_ms, _ONE)

    def check_passing(self, grant: Grant, ts_ms: int, *, is_free: bool, is_told: bool) -> None:
        """What `admit_passing` refuses whatever a body says, before one is read. Raises BadRequest: 401, 403, 429."""
        check_standing(grant.live.key, grant.digest, ts_ms)
        if not is_told and any([limit.kind is Kind.USD for limit in grant.live.key.limits]):
            message = "This ibid key has a limit of money, and nothing tells what a request to this path costs."
            raise BadRequest(message, status=403, code="cost_not_told")
        for budget in exhausted(grant.live.budgets, ts_ms):
            if budget.limit.kind is not Kind.USD or not is_free:
                raise over(budget, ts_ms)

    def _check(self, grant: Grant, upstream: str, ts_ms: int) -> None:
        check_standing(grant.live.key, grant.digest, ts_ms)
        if upstream not in self._keyed:
            raise BadRequest(
                f"ibid keys do not open the upstream {upstream!r}: it has no key of its own. "
                f"The operator must set upstream.{upstream}.key_env.",
                status=403,
                code="upstream_without_key",
            )

    def _estimate(self, query: Query, ts_ms: int) -> Cost:
        """By size, as a call without usage is booked: its input, and the longest output it allows."""
        has_output = query.batch is None
        usage = estimate_usage(query.forward_body, 0, False, has_output=has_output)
        if has_output:
            limit = query.output_limit
            usage = Usage(usage.input_tokens, (OUTPUT_TOKENS if limit is None else max(limit, 0)) * max(query.n, 1))
        price = self._prices.price(query.upstream, query.model, usage, "default", ts_ms)
        return Cost(max(price.nusd, 0), 1, usage.input_tokens + usage.output_tokens)

    def _hold(self, live: LiveKey, request_id: str, ts_ms: int, cost: Cost) -> BadRequest | None:
        spent = exhausted(live.budgets, ts_ms)
        for budget in spent:
            if budget.limit.kind is not Kind.USD:
                raise over(budget, ts_ms)
        if spent:
            cost = cost._replace(nusd=0)
        parts = []
        for budget in live.budgets:
            amount = cost.of(budget.limit.kind)
            budget.hold(amount)
            parts.append((budget.start_ms, amount))
        self.held[request_id] = Held(live, tuple(parts))
        return over(spent[0], ts_ms) if spent else None

    def let_go(self, request_id: str) -> None:
        """Nothing is held for this request any more: it was booked, or it ended without a call."""
        held = self.held.pop(request_id, None)
        if held is not None:
            for budget, (start_ms, amount) in zip(held.live.budgets, held.parts, strict=True):
                budget.let_go(start_ms, amount)

    # -- what it spent --------------------------------------------------------------------------------------------

    def book(self, outcome: Outcome) -> None:
        """Count what a finished request, or an audit on its behalf, took. Called once for every ledger row of a key."""
        self.let_go(outcome.request_id)
        live = self._by_id.get(outcome.key_id or "")
        if live is not None and live.budgets:
            cost = cost_of(outcome, self._prices.price)
            for budget in live.budgets:
                budget.book(outcome.ts_ms, cost.of(budget.limit.kind))

    # -- following the database -----------------------------------------------------------------------------------

    async def load(self) -> None:
        """Every key, and what each has spent. Raises CacheFault."""
        await self.read_keys()
        await self.read_spent(is_first=True)

    async def follow(self, fault: Callable[[str], None]) -> None:
        """Notice what other processes do, for ever. While the database is away, keys stay as they were."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await self._notice()
                self.is_stale = False
            except ports.CACHE_FAULTS as error:
                self.is_stale = True
                fault(getattr(error, "code", "timeout"))

    async def _notice(self) -> None:
        now_s = time.monotonic()
        if await self._store.mark() != self._mark or now_s - self._all_read_s >= READ_ALL_S:
            await self.read_keys()
        if self._store.is_shared and now_s - self._spent_read_s >= self._pause_s:
            await self.read_spent()

    async def read_keys(self) -> None:
        """Every key as the table has it now. Raises CacheFault."""
        async with self._changing:
            self._all_read_s = time.monotonic()
            mark = await self._store.mark()
            found = await self._store.keys()
            gone = self._by_id.keys() - {key.id for key in found}
            for key in found:
                self._take(key)
            for key_id in gone:  # its callers find it revoked
                live = self._by_id.pop(key_id)
                self._by_digest.pop(live.key.digest, None)
                live.key = replace(live.key, revoked_ms=self._now_ms())
            self._mark = mark

    def _take(self, key: Key) -> LiveKey:
        live = self._by_id.get(key.id)
        if live is None:
            live = self._by_id[key.id] = LiveKey(key)
        elif live.key.digest != key.digest:
            self._by_digest.pop(live.key.digest, None)
        live.key = key
        self._by_digest[key.digest] = live
        return live

    async def read_spent(self, *, is_first: bool = False) -> None:
        """What the ledger says was spent in the windows that run now, plus what it does not hold yet. `is_first`: this
        process has counted nothing yet, so what an earlier one left on file counts as well."""
        counted = [live for live in self._by_id.values() if live.budgets and live.key.revoked_ms is None]
        if not counted:
            return
        began_s = self._spent_read_s = time.monotonic()
        now_ms = self._now_ms()
        budgets = [(live, budget) for live in counted for budget in live.budgets]
        for _, budget in budgets:
            budget.turn(now_ms)
        starts = {budget.limit.window.value: budget.start_ms for _, budget in budgets}
        async with self._store.settled() as is_settled:
            if not (is_settled or is_first):  # rows wait for the database: the count in memory knows more
                return
            for _, budget in budgets:
                budget.read_begins()
            found = await self._store.spent([live.key.id for live in counted], starts)
            waiting = () if is_settled else await self._store.unwritten()
        for live, budget in budgets:
            window = budget.limit.window.value
            cost = found.get((live.key.id, window), _NOTHING)
            budget.read(starts[window], cost.of(budget.limit.kind))
        for outcome in waiting:
            self.book(outcome)
        self._pause_s = (time.monotonic() - began_s) / READ_SHARE

    # -- for people -----------------------------------------------------------------------------------------------

    def listed(self) -> list[dict[str, Any]]:
        """Every key, the newest first, without what is spent."""
        newest = sorted(self._by_id.values(), key=lambda live: (-live.key.created_ms, live.key.id))
        return [self._shown(live) for live in newest]

    def described(self, key_id: str) -> dict[str, Any] | None:
        """One key, with what is spent and what remains of each limit."""
        live = self._by_id.get(key_id)
        if live is None:
            return None
        now_ms = self._now_ms()
        for budget in live.budgets:
            budget.turn(now_ms)
        return {**self._shown(live), "limits": [_shown_budget(budget) for budget in live.budgets]}

    def _shown(self, live: LiveKey) -> dict[str, Any]:
        key, now_ms = live.key, self._now_ms()
        is_expired = key.expires_ms is not None and now_ms >= key.expires_ms
        return {
            "id": key.id,
            "project": key.project,
            "name": key.name,
            "state": "revoked" if key.revoked_ms is not None else "expired" if is_expired else "active",
            "tenant": live.tenant,
            "created_ms": key.created_ms,
            "rotated_ms": key.rotated_ms,
            "revoked_ms": key.revoked_ms,
            "expires_ms": key.expires_ms,
            "limits": [_shown_limit(limit) for limit in key.limits],
            "models": list(key.models),
            "plan": key.plan,
        }

    async def create(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """A new key, with its secret, which is told this once. Raises BadRequest, CacheFault.

        `wanted`: project, and name, limit_usd, limit_requests, limit_tokens (lists of texts), models, plan, expires.
        """
        now_ms = self._now_ms()
        limits = [read_limit(kind, text) for kind in Kind for text in wanted.get(f"limit_{kind.value}") or ()]
        if len({(limit.kind, limit.window) for limit in limits}) != len(limits):
            raise BadRequest("one limit of a kind for each window", code="invalid_value", param="limit_usd")
        secret = new_secret()
        key = Key(
            id=f"key_{secrets.token_hex(6)}",
            digest=digest_of(secret),
            project=wanted["project"],
            name=wanted.get("name") or "",
            created_ms=now_ms,
            expires_ms=read_expiry(wanted["expires"], now_ms) if wanted.get("expires") else None,
            limits=tuple(limits),
            models=tuple(wanted.get("models") or ()),
            plan=read_plan(wanted["plan"]) if wanted.get("plan") else "",
        )
        async with self._changing:
            await self._store.create(key)
            self._take(key)
        return {**(self.described(key.id) or {}), "secret": secret.decode()}

    async def revoke(self, key_id: str) -> dict[str, Any] | None:
        """Close a key for good; None when there is none. Raises CacheFault."""
        async with self._changing:
            key = await self._store.revoke(key_id, self._now_ms())
            if key is None:
                return None
            self._take(key)
        return self.described(key_id)

    async def rotate(self, key_id: str) -> dict[str, Any] | None:
        """A new secret for a key; the old one ends now. Raises BadRequest for a revoked key, CacheFault."""
        live = self._by_id.get(key_id)
        if live is not None and live.key.revoked_ms is not None:
            raise BadRequest("a revoked key stays revoked: create another", code="key_revoked", status=409, param="id")
        secret = new_secret()
        async with self._changing:
            key = await self._store.rotate(key_id, digest_of(secret), self._now_ms())
            if key is None:
                return None
            self._take(key)
        return {**(self.described(key_id) or {}), "secret": secret.decode()}


def new_secret() -> bytes:
    return PREFIX + secrets.token_hex(SECRET_BYTES).encode()


def _shown_limit(limit: Limit) -> dict[str, Any]:
    amount = usd(limit.amount) if limit.kind is Kind.USD else limit.amount
    return {"kind": limit.kind.value, "amount": amount, "window": limit.window.value}


def _shown_budget(budget: Budget) -> dict[str, Any]:
    """USD as exact decimals in text, as in headers; what is held belongs to requests in flight."""
    limit = budget.limit
    is_money = limit.kind is Kind.USD
    counts = {"spent": budget.spent, "held": budget.held, "remaining": max(limit.amount - budget.spent, 0)}
    return {
        **_shown_limit(limit),
        **{name: usd(count) if is_money else count for name, count in counts.items()},
        "resets_ms": budget.end_ms,
    }


class MeteredLedger:
    """`Ledger` that counts what keys spend before it writes it down."""

    def __init__(self, ledger: ports.Ledger, ring: KeyRing) -> None:
        self._ledger = ledger
        self._ring = ring

    def record(self, outcome: Outcome) -> None:
        if outcome.key_id is not None:
            self._ring.book(outcome)
        self._ledger.record(outcome)

    def record_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> None:
        if recurring[_KEY_ID] is not None:
            self._ring.book(again(recurring, request_id, ts_ms, total_ms, total_ms))
        self._ledger.record_again(recurring, request_id, ts_ms, total_ms)
