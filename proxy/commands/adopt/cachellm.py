"""CacheLLM: its environment file, `CACHELLM_NAME=value`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from proxy.commands.adopt import reading, servers
from proxy.commands.adopt.draft import Draft
from proxy.commands.adopt.litellm import TO_KEYS, set_ttl

_PREFIX: Final = "CACHELLM_"
_NUMBERS: Final[Mapping[str, tuple[str, str]]] = {
    "TTL_VOLATILE": ("cache", "volatile_ttl_s"),
    "REQUEST_TIMEOUT": ("forward", "first_byte_timeout_s"),
}
_THRESHOLD: Final = "no threshold here: cache.max_error_rate is the share of hits that may be wrong"
_CATEGORY: Final = "no categories: ttl_s of a [[policy]] for a model, a namespace or a tag"
_ELSEWHERE: Final[Mapping[str, str]] = {
    "REDIS_URL": "not needed: SQLite, or IBID_DATABASE_URL for PostgreSQL",
    "INDEX_NAME": "not needed", "EMBEDDING_BACKEND": "not needed", "EMBEDDING_DIM": "not needed",
    "EMBEDDING_CACHE_SIZE": "embedding.lru", "TOP_K": "not needed",
    "NEAR_MISS_MARGIN": "cache.near_floor", "NEAR_MISS_LOG_SIZE": "GET /cache/near-misses has them all",
    "CACHE_MULTI_TURN": "later turns are found again word for word, never by meaning",
    "CACHE_JSON_MODE": "JSON answers are cached",
    "CACHE_STREAMING": "streams are cached",
    "PII_GUARD": "always on", "STRIP_FILLER_WORDS": "pleasantries at either end do not count",
    "LOG_PROMPTS": "prompts are never logged",
    "PROVIDER_MAX_RETRIES": "ibid does not retry: the SDKs do",
    "METRICS_ENABLED": "/metrics on the admin port, always",
    "TRACING_ENABLED": "log lines and the ledger have the times",
    "OTLP_ENDPOINT": "log lines and the ledger have the times", "SERVICE_NAME": "not needed",
    "AWS_PROFILE": "ibid does not translate for bedrock",
    "ENTRY_PREFIX": "not needed", "EXACT_PREFIX": "not needed", "STATS_PREFIX": "not needed",
    "REQUIRE_AUTH_FOR_ADMIN": "always: IBID_ADMIN_TOKEN, or the file admin-token",
    "ENABLED": "ibid caches; `x-cache-mode: off` leaves a request out",
}  # fmt: skip


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    draft = Draft()
    said = reading.variables(text, name)
    given = {key.removeprefix(_PREFIX): value for key, value in said.items() if key.startswith(_PREFIX) and value}
    _listen(draft, given)
    _upstream(draft, given)
    _cache(draft, given)
    for key in given:
        if key in _ELSEWHERE and not (key == "ENABLED" and reading.truth(given[key])):
            draft.leave(_PREFIX + key, _ELSEWHERE[key])
    known = frozenset({*_ELSEWHERE, *_NUMBERS, *_READ})
    others = {key: value for key, value in given.items() if not key.startswith(("THRESHOLD_", "TTL_"))}
    draft.leave_others("", {_PREFIX + key: value for key, value in others.items() if key not in known}, frozenset())
    return draft


_READ: Final = frozenset(
    {
        "HOST", "PORT", "LOG_LEVEL", "LOG_JSON", "API_KEYS", "SHADOW_MODE", "EMBEDDING_MODEL", "DEFAULT_PROVIDER",
        "OPENAI_BASE_URL", "OPENAI_API_KEY", "MAX_CACHEABLE_TEMPERATURE", "CACHE_TOOL_CALLS", "MAX_PROMPT_CHARS",
    }
)  # fmt: skip


def _listen(draft: Draft, given: Mapping[str, str]) -> None:
    if "HOST" in given or "PORT" in given:
        host, port = given.get("HOST", "127.0.0.1"), reading.number(given.get("PORT", "8080"))
        if port is not None and 0 < port < 65536:
            address = f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"
            draft.take("CACHELLM_HOST, CACHELLM_PORT", "server", "listen", address, "clients keep their base URL")
    level = given.get("LOG_LEVEL", "").upper()
    if level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        draft.take("CACHELLM_LOG_LEVEL", "log", "level", level)
    if (as_json := reading.truth(given.get("LOG_JSON", ""))) is not None:
        draft.take("CACHELLM_LOG_JSON", "log", "format", "json" if as_json else "text")
    if "API_KEYS" in given:
        draft.take("CACHELLM_API_KEYS", "server", "keys_only", True, f"keys are not copied, make new ones: {TO_KEYS}")


def _upstream(draft: Draft, given: Mapping[str, str]) -> None:
    key = "CACHELLM_OPENAI_API_KEY" if "OPENAI_API_KEY" in given else None
    address = given.get("OPENAI_BASE_URL")
    if (provider := given.get("DEFAULT_PROVIDER", "openai").lower()) not in ("openai", "fake"):
        draft.leave("CACHELLM_DEFAULT_PROVIDER", f"ibid does not translate for {provider}: ask it by its own gateway")
    found = servers.add(draft, servers.PROVIDERS["openai"], address, key, [])
    if found is None:
        draft.leave("CACHELLM_OPENAI_BASE_URL", "is no address: set base_url of [upstream.openai]")
        return
    draft.rename("CACHELLM_DEFAULT_PROVIDER, CACHELLM_OPENAI_BASE_URL", f"[upstream.{found}]")
    if key:
        draft.rename(key, f"key_env = {key}: {servers.SECRET}, export it under this name")


def _cache(draft: Draft, given: Mapping[str, str]) -> None:
    if (ttl_s := reading.seconds(given.get("TTL_DEFAULT"))) is not None:
        set_ttl(draft, "CACHELLM_TTL_DEFAULT", ttl_s)
    for key, (section, name) in _NUMBERS.items():
        if (value := reading.seconds(given.get(key))) is not None:
            draft.take(_PREFIX + key, section, name, value)
    if (temperature := reading.number(given.get("MAX_CACHEABLE_TEMPERATURE"))) is not None and 0 <= temperature <= 2:
        draft.take(
            "CACHELLM_MAX_CACHEABLE_TEMPERATURE", "cache", "semantic_temperature_max", float(temperature),
            "above it exact hits only",
        )  # fmt: skip
    _switch(draft, given, "SHADOW_MODE", lambda is_on: ("cache", "shadow", is_on))
    _switch(draft, given, "CACHE_TOOL_CALLS", lambda is_on: ("cache", "cache_tool_calls", is_on))
    if (characters := reading.number(given.get("MAX_PROMPT_CHARS"))) is not None and characters >= 1:
        draft.take("CACHELLM_MAX_PROMPT_CHARS", "cache", "prompt_limit_bytes", int(characters))
    if "EMBEDDING_MODEL" in given:
        draft.rename(
            "CACHELLM_EMBEDDING_MODEL", "embedding.model: the bundled all-MiniLM-L6-v2; another one as a folder"
        )
    for key in given:
        if key.startswith("THRESHOLD_"):
            draft.leave(_PREFIX + key, _THRESHOLD)
        elif key.startswith("TTL_") and key not in ("TTL_DEFAULT", "TTL_VOLATILE"):
            draft.leave(_PREFIX + key, _CATEGORY)


def _switch(draft: Draft, given: Mapping[str, str], key: str, setting: Callable[[bool], tuple[str, str, Any]]) -> None:
    if (is_on := reading.truth(given.get(key, ""))) is not None:
        draft.take(_PREFIX + key, *setting(is_on))
