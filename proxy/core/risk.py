"""How far the judge may go: evidence in, bounds out. The promise is on wrong / hits, what a user sees.

A would-be hit stands in one of four ways, tried in this order:

- *proven*: its log-odds reach a level at which, among the labelled decisions at or above it, an upper confidence bound
  of the share of wrong ones is within the budget.
- *provisional*: the mean of labels that do not err is within the budget, the bound not yet.
- *normal*: the texts are the same but for case, spacing, closing punctuation and pleasantries.
- *start*: too little is known here, but the texts are so alike, and the guards so content, that a prior measured on
  other traffic puts the share of wrong ones within the budget.

A sample of all is audited, much at first, less as evidence grows. None of the last three is served while the account
is overdrawn: wrong answers counted, and those to be expected, against the budget's share of all hits; nor where pairs
of comparisons show that more is wrong than the budget allows (`proxy.core.contrast`). A mark by somebody who knows
narrows at once, and nothing widens on it; one alarm of a comparison closes nothing.

Labels are of two kinds. Feedback, and answers that are equal to the letter, are *certain*. Everything else is *noisy*:
a comparison that alarms too often or too seldom. A noisy label counts for w = (y - f) / (s - f), with y = 1 for an
alarm, f the share of false alarms and s that of differing answers that alarm: on average 1 for a wrong decision and 0
for a right one. For f a lower bound from repeats of one question is taken, which errs to the strict side.

The bound holds at every time at once (a confidence sequence), because it is looked at after every label: it is the
inversion of a mixture of betting martingales (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random
variables by betting"; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences"). With x the label and q the rate tested, each bettor multiplies its stake by 1 + s (q - x), where s =
(1 - r) / (top - q), for its own ratio r < 1 and the largest value `top` that a label takes; under any rate of q or more
no bettor gains on average, so the mixture reaches 1 / alpha with probability alpha at most, whenever it is looked at.

What this does not cover, said plainly: the bound is taken at 41 levels without a correction for choosing among them,
past decisions are counted under weights of today that have not seen them (cross-fitting), not of their own time, and
the share s of a comparer is taken as it is estimated. Decisions below the serving level are labelled more often than
those above: the unweighted count that the bound uses leans to the worse end, which is the safe one as long as error
falls with log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from proxy.core import contrast
from proxy.core.contrast import Noise, Pairs

RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
STAKES = (0.30, 0.15, 0.15, 0.10, 0.10, 0.08, 0.07, 0.05)
"""Bettors on a true rate of ratio x tested rate, and the share of the stake each starts with."""

_LOG_STAKES = [math.log(stake) for stake in STAKES]
MIN_LABELS = 100  # before a mean counts as evidence
PROVISIONAL_SHARE = 0.9  # of the budget, that a mean must keep: the loosest of 41 levels is the luckiest, too
AUDIT_ALL = 60  # would-be hits with certain labels that are all audited; after n of them the share is AUDIT_ALL / n
PROVEN_AUDITS = 300  # audited hits before a proven one is audited at the configured share only
AUDIT_PAIRS: Final = {"normal": 4.0, "alike": 2.0}
"""Pairs of a region after which one hit in four is audited, and after nine times as many one in a hundred: but for the
square of what its wording was used since it was judged last. An audit costs two calls and a wording that is asked once
saves one, so it pays on those that are asked again. With 12, and no square, 64 to 80 % as many hits were served on five
streams of `tests.bench.reallife` as authored and more of them were wrong, on as many audits and a half (December 2026).
"""
ALERT: Final = 0.5  # share of the way to closing, in logs, from which every hit is audited
CREDIT_WRONG = 4.0
REPAID_WRONG = 6.0
"""Wrong answers a scope may be in arrears: with none, a wrong mark among the first ten hits would close it for good.
The credit is paid back as the budget grows, by the factor e for each 6 wrong answers that the hits so far allow. Kept
for good it would show: 2 wrong ones over are a third of the budget of 600 hits at 1 % (banking77 in 20 orders,
November 2026: 1.25 % wrong with a lasting credit of 2, 0.9 % with this one, and a third more hits).
"""
SHRINK_LABELS = 20.0  # decisions at the budget's own rate that the account's estimate starts from
PRIOR_LABELS: Final = 25.0
PRIOR_WRONG: Final = {"normal": 0.02, "alike": 0.2}
"""What a region of a scope begins with, in certain labels: as if 25 such pairs had shown so many wrong ones. Read by
eye, 3 of about 900 pairs of four streams from similarity .95 on that no guard refused were wrong (November 2026), .8 %
with some caution; of texts with one normal form none of 4,213 was (`make real-life`)."""


class Labels(NamedTuple):
    """Labelled decisions, by kind of label."""

    n: float = 0.0  # certain ones
    wrong: float = 0.0
    noisy: float = 0.0
    alarms: float = 0.0  # among the noisy


class Doubt(NamedTuple):
    """How noisy labels are read: rates of alarms where the decision was right, and where it was wrong."""

    right: float = 0.0
    wrong: float = 1.0

    @property
    def values(self) -> tuple[float, float]:
        """What a silent comparison and an alarm count for."""
        contrast = self.wrong - self.right
        return -self.right / contrast, (1.0 - self.right) / contrast


CERTAIN: Final = Doubt()


def doubt_of(noise: Noise, seen: Noise, alpha: float) -> Doubt:
    """The strict reading of noisy labels: false alarms as rare as what was `seen` allows, misses as estimated."""
    rare = 1.0 - upper_bound(seen.repeats, seen.repeats - seen.false_alarms, alpha)
    return Doubt(rare, max(rare + contrast.LEAST_CONTRAST, 1.0 - noise.miss_rate))


def log_evidence(labels: Labels, rate: float, doubt: Doubt = CERTAIN) -> float:
    """Log of the martingale against "the rate is `rate` or more"."""
    if not 0.0 < rate < 1.0:
        return 0.0 if rate <= 0.0 else math.inf
    silent, alarm = doubt.values
    counted = [(labels.wrong, 1.0), (labels.n - labels.wrong, 0.0)]
    counted += [(labels.alarms, alarm), (labels.noisy - labels.alarms, silent)]
    logs = [
        log_stake + sum(n * _log(1.0 + (1.0 - ratio) / (alarm - rate) * (rate - x)) for n, x in counted if n)
        for log_stake, ratio in zip(_LOG_STAKES, RATIOS, strict=True)
    ]
    top = max(logs)
    return -math.inf if math.isinf(top) else top + math.log(sum(math.exp(log - top) for log in logs))


def _log(growth: float) -> float:
    return math.log(growth) if growth > 0.0 else -math.inf


def certifies(labels: Labels, max_error: float, alpha: float, doubt: Doubt = CERTAIN) -> bool:
    """Whether the upper bound is within `max_error`, at confidence 1 - alpha."""
    return labels.n + labels.noisy > 0 and log_evidence(labels, max_error, doubt) >= -math.log(alpha)


def upper_bound(n: float, wrong: float, alpha: float) -> float:
    """The smallest rate that n certain labels exclude, 0...1: valid at all times together with probability
    1 - alpha."""
    if n <= 0:
        return 1.0
    return highest_share(Labels(n, wrong), alpha, least=min(wrong / n, 1.0))


def highest_share(labels: Labels, alpha: float, doubt: Doubt = CERTAIN, *, least: float = 0.0) -> float:
    """The smallest rate of wrong ones, from `least` on, that the labels exclude: as `upper_bound`, of both kinds."""
    low, high = least, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if certifies(labels, middle, alpha, doubt):
            high = middle
        else:
            low = middle
    return high


class Standing(StrEnum):
    PROVEN = "proven"
    PROVISIONAL = "provisional"
    NORMAL = "normal"
    START = "start"


class Counted(Protocol):
    """Labelled decisions at or above each level of log-odds; see `index.learner.Counts`."""

    @property
    def n(self) -> Sequence[float]: ...
    @property
    def wrong(self) -> Sequence[float]: ...
    @property
    def noisy(self) -> Sequence[float]: ...
    @property
    def alarms(self) -> Sequence[float]: ...
    @property
    def weighted(self) -> Sequence[float]: ...
    @property
    def weighted_wrong(self) -> Sequence[float]: ...
    @property
    def weighted_noisy(self) -> Sequence[float]: ...
    @property
    def weighted_alarms(self) -> Sequence[float]: ...


class Thresholds(NamedTuple):
    """Log-odds from which one may serve; inf when nowhere."""

    proven: float = math.inf
    provisional: float = math.inf

    def narrowed(self, other: Thresholds) -> Thresholds:
        """The stricter of both."""
        return Thresholds(max(self.proven, other.proven), max(self.provisional, other.provisional))


def thresholds_of(
    levels: Sequence[float], counts: Counted, max_error: float, alpha: float, doubt: Doubt = CERTAIN
) -> Thresholds:
    """The loosest level that is proven, and the loosest whose mean is well within the budget. Levels ascend."""
    provisional = math.inf
    tolerable = PROVISIONAL_SHARE * max_error
    plain = map(Labels, counts.n, counts.wrong, counts.noisy, counts.alarms)
    weighted = map(Labels, counts.weighted, counts.weighted_wrong, counts.weighted_noisy, counts.weighted_alarms)
    for level, labels, standing_for in zip(levels, plain, weighted, strict=True):
        n = labels.n + labels.noisy
        if n == 0:
            break
        if n >= MIN_LABELS and math.isinf(provisional) and _cautious_mean(standing_for, doubt, n) <= tolerable:
            provisional = level
        if certifies(labels, max_error, alpha, doubt):
            return Thresholds(level, min(provisional, level))
    return Thresholds(math.inf, provisional)


def _cautious_mean(labels: Labels, doubt: Doubt, n: float) -> float:
    """The share of wrong ones, as if one more had been wrong and one right; with a standard error of what is noisy."""
    silent, alarm = doubt.values
    total = labels.n + labels.noisy
    wrong = labels.wrong + labels.alarms * alarm + (labels.noisy - labels.alarms) * silent
    share = labels.noisy / total
    error = math.sqrt(share * doubt.right * (1.0 - doubt.right) / n) * (alarm - silent)
    return (wrong + 1.0) / (total + 2.0) + error


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
    more: float = 0.0
    less: float = 0.0
    even: float = 0.0
    normal: float = 0.0
    normal_wrong: float = 0.0
    normal_more: float = 0.0
    normal_less: float = 0.0
    normal_even: float = 0.0

    def plus(self, change: Tally) -> Tally:
        return Tally(*(one + other for one, other in zip(self, change, strict=True)))

    def minus(self, before: Tally) -> Tally:
        return Tally(*(one - other for one, other in zip(self, before, strict=True)))


NORMAL: Final = "normal"
ALIKE: Final = "alike"
"""Regions whose evidence is kept apart: hits on texts of one normal form, and all others."""


NO_PAIRS: Final = Pairs()


@dataclass(slots=True)
class Region:
    """What is known of one kind of hit in a scope, or a level above it."""

    n: float = 0.0  # certain labels of pairs that need no proof, each for as many as it stands for
    wrong: float = 0.0
    pairs: Pairs = NO_PAIRS

    def rate(self, prior: float) -> float:
        """Share of wrong ones, by certain labels, from a prior's."""
        return (self.wrong + PRIOR_LABELS * prior) / (self.n + PRIOR_LABELS)

    def alarm(self, max_error: float, noise: Noise) -> float:
        """Log of the evidence that more than `max_error` is wrong."""
        return contrast.log_wealth(self.pairs, max_error * noise.contrast)

    def is_closed(self, max_error: float, noise: Noise, alpha: float) -> bool:
        """Whether pairs show that more than `max_error` is wrong."""
        return contrast.exceeds(self.pairs, max_error * noise.contrast, alpha)


