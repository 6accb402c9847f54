"""Search at the provider: by what is asked, whatever the dialect; and by what is answered."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.core.dialects.routes import Routes
from proxy.core.model import Controls, Level, Rules
from proxy.core.policy import classify
from proxy.core.search import is_asked, is_offered, is_remote

ROUTES = Routes(orjson.loads)
TURN = [{"role": "user", "content": "What do the papers say?"}]
SAID: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/chat/completions", {"model": "m", "messages": TURN}),
    "completions": ("/v1/completions", {"model": "m", "prompt": "What do the papers say?"}),
    "anthropic": ("/v1/messages", {"model": "m", "max_tokens": 9, "messages": TURN}),
    "responses": ("/v1/responses", {"model": "m", "store": False, "input": "What do the papers say?"}),
    "ollama": ("/api/chat", {"model": "m", "messages": TURN}),
    "gemini": ("/v1beta/models/m:generateContent", {"contents": [{"role": "user", "parts": [{"text": "What?"}]}]}),
}
ASKED: list[dict[str, Any]] = [
    {"web_search_options": {"search_context_size": "low"}}, {"plugins": [{"id": "web", "max_results": 3}]},
    {"plugins": ["web"]}, {"search_parameters": {"mode": "auto"}}, {"search_parameters": {}}, {"enable_search": True},
    {"enable_search": "true"}, {"data_sources": [{"type": "azure_search"}]}, {"connectors": [{"id": "web-search"}]},
    {"web_search": True}, {"web_search": {"enable": True}}, {"search_domain_filter": ["x.test"]},
    {"grounding": {"x": 1}},
]  # fmt: skip
NOT_ASKED: list[dict[str, Any]] = [
    {"search_parameters": {"mode": "off"}}, {"enable_search": False}, {"enable_search": "false"}, {"plugins": []},
    {"plugins": [{"id": "web", "enabled": False}]}, {"plugins": [{"id": "response-healing"}]}, {"data_sources": None},
    {"web_search": {"enable": False}}, {"web_search_options": None}, {"connectors": []},
]  # fmt: skip


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("more", ASKED, ids=str)
def test_a_field_asks_for_it_in_every_dialect(name: str, more: dict[str, Any]) -> None:
    path, body = SAID[name]
    dialect = ROUTES.find(path).dialect
    assert dialect is not None
    facts = dialect.read({**body, **more}, model="m" if name == "gemini" else "")
    found = classify(facts, Controls(), Rules())
    assert (found.level, found.reason) == (Level.NONE, "web_search")


@pytest.mark.parametrize("more", NOT_ASKED, ids=str)
def test_a_field_that_says_off_does_not(more: dict[str, Any]) -> None:
    assert not is_asked("m", more)


@pytest.mark.parametrize(
    ("model", "searches"),
    [
        ("gpt-4o-search-preview", True), ("gpt-4o-mini-search-preview-2025-03-11", True), ("gpt-5-search-api", True),
        ("openai/gpt-4o:online", True), ("sonar", True), ("perplexity/sonar-reasoning-pro", True),
        ("llama-3-sonar-large-32k-online", True), ("o3-deep-research", True), ("groq/compound", True),
        ("compound-beta", True),
        ("Sonar-Pro", True), ("gpt-4o", False), ("research-assistant", False), ("deepseek-chat", False), ("", False),
        ("online-learner", False),
    ],
)  # fmt: skip
def test_a_model_is_known_by_its_name(model: str, searches: bool) -> None:
    assert is_asked(model, {}) is searches


def test_an_operator_knows_more_names() -> None:
    assert is_asked("House-Oracle-7", {}, ["house-oracle-*"])
    assert is_asked("m", {"look": 1}, [], ["look"])
    assert not is_asked("m", {"look": 0}, [], ["look"])


def test_an_embedding_model_that_is_called_so_searches_nothing() -> None:
    dialect = ROUTES.find("/v1/embeddings").dialect
    assert dialect is not None
    facts = dialect.read({"model": "text-search-ada-doc-001", "input": "x"})
    assert classify(facts, Controls(), Rules()).reason != "web_search"


@pytest.mark.parametrize(
    ("tool", "runs_there"),
    [
        ({"type": "function", "function": {"name": "web_search"}}, False),
        ({"function": {"name": "f"}}, False),
        ({"name": "f", "input_schema": {}}, False),
        ({"type": "custom", "name": "f"}, False),
        ({"type": "local_shell"}, False),
        ({"type": "bash_20250124"}, False),
        ({"type": "web_search"}, True),
        ({"type": "openrouter:web_search"}, True),
        ({"type": "builtin_function", "function": {"name": "$web_search"}}, True),
        ({"type": "function", "function": {"name": "googleSearch"}}, True),
        ({"type": "retrieval"}, True),
        ({"googleSearch": {}}, True),
        ("web", True),
        ({"type": "code_interpreter"}, True),
    ],
)
def test_a_tool_is_run_there_unless_the_client_answers_it(tool: Any, runs_there: bool) -> None:
    assert is_offered([tool]) is runs_there


@pytest.mark.parametrize(
    ("part", "remote"),
    [
        ({"type": "text", "text": "https://x.test"}, False),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, False),
        ({"type": "input_audio", "input_audio": {"data": "UklGRg", "format": "wav"}}, False),
        ({"type": "video_url", "video_url": {"url": "HTTPS://x.test/v"}}, True),
        ({"type": "video_url", "video_url": "rtsp://x.test/v"}, True),
        ({"type": "file", "file": {"file_data": "https://x.test/a.pdf"}}, True),
        ({"type": "media", "source": {"uri": "s3://bucket/x"}}, True),
        ({"type": "images", "images": [{"src": "gs://bucket/x"}]}, True),
    ],
)
def test_a_part_is_remote_under_whatever_name(part: dict[str, Any], remote: bool) -> None:
    assert is_remote(part) is remote
