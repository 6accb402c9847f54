"""How far the judge may go: evidence in, bounds out. The promise is on wrong / hits, what a user sees.

A would-be hit stands in one of three ways, tried in this order:

- *proven*: its log-odds reach a level at which, among the labelled decisions at or above it, an upper confidence bound
  of the share of wrong ones is within the budget. A small share of these hits is audited.
- *provisional*: the mean is within the budget, the bound not yet. All of the first are audited, fewer and fewer as
  labels come in, so that what is wrong among them is counted rather than hoped for.
- *start*: too little is known here, but the texts are almost the same and no guard objects. Served while the share of
  wrong ones among such pairs, seen from a cautious start, is within the budget; audited like provisional ones.

Neither of the last two is served once the account is overdrawn: wrong answers counted, and those to be expected among
hits not audited, against the budget's share of all hits. A wrong mark narrows at once, and nothing widens on it.

The bound holds at every time at once (a confidence sequence), because it is looked at after every label: it is the
inversion of a mixture of betting martingales (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random
variables by betting"; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences"). With x = 1 for a wrong decision and q the rate tested, each bettor multiplies its stake by 1 + s (q - x),
s = (1 - r) / (1 - q), for its own ratio r < 1; under any rate of q or more no bettor gains on average, so the mixture
reaches 1 / alpha with probability alpha at most, whatever the moment it is looked at. Labels come from comparing
answers, which errs: what it calls wrong and is right makes the bound too high, which is safe; of what is wrong it finds
only a share, its sensitivity, and the rate tested is the budget times that share.

What this does not cover, said plainly: the bound is taken at 41 levels without a correction for choosing among them,
and past decisions are counted under weights of today that have not seen them (cross-fitting), not of their own time.
Decisions below the serving level are all labelled, those above only at the share that is audited: the unweighted count
that the bound uses leans to the worse end, which is the safe one as long as error falls with log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
STAKES = (0.30, 0.15, 0.15, 0.10, 0.10, 0.08, 0.07, 0.05)
"""Bettors on a true rate of ratio x tested rate, and the share of the stake each starts with."""

_LOG_STAKES = [math.log(stake) for stake in STAKES]
_LOG_RATIOS = [-math.inf, *(math.log(ratio) for ratio in RATIOS[1:])]
MIN_LABELS = 100  # before a mean counts as evidence
PROVISIONAL_SHARE = 0.9  # of the budget, that a mean must keep: the loosest of 41 levels is the luckiest, too
AUDIT_ALL = 60  # would-be hits that are all audited; after n labels the share is AUDIT_ALL / n
PROVEN_AUDITS = 300  # audited hits before a proven one is audited at the configured share only
CREDIT_WRONG = 4.0
REPAID_WRONG = 6.0
"""Wrong answers a scope may be in arrears: with none, a wrong mark among the first ten hits would close it for good.
The credit is paid back as the budget grows, by the factor e for each 6 wrong answers that the hits so far allow. Kept
for good it would show: 2 wrong ones over are a third of the budget of 600 hits at 1 % (banking77 in 20 orders,
November 2026: 1.25 % wrong with a lasting credit of 2, 0.9 % with this one, and a third more hits).
"""
SHRINK_LABELS = 20.0  # decisions at the budget's own rate that the account's estimate starts from
START_LABELS, START_WRONG = 25.0, 0.2
"""The start region begins as if 25 such pairs had shown 0.2 wrong ones, 0.8 %: read by eye, 3 of about 900 pairs of
four streams were (November 2026). So a budget of 1 % serves from the first request, one of 0.5 % after 15 right ones.
"""


def log_evidence(n: float, wrong: float, rate: float) -> float:
    """Log of the martingale against "the rate is `rate` or more", after n decisions of which `wrong` were wrong."""
    if not 0.0 < rate < 1.0:
        return 0.0 if rate <= 0.0 else math.inf
    rest = n - wrong
    logs = [
        stake + (wrong * log_ratio if wrong else 0.0) + rest * math.log((1.0 - rate * ratio) / (1.0 - rate))
        for stake, ratio, log_ratio in zip(_LOG_STAKES, RATIOS, _LOG_RATIOS, strict=True)
    ]
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs))


def certifies(n: float, wrong: float, max_error: float, alpha: float) -> bool:
    """Whether the upper bound is within `max_error`, at confidence 1 - alpha."""
    return n > 0 and log_evidence(n, wrong, max_error) >= -math.log(alpha)


def upper_bound(n: float, wrong: float, alpha: float) -> float:
    """The smallest rate that the evidence excludes, 0...1: valid at all times together with probability 1 - alpha."""
    if n <= 0:
        return 1.0
    low, high = min(wrong / n, 1.0), 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if certifies(n, wrong, middle, alpha):
            high = middle
        else:
            low = middle
    return high


class Standing(StrEnum):
    PROVEN = "proven"
    PROVISIONAL = "provisional"
    START = "start"


class Counted(Protocol):
    """Labelled decisions at or above each level of log-odds; see `index.learner.Counts`."""

    @property
    def n(self) -> Sequence[float]: ...
    @property
    def wrong(self) -> Sequence[float]: ...
    @property
    def weighted(self) -> Sequence[float]: ...
    @property
    def weighted_wrong(self) -> Sequence[float]: ...


class Thresholds(NamedTuple):
    """Log-odds from which one may serve; inf when nowhere."""

    proven: float = math.inf
    provisional: float = math.inf

    def narrowed(self, other: Thresholds) -> Thresholds:
        """The stricter of both."""
        return Thresholds(max(self.proven, other.proven), max(self.provisional, other.provisional))


def thresholds_of(levels: Sequence[float], counts: Counted, max_error: float, alpha: float) -> Thresholds:
    """The loosest level that is proven, and the loosest whose mean is well within the budget. Levels ascend."""
    provisional = math.inf
    tolerable = PROVISIONAL_SHARE * max_error
    rows = zip(levels, counts.n, counts.wrong, counts.weighted, counts.weighted_wrong, strict=True)
    for level, n, wrong, weighted, weighted_wrong in rows:
        if n == 0:
            break
        if n >= MIN_LABELS and math.isinf(provisional) and (weighted_wrong + 1.0) / (weighted + 2.0) <= tolerable:
            provisional = level
        if certifies(n, wrong, max_error, alpha):
            return Thresholds(level, min(provisional, level))
    return Thresholds(math.inf, provisional)


class LevelName(NamedTuple):
    """One level of evidence: a scope, a tenant's namespace, a tenant, or the installation."""

    kind: str
    scope: bytes = b""
    tenant: str = ""
    namespace: str = ""

    @property
    def shown(self) -> str:
        """For people."""
        return self.scope.hex()[:16] or self.tenant + (f"/{self.namespace}" if self.kind == "namespace" else "")


