"""Portkey: a config (JSON) as `x-portkey-config` names it, or the headers of a client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from proxy.commands.adopt import client, reading, servers
from proxy.commands.adopt.draft import Draft
from proxy.commands.adopt.litellm import TO_KEYS, set_ttl

PREFIX: Final = "x-portkey-"
_ELSEWHERE: Final[Mapping[str, str]] = {
    "retry": "ibid does not retry: the SDKs do; `on_error` of a [[policy]] says what stands in",
    "weight": "no balancing: a model has one upstream",
    "override_params": "requests reach the model server as they are",
    "on_status_codes": "a policy's on_error acts when the model server fails or cannot be reached",
    "input_guardrails": "no guardrails: put them in front of ibid or behind it",
    "output_guardrails": "no guardrails: put them in front of ibid or behind it",
    "before_request_hooks": "no guardrails: put them in front of ibid or behind it",
    "after_request_hooks": "no guardrails: put them in front of ibid or behind it",
    "forward_headers": "headers reach the model server; forward.drop_headers names those that shall not",
    "strict_open_ai_compliance": "answers reach the client as they are",
    "conditions": "a [[policy]] with match says which lanes a request takes",
    "default": "a [[policy]] with match says which lanes a request takes",
}
_HEADERS: Final[Mapping[str, str]] = {
    "x-portkey-api-key": "not needed; with server.keys_only clients get keys of ibid: " + TO_KEYS,
    "x-portkey-virtual-key": "key_env of the upstream holds the provider's key",
    "x-portkey-metadata": "x-cache-tags, x-cache-user",
    "x-portkey-trace-id": "x-request-id of the answer names the ledger's row",
    "x-portkey-cache-namespace": "the same header",
    "x-portkey-cache-force-refresh": "the same header",
}


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    draft, config = Draft(), {}
    is_tree = text.lstrip().startswith("{")
    given = reading.tree(text, name) if is_tree else {}
    if not is_tree or any(key.lower().startswith(PREFIX) for key in given):
        headers = reading.headers(text, name)
        said = headers.get(f"{PREFIX}config", "")
        config = reading.tree(said, f"{PREFIX}config") if said.startswith("{") else {}
        if said and not config:
            draft.leave(f"{PREFIX}config", "a name of a config kept at Portkey: export it there and adopt the file")
        for header, key in (("provider", "provider"), ("custom-host", "custom_host"), ("virtual-key", "virtual_key")):
            if (value := headers.get(PREFIX + header)) is not None:
                config.setdefault(key, value)
                draft.rename(PREFIX + header, "an [upstream.NAME]: the model's name decides who is asked, not a header")
        passed = [PREFIX + name for name in ("provider", "custom-host", "virtual-key", "config")]
        client.adopt_headers(draft, headers, PREFIX, _HEADERS, passed)
    else:
        config = given
    _config(draft, _snaked(config))
    return draft


def _snaked(value: Any) -> Any:
    """With camelCase names as snake_case: both are allowed there."""
    if isinstance(value, list):
        return [_snaked(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {_snake(str(name)): _snaked(inner) for name, inner in value.items()}


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _config(draft: Draft, config: Mapping[str, Any]) -> None:
    strategy = reading.table(config.get("strategy"), "strategy")
    mode = str(strategy.get("mode") or "single")
    targets = list(_targets(config))
    taken = [name for target in targets if (name := _target(draft, *target)) is not None]
    if len(targets) > 1:
        what = f"strategy.mode = {mode} over {len(targets)} targets"
        names = ", ".join(dict.fromkeys(taken)) or "none"
        draft.leave(what, f"each target is an upstream ({names}); the model's name decides, set `models` of each")
    _cache(draft, reading.table(config.get("cache") or _first(targets, "cache"), "cache"))
    timeout_ms = reading.seconds(config.get("request_timeout") or _first(targets, "request_timeout"))
    if timeout_ms is not None:
        draft.take("request_timeout", "forward", "first_byte_timeout_s", timeout_ms / 1000, "until the answer begins")
    _others(draft, "", config)
    _others(draft, "strategy", {name: value for name, value in strategy.items() if name != "mode"})
    for where, target in targets:
        if where:
            _others(draft, where, target)


def _targets(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Targets of targets too, each with where it stands; the config itself where it has none."""
    listed = reading.tables(config.get("targets"), f"{where}targets")
    if not listed:
        yield where.rstrip("."), dict(config)
    for number, target in enumerate(listed):
        yield from _targets(target, f"{where}targets[{number}].")


