"""Who asks: what a header block, and the credentials in a query, say of the caller. Remembered, for equal ones say the
same; what may change meanwhile (whether a key still stands) is looked at each time."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.core import identity
from proxy.core.identity import HeaderRules
from proxy.core.memo import Memo, size_of
from proxy.core.retries import retry_count
from proxy.money.keys import Grant, KeyRing
from proxy.request.reading import Caller, Target

Lines = tuple[tuple[bytes, bytes], ...]
CALLER_BYTES = 1024
"""Of a Caller and its parts, but for what it says."""


class Callers:
    """Reads callers. `anonymous`, `keyless`: whether a request may come without a credential, on any path or on those
    of dialects whose own server asks for none."""

    def __init__(
        self,
        secret: bytes,
        keys: KeyRing,
        header_rules: HeaderRules,
        memo_bytes: int,
        *,
        anonymous: bool = False,
        keyless: bool = False,
    ) -> None:
        self._secret = secret
        self._keys = keys
        self._header_rules = header_rules
        self._anonymous = anonymous
        self._keyless = keyless
        # What decides who asks: the header block, the credentials in the query, and whether none is allowed.
        self._known: Memo[tuple[Lines, tuple[bytes, ...], bool], Caller] = Memo(memo_bytes)
        self._of_lines: Memo[tuple[str, Lines, Grant | None], Caller] = Memo(memo_bytes)

    def find(self, headers: Lines, target: Target) -> Caller | None:
        """Who is remembered for this, unless the key ring has changed under them."""
        caller = self._known.get((headers, target.keys, target.is_keyless))
        if caller is None or caller.grant is None or self._keys.opens(caller.grant):
            return caller
        return None

    def read(self, headers: Lines, target: Target) -> Caller:
        """Raises BadRequest (401)."""
        who = identity.credential(
            headers, target.keys, anonymous=self._anonymous or (target.is_keyless and self._keyless)
        )
        grant = self._keys.grant(who)
        said = {name.lower(): value for name, value in reversed(headers)}  # the first of a name
        if target.keys and b"x-goog-api-key" not in said:
            headers = (*headers, (b"x-goog-api-key", target.keys[0]))
        tried = retry_count(said)
        return Caller(
            identity.tenant_of(self._secret, who) if grant is None else grant.live.tenant,
            headers if grant is None else identity.without_credentials(headers),
            identity.scope_headers(headers, self._header_rules),
            is_json=_may_be_json(said.get(b"content-type", b"")),
            is_retry=bool(tried),
            tries_again=tried is not None,
            grant=grant,
            is_deferring=b"respond-async" in said.get(b"prefer", b""),
            origin=said.get(b"origin", b"").decode("latin-1"),
        )

    def of_preflight(self, headers: Lines) -> Caller:
        """Nobody yet: a browser that asks whether it may ask."""
        tenant = identity.tenant_of(self._secret, identity.ANONYMOUS)
        origin = next((value.decode("latin-1") for name, value in headers if name.lower() == b"origin"), "")
        return Caller(tenant, identity.without_credentials(headers), (), is_json=False, is_retry=False, origin=origin)

    def remember(self, headers: Lines, target: Target, caller: Caller) -> None:
        """Call it for one whose request was answered: of a refused one nothing is kept."""
        self._known.put((headers, target.keys, target.is_keyless), caller, 2 * _size_of_lines(headers) + CALLER_BYTES)

    def shed(self) -> None:
        """Forget everybody: they are read anew."""
        self._known.clear()
        self._of_lines.clear()

    def of_line(self, tenant: str, headers: Lines, key_id: str) -> Caller:
        """Who asks a line of a batch, or asked earlier, with this virtual key."""
        grant = self._keys.grant_of(key_id) if key_id else None
        caller = self._of_lines.get((tenant, headers, grant))
        if caller is None:
            scope_headers = identity.scope_headers(headers, self._header_rules)
            caller = Caller(tenant, headers, scope_headers, is_json=True, is_retry=False, grant=grant)
            self._of_lines.put((tenant, headers, grant), caller, 2 * _size_of_lines(headers) + CALLER_BYTES)
        return caller


_JSON_OR_UNSAID = frozenset(
    {b"", b"application/json", b"text/json", b"text/plain", b"application/x-www-form-urlencoded",
     b"application/octet-stream", b"binary/octet-stream"}
)  # fmt: skip
"""JSON, and what programs say that say nothing of it: curl's `-d` alone makes a form of it. Model servers look at the
body."""


def _may_be_json(content_type: bytes) -> bool:
    media = content_type.partition(b";")[0].strip().lower()
    return media in _JSON_OR_UNSAID or media.endswith(b"+json")


def _size_of_lines(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum([size_of(line) + 16 for line in headers])
