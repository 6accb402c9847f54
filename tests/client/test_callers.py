"""Who asks, remembered: whoever came before, it is what a reader without memory says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.client.callers import Callers, Lines
from proxy.core.dialects.routes import CHAT_PATH, Routes
from proxy.core.errors import BadRequest
from proxy.core.identity import HeaderRules
from proxy.core.keys import Key, digest_of
from proxy.core.model import Limits, Rules
from proxy.money.keys import KeyRing
from proxy.request.reading import Caller, Reader

SECRET = bytes(range(32))
HEADERS = {b"Authorization": b"Bearer %b", b"x-api-key": b"%b", b"api-key": b"%b", b"x-goog-api-key": b"%b"}
QUERIED = {b"key": "key", b"key again": "k%65y"}
VIRTUAL = [b"ibid-" + letter * 48 for letter in (b"0", b"1")]
SECRETS = [b"sk-a", b"sk-b", *VIRTUAL]
PATHS = [CHAT_PATH, "/v1beta/models/gemini-2.5-flash:generateContent", "/api/chat", "/v1/files"]
OTHERS = [
    (b"Content-Type", b"application/json"),
    (b"Content-Type", b"text/plain"),
    (b"OpenAI-Beta", b"x"),
    (b"Prefer", b"respond-async"),
]

carried = st.dictionaries(st.sampled_from([*HEADERS, *QUERIED]), st.sampled_from(SECRETS), max_size=4)
asked = st.tuples(st.sampled_from(PATHS), carried, st.lists(st.sampled_from(OTHERS), max_size=2, unique=True))
changed = st.sampled_from(["rotate", "revoke", "restore"])


def key_of(number: int) -> Key:
    return Key(f"key_{number}", digest_of(VIRTUAL[number]), f"project-{number}", "", 0)


def said(caller: Caller) -> tuple[object, ...]:
    return tuple(getattr(caller, name) for name in Caller.__slots__ if name != "controls")


def lines_of(secrets: Mapping[bytes, bytes], others: list[tuple[bytes, bytes]]) -> Lines:
    return (*others, *((name, HEADERS[name] % secret) for name, secret in secrets.items() if name in HEADERS))


def query_of(secrets: Mapping[bytes, bytes]) -> str:
    pairs = [f"{QUERIED[name]}={secret.decode()}" for name, secret in secrets.items() if name in QUERIED]
    return "?" + "&".join(pairs) if pairs else ""


def answer_of(read: Any) -> object:
    try:
        return said(read())
    except BadRequest as error:
        return error.status, error.code, error.message


@settings(max_examples=300, deadline=None)
@given(st.lists(asked, min_size=1, max_size=6), st.lists(st.integers(0, 5) | changed, max_size=40), st.booleans())
def test_the_memory_says_what_a_fresh_reader_says_and_no_two_sets_of_credentials_share_a_tenant(
    pool: list[tuple[str, dict[bytes, bytes], list[tuple[bytes, bytes]]]], steps: list[int | str], anonymous: bool
) -> None:
    reader = Reader(Routes(), cast(Any, None), Rules(), Limits())
    ring = KeyRing(cast(Any, None), cast(Any, None), clock=lambda: 1.0)

    def callers() -> Callers:
        return Callers(SECRET, ring, HeaderRules(), 1 << 20, anonymous=anonymous, keyless=True)

    for number in range(2):
        ring._take(key_of(number))
    remembering = callers()
    sets: dict[str, object] = {}
    for step in steps:
        if isinstance(step, str):
            key = ring._by_id["key_0"].key
            if step == "restore":  # the table was emptied, and written again
                ring._by_digest.pop(key.digest, None)
                del ring._by_id["key_0"]
                ring._take(key_of(0))
            else:
                ring._take(
                    replace(key, **({"digest": digest_of(b"ibid-new")} if step == "rotate" else {"revoked_ms": 0}))
                )
            continue
        path, secrets, others = pool[step % len(pool)]
        headers, target = lines_of(secrets, others), reader.target(path, query_of(secrets))
        found = remembering.find(headers, target)
        fresh = answer_of(lambda: callers().read(headers, target))  # noqa: B023
        assert answer_of(lambda: found or remembering.read(headers, target)) == fresh  # noqa: B023
        if isinstance(fresh, tuple) and len(fresh) > 3:
            caller = found or remembering.read(headers, target)
            remembering.remember(headers, target, caller)
            owner = {*secrets.values()} if caller.grant is None else caller.team
            assert sets.setdefault(caller.tenant, owner) == owner
            assert all(tenant == caller.tenant for tenant, known in sets.items() if known == owner)
