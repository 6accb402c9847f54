"""How often what would have been served was wrong, by comparisons that were made anyway; and what to do about it.

In shadow the answer that comes all the same is compared with the one that would have been served. There is no paired
repeat of the kept question, as an audit has it (`proxy.core.contrast`), for nothing is paid for: the comparer's false
alarms are taken from questions that were answered twice in the same traffic, and from what was measured of it before.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from proxy.core import risk
from proxy.core.contrast import Noise
from proxy.core.risk import Labels


class Share(NamedTuple):
    """Of the look-alikes, what share was, or would have been, wrong: 0...1, `low` to `high` with confidence."""

    compared: int
    estimate: float
    low: float
    high: float


UNKNOWN: Final = Share(0, 0.0, 0.0, 1.0)


def share_wrong(found: Labels, noise: Noise, seen: Noise, alpha: float) -> Share:
    """The share of wrong ones among unpaired comparisons, with an interval that holds with probability 1 - alpha.

    `noise`: the comparer's errors as known in all; `seen`: those seen in this traffic. Comparisons are one for each
    pair of questions, so that what is asked often does not count for what is asked seldom. Above, alarms count as
    strictly as the judge reads them (`risk.doubt_of`); below, only alarms beyond the most false ones count.
    """
    n = found.n + found.noisy
    if n <= 0:
        return UNKNOWN
    part = alpha / 6.0
    noisy_share, low_noisy = 0.0, 0.0
    if found.noisy:
        alarm_rate = found.alarms / found.noisy
        noisy_share = min(1.0, max(0.0, (alarm_rate - noise.false_alarm_rate) / noise.contrast))
        least_alarms = 1.0 - risk.upper_bound(found.noisy, found.noisy - found.alarms, part)
        most_false = risk.upper_bound(noise.repeats, noise.false_alarms, part)
        low_noisy = min(1.0, max(0.0, (least_alarms - most_false) / noise.contrast))
    estimate = (found.wrong + found.noisy * noisy_share) / n
    low_certain = 1.0 - risk.upper_bound(n, n - found.wrong, part)
    low = min(estimate, low_certain + low_noisy * found.noisy / n)
    high = risk.highest_share(found, alpha / 2.0, risk.doubt_of(noise, seen, alpha / 2.0), least=estimate)
    return Share(int(n), estimate, low, high)


class Seen(NamedTuple):
    """What a time showed, as far as advice depends on it."""

    looked_up: int
    exact: int  # hits, served or not, on the very same question
    alike: int  # on a question that is alike
    share: Share
    max_error: float
    is_shadow: bool
    held_back_by: str  # the commonest reason of all others


def advice(seen: Seen) -> str:
    """What to do now, in one sentence."""
    share, budget = seen.share, f"{100 * seen.max_error:g} %"
    if not seen.looked_up:
        return "Nothing was looked up: send requests through ibid, or look further back with --since."
    if not seen.exact + seen.alike:
        why = f", mostly for the reason {seen.held_back_by}" if seen.held_back_by else ""
        return f"Nothing would be served yet{why}: ask `ibid explain` about a question that you expected to be found."
    if not seen.alike:
        act = "start without --shadow" if seen.is_shadow else "nothing needs to be done"
        return f"All hits repeat a question to the letter, so no answer is for another question: {act}."
    told = f"{share.compared} comparisons put the wrong ones at {shown(share)}"
    if not share.compared:
        what = "stay in shadow for another day" if seen.is_shadow else "send feedback, or raise cache.audit_share"
        return f"No look-alike was compared yet, so nobody knows how many are wrong: {what}."
    if share.high <= seen.max_error:
        act = "start without --shadow" if seen.is_shadow else "nothing needs to be done"
        return f"{told}, within the budget of {budget}: {act}."
    if share.low > seen.max_error:
        act = (
            "set cache.semantic = false and start without --shadow" if seen.is_shadow else "set cache.semantic = false"
        )
        return f"{told}, above the budget of {budget}: serve exact repeats alone ({act}), and read /cache/near-misses."
    if share.estimate <= seen.max_error:
        act = "start without --shadow, for ibid goes on measuring" if seen.is_shadow else "let it run"
        return f"{told}: likely within the budget of {budget}, not proven yet; {act}, or wait for more comparisons."
    act = "stay in shadow" if seen.is_shadow else "lower cache.max_error_rate or let it run"
    return f"{told}: perhaps above the budget of {budget}; {act} until there are more comparisons."


def shown(share: Share) -> str:
    """ "0.4 % (0 to 2.1 %)"."""
    return f"{_percent(share.estimate)} % ({_percent(share.low)} to {_percent(share.high)} %)"


def _percent(value: float) -> str:
    return f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.0f}"
