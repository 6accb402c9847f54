"""What a path's operation is called, and what traces say without their SDK."""

from __future__ import annotations

import sys

import pytest

from proxy.core.errors import ConfigError
from proxy.watch.tracing import Spans, operation_of


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "text_completion"),
        ("/v1/responses", "chat"),
        ("/v1/messages", "chat"),
        ("/v1beta/models/gemini-2.5-pro:streamGenerateContent", "generate_content"),
        ("/v1beta/models/text-embedding-004:embedContent", "embeddings"),
        ("/v1/embeddings", "embeddings"),
        ("/api/generate", "text_completion"),
        ("/api/chat", "chat"),
        ("/api/embed", "embeddings"),
    ],
)
def test_an_operation_is_called_as_the_conventions_do(path: str, operation: str) -> None:
    assert operation_of(path) == operation


def test_without_the_sdk_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"ibid-proxy\[otel\]"):
        Spans("0")
