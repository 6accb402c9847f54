"""What comparisons that err say of the share of wrong hits: the contrast between alarms and false alarms.

A comparison of two answers *alarms* when it calls them different. It does so for some answers that say the same (false
alarms), and keeps silent about some that differ (misses). How often it errs depends on who compares, on what is asked
and on how freely it is answered, so both rates are measured where they act:

- *Pairs* measure the share of wrong hits. Of a hit that is audited, the new answer is compared with the kept one; and
  beside it the *kept* question is asked again, and that answer is compared with the kept one as well. Where both
  questions ask the same, both comparisons alarm equally often, whatever that rate is; where they do not, the first
  alarms more. The difference d of one pair is -1, 0 or 1, its mean is (share wrong) x (contrast), with contrast = 1 -
  misses - false alarms.
- *Noise* holds what is known of both rates: repeats of one question, and answers to questions known to differ.

The tests hold at every time at once, because they are looked at after every pair. Each is a mixture of betting
martingales on bounded differences (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by
betting", section 4; Ramdas, Grünwald, Vovk and Shafer 2023, "Game-theoretic statistics and safe anytime-valid
inference"): under a mean of `drift` or less no bettor gains on average, so the mixture ever reaches 1 / alpha with
probability alpha at most. A bettor stakes the same part of its wealth on every pair; so three counts say all, in
whatever order the pairs came and whoever saw them.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

BETS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.65, 0.9)
"""Parts of its wealth that each bettor stakes; all begin alike. Small ones find small shares of wrong under much noise,
large ones close within a handful of pairs where every hit is wrong."""
STEPS: Final = 40  # of bisection: 1e-12
LEAST_CONTRAST: Final = 0.1  # a comparison that tells less than this tells nothing
WEIGHT: Final = 30.0  # comparisons that a prior rate counts for


class Pairs(NamedTuple):
    """Paired comparisons, counted by what they showed."""

    more: float = 0.0  # the new answer alarmed, the kept question's own repeat did not
    less: float = 0.0  # the other way round
    even: float = 0.0  # both did, or neither

    @property
    def n(self) -> float:
        return self.more + self.less + self.even

    @property
    def mean(self) -> float:
        return (self.more - self.less) / self.n if self.n else 0.0

    @property
    def turned(self) -> Pairs:
        return Pairs(self.less, self.more, self.even)


def log_wealth(pairs: Pairs, drift: float) -> float:
    """Log of the mixture's wealth against "the mean difference is `drift` or less"; `drift` in -1...1."""
    logs = [_log_growth(pairs, drift, bet / (1.0 + drift)) for bet in BETS] if drift > -1.0 else [0.0]
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs) / len(logs))


def _log_growth(pairs: Pairs, drift: float, stake: float) -> float:
    return (
        pairs.more * math.log1p(stake * (1.0 - drift))
        + pairs.less * math.log1p(-stake * (1.0 + drift))
        + pairs.even * math.log1p(-stake * drift)
    )


def exceeds(pairs: Pairs, drift: float, alpha: float) -> bool:
    """Whether the mean difference is shown to be above `drift`, at confidence 1 - alpha, at every time together."""
    return pairs.n > 0 and log_wealth(pairs, drift) >= -math.log(alpha)


def interval(pairs: Pairs, alpha: float) -> tuple[float, float]:
    """Bounds of the mean difference, -1...1, that hold at every time together with probability 1 - alpha."""
    return _lower(pairs, alpha / 2.0), -_lower(pairs.turned, alpha / 2.0)


def _lower(pairs: Pairs, alpha: float) -> float:
    low, high = -1.0, max(-1.0, pairs.mean)
    for _ in range(STEPS):
        middle = (low + high) / 2.0
        if exceeds(pairs, middle, alpha):
            low = middle
        else:
            high = middle
    return low


class Noise(NamedTuple):
    """How a comparer erred: comparisons of two answers to one question, and of answers to questions known to differ."""

    repeats: float = 0.0
    false_alarms: float = 0.0
    differing: float = 0.0
    alarms: float = 0.0  # among the differing

    @classmethod
    def measured(cls, false_alarms: tuple[int, int], misses: tuple[int, int]) -> Noise:
        """From (errors, comparisons) of two answers to one question, and of answers to questions known to differ."""
        return cls(false_alarms[1], false_alarms[0], misses[1], misses[1] - misses[0])

    def plus(self, other: Noise) -> Noise:
        return Noise(*(one + more for one, more in zip(self, other, strict=True)))

    def after(self, prior: Noise) -> Noise:
        """Rates drawn towards a prior's, which counts for WEIGHT comparisons of each kind at most."""
        return self.plus(prior.lightened(WEIGHT))

    def lightened(self, most: float) -> Noise:
        """The same rates, from `most` comparisons of each kind or fewer."""
        one = min(1.0, most / self.repeats) if self.repeats else 0.0
        other = min(1.0, most / self.differing) if self.differing else 0.0
        return Noise(self.repeats * one, self.false_alarms * one, self.differing * other, self.alarms * other)

    @property
    def false_alarm_rate(self) -> float:
        return (self.false_alarms + 0.5) / (self.repeats + 1.0)

    @property
    def miss_rate(self) -> float:
        return (self.differing - self.alarms + 0.5) / (self.differing + 1.0)

    @property
    def contrast(self) -> float:
        """By how much likelier a differing answer alarms than one that says the same, LEAST_CONTRAST...1."""
        return max(LEAST_CONTRAST, 1.0 - self.miss_rate - self.false_alarm_rate)


def share_wrong(pairs: Pairs, noise: Noise, alpha: float) -> tuple[float, float, float]:
    """(estimate, lower, upper) of the share of wrong hits, 0...1. The interval is the pairs'; the contrast is taken as
    it is estimated."""
    low, high = interval(pairs, alpha)
    found = [max(0.0, min(1.0, value / noise.contrast)) for value in (pairs.mean, low, high)]
    return found[0], found[1], found[2]
