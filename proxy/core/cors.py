"""Pages of other origins in a browser: what lets them read an answer (Fetch standard, "CORS protocol").

An upstream decides who may read its answers. What it said to an origin, to a preflight or with an answer, goes for what
ibid answers in its place too: a hit, or an error of its own. Origins that the operator names may read everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from proxy.core.patterns import is_one_of

Headers = list[tuple[str, str]]

ORIGINS_KEPT: Final = 256
ANY: Final = "*"
_ORIGIN: Final = "access-control-allow-origin"
_CARRIED: Final = frozenset({_ORIGIN, "access-control-allow-credentials", "access-control-expose-headers"})
_VARY: Final = ("Vary", "Origin")


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """A browser's question whether it may ask: it never carries a credential."""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


class Cors:
    """`allowed`: origins that may read everything, with * and ?. Remembers what upstreams said, by family of dialects,
    as long as the process lives."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = tuple(allowed)
        self._told: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}

    def may_read(self, origin: str) -> bool:
        return bool(self._allowed) and is_one_of(origin, self._allowed)

    def preflight(self, headers: Mapping[str, str]) -> Headers | None:
        """Headers of the answer to one of an origin that the operator named; None when the upstream is to be asked."""
        origin = headers["origin"]
        if not self.may_read(origin):
            return None
        told = [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Methods", headers["access-control-request-method"]),
            ("Access-Control-Max-Age", "600"),
            ("Vary", "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
        ]
        if (asked := headers.get("access-control-request-headers")) is not None:  # "*" would not cover Authorization
            told.append(("Access-Control-Allow-Headers", asked))
        if headers.get("access-control-request-private-network") == "true":
            told.append(("Access-Control-Allow-Private-Network", "true"))
        return told

    def carried(self, family: str, origin: str, headers: Iterable[tuple[str, str]]) -> Headers:
        """The headers of an upstream's answer as this origin gets them; what they say to it is remembered."""
        told = list(headers)
        said = next((value for name, value in told if name.lower() == _ORIGIN), None)
        if said in (ANY, origin):
            self._remember(family, said, told)
            if not self.may_read(origin):
                return told
        elif said is None and not self.may_read(origin):
            return told
        return [line for line in told if line[0].lower() not in _CARRIED] + self.granted(family, origin)

    def granted(self, family: str, origin: str) -> Headers:
        """Headers that let this origin read what ibid itself answers; none for one that nobody let."""
        if self.may_read(origin):
            return [("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", ANY), _VARY]
        told = self._told.get((family, origin)) or self._told.get((family, ANY))
        return [] if told is None else [*told, _VARY]

    def _remember(self, family: str, said: str, headers: Headers) -> None:
        if len(self._told) >= ORIGINS_KEPT:
            self._told.clear()
        self._told[family, said] = tuple([line for line in headers if line[0].lower() in _CARRIED])
