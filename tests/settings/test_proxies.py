"""Which upstreams are reached through an HTTP proxy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.core.errors import ConfigError
from proxy.settings.config import Flags, load
from proxy.settings.proxies import proxy_for

HTTP, HTTPS = "http://office:3128", "http://office:3129"
BOTH = {"HTTP_PROXY": HTTP, "HTTPS_PROXY": HTTPS}
CASES: list[tuple[str, str | None, Mapping[str, str], str | None]] = [
    ("http://llm.test:8000", None, {}, None),
    ("http://llm.test:8000", None, BOTH, HTTP),
    ("https://llm.test", None, BOTH, HTTPS),
    ("https://llm.test", None, {"HTTP_PROXY": HTTP}, None),
    ("https://llm.test", None, {"ALL_PROXY": HTTP}, HTTP),
    ("https://llm.test", None, {"HTTPS_PROXY": "http://other:1", "https_proxy": HTTPS}, HTTPS),
    ("https://llm.test", None, {**BOTH, "NO_PROXY": "llm.test"}, None),
    ("https://api.llm.test", None, {**BOTH, "no_proxy": "a.test, .llm.test"}, None),
    ("https://api.llm.test", None, {**BOTH, "no_proxy": "*.llm.test"}, None),
    ("https://notllm.test", None, {**BOTH, "no_proxy": "llm.test"}, HTTPS),
    ("https://llm.test:8443", None, {**BOTH, "no_proxy": "llm.test:8443"}, None),
    ("https://llm.test:8444", None, {**BOTH, "no_proxy": "llm.test:8443"}, HTTPS),
    ("https://llm.test", None, {**BOTH, "no_proxy": "*"}, None),
    ("http://10.1.2.3:8000", None, {**BOTH, "no_proxy": "10.0.0.0/8"}, None),
    ("http://11.1.2.3:8000", None, {**BOTH, "no_proxy": "10.0.0.0/8"}, HTTP),
    ("http://127.0.0.1:11434", None, BOTH, None),
    ("http://[::1]:11434", None, BOTH, None),
    ("http://localhost:11434", None, BOTH, None),
    ("http://127.0.0.1:11434", HTTP, {}, HTTP),
    ("http://llm.test", "off", BOTH, None),
    ("http://llm.test", HTTPS, {**BOTH, "no_proxy": "*"}, HTTPS),
]


@pytest.mark.parametrize(("url", "configured", "environ", "expected"), CASES)
def test_the_environment_is_read_as_the_sdks_read_it_and_the_setting_beats_it(
    url: str, configured: str | None, environ: Mapping[str, str], expected: str | None
) -> None:
    assert proxy_for(url, configured, environ) == expected


def test_each_upstream_has_its_own_way(tmp_path: Path) -> None:
    file = tmp_path / "ibid.toml"
    file.write_text('[upstream.near]\nbase_url = "http://near.test"\n')
    settings = load(Flags(config=str(file)), {**BOTH, "NO_PROXY": "near.test"})
    ways = {name: upstream.proxy for name, upstream in settings.upstreams.items()}
    assert ways == {"openai": HTTPS, "anthropic": HTTPS, "gemini": HTTPS, "ollama": None, "near": None}
    assert "office" not in repr(settings), "it may hold a password"


@pytest.mark.parametrize("proxy", ["socks5://office:1080", "office:3128", "http://"])
def test_a_proxy_that_is_none_is_an_error_of_the_operators(tmp_path: Path, proxy: str) -> None:
    file = tmp_path / "ibid.toml"
    file.write_text(f'[forward]\nproxy = "{proxy}"\n')
    with pytest.raises(ConfigError, match=r"proxy"):
        load(Flags(config=str(file)), {})
