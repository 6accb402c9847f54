"""Where the configured model servers are, and the URL there of a path asked of us: never another host's."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from yarl import URL

from proxy.core.dialects.routes import without_key
from proxy.core.errors import BadRequest, ConfigError
from proxy.core.identity import CREDENTIALS
from proxy.core.memo import Memo
from proxy.upstreams.breaker import Breaker

log = logging.getLogger(__name__)

MEMO_BYTES = 8 * 1024 * 1024
URL_BYTES = 2048
"""Of a URL, but for the texts in it."""

_BARE = re.compile(
    r"/(chat|completions|responses|embeddings|models|files|batches|messages|audio|images|moderations|fine_tuning|"
    r"assistants|threads|vector_stores|uploads)(/|\?|$)"
)
_VERSION = re.compile(r"/v\d[^/]*(/|$)")
_PLAIN_TARGET = re.compile(r"/[\x21-\x7e]*")


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """One configured model server. Of a dialect's, the first that names the model serves it, else the first without
    names; where all name theirs, nobody serves another model."""

    name: str
    base_url: str  # with or without its /v1
    dialect: str  # "openai" | "anthropic" | "gemini" | "ollama"
    models: tuple[str, ...] = ()  # patterns of `fnmatch`; none: what no other upstream of the dialect names
    key: str | None = field(default=None, repr=False)  # sent instead of the client's own
    proxy: str | None = field(default=None, repr=False)  # HTTP proxy on the way
    stands_in_for: tuple[str, ...] = ()  # `asked=own` names of models, see `core.failover.named_there`


DEFAULTS = (
    UpstreamAddress("openai", "https://api.openai.com", "openai"),
    UpstreamAddress("anthropic", "https://api.anthropic.com", "anthropic"),
    UpstreamAddress("gemini", "https://generativelanguage.googleapis.com", "gemini"),
    UpstreamAddress("ollama", "http://127.0.0.1:11434", "ollama"),
)

_KEY_HEADERS = {"anthropic": (b"x-api-key", b""), "gemini": (b"x-goog-api-key", b"")}


class Address:
    """Where an upstream is, and the URL of a path there. Raises ConfigError for a base that is not plain http(s)."""

    __slots__ = (
        "_host", "_is_complete", "_known", "_root", "breaker", "dialect", "key", "models", "name", "place", "proxy",
        "stands_in_for",
    )  # fmt: skip

    def __init__(self, configured: UpstreamAddress, breaker: Breaker, memo_bytes: int = MEMO_BYTES) -> None:
        self.name = configured.name
        self.dialect = configured.dialect
        self.models = configured.models
        self.stands_in_for = configured.stands_in_for
        self.breaker = breaker
        self.proxy = _proxy_of(configured)
        self.key: tuple[bytes, bytes] | None = None
        if configured.key is not None:
            name, prefix = _KEY_HEADERS.get(configured.dialect, (b"authorization", b"Bearer "))
            self.key = name, prefix + configured.key.encode("ascii")
        try:
            base = URL(configured.base_url)
            has_host = bool(base.scheme in ("http", "https") and base.raw_host and base.port)
        except ValueError as error:
            raise ConfigError(f"upstream {self.name!r}: base_url is not a URL") from error
        if not has_host or base.raw_user is not None or base.raw_password is not None:
            raise ConfigError(f"upstream {self.name!r}: base_url must be http(s)://host[:port][/path], no credentials")
        if base.raw_query_string or base.raw_fragment:
            raise ConfigError(f"upstream {self.name!r}: base_url must not have a query or a fragment")
        path = base.raw_path.rstrip("/")
        self._host = (base.scheme, base.raw_host, base.port)
        # "/v1" at the end is the part every client repeats; another version ("/v4", "/v1beta/openai") stands for it.
        path = path.removesuffix("/v1")
        self._is_complete = _VERSION.search(path) is not None
        self._root = self.place = str(base.origin()) + path
        self._known: Memo[str, URL] = Memo(memo_bytes)

    def with_key(
        self, headers: Sequence[tuple[bytes, bytes]], path_qs: str
    ) -> tuple[Sequence[tuple[bytes, bytes]], str]:
        """Headers and target with this upstream's key where the client's were."""
        assert self.key is not None
        others = [header for header in headers if header[0].lower() not in CREDENTIALS]
        path, mark, query = path_qs.partition("?")
        return (*others, self.key), path + without_key(mark + query)

    def url_of(self, path_qs: str) -> URL:
        """The URL to ask for what a client asked of us. Its scheme, host and port are always the configured ones."""
        return self._known.get(path_qs) or self._join(path_qs)

    def remember(self, path_qs: str, url: URL) -> None:
        """That an upstream answered there."""
        if self._known.get(path_qs) is not url:
            self._known.put(path_qs, url, 6 * len(path_qs) + URL_BYTES)

    def _join(self, path_qs: str) -> URL:
        if _PLAIN_TARGET.fullmatch(path_qs) is None or "#" in path_qs:
            raise BadRequest("Unknown request URL.", code="unknown_url", status=404)
        path = path_qs.removeprefix("/v1") if path_qs.startswith("/v1/v1/") else path_qs
        root_path = URL(self._root, encoded=True).raw_path.rstrip("/")
        if self._is_complete:
            path = path.removeprefix("/v1") if path.startswith("/v1/") else path
        elif _BARE.match(path):
            path = "/v1" + path
        joined = path if root_path and path.startswith(root_path + "/") else root_path + path
        url = URL(str(URL(self._root, encoded=True).origin()) + joined, encoded=True)
        if (url.scheme, url.raw_host, url.port) != self._host or url.raw_user is not None:
            raise BadRequest("Unknown request URL.", code="unknown_url", status=404)
        return url


def _proxy_of(configured: UpstreamAddress) -> URL | None:
    """None, and a word about it, for one of a kind that cannot be used: SOCKS."""
    if configured.proxy is None:
        return None
    try:
        url = URL(configured.proxy if "://" in configured.proxy else f"http://{configured.proxy}")
    except ValueError:
        url = URL()
    if url.scheme in ("http", "https") and url.raw_host:
        return url
    log.warning("the proxy of the environment cannot be used", extra={"upstream": configured.name})
    return None
