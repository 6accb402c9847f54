"""Scope and fingerprint: which requests ask the same thing.

A scope is the digest of everything that must match exactly. Nothing is left out here: a dialect's `read` hands over
`Facts` that lose only its own DELIVERY_FIELDS, each with its reason, so a field nobody thought of keeps requests apart.
Both digests are SHA-256 over canonical JSON of one list, which frames its parts without ambiguity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from proxy.core.facts import Facts
from proxy.core.jsontext import canonical
from proxy.core.model import Controls, Input

KEY_VERSION = 2
"""Raised when the same request would get another digest: entries of older versions are then never found."""

_NO_CONTROLS = Controls()


def scope_of(
    facts: Facts,
    *,
    tenant: str,
    upstream: str,
    operation: str,
    controls: Controls = _NO_CONTROLS,
    headers: Sequence[tuple[str, str]] = (),
    query: str = "",
) -> bytes:
    """32 bytes: tenant, end user, upstream's place, operation, namespace, headers, query, model, context, settings.

    `headers` as of `identity.scope_headers`; `query` is the target's query string as received. Of the controls only
    namespace, sample and user take part. The prompt does not.
    """
    parts = [
        "scope",
        KEY_VERSION,
        tenant,
        facts.end_user,
        controls.user,
        upstream,
        operation,
        [controls.namespace, controls.sample] if controls.sample else controls.namespace,
        headers,
        query,
        facts.model,
        facts.prompt is None,
        facts.context,
        facts.settings,
    ]
    return hashlib.sha256(canonical(parts)).digest()


def fingerprint_of(scope: bytes, prompt: Input | None) -> bytes:
    """32 bytes: exact identity. Over the text as it is, never normalised; None when the context holds all of it.

    Token ids are another prompt than the text they stand for.
    """
    return hashlib.sha256(b"fingerprint\x00" + scope + canonical(prompt)).digest()


def normal_key_of(scope: bytes, form: str) -> bytes:
    """32 bytes: what a scope's questions of one normal form share (`core.normal`)."""
    return hashlib.sha256(b"normal\x00" + scope + canonical(form)).digest()
