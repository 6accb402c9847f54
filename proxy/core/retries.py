"""A client's library that tries again: how that shows, and by what its tries are one request.

The SDKs made with Stainless count in a header of their own and send one idempotency key with all tries; others count in
headers that proxies and clouds have made usual.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final

from proxy.core.jsontext import canonical

_TRIES_BEFORE: Final = (b"x-stainless-retry-count", b"x-retry-count", b"x-retry-attempt", b"retry-count")
_TRIES: Final = ((b"x-envoy-attempt-count", re.compile(rb"\s*(\d{1,4})")),
                 (b"amz-sdk-request", re.compile(rb".*attempt=(\d{1,4})")))  # fmt: skip
_COUNT: Final = re.compile(rb"\s*(\d{1,4})\s*")


def retry_count(said: Mapping[bytes, bytes]) -> int | None:
    """How often this was tried before, by headers with lower-case names; None where the client does not say."""
    for name in _TRIES_BEFORE:
        if (found := _COUNT.fullmatch(said.get(name, b""))) is not None:
            return int(found[1])
    for name, pattern in _TRIES:
        if (found := pattern.match(said.get(name, b""))) is not None:
            return max(0, int(found[1]) - 1)
    return None


def key_of(
    tenant: str, path_qs: str, headers: Sequence[tuple[str, str]], idempotency: Sequence[bytes], body: bytes
) -> bytes:
    """32 bytes that the tries of one request share and no other has. `headers` as of `identity.scope_headers`."""
    told = canonical([tenant, path_qs, headers, [value.decode("latin-1") for value in idempotency]])
    return hashlib.sha256(b"retry\x00" + hashlib.sha256(body).digest() + told).digest()
