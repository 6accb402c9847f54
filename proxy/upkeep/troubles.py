"""Every part that can serve less well without anybody being told by an error, put on the register of health."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.money.keys import KeyRing
from proxy.money.prices import Booking
from proxy.store.store import Store
from proxy.upkeep.semantic import Semantic
from proxy.watch.health import Health, Trouble

if TYPE_CHECKING:
    from proxy.upkeep.loading import Opened


def watch_semantic(health: Health, semantic: Semantic) -> None:
    """What compares by meaning."""
    watch, meaning = health.watch, semantic.meaning

    def trouble() -> Trouble | None:
        if meaning.reason in ("", "semantic_off"):
            return None
        at = meaning.step
        return Trouble(meaning.reason, meaning.cause if at is None else f"{at.number}/{at.of} {at.about}")

    def opened(look: Callable[[Opened], str]) -> Trouble | None:
        """What is the matter with a part of what was loaded; none before it is."""
        if meaning.parts is None or semantic.opened is None or not (reason := look(semantic.opened)):
            return None
        return Trouble(reason, semantic.opened.embedder.identity)

    watch("semantic", trouble)
    watch("model", lambda: opened(lambda found: "" if found.is_converted else "torch_fallback"))
    watch("pair_guard", lambda: opened(lambda found: "" if found.is_guarded else "no_pair_guard"))
    watch("embedder", lambda: opened(lambda found: found.embedder.trouble))
    watch("index", lambda: opened(lambda found: found.index.trouble))
    watch("kernels", lambda: opened(lambda found: "" if found.is_compiled else "interpreted"))
    watch("evidence", lambda: Trouble("unlearned", semantic.unlearned) if semantic.unlearned else None)
    watch("snapshot", lambda: Trouble("snapshot_unsaved", semantic.unsaved) if semantic.unsaved else None)


def watch_store(health: Health, store: Store) -> None:
    """Database and ledger."""
    health.watch("store", lambda: None if store.state == "ok" else Trouble(store.state, store.database.label))
    health.watch("ledger", lambda: None if store.ledger.state == "ok" else Trouble(store.ledger.state))


def watch_money(health: Health, keys: KeyRing, booking: Booking) -> None:
    """Virtual keys and prices."""
    health.watch("keys", lambda: Trouble("unread") if keys.is_stale else None)
    health.watch("prices", lambda: Trouble("unpriced", ", ".join(booking.unpriced)) if booking.unpriced else None)
