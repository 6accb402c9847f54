"""Which dialect speaks on which path, and where the request goes upstream."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.completions import Completions
from proxy.core.dialects.dialect import Dialect, Loads
from proxy.core.dialects.gemini import DELIVERY_QUERY, Gemini
from proxy.core.dialects.gemini_embeddings import GeminiEmbeddings
from proxy.core.dialects.ollama import Ollama
from proxy.core.dialects.ollama_embeddings import OllamaEmbeddings
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.openai_embeddings import OpenAIEmbeddings
from proxy.core.dialects.responses import Responses

CHAT_PATH: Final = "/v1/chat/completions"
MESSAGES_PATH: Final = "/v1/messages"
EMBEDDINGS_PATH: Final = "/v1/embeddings"

_GEMINI_OPERATION = re.compile(r":(generateContent|streamGenerateContent|embedContent|batchEmbedContents)")
_GEMINI = re.compile(r"(?:/v1|/v1beta|/v1alpha)?/models/([^/:]+)" + _GEMINI_OPERATION.pattern)
_AZURE = re.compile(r"/openai/deployments/([^/]+)(/(?:chat/completions|completions|embeddings))")
_OLLAMA = re.compile(
    r"/(?:api/(chat|generate|embed|embeddings|tags|show|ps|version|pull|push|create|copy|delete|blobs|me|signout|status"
    r"|user|experimental|web_search|web_fetch)\b.*)?"
)
"""Its API, and its root: its command line asks `HEAD /` before every command."""


class Route(NamedTuple):
    """Where a path leads. Without a dialect the request passes through."""

    dialect: Dialect | None
    path: str  # as it goes upstream
    model: str = ""  # where the path says it
    stream: bool = False  # likewise
    scope_query: str = ""  # what of the query may change the answer


class Routes:
    """The table of paths. `loads`: the reader of upstreams' JSON."""

    def __init__(self, loads: Loads = json.loads) -> None:
        chat, messages, completions = OpenAIChat(loads), Messages(loads), Completions(loads)
        spoken: dict[str, Dialect] = {
            "/chat/completions": chat,
            "/completions": completions,
            "/embeddings": OpenAIEmbeddings(loads),
            "/responses": Responses(loads),
        }
        self._chat = chat
        self._deployed = {path: dialect for path, dialect in spoken.items() if path != "/responses"}
        self._table: dict[str, Route] = {}
        for prefix in ("", "/v1", "/v1/v1"):
            self._table[prefix + "/messages"] = Route(messages, MESSAGES_PATH)
            for path, dialect in spoken.items():
                self._table[prefix + path] = Route(dialect, "/v1" + path)
        for path, dialect in spoken.items():
            self._table["/openai/v1" + path] = Route(dialect, "/openai/v1" + path)
        self._table["/openai/responses"] = Route(spoken["/responses"], "/openai/responses")
        ollama = Ollama("chat", loads)
        self._table["/api/chat"] = Route(ollama, "/api/chat")
        self._table["/api/generate"] = Route(Ollama("generate", loads), "/api/generate")
        self._table["/api/embed"] = Route(OllamaEmbeddings(loads), "/api/embed")
        self._gemini = Gemini(loads)
        self._spoken_by_gemini: dict[str, Dialect] = {
            "embedContent": GeminiEmbeddings(loads, batch=False),
            "batchEmbedContents": GeminiEmbeddings(loads, batch=True),
        }
        chats: tuple[Dialect, ...] = (chat, messages, self._gemini, ollama)
        self._errors = {dialect.name: dialect for dialect in chats}

    def find(self, path: str, query: str = "") -> Route:
        """The route of a path, escapes left as they were sent, and of the query behind it, its question mark included.

        A Gemini stream that is no event stream is one long JSON array, which passes through.
        """
        route = self._table.get(path)
        if route is not None:
            return route._replace(scope_query=query)
        if (azure := _AZURE.fullmatch(path)) is not None:
            return Route(self._deployed[azure[2]], path, azure[1], scope_query=query)
        if (gemini := _GEMINI.fullmatch(path)) is not None:
            is_stream = gemini[2] == "streamGenerateContent"
            pairs = query[1:].split("&") if len(query) > 1 else []
            if not is_stream or "alt=sse" in pairs or "$alt=sse" in pairs:
                kept = "&".join(pair for pair in pairs if pair.partition("=")[0] not in DELIVERY_QUERY)
                dialect = self._spoken_by_gemini.get(gemini[2], self._gemini)
                return Route(dialect, path, gemini[1], is_stream, "?" + kept if kept else "")
        return Route(None, path)

    def of_errors(self, path: str, headers: Mapping[str, str]) -> Dialect:
        """The dialect in which a client on this path understands an error."""
        return self._errors.get(family_of(path, headers), self._chat)


def keys_in(query: str) -> tuple[bytes, ...]:
    """The `key` parameters of a query, in which Gemini takes a credential, in whatever escapes they are spelled."""
    if "=" not in query:
        return ()
    pairs = [pair.partition("=") for pair in query[1:].split("&")]
    return tuple([unquote_to_bytes(value) for name, _, value in pairs if value and _is_key(name)])


def without_key(query: str) -> str:
    """A query less its `key` parameters; "" when nothing else is in it."""
    kept = "&".join([pair for pair in query[1:].split("&") if not _is_key(pair.partition("=")[0])])
    return "?" + kept if kept else ""


def _is_key(name: str) -> bool:
    return name == "key" or ("%" in name and unquote_to_bytes(name) == b"key")


def family_of(path: str, headers: Mapping[str, str]) -> str:
    """Whose path it is; `anthropic-version` decides where paths coincide."""
    if "anthropic-version" in headers or path.startswith(("/v1/messages", "/messages")):
        return "anthropic"
    if path.startswith("/v1beta/") or _GEMINI_OPERATION.search(path) is not None:
        return "gemini"
    if "x-goog-api-key" in headers:
        return "gemini"
    return "ollama" if _OLLAMA.fullmatch(path) else "openai"