@dataclass(slots=True)
class Account:
    """What was served in one scope (or a level above it), and how much of it was wrong as far as known for certain.

    A would-be hit is one that met a bound, whether the account then let it pass or not: those that did not pass are
    forwarded and labelled for free, and so show when the account may open again.
    """

    hits: float = 0.0
    audited: float = 0.0  # hits whose certain label came
    counted_wrong: float = 0.0  # among them
    would_be: float = 0.0  # would-be hits with a certain label
    would_be_wrong: float = 0.0
    alike: Region = field(default_factory=Region)
    normal: Region = field(default_factory=Region)

    @classmethod
    def of(cls, tally: Tally) -> Account:
        return cls(
            *tally[1:6],
            alike=Region(tally.start, tally.start_wrong, Pairs(tally.more, tally.less, tally.even)),
            normal=Region(
                tally.normal, tally.normal_wrong, Pairs(tally.normal_more, tally.normal_less, tally.normal_even)
            ),
        )

    def tally(self, labelled: float) -> Tally:
        alike, normal = self.alike, self.normal
        return Tally(
            labelled, self.hits, self.audited, self.counted_wrong, self.would_be, self.would_be_wrong,
            alike.n, alike.wrong, *alike.pairs, normal.n, normal.wrong, *normal.pairs,
        )  # fmt: skip

    def region(self, name: str) -> Region:
        return self.normal if name == NORMAL else self.alike

    def expected_wrong(self, max_error: float) -> float:
        """Wrong answers counted among audited hits, and to be expected among the others."""
        rate = (self.would_be_wrong + SHRINK_LABELS * max_error) / (self.would_be + SHRINK_LABELS)
        return self.counted_wrong + max(0.0, self.hits - self.audited) * rate

    def has_room(self, max_error: float, caution: float = 1.0) -> bool:
        """Whether one more hit without proof may be risked; `caution` divides the credit."""
        budget = max_error * self.hits
        credit = CREDIT_WRONG / caution * math.exp(-budget / REPAID_WRONG)
        return self.expected_wrong(max_error) <= budget + credit

    def label(self, wrong: float, weight: float, *, served: bool, would_be: bool, region: str) -> None:
        """A certain label came, for a hit (`served`) or for a decision that was forwarded; `region` is that of a pair
        which needs no proof, else ""."""
        if served:
            self.audited += 1.0
            self.counted_wrong += wrong
        if would_be:
            self.would_be += 1.0
            self.would_be_wrong += wrong
        if region:
            found = self.region(region)
            found.n += weight
            found.wrong += weight * wrong

    def pair(self, change: Pairs, region: str) -> None:
        """A pair of noisy comparisons came, for a would-be hit."""
        found = self.region(region)
        found.pairs = Pairs(*(one + more for one, more in zip(found.pairs, change, strict=True)))

    def correct(self, before: float, wrong: float, weight: float, *, served: bool, would_be: bool, region: str) -> None:
        """A certain label given before turned out otherwise."""
        change = wrong - before
        if served:
            self.counted_wrong = max(0.0, self.counted_wrong + change)
        if would_be:
            self.would_be_wrong = max(0.0, self.would_be_wrong + change)
        if region:
            found = self.region(region)
            found.wrong = max(0.0, found.wrong + weight * change)


