"""List prices of model calls in integer nano-dollars, from the genai-prices snapshot that ships in its wheel.

Nothing here touches the network: genai-prices fetches only through `UpdatePrices`, which is never started, and prices
are resolved against the bundled snapshot object itself, so an updater started elsewhere would not be seen either.

A price is resolved once per (upstream, model, tier, day) into exact integer rates, then costs a dictionary lookup and
four multiplications. Rounding: a cost is summed exactly, as integers over one denominator, and rounded once, half to
even, to whole nano-dollars.

A tier whose price is not known makes a call unpriced. genai-prices itself answers an unknown price context with the
full price, so a context counts only where the model has a variant for it that is in force that day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from proxy.core.errors import ConfigError
from proxy.core.model import Usage
from proxy.core.rates import PUSD_PER_NUSD, Rate
from proxy.core.units import DAY_MS, NUSD_PER_USD
from proxy.ports import Price
from proxy.settings.sections import Settings

if TYPE_CHECKING:  # .3 s to import: `Prices.load`, or when a list price is first asked for
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

NUSD_PER_TOKEN = 1_000  # nano-dollars a token costs at one USD per million tokens
MEMO_LIMIT = 4_096  # model names come from clients: the memo must not grow with them
TOKEN_FIELDS = frozenset({"input", "output", "cache_read", "cache_write"})
UNPRICED_LIMIT = 32
FACTORS = {"flex_factor": "flex", "batch_factor": "batch", "priority_factor": "priority"}
"""Field of an override → the tier whose rates are that many times the default tier's."""
OVERRIDE_FIELDS = TOKEN_FIELDS | FACTORS.keys() | {"per_second_usd"}
TIMED = "timed"  # in place of a tier's name: priced by time alone, so the same in every tier

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
    per_ms: Fraction = Fraction(0)  # of the time the call took


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
    per_ms: Fraction


class Known(NamedTuple):
    """What the price list has of a provider: its id there, and the service tiers any model of it has a price for."""

    provider: str
    tiers: frozenset[str]


