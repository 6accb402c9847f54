"""List prices of model calls in integer nano-dollars, from the genai-prices snapshot that ships in its wheel.

Nothing here touches the network: genai-prices fetches only through `UpdatePrices`, which is never started, and prices
are resolved against the bundled snapshot object itself, so an updater started elsewhere would not be seen either.

A price is resolved once per (upstream, model, tier, day) into exact integer rates, then costs a dictionary lookup and
four multiplications. Rounding: a cost is summed exactly, as integers over one denominator, and rounded once, half to
even, to whole nano-dollars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from typing import NamedTuple

from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import ModelPrice, TieredPrices

from proxy.core.errors import ConfigError
from proxy.core.model import Usage
from proxy.ports import Price

NUSD_PER_TOKEN = 1_000  # nano-dollars a token costs at one USD per million tokens
MEMO_LIMIT = 4_096  # model names come from clients: the memo must not grow with them
OVERRIDE_FIELDS = frozenset({"input", "output", "cache_read", "cache_write"})

_CONTEXTS: dict[str, dict[str, str]] = {
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
    "batch": {"processing": "batch"},
}
_UNPRICED = Price(0, "unpriced", "")


class Rates(NamedTuple):
    """Nano-dollars a token, exact. Tiers: (tokens above which, rate), descending; crossing one reprices all tokens."""

    input: tuple[tuple[int, Fraction], ...]
    output: tuple[tuple[int, Fraction], ...]
    cache_read: tuple[tuple[int, Fraction], ...]
    cache_write: tuple[tuple[int, Fraction], ...]
    basis: str
    price_id: str


class _Step(NamedTuple):
    """Integer rates over one denominator, for inputs of more than `above` tokens."""

    above: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    denominator: int


class _Ready(NamedTuple):
    """Rates in the form a price is computed from: steps from the highest threshold down, the last above -1."""

    steps: tuple[_Step, ...]
    basis: str
    price_id: str


class Prices:
    """PriceBook of the bundled snapshot and the operator's overrides.

    `overrides`: {"openai/gpt-x": {"input": 2.5, "output": 10, "cache_read": 0.25, "cache_write": …}} in USD per million
    tokens; "local/*" prices a whole upstream. An absent cache rate is the input rate. Raises ConfigError on a name
    without "/", an unknown field, or a value that is not a finite number ≥ 0.
    `providers`: configured upstream name → genai-prices provider id, where they differ.
    """

    def __init__(
        self,
        overrides: Mapping[str, Mapping[str, float | int | str]] | None = None,
        providers: Mapping[str, str] | None = None,
    ) -> None:
        self.source = f"genai-prices {version('genai-prices')}"
        self._providers = dict(providers or {})
        self._overrides = {name: _override(name, fields) for name, fields in (overrides or {}).items()}
        self._memo: dict[tuple[str, str, str, int], _Ready | None] = {}
        self._snapshot: DataSnapshot | None = None

    def load(self) -> None:
        """Read the snapshot now instead of at the first list price; blocks for about 50 ms."""
        self._snapshot = self._snapshot or self._load()

    def price(self, upstream: str, model: str, usage: Usage, tier: str, ts_ms: int, seconds: float = 0.0) -> Price:
        """What one call costs. Unknown models and upstreams cost 0 with the basis "unpriced": never a guess."""
        key = (upstream, model, tier, ts_ms // 86_400_000)
        try:
            rates = self._memo[key]
        except KeyError:
            rates = self._remember(key, ts_ms)
        if rates is None:
            return _UNPRICED
        read, write = usage.cache_read_tokens, usage.cache_write_tokens
        plain = usage.input_tokens - read - write
        if plain < 0:  # an upstream whose input counter leaves the cache out
            plain = usage.input_tokens
        for step in rates.steps:
            if usage.input_tokens > step.above:
                total = plain * step.input + usage.output_tokens * step.output
                if read or write:
                    total += read * step.cache_read + write * step.cache_write
                nusd = total if step.denominator == 1 else round(Fraction(total, step.denominator))
                return Price(nusd, rates.basis, rates.price_id)
        return _UNPRICED  # a negative input counter: an upstream that cannot be believed

    def _remember(self, key: tuple[str, str, str, int], ts_ms: int) -> _Ready | None:
        upstream, model, tier, _ = key
        rates = self._resolve(upstream, model, tier, ts_ms)
        if len(self._memo) >= MEMO_LIMIT:
            self._memo.clear()
        self._memo[key] = found = None if rates is None else _ready(rates)
        return found

    def _resolve(self, upstream: str, model: str, tier: str, ts_ms: int) -> Rates | None:
        override = self._overrides.get(f"{upstream}/{model}") or self._overrides.get(f"{upstream}/*")
        if override is not None:
            return override
        if not model:
            return None
        snapshot = self._snapshot or self._load()
        try:
            provider, info = snapshot.find_provider_model(model, None, self._providers.get(upstream, upstream), None)
        except LookupError:
            return None
        at = datetime.fromtimestamp(ts_ms / 1000, UTC)
        context = _CONTEXTS.get(tier)
        if tier != "default" and context is None:
            return None  # an unknown tier would silently get the full price
        variants = [v for v in info.price_variants or () if context is not None and v.when.items() <= context.items()]
        if context is not None and not variants:
            return None
        return _rates(info.get_prices(at, context), f"{self.source} {provider.id}/{info.id}")

    def _load(self) -> DataSnapshot:
        from genai_prices.data import providers  # 50 ms and 10 MB: only when a list price is first asked for

        self._snapshot = DataSnapshot(providers=providers, from_auto_update=False)
        return self._snapshot


def _rate(tiers: tuple[tuple[int, Fraction], ...], input_tokens: int) -> Fraction:
    for start, rate in tiers:
        if input_tokens > start:
            return rate
    return tiers[-1][1]


def _exact(usd_per_mtok: Decimal) -> Fraction:
    return Fraction(usd_per_mtok) * NUSD_PER_TOKEN


def _tiers(value: Decimal | TieredPrices | None) -> tuple[tuple[int, Fraction], ...] | None:
    if value is None:
        return None
    if isinstance(value, TieredPrices):
        steps = sorted(((tier.start, _exact(tier.price)) for tier in value.tiers), reverse=True)
        return (*steps, (-1, _exact(value.base)))
    return ((-1, _exact(value)),)


def _rates(prices: ModelPrice, price_id: str) -> Rates | None:
    """Token rates of a list price. A side without a price makes the model unpriced, not half free."""
    plain = _tiers(prices.input_mtok)
    if plain is None:
        return None
    free: tuple[tuple[int, Fraction], ...] = ((-1, Fraction(0)),)
    return Rates(
        plain,
        _tiers(prices.output_mtok) or free,  # embeddings have no output price
        _tiers(prices.cache_read_mtok) or plain,
        _tiers(prices.cache_write_mtok) or plain,
        "list",
        price_id,
    )


def _ready(rates: Rates) -> _Ready:
    sides = (rates.input, rates.output, rates.cache_read, rates.cache_write)
    steps = []
    for above in sorted({start for side in sides for start, _ in side}, reverse=True):
        exact = [_rate(side, above + 1) for side in sides]
        denominator = math.lcm(*(rate.denominator for rate in exact))
        fresh, output, read, write = (int(rate * denominator) for rate in exact)
        steps.append(_Step(above, fresh, output, read, write, denominator))
    return _Ready(tuple(steps), rates.basis, rates.price_id)


def _override(name: str, fields: Mapping[str, float | int | str]) -> Rates:
    upstream, slash, model = name.partition("/")
    if not slash or not upstream or not model:
        raise ConfigError(f'prices.override: "{name}" must be "upstream/model" or "upstream/*"', param="prices")
    unknown = sorted(set(fields) - OVERRIDE_FIELDS)
    if unknown:
        raise ConfigError(f'prices.override."{name}": unknown field {unknown[0]!r}', param="prices")
    if "input" not in fields or "output" not in fields:
        raise ConfigError(f'prices.override."{name}": input and output are both needed', param="prices")
    rates = {field: _usd(name, field, value) for field, value in fields.items()}
    plain = ((-1, rates["input"]),)
    return Rates(
        plain,
        ((-1, rates["output"]),),
        ((-1, rates["cache_read"]),) if "cache_read" in rates else plain,
        ((-1, rates["cache_write"]),) if "cache_write" in rates else plain,
        "override",
        f"override {name}",
    )


def _usd(name: str, field: str, value: float | int | str) -> Fraction:
    number = None if isinstance(value, bool) else _decimal(value)
    if number is None or not number.is_finite() or number < 0:
        raise ConfigError(f'prices.override."{name}".{field} must be a number of USD ≥ 0', param="prices")
    return _exact(number)


def _decimal(value: float | int | str) -> Decimal | None:
    try:
        return Decimal(str(value))  # as written: 0.1 is a tenth, not its binary neighbour
    except ArithmeticError:
        return None
