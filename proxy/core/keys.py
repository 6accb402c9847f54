"""Virtual keys as values: how they are spelled, what they may do, and what of their limits is spent.

A key stands for a project. Its secret is 192 random bits, so a plain SHA-256 keeps it as well as a keyed one would, and
every replica of one database knows it. Limits are counted in fixed UTC windows: a request counts in the window in which
it began. Money is refused once spent and held together reach the limit, whatever the next request will cost: what is
held for requests in flight is an estimate, so a budget is overrun by no more than the answers in flight.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

from proxy.core.errors import BadRequest
from proxy.core.identity import Credential
from proxy.core.patterns import is_one_of
from proxy.core.plan import DEFAULT_PLAN, edited
from proxy.core.units import DAY_MS, LAST_MS, NUSD_PER_USD, instant_ms, ms_of, usd

PREFIX = b"ibid-"
RETRY_AFTER_MOST_S = 120
"""Longer waits are not told as Retry-After: openai 3.54 gives up above it, Anthropic's clients would sleep through them
(protocols §1.1)."""

_AMOUNT = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?/([a-z]+)")


class Kind(StrEnum):
    """What a limit counts."""

    USD = "usd"  # in nano-dollars
    REQUESTS = "requests"
    TOKENS = "tokens"


class Window(StrEnum):
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


_LENGTHS_MS = {Window.MINUTE: 60_000, Window.HOUR: 3_600_000, Window.DAY: DAY_MS}


def bounds_of(window: Window, ts_ms: int) -> tuple[int, int]:
    """First millisecond of the window an instant lies in, and the first after it. UTC."""
    length_ms = _LENGTHS_MS.get(window)
    if length_ms is not None:
        start_ms = ts_ms - ts_ms % length_ms
        return start_ms, start_ms + length_ms
    at = datetime.fromtimestamp(ts_ms // 1000, UTC)
    first = datetime(at.year, at.month, 1, tzinfo=UTC)
    after = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
    return ms_of(first), ms_of(after)


class Limit(NamedTuple):
    """So much of a kind in each window."""

    kind: Kind
    amount: int  # of nano-dollars, requests or tokens
    window: Window

    def __str__(self) -> str:
        return f"{shown(self.kind, self.amount)} per {self.window.value}"


def shown(kind: Kind, amount: int) -> str:
    """An amount for people: "10 USD", "100 requests"."""
    if kind is Kind.USD:
        return f"{usd(amount).rstrip('0').rstrip('.')} USD"
    return f"{amount} {kind.value}"


def read_limit(kind: Kind, text: str) -> Limit:
    """ "10/day", "0.25/hour", "1000000/month". Raises BadRequest; an amount of money may be 0: answers from the cache
    only."""
    name = f"limit_{kind.value}"
    found = _AMOUNT.fullmatch(text)
    if found is None or found[3] not in list(Window):
        raise _invalid(name, f"must be an amount per {', '.join(Window)}, as in 10/day")
    if kind is Kind.USD:
        amount = int(Decimal(f"{found[1]}.{found[2] or 0}") * NUSD_PER_USD)
        if amount > 10**9 * NUSD_PER_USD:
            raise _invalid(name, "must be at most 1000000000 USD")
    else:
        amount = int(found[1])
        if found[2] is not None or amount < 1:
            raise _invalid(name, "must be a whole number above 0 per window")
    return Limit(kind, amount, Window(found[3]))


def read_expiry(text: str, now_ms: int) -> int:
    """When a key ends, epoch milliseconds: after an age such as 90d from now, or at an ISO 8601 time, UTC when it names
    no zone. Raises BadRequest."""
    try:
        expires_ms = instant_ms(text, now_ms, past=False)
    except ValueError as error:
        raise _invalid("expires", "must be an ISO 8601 date or time, or an age such as 90d") from error
    if not now_ms < expires_ms <= LAST_MS:
        raise _invalid("expires", "must be in the future, before the year 10000")
    return expires_ms


def read_plan(text: str) -> str:
    """Lanes as `x-plan` names them: "exact,semantic", "+route,-semantic". Raises BadRequest."""
    try:
        edited(DEFAULT_PLAN, text)
    except ValueError as fault:
        raise _invalid("plan", f"is none: {fault}") from None
    return text


def _invalid(name: str, message: str) -> BadRequest:
    return BadRequest(f"{name}: {message}", code="invalid_value", param=name)


@dataclass(frozen=True, slots=True)
class Key:
    """A virtual key as its row."""

    id: str
    digest: bytes = field(repr=False)
    project: str
    name: str
    created_ms: int
    rotated_ms: int | None = None
    revoked_ms: int | None = None
    expires_ms: int | None = None
    limits: tuple[Limit, ...] = ()
    models: tuple[str, ...] = ()  # patterns of `fnmatch`; (): every model
    plan: str = ""

    def allows(self, model: str) -> bool:
        return not self.models or is_one_of(model, self.models)


def digest_of(secret: bytes) -> bytes:
    """What is kept of a secret, 32 bytes."""
    return hashlib.sha256(secret).digest()


def tenant_of_project(project: str) -> str:
    """The tenant of all keys of a project, 64 hex digits, the same in every replica. It cannot meet that of a
    credential, which is a keyed digest."""
    return hashlib.sha256(b"project\x00" + project.encode()).hexdigest()


def is_virtual(secret: bytes) -> bool:
    """Whether a credential is meant for ibid itself."""
    return secret.startswith(PREFIX)


def virtual_key_in(who: Credential) -> bytes | None:
    """The one virtual key among the credentials of a request, in whichever header. Raises BadRequest (401) for two."""
    found = {secret for _, secret in who.secrets if is_virtual(secret)}
    if len(found) > 1:
        raise refused("Two different ibid keys were sent.")
    return next(iter(found), None)


def refused(message: str, code: str = "invalid_api_key") -> BadRequest:
    """401: who asks is not known, or not any more."""
    return BadRequest(message, status=401, code=code, should_retry=False)


def check_standing(key: Key, digest: bytes, now_ms: int) -> None:
    """Raises BadRequest (401: invalid_api_key, key_revoked, key_expired) unless this secret still opens the door."""
    if key.revoked_ms is not None:
        raise refused("This ibid key was revoked.", "key_revoked")
    if not hmac.compare_digest(digest, key.digest):
        raise refused("This ibid key was replaced by a new one.")
    if key.expires_ms is not None and now_ms >= key.expires_ms:
        raise refused(f"This ibid key expired at {moment(key.expires_ms)}.", "key_expired")


def check_model(key: Key, model: str) -> None:
    """Raises BadRequest (403, model_not_allowed)."""
    if not key.allows(model):
        said = f"the model {model[:100]!r}" if model else "a request that names no model"
        raise BadRequest(
            f"This ibid key does not allow {said}; it allows {', '.join(key.models)[:500]}.",
            status=403,
            code="model_not_allowed",
            param="model",
        )


class Cost(NamedTuple):
    """What one request takes of each kind of limit."""

    nusd: int
    requests: int
    tokens: int

    def of(self, kind: Kind) -> int:
        return self.nusd if kind is Kind.USD else self.requests if kind is Kind.REQUESTS else self.tokens


class Budget:
    """One limit of one key, and what of it is spent in the current window. `held` stands for requests in flight."""

    __slots__ = ("end_ms", "held", "limit", "spent", "start_ms", "unread")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.start_ms = self.end_ms = 0
        self.spent = self.held = 0
        self.unread = 0  # of what is spent: booked since `read_begins`

    def turn(self, now_ms: int) -> None:
        """Begin the window of this instant, if it is a later one. A clock set back changes nothing."""
        if now_ms >= self.end_ms:
            self.start_ms, self.end_ms = bounds_of(self.limit.window, now_ms)
            self.spent = self.held = self.unread = 0

    @property
    def is_spent(self) -> bool:
        return self.spent + self.held >= self.limit.amount

    def hold(self, amount: int) -> None:
        self.held += amount

    def let_go(self, start_ms: int, amount: int) -> None:
        """What was held in the window that began at `start_ms`."""
        if start_ms == self.start_ms:
            self.held -= amount

    def book(self, ts_ms: int, amount: int) -> None:
        """Spend on a request that began at `ts_ms`; in a window that is over it counts no more."""
        self.turn(ts_ms)
        if ts_ms >= self.start_ms:
            self.spent += amount
            self.unread += amount

    def read_begins(self) -> None:
        """All that was booked so far is in what will be read."""
        self.unread = 0

    def read(self, start_ms: int, amount: int) -> None:
        """What SQL knows of the window that began at `start_ms`, whoever spent it."""
        if start_ms == self.start_ms:
            self.spent = amount + self.unread


def exhausted(budgets: Sequence[Budget], now_ms: int) -> list[Budget]:
    """Those that let nothing more in, the one that resets last first."""
    for budget in budgets:
        budget.turn(now_ms)
    return sorted([b for b in budgets if b.is_spent], key=lambda budget: -budget.end_ms)


def over(budget: Budget, now_ms: int) -> BadRequest:
    """The refusal (429): which limit, and when it resets. A client's library tries again by itself only where that
    helps: never for money, else once the window ends within RETRY_AFTER_MOST_S."""
    limit = budget.limit
    if limit.kind is not Kind.REQUESTS and budget.spent < limit.amount:
        return BadRequest(
            f"What is left of this ibid key's limit of {limit} is held for requests under way.",
            status=429,
            code="rate_limit_exceeded",
            should_retry=True,
            retry_after_s=1,
        )
    is_money = limit.kind is Kind.USD
    wait_s = max(-(-(budget.end_ms - now_ms) // 1000), 1)
    return BadRequest(
        f"This ibid key's limit of {limit} is used up; it resets at {moment(budget.end_ms)}.",
        status=429,
        code="budget_exceeded" if is_money else "rate_limit_exceeded",
        should_retry=not is_money and wait_s <= RETRY_AFTER_MOST_S,
        retry_after_s=wait_s if wait_s <= RETRY_AFTER_MOST_S else None,
    )


def moment(ms: int) -> str:
    """An instant for people, to the second."""
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
