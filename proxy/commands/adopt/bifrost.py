"""Bifrost: `config.json` with providers, plugins and governance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proxy.commands.adopt import reading, servers
from proxy.commands.adopt.draft import Draft
from proxy.commands.adopt.litellm import TO_KEYS, set_ttl
from proxy.core.units import AGE, duration_s

_REFERENCE: Final = "env."
_ELSEWHERE: Final[Mapping[str, str]] = {
    "vector_store": "not needed: vectors are kept here",
    "config_store": "not needed: the file is the configuration",
    "logs_store": "the ledger: `ibid docs ledger`",
    "encryption_key": "not needed: no provider's key is stored",
    "mcp": "no tools are run here",
    "guardrails_config": "no guardrails: put them in front of ibid or behind it",
    "framework": "prices come with the installation; [prices.override] has your own",
    "websocket": "not passed on",
}
_CACHE: Final[Mapping[str, str]] = {
    "threshold": "no threshold here: cache.max_error_rate is the share of hits that may be wrong",
    "provider": "not needed: texts are embedded here", "embedding_model": "not needed: texts are embedded here",
    "dimension": "not needed: texts are embedded here", "keys": "not needed: texts are embedded here",
    "default_cache_key": "not needed: every request is looked up; x-bf-cache-key keeps requests apart",
    "conversation_history_threshold": "conversations of any length are found again word for word",
    "exclude_system_prompt": "the system prompt always counts",
    "cache_by_model": "always", "cache_by_provider": "always",
    "cache_tool_call_responses": "cache.cache_tool_calls",
    "cleanup_on_shutdown": "no: answers outlive a restart", "vector_store_namespace": "not needed",
}  # fmt: skip


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    given, draft = reading.tree(text, name), Draft()
    for provider, said in reading.table(given.get("providers"), "providers").items():
        _provider(draft, provider, reading.table(said, f"providers.{provider}"))
    draft.close_the_others()
    _plugins(draft, given)
    settings = reading.table(given.get("client"), "client")
    is_closed = settings.get("enforce_auth_on_inference", settings.get("enforce_governance_header"))
    if reading.truth(is_closed):
        draft.take("client.enforce_auth_on_inference", "server", "keys_only", True, f"make keys: {TO_KEYS}")
    if "governance" in given:
        draft.leave(
            "governance: virtual keys, budgets, rate limits", f"{TO_KEYS} --limit-usd 10/day --limit-requests …"
        )
    for word, instead in _ELSEWHERE.items():
        if word in given:
            draft.leave(word, instead)
    known = {"$schema", "providers", "plugins", "client", "governance", *_ELSEWHERE}
    draft.leave_others("", given, frozenset(known))
    others = {name for name in settings if not name.startswith("enforce_")}
    if others:
        draft.leave(f"client: {', '.join(sorted(others))}", "nothing here; see `ibid docs configuration`")
    return draft


def _provider(draft: Draft, name: str, said: Mapping[str, Any]) -> None:
    where = f"providers.{name}"
    custom = reading.table(said.get("custom_provider_config"), where)
    base = str(custom.get("base_provider_type") or name).lower()
    if base in servers.TRANSLATED:
        draft.leave(where, f"ibid does not translate for {base}: keep Bifrost and put ibid in front")
        return
    network = reading.table(said.get("network_config"), f"{where}.network_config")
    address = str(network.get("base_url") or "")
    provider = servers.PROVIDERS.get(base) or (servers.SERVER if address else None)
    if provider is not None and address and base != name:
        provider = provider._replace(name=name)  # the operator's own word for it
    keys = reading.tables(said.get("keys"), f"{where}.keys")
    models = [str(model) for key in keys for model in key.get("models") or ["*"]]
    if base == "azure" and keys:
        azure = reading.table(keys[0].get("azure_key_config"), where)
        address = address or _plain(azure.get("endpoint"))
    key_env = _key(draft, where, name, keys)
    found = None if provider is None else servers.add(draft, provider, address or None, key_env, models)
    if provider is None or found is None:
        draft.leave(where, "no address is known for it: add an [upstream.NAME] with base_url and models")
        return
    draft.rename(where, f"[upstream.{found}]; clients ask for MODEL, not {name}/MODEL")
    if provider.dialect != "openai":
        draft.leave(
            f"{where}: translation", f"clients speak {provider.dialect}'s own API to ibid, at the same base URL"
        )
    if len(keys) > 1:
        draft.leave(f"{where}.keys", "an upstream has one key, the first; no balancing over several")
    timeout_s = reading.seconds(network.get("default_request_timeout_in_seconds"))
    if timeout_s is not None:
        so_far = draft.tables.get("forward", {}).get("first_byte_timeout_s", 0.0)
        draft.take(
            f"{where}: default_request_timeout_in_seconds", "forward", "first_byte_timeout_s", max(timeout_s, so_far),
            "one for all upstreams, until the answer begins",
        )  # fmt: skip
    if network.get("max_retries"):
        draft.leave(f"{where}: max_retries", "ibid does not retry: the SDKs do")
    if network.get("extra_headers"):
        draft.leave(f"{where}: extra_headers", "clients send them; they reach the model server")


def _plain(value: object) -> str:
    return value if isinstance(value, str) and not value.startswith(_REFERENCE) else ""


def _key(draft: Draft, where: str, name: str, keys: list[dict[str, Any]]) -> str | None:
    """The environment variable of the first key."""
    value = keys[0].get("value") if keys else None
    if isinstance(value, Mapping):  # later versions: {"value": …, "env_var": …}
        value = f"{_REFERENCE}{value['env_var']}" if value.get("env_var") else value.get("value")
    if not isinstance(value, str) or not value:
        return None
    variable = value.removeprefix(_REFERENCE)
    if value.startswith(_REFERENCE) and reading.VARIABLE_NAME.fullmatch(variable):
        draft.rename(f"{where}.keys", f"key_env = {variable}")
        return variable
    made = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name.upper()) + "_API_KEY"
    draft.rename(f"{where}.keys", f"key_env = {made}: {servers.SECRET}, export it under this name")
    return made


def _plugins(draft: Draft, given: Mapping[str, Any]) -> None:
    plugins = {str(one.get("name")): one for one in reading.tables(given.get("plugins"), "plugins")}
    cache = plugins.pop("semantic_cache", None)
    for name in plugins:
        draft.leave(f"plugins: {name}", "the ledger and /metrics have the numbers; no plugins here")
    if cache is None or reading.truth(cache.get("enabled", True)) is False:
        draft.leave("plugins: no semantic_cache", "ibid caches: start with `ibid serve --shadow`, then `ibid report`")
        return
    config = reading.table(cache.get("config"), "semantic_cache")
    if not config.get("provider"):
        draft.take(
            "semantic_cache without provider", "cache", "semantic", False,
            "it served exact repeats alone; true serves reworded ones too, try it with --shadow",
        )  # fmt: skip
    else:
        draft.rename("semantic_cache", "cache.semantic, which is on")
    ttl = config.get("ttl")
    ttl_s = duration_s(ttl, AGE) if isinstance(ttl, str) and AGE.fullmatch(ttl) else reading.seconds(ttl)
    if ttl_s:
        set_ttl(draft, "semantic_cache.ttl", float(ttl_s))
    for name in config:
        if name != "ttl":
            draft.leave(f"semantic_cache.{name}", _CACHE.get(name, "nothing here; see `ibid docs configuration`"))