def prior_of(region: str, others: Region, max_error: float) -> float:
    """Share of wrong ones that a region of a new scope begins with: what was measured before, and what other scopes of
    this installation showed for certain. That is a prior and no verdict: no others close a scope that has shown nothing
    yet, so it stays within the budget where the measured one is."""
    measured = PRIOR_WRONG[region] / PRIOR_LABELS
    here = others.rate(measured)
    return here if here <= measured else max(measured, min(here, max_error))


def standing_of(
    log_odds: float, *, region: str, vetoed: bool, thresholds: Thresholds, open_regions: frozenset[str]
) -> Standing | None:
    """How a candidate would be served, or None: room in the account is not looked at.

    `vetoed`: a guard that no evidence overrules objects. `region`: of texts that may be served without proof, else "".
    """
    if vetoed:
        return None
    if log_odds >= thresholds.proven:
        return Standing.PROVEN
    if region == NORMAL and region in open_regions:
        return Standing.NORMAL
    if log_odds >= thresholds.provisional:
        return Standing.PROVISIONAL
    return Standing.START if region and region in open_regions else None


def audit_share(
    standing: Standing, account: Account, region: str, alarm: float, alpha: float, least: float, uses: int = 1
) -> float:
    """The share of such hits to ask again upstream, at least `least`: all of them until the evidence is thick, and
    again where it comes near to closing (`alarm`, see `Region.alarm`); the more, the oftener the wording was served
    since it was judged last (`uses`).

    With `least` 0 none is, ever: labels then come from misses and from feedback alone.
    """
    if least <= 0.0:
        return 0.0
    n = account.region(region).pairs.n
    if n and alarm >= -ALERT * math.log(alpha):
        return 1.0
    if standing is Standing.PROVEN:
        return min(1.0, uses * least) if account.audited + n >= PROVEN_AUDITS else 1.0
    first = AUDIT_PAIRS[region]
    early = min(uses * AUDIT_ALL / max(1.0, account.would_be), (uses * first / (first + n)) ** 2)
    return min(1.0, max(uses * least, early))
