"""`ibid check` names what would be booked as unpriced, before a bill does."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy import checks, config
from proxy.core.errors import ConfigError
from proxy.prices import Prices, configured

NOW_MS = 1_795_348_800_000  # 2026-11-22 12:00 UTC
LAB = "[upstream.lab]\nbase_url = 'http://127.0.0.1:9'\nmodels = ['llama-x', 'qwen-*']\n"


def told(tmp_path: Path, text: str, **tiers: tuple[str, ...]) -> dict[str, str]:
    """note → state, without what every configuration says of ollama."""
    path = tmp_path / "ibid.toml"
    path.write_text(text)
    settings = config.load(config.Flags(config=str(path)), {"HOME": str(tmp_path)})
    found = checks.price_gaps(configured(settings), settings, tiers, NOW_MS)
    return {finding.note: finding.state for finding in found if "upstream ollama" not in finding.note}


def test_the_providers_of_the_list_are_priced_and_ollama_is_named(tmp_path: Path) -> None:
    assert told(tmp_path, "") == {}
    settings = config.load(config.Flags(), {"HOME": str(tmp_path)})
    (finding,) = checks.price_gaps(Prices(), settings, {}, NOW_MS)
    assert (finding.part, finding.state) == ("prices", "warn")
    assert "booked as unpriced: name a provider in upstream.ollama.prices_as" in finding.note
    assert 'or prices in [prices.override."ollama/*"]' in finding.note


@pytest.mark.parametrize(
    ("text", "tiers", "notes"),
    [
        (LAB, {}, ["warn: calls to upstream lab are booked as unpriced",
                   "warn: upstream lab, tier default: no price of llama-x"]),
        (LAB + '[prices.override."lab/*"]\nper_second_usd = 0.001\n', {"lab": ("flex",)}, []),
        (LAB + '[prices.override."lab/*"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\nflex_factor = 0.5\n',
         {"lab": ("batch", "flex")}, ["fail: upstream lab, tier batch: no price of *, llama-x"]),
        (LAB + '[prices.override."lab/llama-x"]\nper_second_usd = 1\n', {},
         ["warn: calls of other models to upstream lab are booked as unpriced"]),
        (LAB + "prices_as = 'mistral'\n", {}, ["warn: upstream lab, tier default: no price of llama-x"]),
        ("[upstream.openai]\nmodels = ['gpt-5.4', 'gpt-4']\n", {"openai": ("flex", "batch")},
         ["fail: upstream openai, tier flex: no price of gpt-4"]),
        ("", {"anthropic": ("flex",), "openai": ("flex", "turbo")},
         ["fail: upstream anthropic, tier flex: no model there", "fail: upstream openai, tier turbo: no model there"]),
        ('[prices.override."opnai/gpt-4"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\n', {},
         ['warn: [prices.override."opnai/…"] prices an upstream that is not configured']),
    ],
)  # fmt: skip
def test_each_gap_is_named(tmp_path: Path, text: str, tiers: dict[str, tuple[str, ...]], notes: list[str]) -> None:
    found = sorted(f"{state}: {note}" for note, state in told(tmp_path, text, **tiers).items())
    assert len(found) == len(notes), found
    for line, wanted in zip(found, sorted(notes), strict=True):
        assert line.startswith(wanted)


def test_an_unknown_price_context_is_an_error_of_the_file(tmp_path: Path) -> None:
    text = '[prices.override."openai/m"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\nturbo_factor = 2\n'
    with pytest.raises(ConfigError, match=r"line 4: prices\.override\.openai/m\.turbo_factor is unknown"):
        told(tmp_path, text)