class Tally(NamedTuple):
    """What a level's evidence amounts to, or by how much it changed: sums, whatever the order."""

    labelled: float = 0.0  # decisions that are evidence
    hits: float = 0.0  # from here on as in an Account
    audited: float = 0.0
    counted_wrong: float = 0.0
    would_be: float = 0.0
    would_be_wrong: float = 0.0
    start: float = 0.0
    start_wrong: float = 0.0

    def plus(self, change: Tally) -> Tally:
        return Tally(*(one + other for one, other in zip(self, change, strict=True)))

    def minus(self, before: Tally) -> Tally:
        return Tally(*(one - other for one, other in zip(self, before, strict=True)))


@dataclass(slots=True)
class Account:
    """What was served in one scope (or a level above it), and how much of it was wrong as far as known.

    A would-be hit is one that met a bound, whether the account then let it pass or not: those that did not pass are
    forwarded and labelled for free, and so show when the account may open again.
    """

    hits: float = 0.0
    audited: float = 0.0  # hits whose label came
    counted_wrong: float = 0.0  # among them
    would_be: float = 0.0  # labelled would-be hits
    would_be_wrong: float = 0.0
    start: float = 0.0  # labelled pairs of the start region, each for as many as it stands for
    start_wrong: float = 0.0

    def expected_wrong(self, max_error: float) -> float:
        """Wrong answers counted among audited hits, and to be expected among the others."""
        rate = (self.would_be_wrong + SHRINK_LABELS * max_error) / (self.would_be + SHRINK_LABELS)
        return self.counted_wrong + max(0.0, self.hits - self.audited) * rate

    def has_room(self, max_error: float) -> bool:
        """Whether one more hit without proof may be risked."""
        budget = max_error * self.hits
        return self.expected_wrong(max_error) <= budget + CREDIT_WRONG * math.exp(-budget / REPAID_WRONG)

    @property
    def start_rate(self) -> float:
        """Share of wrong ones in the start region, from a cautious start."""
        return (self.start_wrong + START_WRONG) / (self.start + START_LABELS)

    def label(self, wrong: float, weight: float, *, served: bool, would_be: bool, near_same: bool) -> None:
        """A label came, for a hit (`served`) or for a decision that was forwarded."""
        if served:
            self.audited += 1.0
            self.counted_wrong += wrong
        if would_be:
            self.would_be += 1.0
            self.would_be_wrong += wrong
        if near_same:
            self.start += weight
            self.start_wrong += weight * wrong

    def correct(
        self, before: float, wrong: float, weight: float, *, served: bool, would_be: bool, near_same: bool
    ) -> None:
        """A label given before turned out otherwise."""
        change = wrong - before
        if served:
            self.counted_wrong = max(0.0, self.counted_wrong + change)
        if would_be:
            self.would_be_wrong = max(0.0, self.would_be_wrong + change)
        if near_same:
            self.start_wrong = max(0.0, self.start_wrong + weight * change)


def standing_of(
    log_odds: float, *, near_same: bool, vetoed: bool, thresholds: Thresholds, starts: bool
) -> Standing | None:
    """How a candidate would be served, or None: room in the account is not looked at.

    `vetoed`: a guard that no evidence overrules objects. `near_same`: the texts are almost the same and no guard at all
    objects. `starts`: such pairs may be served without proof here.
    """
    if vetoed:
        return None
    if log_odds >= thresholds.proven:
        return Standing.PROVEN
    if log_odds >= thresholds.provisional:
        return Standing.PROVISIONAL
    return Standing.START if near_same and starts else None


def audit_share(standing: Standing, account: Account, least: float) -> float:
    """The share of such hits to ask again upstream, at least `least`: all of them until the evidence is thick.

    With `least` 0 none is, ever: labels then come from misses and from feedback alone.
    """
    if least <= 0.0:
        return 0.0
    if standing is Standing.PROVEN:
        return least if account.audited >= PROVEN_AUDITS else 1.0
    return min(1.0, max(least, AUDIT_ALL / max(1.0, account.would_be)))
