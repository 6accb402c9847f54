"""LiteLLM's proxy: `config.yaml` with model_list, litellm_settings, router_settings and general_settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from proxy.commands.adopt import reading, servers
from proxy.commands.adopt.draft import Draft
from proxy.core.model import Rules
from proxy.settings.environment import PREFIX

_REFERENCE: Final = "os.environ/"
_SEMANTIC: Final = "-semantic"
TO_KEYS: Final = "ibid keys create --project NAME"
_PRICES: Final[Mapping[str, str]] = {
    "input_cost_per_token": "input_usd_per_mtok",
    "output_cost_per_token": "output_usd_per_mtok",
    "cache_read_input_token_cost": "cache_read_usd_per_mtok",
    "cache_creation_input_token_cost": "cache_write_usd_per_mtok",
}
_READ: Final = frozenset({"model", "api_key", "api_base", "base_url", "api_version", "timeout", *_PRICES})
_ELSEWHERE: Final[Mapping[str, str]] = {
    "num_retries": "ibid does not retry: the SDKs do; `on_error` of a [[policy]] says what stands in",
    "max_retries": "ibid does not retry: the SDKs do",
    "retry_policy": "ibid does not retry: the SDKs do",
    "allowed_fails": "a circuit breaker for each upstream is built in",
    "cooldown_time": "a circuit breaker for each upstream is built in",
    "routing_strategy": "a model has one upstream: put a balancer in front of its servers",
    "model_group_alias": "clients ask for models by their own names",
    "context_window_fallbacks": "the model server's error reaches the client",
    "content_policy_fallbacks": "the model server's error reaches the client",
    "default_fallbacks": "name the model in a [[policy]] with on_error = [\"edge\"]",
    "success_callback": "the ledger has every request: `ibid docs ledger`; /metrics for Prometheus",
    "failure_callback": "the ledger has every request: `ibid docs ledger`; /metrics for Prometheus",
    "callbacks": "the ledger has every request: `ibid docs ledger`; /metrics for Prometheus",
    "drop_params": "requests reach the model server as they are",
    "modify_params": "requests reach the model server as they are",
    "rpm": f"{TO_KEYS} --limit-requests N/minute",
    "tpm": f"{TO_KEYS} --limit-tokens N/minute",
    "max_budget": f"{TO_KEYS} --limit-usd N/day",
    "budget_duration": f"the window of {TO_KEYS} --limit-usd N/month",
    "max_parallel_requests": "limits.in_flight bounds all requests together",
    "database_url": "ibid keeps tables of its own: SQLite, or IBID_DATABASE_URL for a PostgreSQL database of its own",
    "redis_host": "not needed", "redis_port": "not needed", "redis_password": "not needed", "redis_url": "not needed",
    "set_verbose": "log.level",
    "json_logs": "log.format",
    "weight": "a model has one upstream: put a balancer in front of its servers",
    "order": "a model has one upstream",
    "stream_timeout": "forward.idle_timeout_s bounds the silence inside an answer",
    "organization": "clients send the header OpenAI-Organization, which reaches the model server",
}  # fmt: skip
"""Words that have no setting here, and what to do instead."""


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    given, draft = reading.tree(text, name), Draft()
    parts = {part: reading.table(given.get(part), part) for part in (
        "litellm_settings", "router_settings", "general_settings"
    )}  # fmt: skip
    places = _models(draft, reading.tables(given.get("model_list"), "model_list"))
    draft.close_the_others()
    _cache(draft, parts["litellm_settings"])
    _timeout(draft, parts)
    _fallbacks(draft, parts, places)
    _general(draft, parts["general_settings"])
    for part in ("litellm_settings", "router_settings"):
        _others(
            draft, part, parts[part], frozenset({"cache", "cache_params", "request_timeout", "timeout", "fallbacks"})
        )
    _around(draft, given)
    return draft


def _models(draft: Draft, listed: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Upstream and model there, by the name that clients asked for."""
    places: dict[str, tuple[str, str]] = {}
    for number, one in enumerate(listed):
        where, params = f"model_list[{number}]", reading.table(one.get("litellm_params"), f"model_list[{number}]")
        alias = str(one.get("model_name") or params.get("model") or "")
        prefix, model = _split(str(params.get("model") or ""))
        address, variable = _address(params.get("api_base") or params.get("base_url"))
        if prefix.lower() in servers.TRANSLATED:
            draft.leave(f"{where} {alias}", f"ibid does not translate for {prefix}: keep LiteLLM and put ibid in front")
            continue
        if alias in places:
            draft.leave(f"{where} {alias}", "a second deployment: a model has one upstream, the first is taken")
            continue
        provider = servers.provider_of(prefix, model) or (servers.SERVER if address else None)
        key = key_of(draft, f"{where}.api_key", params.get("api_key"), provider)
        upstream = None if provider is None else servers.add(draft, provider, address, key, [model])
        if provider is None or upstream is None:
            draft.leave(
                f"{where} {alias}", "no address is known for it: add an [upstream.NAME] with base_url and models"
            )
            continue
        places[alias] = upstream, model
        if variable:
            name_there = f"{PREFIX}UPSTREAM__{re.sub('[^A-Z0-9]', '_', upstream.upper())}__BASE_URL"
            draft.rename(f"{where}.api_base", f"start with {name_there}=${variable}: the file names no address of it")
        _say_where(draft, where, alias, model, upstream, provider)
        _prices(draft, upstream, model, {**params, **reading.table(one.get("model_info"), where)})
        _others(draft, where, params, _READ)
    return places


