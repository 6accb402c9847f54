"""Which entry answers a question of this normal form, in memory: found without embedding, and without SQL.

A hint like the index: the row decides. Bounded, the oldest leave; what other processes store is in it within seconds.
"""

from __future__ import annotations

from typing import Final

from proxy.core.fingerprint import normal_key_of
from proxy.core.normal import normal_form

LIMIT: Final = 131_072  # entries: about 25 MB when full


class Normals:
    """Lives on the event loop."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._entries: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, entry_id: int, scope: bytes, prompt: str) -> None:
        """The newest entry of a form is the one that is found."""
        form = normal_form(prompt)
        if form is None:
            return
        key = normal_key_of(scope, form)
        self.forget([] if (old := self._entries.get(key)) is None else [old])
        self._entries[key] = entry_id
        self._keys[entry_id] = key
        if len(self._entries) > self.limit:
            self.forget([next(iter(self._keys))])

    def forget(self, entry_ids: list[int]) -> None:
        for entry_id in entry_ids:
            if (key := self._keys.pop(entry_id, None)) is not None:
                del self._entries[key]

    def find_alike(self, scope: bytes, prompt: str) -> int | None:
        """The id of an entry whose question has the normal form of this one."""
        if not self._entries or (form := normal_form(prompt)) is None:
            return None
        return self._entries.get(normal_key_of(scope, form))
