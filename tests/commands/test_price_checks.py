"""`ibid check` names what would be booked as unpriced, before a bill does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy.commands import checks
from proxy.commands import main as cli
from proxy.core.errors import ConfigError
from proxy.money.prices import Prices, configured
from proxy.settings import config

NOW_MS = 1_795_348_800_000  # 2026-11-22 12:00 UTC
LAB = "[upstream.lab]\nbase_url = 'http://127.0.0.1:9'\nmodels = ['llama-x', 'qwen-*']\n"


def told(tmp_path: Path, text: str) -> dict[str, str]:
    """note → state, without what every configuration says of ollama."""
    path = tmp_path / "ibid.toml"
    path.write_text(text)
    settings = config.load(config.Flags(config=str(path)), {"HOME": str(tmp_path)})
    found = checks.price_gaps(configured(settings), settings, NOW_MS)
    return {finding.note: finding.state for finding in found if "upstream ollama" not in finding.note}


def test_the_providers_of_the_list_are_priced_and_ollama_is_named(tmp_path: Path) -> None:
    assert told(tmp_path, "") == {}
    settings = config.load(config.Flags(), {"HOME": str(tmp_path)})
    (finding,) = checks.price_gaps(Prices(), settings, NOW_MS)
    assert (finding.part, finding.state) == ("prices", "warn")
    assert "booked as unpriced: name a provider in upstream.ollama.prices_as" in finding.note
    assert 'or prices in [prices.override."ollama/*"]' in finding.note


FLEX = '[lane.tier]\nmodels = ["llama-x", "qwen-*"]\n'
TOKENS = "input_usd_per_mtok = 1\noutput_usd_per_mtok = 1\n"


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (LAB, ["warn: calls to upstream lab are booked as unpriced",
               "warn: upstream.lab.models: upstream lab has no default price of llama-x"]),
        (LAB + '[prices.override."lab/*"]\nper_second_usd = 0.001\n', []),
        (LAB + '[prices.override."lab/*"]\nper_second_usd = 0.001\n' + FLEX, []),
        (LAB + '[prices.override."lab/*"]\n' + TOKENS + '[lane.tier]\nmodels = ["llama-x", "qwen-7", "qwen-*"]\n',
         ["fail: lane.tier.models: upstream lab has no flex price of llama-x",
          "fail: lane.tier.models: upstream lab has no flex price of qwen-*",
          "fail: lane.tier.models: upstream lab has no flex price of qwen-7"]),
        (LAB + '[prices.override."lab/*"]\n' + TOKENS + "flex_factor = 1\n" + FLEX, []),
        (LAB + '[prices.override."lab/llama-x"]\nper_second_usd = 1\n',
         ["warn: calls of other models to upstream lab are booked as unpriced"]),
        (LAB + "prices_as = 'mistral'\n", ["warn: upstream.lab.models: upstream lab has no default price of llama-x"]),
        ("[lane.tier]\nmodels = ['gpt-5.4', 'gpt-4', 'gpt-5*']\n",
         ["fail: lane.tier.models: upstream openai has no flex price of gpt-4"]),
        (LAB + '[prices.override."lab/llama-x"]\nper_second_usd = 1\n[lane.edge]\nupstream = "lab"\nmodel = "qwen-1"\n'
         '[lane.route]\ncandidates = ["lab/qwen-1", "lab/llama-x", "openai/gpt-99"]\n',
         ["warn: calls of other models to upstream lab are booked as unpriced",
          "warn: lane.edge.model: upstream lab has no default price of qwen-1",
          "warn: lane.route.candidates: upstream lab has no default price of qwen-1",
          "warn: lane.route.candidates: upstream openai has no default price of gpt-99"]),
        ('[prices.override."opnai/gpt-4"]\n' + TOKENS,
         ['warn: [prices.override."opnai/…"] prices an upstream that is not configured']),
    ],
)  # fmt: skip
def test_each_gap_is_named(tmp_path: Path, text: str, notes: list[str]) -> None:
    found = sorted(f"{state}: {note}" for note, state in told(tmp_path, text).items())
    assert len(found) == len(notes), found
    for line, wanted in zip(found, notes, strict=True):
        assert line.startswith(wanted)


def test_a_tier_without_a_price_makes_check_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("IBID_")]:
        monkeypatch.delenv(name)
    (tmp_path / "ibid.toml").write_text("[lane.tier]\nmodels = ['gpt-4']\n[server]\nlisten = '127.0.0.1:0'\n")
    places = ("--data-dir", str(tmp_path / "data"), "--admin", "127.0.0.1:0")
    assert cli.main(["check", "--config", str(tmp_path / "ibid.toml"), *places]) == 2
    assert capsys.readouterr().err == ("ibid: prices: lane.tier.models: upstream openai has no flex price of gpt-4\n")


def test_an_unknown_price_context_is_an_error_of_the_file(tmp_path: Path) -> None:
    text = f'[prices.override."openai/m"]\n{TOKENS}turbo_factor = 2\n'
    with pytest.raises(ConfigError, match=r"line 4: prices\.override\.openai/m\.turbo_factor is unknown"):
        told(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("", ["ok: openai: any model at openai"]),
        (LAB, ["ok: openai: llama-x, qwen-* at lab; any other model at openai"]),
        (LAB + "[upstream.openai]\nmodels = ['gpt-*']\n",
         ["ok: openai: gpt-* at openai; llama-x, qwen-* at lab; no other model"]),
        ("[upstream.lab]\nbase_url = 'http://h'\n",
         ["ok: openai: any model at openai",
          "warn: lab is asked for nothing: openai, before it, takes every model. Set upstream.lab.models"]),
        ("[upstream.lab]\nbase_url = 'http://h'\n[[policy]]\non_rate_limit = ['upstream:lab']\n",
         ["ok: openai: any model at openai"]),
        ("[upstream.lab]\nbase_url = 'http://h'\n[lane.edge]\nupstream = 'lab'\nmodel = 'tiny'\n",
         ["ok: openai: any model at openai"]),
    ],
)  # fmt: skip
def test_check_says_which_models_are_open(tmp_path: Path, text: str, notes: list[str]) -> None:
    (tmp_path / "ibid.toml").write_text(text)
    settings = config.load(config.Flags(config=str(tmp_path / "ibid.toml")), {"HOME": "/home/ann"})
    found = [f"{finding.state}: {finding.note}" for finding in checks._upstreams(settings)]
    for dialect in ("anthropic", "gemini", "ollama"):
        found.remove(f"ok: {dialect}: any model at {dialect}")
    assert found == notes


def test_check_says_what_would_keep_an_upstream_from_standing_in(tmp_path: Path) -> None:
    (tmp_path / "ibid.toml").write_text(
        "[upstream.lab]\nbase_url = 'http://h'\n[upstream.here]\nbase_url = 'http://127.0.0.1:8000'\n"
        "[[policy]]\non_error = ['upstream:here', 'upstream:lab']\non_rate_limit = ['upstream:gemini']\n"
    )
    settings = config.load(config.Flags(config=str(tmp_path / "ibid.toml")), {"HOME": "/home/ann"})
    keyless = "has no key of its own, and is never sent a client's. Set its key_env"
    assert [f"{finding.state}: {finding.note}" for finding in checks._failover(settings)] == [
        f"warn: policy.0.on_error: upstream lab {keyless}",
        f"warn: policy.0.on_rate_limit: upstream gemini {keyless}",
        "ok: policy.0.on_rate_limit: upstream gemini stands in for requests of the dialect gemini alone",
    ]
