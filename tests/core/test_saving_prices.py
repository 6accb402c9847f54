"""List prices: exact, offline, never a guess."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import genai_prices
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import ConfigError
from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.rows import NOON_MS

BOOK = Prices()
counts = st.integers(0, 2_000_000)


def reference_nusd(model: str, provider: str, usage: Usage) -> int:
    """What genai-prices itself says, as exact nano-dollars."""
    priced = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
        ),
        model,
        provider_id=provider,
        genai_request_timestamp=datetime.fromtimestamp(NOON_MS / 1000, UTC),
    )
    return round(priced.total_price * Decimal(10**9))


@pytest.mark.parametrize(
    ("provider", "model"),
    [("openai", "gpt-4o-mini"), ("openai", "gpt-5.4"), ("openai", "gpt-6.1-sol"), ("anthropic", "claude-opus-5-5")],
)
@given(plain=counts, output=counts, read=counts, write=counts)
def test_prices_agree_with_their_source_to_the_nano_dollar(provider, model, plain, output, read, write):
    if write and model != "claude-opus-5-5" and model != "gpt-6.1-sol":
        write = 0  # these models have no price for cache writes in the source, which then refuses or drops them
    usage = Usage(plain + read + write, output, read, write)
    found = BOOK.price(provider, model, usage, "default", NOON_MS)
    assert found.basis == "list"
    assert abs(found.nusd - reference_nusd(model, provider, usage)) <= 0


def test_the_price_names_its_source_version_provider_and_model():
    price = BOOK.price("openai", "gpt-4o-mini", Usage(1, 1), "default", NOON_MS)
    assert price.price_id == f"genai-prices {genai_prices.__version__} openai/gpt-4o-mini"


@pytest.mark.parametrize(
    ("upstream", "model", "tier"),
    [("local", "smollm2", "default"), ("openai", "gpt-99-nothing", "default"), ("openai", "", "default"),
     ("openai", "gpt-4o-mini", "a-tier-nobody-sells"), ("openai", "x" * 10_000, "default")],
)  # fmt: skip
def test_unknown_is_unpriced_not_guessed(upstream, model, tier):
    assert BOOK.price(upstream, model, Usage(1000, 1000), tier, NOON_MS) == (0, "unpriced", "")


def test_flex_costs_less_than_default():
    usage = Usage(1000, 1000)
    flex = BOOK.price("openai", "gpt-5.4", usage, "flex", NOON_MS)
    assert 0 < flex.nusd < BOOK.price("openai", "gpt-5.4", usage, "default", NOON_MS).nusd


def test_overrides_are_exact_and_a_star_prices_the_whole_upstream():
    book = Prices({"openai/gpt-4o-mini": {"input": 0.1, "output": 0.3}, "local/*": {"input": "0.0001", "output": 0}})
    assert book.price("openai", "gpt-4o-mini", Usage(3, 1), "default", NOON_MS) == (
        600, "override", "override openai/gpt-4o-mini"
    )  # fmt: skip
    assert book.price("local", "anything", Usage(15, 9), "default", NOON_MS).nusd == 2  # 1.5, half to even
    assert book.price("local", "anything", Usage(25, 9), "default", NOON_MS).nusd == 2  # 2.5, half to even


TIERED = {"flex_factor": "0.5", "batch_factor": "0.4", "priority_factor": "1.75"}


def test_a_tier_of_an_override_is_its_factor_times_the_rates_and_unpriced_without_one():
    rates = {"input": "2", "output": "8", "cache_read": "0.5", "cache_write": "2.5"}
    book, bare = Prices({"openai/gpt-x": {**rates, **TIERED}}), Prices({"openai/gpt-x": rates})
    usage = Usage(1000, 100, 300, 200)
    default = 500 * 2_000 + 100 * 8_000 + 300 * 500 + 200 * 2_500
    for tier, factor in (("default", 1), ("flex", Fraction("0.5")), ("batch", Fraction("0.4")),
                         ("priority", Fraction("1.75"))):  # fmt: skip
        assert book.price("openai", "gpt-x", usage, tier, NOON_MS).nusd == default * factor, tier
    assert book.price("openai", "gpt-x", usage, "flex", NOON_MS).price_id == "override openai/gpt-x flex"
    for tier in ("flex", "batch", "priority", "turbo"):
        assert bare.price("openai", "gpt-x", usage, tier, NOON_MS) == (0, "unpriced", ""), tier
    assert book.price("openai", "gpt-x", usage, "turbo", NOON_MS).basis == "unpriced"


def test_a_variant_not_yet_in_force_is_no_price():
    """genai-prices has Anthropic's batch prices from 2026-10-14 on; asked for a day before it gives the full price."""
    before, after = (int(datetime(2026, 10, day, 12, tzinfo=UTC).timestamp() * 1000) for day in (1, 20))
    usage = Usage(1000, 1000)
    assert BOOK.price("anthropic", "claude-haiku-4-5", usage, "batch", before).basis == "unpriced"
    full, batch = (BOOK.price("anthropic", "claude-haiku-4-5", usage, tier, after) for tier in ("default", "batch"))
    assert (batch.basis, batch.nusd * 2) == ("list", full.nusd)


