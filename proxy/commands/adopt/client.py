"""Headers that a client sends for another gateway: which of them ibid reads, and which would keep requests apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from proxy.commands.adopt.draft import Draft
from proxy.core.headers import MEANT, PEERS
from proxy.core.identity import BUILT_IN


def adopt_headers(
    draft: Draft, headers: Mapping[str, str], prefix: str, said: Mapping[str, str], passed: Collection[str] = ()
) -> None:
    """Say of each header of the gateway what it is here. What ibid does not read would reach the model server and be
    part of what must match, so it is dropped: a trace id would keep every request apart. `passed`: what the caller
    reads itself."""
    dropped = []
    for name in headers:
        if not name.startswith(prefix):
            continue
        raw = name.encode("latin-1", "ignore")
        if name in PEERS:
            draft.rename(name, f"the same header: {MEANT[PEERS[name]]}")
        elif name not in passed:
            draft.leave(name, said.get(name, "not read; clients need not send it"))
        if BUILT_IN.travels(raw) and not BUILT_IN.is_delivery(raw):
            dropped.append(name)
    if dropped:
        draft.take(
            "headers for the gateway", "forward", "drop_headers", sorted(dropped), "they mean nothing further on"
        )


def table_of(prefix: str) -> list[tuple[str, str]]:
    """The gateway's headers that ibid reads, and what each does."""
    return [(name, MEANT[meaning]) for name, meaning in PEERS.items() if name.startswith(prefix)]
