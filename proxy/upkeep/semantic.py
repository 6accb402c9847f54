"""What compares questions by meaning, from its loading behind the listeners to the snapshot of its index.

What it brings (FAISS, Numba, ONNX Runtime) is imported on a thread of its own, with `proxy.upkeep.loading`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from index.errors import IndexRoomError
from proxy.admin.reindex import Reindex
from proxy.core.errors import CacheFault, ConfigError
from proxy.meaning import SNAPSHOT_NAME, Meaning, Step
from proxy.request.pipeline import Pipeline
from proxy.settings.sections import Settings
from proxy.store.store import Store
from proxy.tasks import aside
from proxy.watch.health import Health

if TYPE_CHECKING:
    from proxy.upkeep.loading import Opened

log = logging.getLogger(__name__)

NORMALS = 20_000  # newest questions whose normal form is known after a start: a second of a core
NORMALS_AT_ONCE = 64  # 3 ms
PROGRESS_S: Final = 10.0  # between two lines about a step of loading

Tell = Callable[[str], None]
"""Says one line to whoever started the program."""


class Semantic:
    """Lives on the event loop. `stopping` is set when it is required and not to be had."""

    def __init__(
        self, settings: Settings, pipeline: Pipeline, store: Store, health: Health, stopping: asyncio.Event
    ) -> None:
        self.meaning = pipeline.meaning
        self.opened: Opened | None = None  # once it is loaded
        self.reindex: Reindex | None = None
        self.refusal: ConfigError | None = None  # why the program stops by itself
        self.unlearned = ""  # why the judge starts without what it had learned
        self._last_question = 0  # whose normal form is known
        self.unsaved = ""  # why the last saving of the snapshot failed
        self._settings = settings
        self._pipeline = pipeline
        self._store = store
        self._health = health
        self._stopping = stopping

    async def settled(self) -> None:
        """Wait for the end of loading. Raises ConfigError where it is required and not to be had."""
        await self.meaning.settled()
        if self.refusal is not None:
            raise self.refusal

    async def load(self, stack: contextlib.AsyncExitStack, tell: Tell) -> None:
        """Open it, while requests are answered without it. `stack` closes it."""
        if not self._settings.rules.semantic:
            self.meaning.close("semantic_off")
            return
        began_s = time.monotonic()
        telling = asyncio.ensure_future(self._tell_progress(tell, began_s))
        try:
            opened = await self._open(stack, tell)
        except (IndexRoomError, CacheFault, ImportError) as fault:
            self._do_without(fault, tell)
            return
        finally:
            telling.cancel()
        self.reindex = Reindex(
            opened.embedder, self._store.entries, self._pipeline.entries.propose, lambda: opened.embedder.queue_length
        )
        self._pipeline.entries.on_lacking = self.reindex.wake
        self.meaning.open(opened.parts(guarded=self._settings.rules.pair_guard))
        tell(f"semantic      {describe(self.meaning)}, after {time.monotonic() - began_s:.1f} s")
        for line in degraded_lines(self._health):
            tell(line)

    async def _open(self, stack: contextlib.AsyncExitStack, tell: Tell) -> Opened:
        """Raises IndexRoomError, CacheFault and ImportError."""

        def step(now: Step) -> None:
            self.meaning.step = now
            tell(f"loading       {now.number}/{now.of} {now.about}")

        step(Step("libraries", 1, 4))
        room = await aside(lambda: importlib.import_module("proxy.upkeep.loading"))
        opened: Opened = await room.open_semantic(self._settings, self._store, stack, step)
        self.opened = opened
        self.meaning.identity = opened.embedder.identity
        await self._learn()
        return opened

    async def _tell_progress(self, tell: Tell, began_s: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            if (now := self.meaning.step) is not None:
                tell(f"loading       {now.number}/{now.of} {now.about}: {time.monotonic() - began_s:.0f} s so far")

    def _do_without(self, fault: Exception, tell: Tell) -> None:
        """Exact hits only, or the end where the operator wants no such thing."""
        reason = fault.code if isinstance(fault, CacheFault) else getattr(fault, "reason", "embedder_down")
        log.error("serving exact hits only", extra={"reason": reason, "cause": str(fault)})
        if self._settings.embedding.require_semantic:
            self.refusal = ConfigError(f"semantic lookups are required and cannot start: {fault}")
            self._stopping.set()
        self.meaning.close(reason, str(fault))
        tell(f"semantic      {reason}: exact hits only ({fault})")

    async def _learn(self) -> None:
        """What judge and router knew when they stopped. Without it they start strict, which is safe."""
        try:
            await self._pipeline.auditor.load()
            await self._pipeline.errands.router.load()
            await self.follow()
        except CacheFault as fault:
            log.error("the judge starts without what it had learned", extra={"cause": fault.message})
            self.unlearned = fault.message

    async def follow(self) -> None:
        """Know the normal forms of what was stored since, by any process. Raises CacheFault."""
        found = self._store.entries.questions(
            self.meaning.identity, NORMALS, NORMALS_AT_ONCE, after_id=self._last_question
        )
        async for questions in found:
            for entry_id, scope, prompt in questions:
                self._pipeline.entries.normals.keep(entry_id, scope, prompt)
            self._last_question = questions[-1][0]

    async def renew(self) -> None:
        """Vectors of this model for the entries that have none of it. Ends only where there is no model."""
        await self.meaning.settled()
        if self.reindex is not None:
            await self.reindex.keep_up()

    async def save(self) -> None:
        """The snapshot of the index, if it is loaded. Raises IndexRoomError."""
        if self.opened is None:
            return
        try:
            await self.opened.index.snapshot(self._settings.data_dir / SNAPSHOT_NAME)
            self.unsaved = ""
        except IndexRoomError as fault:
            self.unsaved = str(fault)
            raise


def describe(meaning: Meaning) -> str:
    """What the banner says of semantic lookups."""
    if meaning.embedder is not None:
        return f"on, embedder {meaning.identity}"
    return "loading; exact hits and forwards are served meanwhile" if meaning.is_loading else meaning.reason


def degraded_lines(health: Health) -> list[str]:
    """What the banner says of every part but semantic lookups, which have a line of their own."""
    return [f"degraded      {part}: {reason}" for part, reason in health.reasons().items() if part != "semantic"]
