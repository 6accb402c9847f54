"""Model servers as peers name them: where each is, what it speaks, whose prices hold, and which have no counterpart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from proxy.commands.adopt.draft import CLOSED, Draft
from proxy.settings.config import url_problem

SECRET: Final = "a key as text is not copied"
_NAME: Final = re.compile(r"[^a-z0-9_.-]+")


class Provider(NamedTuple):
    """`address`: "" where the peer's file must say it."""

    name: str
    address: str
    dialect: str = "openai"
    prices_as: str = ""  # of the price list, where that has another name for it


_PROVIDERS: Final = (
    Provider("openai", "https://api.openai.com"),
    Provider("anthropic", "https://api.anthropic.com", "anthropic"),
    Provider("gemini", "https://generativelanguage.googleapis.com", "gemini", "google"),
    Provider("ollama", "http://127.0.0.1:11434", "ollama"),
    Provider("azure", "", prices_as="azure"),
    Provider("cerebras", "https://api.cerebras.ai/v1"),
    Provider("deepinfra", "https://api.deepinfra.com/v1/openai"),
    Provider("deepseek", "https://api.deepseek.com"),
    Provider("fireworks", "https://api.fireworks.ai/inference/v1"),
    Provider("groq", "https://api.groq.com/openai/v1"),
    Provider("mistral", "https://api.mistral.ai/v1"),
    Provider("nvidia", "https://integrate.api.nvidia.com/v1"),
    Provider("openrouter", "https://openrouter.ai/api/v1"),
    Provider("sambanova", "https://api.sambanova.ai/v1"),
    Provider("together", "https://api.together.xyz/v1"),
    Provider("x-ai", "https://api.x.ai/v1"),
    Provider("server", ""),
)
SERVER: Final = _PROVIDERS[-1]
"""Any server that speaks OpenAI's API, at an address of its own."""

_CALLED: Final[Mapping[str, str]] = {
    "azure_ai": "azure", "azure-openai": "azure", "google": "gemini", "google_ai_studio": "gemini",
    "ollama_chat": "ollama", "fireworks_ai": "fireworks", "fireworks-ai": "fireworks", "mistral-ai": "mistral",
    "mistralai": "mistral", "together_ai": "together", "together-ai": "together", "xai": "x-ai", "nvidia_nim": "nvidia",
    "hosted_vllm": "server", "vllm": "server", "sgl": "server", "lm_studio": "server", "llamafile": "server",
    "litellm_proxy": "server", "openai_like": "server", "custom_openai": "server", "xinference": "server",
    "text-completion-openai": "openai", "custom": "server",
}  # fmt: skip
PROVIDERS: Final[Mapping[str, Provider]] = {
    **{one.name: one for one in _PROVIDERS},
    **{name: next(one for one in _PROVIDERS if one.name == called) for name, called in _CALLED.items()},
}
"""By the names that LiteLLM, Portkey and Bifrost give them."""

TRANSLATED: Final = frozenset(
    {
        "bedrock", "vertex_ai", "vertex-ai", "vertex", "sagemaker", "cohere", "cohere_chat", "huggingface", "replicate",
        "watsonx", "databricks", "snowflake", "predibase", "palm", "ai21", "nlp_cloud", "triton", "oci", "cloudflare",
        "petals", "perplexity",
    }
)  # fmt: skip
"""Providers whose API is not one of ibid's: the peer translates for them."""


def provider_of(prefix: str, model: str) -> Provider | None:
    """The provider a model's prefix names, or the model itself; None when neither does."""
    if prefix:
        return PROVIDERS.get(prefix.lower())
    for start, name in (
        ("claude", "anthropic"),
        ("gemini", "gemini"),
        ("gpt-", "openai"),
        ("text-embedding-", "openai"),
    ):
        if model.startswith(start):
            return PROVIDERS[name]
    return PROVIDERS["openai"] if re.match(r"o\d|chatgpt|dall-e|whisper|tts-", model) else None


def add(draft: Draft, provider: Provider, address: str | None, key_env: str | None, models: list[str]) -> str | None:
    """An upstream for these models, one that is there where address and key are the same; its name. None when nothing
    says where it is. `models`: empty, or with "*", for any."""
    if address and provider.name in ("openai", SERVER.name):
        provider = _at(address)
    base_url = _address_of(address or provider.address)
    if base_url is None:
        return None
    for name, known in draft.upstreams.items():
        if (known["base_url"], known.get("key_env"), known["dialect"]) == (base_url, key_env, provider.dialect):
            _widen(known, models)
            return name
    is_own = base_url == provider.address
    name = _free_name(draft, provider.name if is_own or provider is not SERVER else _host_of(base_url))
    made: dict[str, Any] = {"base_url": base_url, "dialect": provider.dialect}
    if models and not any(model in ("*", "") for model in models):
        made["models"] = list(dict.fromkeys(models))
    if key_env is not None:
        made["key_env"] = key_env
    prices = provider.prices_as or provider.name
    if prices not in (name, SERVER.name) and (is_own or provider.name == "azure"):
        made["prices_as"] = prices
    draft.upstreams[name] = made
    return name


def _at(address: str) -> Provider:
    """The provider whose address this is; elsewhere any server."""
    wanted = address.rstrip("/").removesuffix("/v1")
    return next((one for one in _PROVIDERS if wanted == one.address.removesuffix("/v1")), SERVER)


def _widen(known: dict[str, Any], models: list[str]) -> None:
    """Add models to those of an upstream; one that takes any model still does."""
    if "models" not in known:
        return
    if not models or any(model in ("*", "") for model in models):
        del known["models"]
    else:
        known["models"] = list(dict.fromkeys([*(name for name in known["models"] if name != CLOSED), *models]))


def _address_of(url: str) -> str | None:
    """Scheme, host and path: what an upstream's address may have. None for what is no address."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    host = parts.netloc.rpartition("@")[2]
    address = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
    return None if url_problem(address) else address


def _host_of(base_url: str) -> str:
    parts = urlsplit(base_url)
    is_near = parts.hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "host.docker.internal")
    host = "local" if is_near else (parts.hostname or "server").removeprefix("api.").split(".")[0]
    return f"{host}-{parts.port}" if parts.port else host


def _free_name(draft: Draft, wanted: str) -> str:
    base = _NAME.sub("-", wanted.lower()).strip("-._")[:28] or "server"
    name, number = base, 2
    while name in draft.upstreams:
        name, number = f"{base}-{number}", number + 1
    return name
