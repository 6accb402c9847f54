"""GPTCache: the server's YAML (`cache_config_template.yml`), or the same words of `cache.init`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from proxy.commands.adopt import reading
from proxy.commands.adopt.draft import Draft

_POSTGRES: Final = frozenset({"postgresql", "postgres"})
_ELSEWHERE: Final[Mapping[str, str]] = {
    "evaluation": "no threshold here: cache.max_error_rate is the share of hits that may be wrong",
    "evaluation_kws": "no threshold here: cache.max_error_rate is the share of hits that may be wrong",
    "evaluation_config": "no threshold here: cache.max_error_rate is the share of hits that may be wrong",
    "pre_function": "the last user message is compared; all the rest must match exactly",
    "pre_context_function": "the last user message is compared; all the rest must match exactly",
    "post_function": "one answer is served; x-cache-sample keeps several apart",
}
_OF_CONFIG: Final[Mapping[str, str]] = {
    "threshold": _ELSEWHERE["evaluation"],
    "similarity_threshold": _ELSEWHERE["evaluation"],
    "log_time_func": "the ledger and the log have the times",
    "prompts": "not needed: whatever is not compared must match",
    "template": "not needed: whatever is not compared must match",
    "auto_flush": "answers are on disk as soon as they are stored",
    "enable_token_counter": "the ledger counts tokens and money",
    "input_summary_len": "longer texts than the model reads are exact only",
    "skip_list": "not needed: whatever is not compared must match",
}


def adopt(text: str, name: str) -> Draft:
    """Raises ConfigError."""
    given, draft = reading.tree(text, name), Draft()
    _model(draft, given)
    _storage(draft, reading.table(given.get("storage_config"), "storage_config"))
    for word, instead in _ELSEWHERE.items():
        if given.get(word):
            draft.leave(word, instead)
    settings = reading.table(given.get("config"), "config")
    for word in settings:
        draft.leave(f"config.{word}", _OF_CONFIG.get(word, "nothing here; see `ibid docs configuration`"))
    draft.upstreams["openai"] = {"base_url": "https://api.openai.com", "dialect": "openai"}
    draft.rename("the adapter (gptcache.adapter.openai)", "[upstream.openai]; remove it, and set the client's base URL")
    draft.leave("cache_skip", "x-cache-mode: write of a request")
    draft.leave("stored answers", "they are not taken over: GPTCache does not know what else must match")
    known = {"model_src", "model_config", "embedding", "embedding_config", "storage_config", "config", *_ELSEWHERE}
    draft.leave_others("", given, frozenset(known))
    return draft


def _model(draft: Draft, given: Mapping[str, Any]) -> None:
    source = str(given.get("model_src") or given.get("embedding") or "onnx")
    told = reading.table(given.get("model_config") or given.get("embedding_config"), "model_config")
    model = str(told.get("model") or "")
    if model and Path(model).is_dir():
        draft.take("model_config.model", "embedding", "model", model, "a folder in sentence-transformers layout")
    else:
        draft.rename(f"model_src = {source}", "embedding.model: the bundled all-MiniLM-L6-v2; another one as a folder")
    if "api_key" in told:
        draft.leave("model_config.api_key", "not needed: texts are embedded here; no key is copied")


def _storage(draft: Draft, storage: Mapping[str, Any]) -> None:
    manager = str(storage.get("manager") or "sqlite,faiss")
    scalar = manager.split(",")[0].strip().lower()
    if scalar in _POSTGRES:
        draft.rename(f"storage_config.manager = {manager}", "IBID_DATABASE_URL, a PostgreSQL database of its own")
    else:
        draft.rename(
            f"storage_config.manager = {manager}", "SQLite in data_dir, and an index of its own; nothing to set"
        )
    params = reading.table(storage.get("scalar_params"), "scalar_params")
    size = reading.number(storage.get("max_size") or params.get("max_size"))
    if size is not None and size >= 1:
        draft.take("max_size", "store", "max_entries", int(size), "the least recently used leave")
    if storage.get("data_dir"):
        draft.leave("storage_config.data_dir", "data_dir: ibid keeps files of its own, ~/.local/share/ibid")
    for name in ("vector_params", "scalar_params"):
        if storage.get(name):
            draft.leave(f"storage_config.{name}", "not needed")
    known = {"manager", "data_dir", "vector_params", "scalar_params", "max_size"}
    draft.leave_others("storage_config", storage, frozenset(known))