class Prices:
    """PriceBook of the bundled snapshot and the operator's overrides.

    `overrides`: {"openai/gpt-x": {"input": 2.5, "output": 10, "cache_read": 0.25, "cache_write": …}} in USD per million
    tokens; "local/*" prices a whole upstream. An absent cache rate is the input rate. `flex_factor`, `batch_factor` and
    `priority_factor` price those tiers; without its factor a tier is unpriced. `per_second_usd` prices time: beside
    token rates, or alone, then in every tier. Raises ConfigError on a name without "/", an unknown field, or a value
    that is not a finite number ≥ 0.
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
        """Read the snapshot now instead of at the first list price: .3 s, .75 s where Python must compile it."""
        self._snapshot = self._snapshot or self._load()

    def price(self, upstream: str, model: str, usage: Usage, tier: str, ts_ms: int, seconds: float = 0.0) -> Price:
        """What one call that took `seconds` costs. Unknown models, tiers and upstreams cost 0, basis "unpriced"."""
        rates = self._ready(upstream, model, tier, ts_ms)
        if rates is None:
            return _UNPRICED
        if rates.per_ms and not 0 <= seconds < math.inf:
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
                if rates.per_ms:
                    nusd = round(Fraction(total, step.denominator) + rates.per_ms * round(seconds * 1000))
                else:
                    nusd = total if step.denominator == 1 else round(Fraction(total, step.denominator))
                return Price(nusd, rates.basis, rates.price_id)
        return _UNPRICED  # a negative input counter: an upstream that cannot be believed

    def rates(self, upstream: str, model: str, tier: str, ts_ms: int) -> tuple[Rate, ...] | None:
        """What tokens cost at that time, rounded to pico-dollars a token; None where `price` would say "unpriced"."""
        ready = self._ready(upstream, model, tier, ts_ms)
        if ready is None:
            return None
        return tuple(
            Rate(step.above, *(round(Fraction(rate * PUSD_PER_NUSD, step.denominator)) for rate in step[1:5]))
            for step in ready.steps
        )

    def known(self, upstream: str, ts_ms: int) -> Known | None:
        """The price list's provider for an upstream; None when it has none of that name."""
        snapshot = self._snapshot or self._load()
        try:
            provider = snapshot.find_provider(None, self._providers.get(upstream, upstream), None)
        except LookupError:
            return None
        at = _moment(ts_ms)
        priced = {
            tier
            for tier, context in _CONTEXTS.items()
            if any(_has_variant(info, context, at) for info in provider.models)
        }
        return Known(provider.id, frozenset(priced | {"default"}))

    def _ready(self, upstream: str, model: str, tier: str, ts_ms: int) -> _Ready | None:
        key = (upstream, model, tier, ts_ms // DAY_MS)
        try:
            return self._memo[key]
        except KeyError:
            return self._remember(key, ts_ms)

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
            return override.get(tier) or override.get(TIMED)
        if not model:
            return None
        snapshot = self._snapshot or self._load()
        try:
            provider, info = snapshot.find_provider_model(model, None, self._providers.get(upstream, upstream), None)
        except LookupError:
            return None
        at, context = _moment(ts_ms), _CONTEXTS.get(tier)
        if tier != "default" and (context is None or not _has_variant(info, context, at)):
            return None
        return _rates(info.get_prices(at, context), f"{self.source} {provider.id}/{info.id}")

    def _load(self) -> DataSnapshot:
        from genai_prices.data import providers
        from genai_prices.data_snapshot import DataSnapshot

        self._snapshot = DataSnapshot(providers=providers, from_auto_update=False)
        return self._snapshot


class Booking:
    """The price book as the ledger uses it: it remembers the models that answered and have no price."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self.unpriced: dict[str, None] = {}  # "upstream/model", in the order they were met

    def price(self, upstream: str, model: str, usage: Usage, tier: str, ts_ms: int, seconds: float = 0.0) -> Price:
        """As that of `Prices`."""
        found = self._prices.price(upstream, model, usage, tier, ts_ms, seconds)
        if found.basis == "unpriced" and len(self.unpriced) < UNPRICED_LIMIT:
            self.unpriced[f"{upstream}/{model}" if tier == "default" else f"{upstream}/{model} ({tier})"] = None
        return found


def configured(settings: Settings) -> Prices:
    """The price book of a configuration."""
    return Prices(
        {name: override.rates() for name, override in settings.prices.items()},
        {name: upstream.prices_as for name, upstream in settings.upstreams.items() if upstream.prices_as},
    )


def _moment(ts_ms: int) -> datetime:
    return datetime.fromtimestamp(ts_ms / 1000, UTC)


def _has_variant(info: ModelInfo, context: Mapping[str, str], at: datetime) -> bool:
    return any(
        variant.when.items() <= context.items() and (variant.constraint is None or variant.constraint.active(at))
        for variant in info.price_variants or ()
    )


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
    from genai_prices.types import TieredPrices

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
    return _Ready(tuple(steps), rates.basis, rates.price_id, rates.per_ms)


def _override(name: str, fields: Mapping[str, float | int | str]) -> dict[str, Rates]:
    """Rates by tier; under TIMED alone where only time has a price."""
    upstream, slash, model = name.partition("/")
    if not slash or not upstream or not model:
        raise ConfigError(f'prices.override: "{name}" must be "upstream/model" or "upstream/*"', param="prices")
    unknown = sorted(set(fields) - OVERRIDE_FIELDS)
    if unknown:
        raise ConfigError(f'prices.override."{name}": unknown field {unknown[0]!r}', param="prices")
    if "per_second_usd" not in fields and not {"input", "output"} <= fields.keys():
        raise ConfigError(f'prices.override."{name}": input and output are both needed', param="prices")
    exact = {field: _number(name, field, value) for field, value in fields.items()}
    per_ms = exact.get("per_second_usd", Fraction(0)) * NUSD_PER_USD / 1000
    if not TOKEN_FIELDS & fields.keys():
        return {TIMED: _scaled({}, Fraction(1), f"override {name}", per_ms)}
    tiers = {"default": _scaled(exact, Fraction(1), f"override {name}", per_ms)}
    for field in FACTORS.keys() & fields.keys():
        tiers[FACTORS[field]] = _scaled(exact, exact[field], f"override {name} {FACTORS[field]}", per_ms)
    return tiers


def _scaled(usd: Mapping[str, Fraction], factor: Fraction, price_id: str, per_ms: Fraction) -> Rates:
    def side(field: str, instead: Fraction) -> tuple[tuple[int, Fraction], ...]:
        return ((-1, usd.get(field, instead) * factor * NUSD_PER_TOKEN),)

    plain, none = usd.get("input", Fraction(0)), Fraction(0)
    return Rates(
        side("input", none), side("output", none), side("cache_read", plain), side("cache_write", plain), "override",
        price_id, per_ms,
    )  # fmt: skip


def _number(name: str, field: str, value: float | int | str) -> Fraction:
    number = None if isinstance(value, bool) else _decimal(value)
    if number is None or not number.is_finite() or number < 0:
        raise ConfigError(f'prices.override."{name}".{field} must be a number ≥ 0', param="prices")
    return Fraction(number)


def _decimal(value: float | int | str) -> Decimal | None:
    try:
        return Decimal(str(value))  # as written: 0.1 is a tenth, not its binary neighbour
    except ArithmeticError:
        return None