def _first(targets: list[tuple[str, dict[str, Any]]], name: str) -> Any:
    return next((target[name] for _, target in targets if name in target), None)


def _target(draft: Draft, where: str, target: Mapping[str, Any]) -> str | None:
    """The upstream of a target; None when there is none for it."""
    said = str(target.get("provider") or "").lstrip("@").lower()
    told = " ".join(filter(None, (where, said))) or "provider"
    key_name = f"{said.upper().replace('-', '_') or 'UPSTREAM'}_API_KEY"
    if said in servers.TRANSLATED:
        draft.leave(told, f"ibid does not translate for {said}: ask it by its own gateway")
        return None
    address = str(target.get("custom_host") or "") or _azure(target)
    provider = servers.PROVIDERS.get(said) or _named_in(said) or (servers.SERVER if address else None)
    if provider is None:
        if said or target.get("virtual_key"):
            draft.leave(told, "the provider is kept at Portkey: add an [upstream.NAME] with base_url and key_env")
        return None
    has_key = bool(target.get("api_key") or target.get("virtual_key")) and provider.name != "azure"
    key_env = key_name if has_key and reading.VARIABLE_NAME.fullmatch(key_name) else None
    model = str(reading.table(target.get("override_params"), "override_params").get("model") or "")
    name = servers.add(draft, provider, address or None, key_env, [model] if model else [])
    if name is None:
        draft.leave(told, "no address is known for it: add an [upstream.NAME] with base_url and models")
        return None
    draft.rename(told, f"[upstream.{name}]")
    if key_env:
        draft.rename(f"{told}: key", f"key_env = {key_env}: {servers.SECRET}, export it under this name")
    if provider.dialect != "openai":
        draft.leave(f"{told}: translation", f"clients speak {provider.dialect}'s own API to ibid, at the same base URL")
    return name


def _azure(target: Mapping[str, Any]) -> str:
    resource = str(target.get("resource_name") or target.get("azure_resource_name") or "")
    return f"https://{resource}.openai.azure.com" if resource.replace("-", "").isalnum() else ""


def _named_in(slug: str) -> servers.Provider | None:
    """Of a name somebody gave an integration, "openai-prod", the provider it begins with."""
    return next((one for name, one in servers.PROVIDERS.items() if slug.startswith(f"{name}-")), None)


def _cache(draft: Draft, cache: Mapping[str, Any]) -> None:
    if not cache:
        draft.leave("cache", "it was off; ibid caches: start with `ibid serve --shadow`, then `ibid report`")
        return
    mode = str(cache.get("mode") or "simple")
    if mode == "semantic":
        draft.rename("cache.mode = semantic", "cache.semantic, which is on; the system prompt counts here")
    else:
        draft.take(
            f"cache.mode = {mode}", "cache", "semantic", False,
            "it served exact repeats alone; true serves reworded ones too, try it with --shadow",
        )  # fmt: skip
    if (ttl_s := reading.seconds(cache.get("max_age"))) is not None:
        set_ttl(draft, "cache.max_age", ttl_s)


def _others(draft: Draft, where: str, given: Mapping[str, Any]) -> None:
    known = {
        "strategy", "targets", "provider", "api_key", "virtual_key", "custom_host", "cache", "request_timeout",
        "resource_name", "azure_resource_name", "name", "deployment_id", "api_version",
    }  # fmt: skip
    for name in given:
        if name in _ELSEWHERE:
            draft.leave(f"{where}.{name}" if where else name, _ELSEWHERE[name])
    draft.leave_others(where, given, frozenset(known | _ELSEWHERE.keys()))
