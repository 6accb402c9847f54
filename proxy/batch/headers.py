"""The headers of a batch: what of them may be written down, and what each of its lines is sent with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.core.identity import CREDENTIALS

RawHeaders = tuple[tuple[bytes, bytes], ...]

KEPT_HEADERS: Final = frozenset(
    {b"accept", b"anthropic-beta", b"anthropic-version", b"cache-control", b"openai-organization", b"openai-project"}
)
KEPT_PREFIXES: Final = (b"x-cache-", b"x-stainless-", b"helicone-cache-", b"x-bf-cache-", b"x-portkey-cache-")
"""Headers of a batch that are written down; none of them can hold a credential."""

_OF_THE_BODY: Final = frozenset(
    {b"content-type", b"content-length", b"content-encoding", b"idempotency-key", b"prefer"}
)


def kept(headers: Sequence[tuple[bytes, bytes]]) -> tuple[tuple[tuple[str, str], ...], bool]:
    """What of a client's headers may be written down, and whether there is more, so that its owner must come back."""
    shown = []
    for name, value in headers:
        low = name.lower()
        if low in KEPT_HEADERS or low.startswith(KEPT_PREFIXES):
            shown.append((low.decode("latin-1"), value.decode("latin-1")))
    return tuple(shown), has_credentials(headers)


def has_credentials(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() in CREDENTIALS for name, _ in headers)


def of_lines(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """The headers of a batch as those of each of its lines."""
    own = [(name, value) for name, value in headers if name.lower() not in _OF_THE_BODY]
    return (*own, (b"Content-Type", b"application/json"))


def joined(written: Sequence[tuple[str, str]], headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """What was written down of a batch's headers, and what else its owner sends now."""
    there = {name.encode("latin-1") for name, _ in written}
    old = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in written]
    new = [
        (name, value)
        for name, value in headers
        if (low := name.lower()) not in there and low not in KEPT_HEADERS and not low.startswith(KEPT_PREFIXES)
    ]
    return of_lines([*old, *new])