def _say_where(draft: Draft, where: str, alias: str, model: str, upstream: str, provider: servers.Provider) -> None:
    told = f"{where} {alias}"
    if alias == model:
        draft.rename(told, f"[upstream.{upstream}] models")
    elif alias.endswith("*") or model.endswith("*"):
        draft.rename(told, f"[upstream.{upstream}] models; clients name models without the prefix")
    else:
        draft.rename(
            told, f"[upstream.{upstream}] models; clients ask for {model}: ibid has no names of its own for models"
        )
    if provider.dialect != "openai":
        draft.leave(f"{told}: translation", f"clients speak {provider.dialect}'s own API to ibid, at the same base URL")
    if provider.name == "azure":
        draft.rename(f"{told}: api_version", "clients keep AzureOpenAI; its azure_endpoint becomes ibid's address")


def _split(model: str) -> tuple[str, str]:
    """Prefix and model; a part before a slash that is no provider belongs to the model."""
    prefix, slash, rest = model.partition("/")
    is_known = prefix.lower() in servers.PROVIDERS or prefix.lower() in servers.TRANSLATED
    return (prefix, rest) if slash and is_known else ("", model)


def _address(value: object) -> tuple[str | None, str]:
    """An address; and the environment variable that holds it, "" where the file says it itself."""
    if not isinstance(value, str) or not value.startswith(_REFERENCE):
        return (value if isinstance(value, str) else None), ""
    variable = value.removeprefix(_REFERENCE)
    return f"https://{re.sub('[^a-z0-9]+', '-', variable.lower()).strip('-')}.invalid", variable


def key_of(draft: Draft, where: str, value: object, provider: servers.Provider | None) -> str | None:
    """The environment variable of a key. What stood as a reference stays one; a key as text is not copied."""
    if not isinstance(value, str) or not value:
        return None
    if provider is not None and provider.name == "azure":
        draft.leave(
            where, "clients send Azure's key themselves, as api-key: a key of an upstream goes out as a bearer token"
        )
        return None
    variable = value.removeprefix(_REFERENCE)
    if value.startswith(_REFERENCE) and reading.VARIABLE_NAME.fullmatch(variable):
        draft.rename(where, f"key_env = {variable}")
        return variable
    name = "UPSTREAM" if provider is None else provider.name.upper().replace("-", "_")
    draft.rename(where, f"key_env = {name}_API_KEY: {servers.SECRET}, export it under this name")
    return f"{name}_API_KEY"


def _prices(draft: Draft, upstream: str, model: str, said: Mapping[str, Any]) -> None:
    found = {here: price * 1_000_000 for name, here in _PRICES.items() if (price := reading.number(said.get(name)))}
    if {"input_usd_per_mtok", "output_usd_per_mtok"} <= found.keys():
        values = {name: _trimmed(price) for name, price in found.items()}
        draft.tables.setdefault("prices.override", {})[f"{upstream}/{model}"] = values
        draft.rename(f"{model}: costs per token", f'[prices.override."{upstream}/{model}"], USD for a million tokens')
    elif found:
        draft.leave(f"{model}: costs per token", "prices of input and of output are needed, both")


def _trimmed(price: Decimal) -> Decimal:
    return price.normalize() if price else Decimal(0)


