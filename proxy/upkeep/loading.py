"""What is opened behind the listeners: model, kernels, index, evidence. Importing it takes seconds and a thread.

It brings FAISS, Numba and ONNX Runtime; a first start also converts the model, in a process of its own. All of it is
done beside requests, which are answered meanwhile without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from index.answers import Comparer
from index.batcher import QUEUE_DEADLINE_S, EmbedderOwner, needs_conversion, open_embedder
from index.errors import SnapshotRefused
from index.features import compile_features
from index.kernels import compile_kernels, compiles
from index.model import BUNDLED
from index.vectors import VectorOwner
from proxy.meaning import SNAPSHOT_NAME, Parts, Step
from proxy.settings.sections import Settings
from proxy.store.store import Store
from proxy.tasks import aside

log = logging.getLogger(__name__)

STEPS = 4

Tell = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """Embedder and index, warm, and the kernels compiled."""

    embedder: EmbedderOwner
    index: VectorOwner
    is_guarded: bool  # False: a pair guard is wanted, and there is none for this model
    is_converted: bool  # False: torch serves, because the model did not convert
    is_compiled: bool  # False: Numba is told not to compile

    def parts(self, *, guarded: bool) -> Parts:
        embedder = self.embedder
        return Parts(
            embedder,
            self.index,
            Comparer(
                embedder.match if embedder.can_match else None,
                lambda: embedder.queue_length,
                lambda: embedder.matching_s,
            ),
            lambda: embedder.queue_length,
            embedder.verify if guarded and embedder.can_verify else None,
            embedder.shed,
        )


async def open_semantic(settings: Settings, store: Store, stack: contextlib.AsyncExitStack, tell: Tell) -> Opened:
    """`stack` closes what was opened. Raises IndexRoomError and CacheFault."""
    wanted = settings.embedding
    model = None if wanted.model == BUNDLED else wanted.model
    compiling = asyncio.ensure_future(aside(_compile))
    stack.callback(compiling.cancel)
    if await needs_conversion(settings.data_dir, model=model, backend=wanted.backend):
        tell(Step("converting the embedding model, once; half a minute on a quiet machine", 2, STEPS))
    else:
        tell(Step("opening the embedding model", 2, STEPS))
    embedder = await open_embedder(
        settings.data_dir,
        model=model,
        backend=wanted.backend,
        threads=wanted.threads,
        queue=wanted.queue,
        lru=wanted.lru,
        states_bytes=wanted.states_bytes,
        guarded=settings.rules.pair_guard,
        encode_deadline_s=wanted.deadline_ms / 1000,
        queue_deadline_s=max(QUEUE_DEADLINE_S, wanted.deadline_ms / 1000),  # a turn may take as long as a call
    )
    stack.push_async_callback(embedder.close)
    tell(Step("compiling the kernels", 3, STEPS))
    await compiling
    tell(Step("opening the index", 4, STEPS))
    index = await open_index(settings, embedder, store)
    stack.push_async_callback(asyncio.to_thread, index.close)
    is_converted = wanted.backend == "torch" or embedder.identity.split(":")[1] != "torch"
    is_guarded = embedder.can_verify or not settings.rules.pair_guard
    if not is_guarded:
        log.warning("no pair guard for this model: only evidence serves", extra={"cause": embedder.identity})
    return Opened(embedder, index, is_guarded, is_converted, compiles())


def _compile() -> None:
    compile_kernels()
    compile_features()


async def open_index(settings: Settings, embedder: EmbedderOwner, store: Store) -> VectorOwner:
    """The index as SQL says it must be: the snapshot, less what SQL no longer has, plus what it does not hold yet."""
    path = settings.data_dir / SNAPSHOT_NAME
    promote_above, queue_limit = settings.index.promote_at, settings.index.queue
    try:
        index = await asyncio.to_thread(
            VectorOwner.load,
            path,
            embedder.identity,
            embedder.dimension,
            promote_above=promote_above,
            queue_limit=queue_limit,
        )
    except SnapshotRefused as refusal:
        log.info("building the index from SQL", extra={"reason": str(refusal)})
        index = VectorOwner(embedder.identity, embedder.dimension, promote_above=promote_above, queue_limit=queue_limit)
    try:
        async with index.replaying():
            index.start()
            await _reconcile(index, embedder.identity, store)
    except BaseException:
        await asyncio.to_thread(index.close)
        raise
    return index


async def _reconcile(index: VectorOwner, identity: str, store: Store) -> None:
    held, wanted = await index.ids(), await store.entries.ids(identity)
    gone = np.setdiff1d(held, wanted, assume_unique=True)
    if len(gone):
        index.remove(gone.tolist())
    missing = np.setdiff1d(wanted, held, assume_unique=True)
    if not len(missing):
        return
    async for block in store.entries.vectors(identity, after_id=int(missing[0]) - 1):
        places = np.minimum(np.searchsorted(missing, block.ids), len(missing) - 1)
        new = missing[places] == block.ids
        scopes = [scope.tobytes() for scope in block.scopes[new]]
        await index.add_many(block.ids[new], scopes, block.vectors[new], block.signatures[new], block.expires_ms[new])