@given(seconds=st.floats(0, 1e6), tokens=counts)
def test_time_is_priced_by_the_millisecond_exactly(seconds, tokens):
    book = Prices({"edge/*": {"per_second_usd": "0.00002"}, "edge/m": {"per_second_usd": "0.00002", "input": "0.1",
                                                                        "output": "0"}})  # fmt: skip
    exact = Fraction(round(seconds * 1000)) * 20  # 20,000 nano-dollars a second
    for tier in ("default", "flex"):
        assert book.price("edge", "x", Usage(tokens, tokens), tier, NOON_MS, seconds) == (
            exact, "override", "override edge/*"
        )  # fmt: skip
    assert book.price("edge", "m", Usage(tokens, tokens), "default", NOON_MS, seconds).nusd == exact + tokens * 100
    assert book.price("edge", "m", Usage(tokens, tokens), "default", NOON_MS).nusd == tokens * 100


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_unpriced(seconds):
    book = Prices({"edge/*": {"per_second_usd": 1}})
    assert book.price("edge", "x", Usage(1, 1), "default", NOON_MS, seconds).basis == "unpriced"
    assert BOOK.price("openai", "gpt-4o-mini", Usage(1, 1), "default", NOON_MS, seconds).basis == "list"


@pytest.mark.parametrize("tier", ["default", "flex", "batch", "priority"])
@pytest.mark.parametrize(("upstream", "model"), [("openai", "gpt-5.4"), ("anthropic", "claude-haiku-5-5"), ("o", "m")])
@given(plain=counts, output=counts, read=counts, write=counts)
def test_rates_for_sql_give_the_price_of_the_book(upstream, model, tier, plain, output, read, write):
    book = Prices({"o/m": {"input": "0.123", "output": 4, **TIERED}})
    rates = book.rates(upstream, model, tier, NOON_MS)
    usage = Usage(plain + read + write, output, read, write)
    price = book.price(upstream, model, usage, tier, NOON_MS)
    assert (rates is None) == (price.basis == "unpriced")
    if rates is not None:
        rate = next(rate for rate in rates if usage.input_tokens > rate.above)
        pusd = plain * rate.input + output * rate.output + read * rate.cache_read + write * rate.cache_write
        assert round(Fraction(pusd, 1000)) == price.nusd


def test_the_list_says_which_providers_and_tiers_it_knows():
    assert BOOK.known("openai", NOON_MS) == ("openai", {"default", "flex", "batch", "priority"})
    assert BOOK.known("anthropic", NOON_MS).tiers == {"default", "batch"}
    assert BOOK.known("gemini", NOON_MS).provider == "google"
    assert Prices(providers={"lab": "mistral"}).known("lab", NOON_MS).provider == "mistral"
    assert BOOK.known("ollama", NOON_MS) is None


@pytest.mark.parametrize(
    "overrides",
    [{"gpt": {"input": 1, "output": 1}}, {"a/b": {"input": 1}}, {"a/b": {"input": -1, "output": 1}},
     {"a/b": {"input": 1, "output": float("nan")}}, {"a/b": {"input": 1, "output": 1, "inptu": 1}},
     {"a/b": {"input": True, "output": 1}}, {"a/b": {"input": "one", "output": 1}},
     {"a/b": {"input": 1, "output": 1, "flex_factor": -1}}, {"a/b": {"flex_factor": 0.5}},
     {"a/b": {"per_second_usd": "a lot"}}, {"a/b": {"input": 1, "output": 1, "turbo_factor": 2}}],
)  # fmt: skip
def test_a_bad_override_is_refused_by_name(overrides):
    with pytest.raises(ConfigError, match=r"prices\.override"):
        Prices(overrides)


def test_pricing_opens_no_socket_and_starts_no_thread(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a price must not touch the network")

    monkeypatch.setattr(socket, "socket", refuse)
    before = threading.active_count()
    assert Prices().price("anthropic", "claude-opus-5-5", Usage(10, 10), "default", NOON_MS).nusd > 0
    assert threading.active_count() == before


def test_clients_cannot_grow_the_memo_without_bound():
    book = Prices({"local/*": {"input": 1, "output": 1}})
    for number in range(10_000):
        book.price("local", f"m{number}", Usage(1, 1), "default", NOON_MS)
    assert len(book._memo) <= 4_096
