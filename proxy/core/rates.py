"""What a token costs, in whole pico-dollars, so that SQL can price counters exactly in integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

PUSD_PER_NUSD = 1_000


class Rate(NamedTuple):
    """Pico-dollars a token for calls of more than `above` input tokens, and of no more than the next higher one."""

    above: int
    input: int
    output: int
    cache_read: int
    cache_write: int


Rating = Callable[[str, str, str, int], Sequence[Rate] | None]
"""(upstream, model, tier, ts_ms) → rates from the highest `above` down, or None where the price is not known."""


def reads_cost_less(rates: Sequence[Rate] | None) -> bool:
    """Whether reading from the provider's prompt cache is cheaper than plain input; no where it is not known."""
    return rates is not None and any(rate.cache_read < rate.input for rate in rates)


def writes_cost_extra(rates: Sequence[Rate] | None) -> bool:
    """Whether writing to the provider's prompt cache costs more than plain input; yes where it is not known."""
    return rates is None or any(rate.cache_write > rate.input for rate in rates)