def _cache(draft: Draft, settings: Mapping[str, Any]) -> None:
    if not reading.truth(settings.get("cache", False)):
        draft.leave(
            "litellm_settings.cache", "it was off; ibid caches: start with `ibid serve --shadow`, then `ibid report`"
        )
        return
    params = reading.table(settings.get("cache_params"), "cache_params")
    kind = str(params.get("type") or "local")
    if kind.endswith(_SEMANTIC):
        draft.rename(f"cache_params.type = {kind}", "cache.semantic, which is on; vectors need no server here")
    else:
        draft.take(
            f"cache_params.type = {kind}", "cache", "semantic", False,
            "it served exact repeats alone; true serves reworded ones too, try it with --shadow",
        )  # fmt: skip
    if (ttl_s := reading.seconds(params.get("ttl"))) is not None:
        set_ttl(draft, "cache_params.ttl", ttl_s)
    known = {
        "similarity_threshold": "no threshold here: cache.max_error_rate is the share of hits that may be wrong",
        "namespace": "x-cache-namespace of a request, or `namespace` in its cache object",
        "mode": "caching is on for all; who wants none sends x-cache-mode: off",
        "supported_call_types": "chat, completions, responses and embeddings are cached",
    }
    for name in params:
        if name in known:
            draft.leave(f"cache_params.{name}", known[name])
        elif name not in ("type", "ttl"):
            draft.leave(f"cache_params.{name}", "not needed: ibid keeps answers in its own database")


def set_ttl(draft: Draft, what: str, ttl_s: float) -> None:
    """Life of an entry; the longest a client may ask for is no shorter."""
    draft.take(what, "cache", "ttl_s", ttl_s)
    if ttl_s > Rules().max_ttl_s:
        draft.take(what, "cache", "max_ttl_s", ttl_s)


def _timeout(draft: Draft, parts: Mapping[str, Mapping[str, Any]]) -> None:
    for part, name in (("router_settings", "timeout"), ("litellm_settings", "request_timeout")):
        if (timeout_s := reading.seconds(parts[part].get(name))) is not None:
            draft.take(f"{part}.{name}", "forward", "first_byte_timeout_s", timeout_s, "until the answer begins")
            return


def _fallbacks(draft: Draft, parts: Mapping[str, Mapping[str, Any]], places: Mapping[str, tuple[str, str]]) -> None:
    """The first fallback that can stand in does so for every model that named it; the others have no counterpart."""
    said = [part for name in ("router_settings", "litellm_settings") for part in parts[name].get("fallbacks") or []]
    edge: tuple[str, str] | None = None
    for one in said:
        for asked, instead in reading.table(one, "fallbacks").items():
            names = instead if isinstance(instead, list) else [instead]
            place = next((places[str(name)] for name in names if _may_stand_in(draft, places, asked, str(name))), None)
            told = f"fallbacks: {asked} → {', '.join(map(str, names))}"
            if place is None or (edge is not None and place != edge):
                draft.leave(told, "one model can stand in (lane.edge), at another server of OpenAI's API; not this one")
                continue
            edge = place
            draft.tables["lane.edge"] = {"upstream": place[0], "model": place[1]}
            match = {} if asked == "*" else {"match": {"model": places.get(asked, ("", asked))[1]}}
            draft.policies.append({"name": f"{asked} falls back"[:60], **match, "on_error": ["edge"]})
            draft.rename(told, f'on_error = ["edge"] of a [[policy]], with {place[1]} at {place[0]} as lane.edge')


def _may_stand_in(draft: Draft, places: Mapping[str, tuple[str, str]], asked: str, name: str) -> bool:
    if name not in places:
        return False
    upstream, model = places[name]
    is_other = upstream != places.get(asked, ("", ""))[0]
    return is_other and draft.upstreams[upstream]["dialect"] == "openai" and "*" not in model


def _general(draft: Draft, settings: Mapping[str, Any]) -> None:
    if "master_key" in settings:
        draft.take(
            "general_settings.master_key", "server", "keys_only", True,
            f"clients get keys of ibid: {TO_KEYS}; the admin port has a token of its own, IBID_ADMIN_TOKEN",
        )  # fmt: skip
    elif draft.keys:
        draft.leave("general_settings: no master_key", "whoever reaches the port is served: see server.keys_only")
    _others(draft, "general_settings", settings, frozenset({"master_key"}))


def _others(draft: Draft, where: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in given:
        if name in _ELSEWHERE and name not in known:
            draft.leave(f"{where}.{name}", _ELSEWHERE[name])
    draft.leave_others(where, given, known | _ELSEWHERE.keys())


def _around(draft: Draft, given: Mapping[str, Any]) -> None:
    if "environment_variables" in given:
        names = ", ".join(reading.table(given["environment_variables"], "environment_variables"))
        draft.leave(f"environment_variables ({names})", "export those that the file here names")
    if "include" in given:
        draft.leave("include", "other files are not followed: adopt each of them")
    if "model_list" in given:
        draft.leave("stored answers", "they are not taken over: a cache starts empty")
    known = frozenset(
        {"model_list", "litellm_settings", "router_settings", "general_settings", "environment_variables", "include"}
    )
    draft.leave_others("", given, known)
