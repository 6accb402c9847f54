"""Helicone: the headers of a client, and the base URL it calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from proxy.commands.adopt import client, reading, servers
from proxy.commands.adopt.draft import Draft
from proxy.commands.adopt.litellm import TO_KEYS, set_ttl

PREFIX: Final = "helicone-"
_HOSTS: Final[Mapping[str, str]] = {
    "oai": "openai", "anthropic": "anthropic", "groq": "groq", "together": "together", "openrouter": "openrouter",
    "deepseek": "deepseek", "gemini": "gemini", "x": "x-ai", "mistral": "mistral", "fireworks": "fireworks",
    "deepinfra": "deepinfra", "perplexity": "perplexity", "nvidia": "nvidia",
}  # fmt: skip
_ELSEWHERE: Final[Mapping[str, str]] = {
    "helicone-auth": "not needed; with server.keys_only clients get keys of ibid: " + TO_KEYS,
    "helicone-user-id": "x-cache-user: and then nobody else is served this user's answers",
    "helicone-request-id": "x-request-id of the answer names the ledger's row",
    "helicone-cache-bucket-max-size": "no buckets; x-cache-sample keeps several answers to one question",
    "helicone-retry-enabled": "ibid does not retry: the SDKs do",
    "helicone-ratelimit-policy": f"{TO_KEYS} --limit-requests N/minute, or --limit-usd N/day",
    "helicone-fallbacks": "on_error of a [[policy]] says what stands in",
    "helicone-moderations-enabled": "no guardrails: put them in front of ibid or behind it",
    "helicone-llm-security-enabled": "no guardrails: put them in front of ibid or behind it",
    "helicone-omit-request": "the ledger has no text; Cache-Control: no-store keeps an answer out of the cache",
    "helicone-omit-response": "the ledger has no text; Cache-Control: no-store keeps an answer out of the cache",
    "helicone-model-override": "prices_as of the upstream, or [prices.override]",
    "helicone-prompt-id": "x-cache-tags: prompt:ID",
}
_PLACES: Final = ("helicone-target-url", "helicone-openai-api-base")


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    headers, draft = reading.headers(text, name), Draft()
    said = {**_ELSEWHERE, **{key: _property(key) for key in headers if key.startswith("helicone-property-")}}
    _place(draft, headers)
    is_on = reading.truth(headers.get("helicone-cache-enabled", "false"))
    client.adopt_headers(draft, headers, PREFIX, said, passed=(*_PLACES, "helicone-cache-enabled"))
    if not is_on:
        draft.leave("helicone-cache-enabled", "it was off; ibid caches: try `ibid serve --shadow`, then `ibid report`")
    else:
        draft.take(
            "helicone-cache-enabled", "cache", "semantic", False,
            "it served exact repeats alone; true serves reworded ones too, try it with --shadow",
        )  # fmt: skip
    age = re.search(r"(?:s-maxage|max-age)\s*=\s*\"?(\d+)", headers.get("cache-control", ""))
    if age is not None and (ttl_s := reading.seconds(age[1])) is not None:
        set_ttl(draft, "Cache-Control: max-age", ttl_s)
        draft.rename(
            "Cache-Control: max-age of a request", "x-cache-ttl: how long it is kept; max-age bounds the age served"
        )
    return draft


def _property(name: str) -> str:
    return f"x-cache-tags: {name.removeprefix('helicone-property-')}:VALUE"


def _place(draft: Draft, headers: Mapping[str, str]) -> None:
    """Where the client's requests go."""
    told = next((name for name in _PLACES if name in headers), "")
    address = headers.get(told, "")
    base = next((headers[name] for name in ("base-url", "base_url", "baseurl", "url") if name in headers), "")
    host = re.match(r"https?://([a-z]+)\.(?:helicone|hconeai)\.", base or "https://oai.helicone.ai")
    provider = servers.PROVIDERS.get(_HOSTS.get(host[1] if host else "", ""))
    if address:
        provider = servers.PROVIDERS["azure"] if ".azure.com" in address else servers.SERVER
    name = None if provider is None else servers.add(draft, provider, address or None, None, [])
    if name is None:
        draft.leave(told or "base URL", "no address is known for it: add an [upstream.NAME] with base_url")
        return
    draft.rename(told or base or "the base URL of Helicone", f"[upstream.{name}]; the client's base URL becomes ibid's")
