"""Build the index anew from the vectors in SQL and save its snapshot, with no server running."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time

from index.batcher import open_embedder
from index.errors import IndexRoomError
from index.model import BUNDLED_NAMES
from index.vectors import VectorOwner
from proxy.commands.codes import FINE
from proxy.commands.printing import Bar
from proxy.core.errors import ConfigError
from proxy.meaning import SNAPSHOT_NAME
from proxy.settings.config import Settings
from proxy.store.store import open_store


async def rebuild(settings: Settings) -> int:
    """How many vectors the new snapshot holds. Raises ConfigError: another ibid runs, or the model cannot be used."""
    from proxy.money.prices import configured
    from proxy.store.reading import refuse_unless_there

    refuse_unless_there(settings.store.database_url or None, settings.data_dir)
    async with contextlib.AsyncExitStack() as stack:
        price = configured(settings).price
        store = await open_store(settings.store.database_url or None, settings.data_dir, price=price)
        stack.push_async_callback(store.close)
        wanted = settings.embedding
        try:
            embedder = await open_embedder(
                settings.data_dir,
                model=None if wanted.model in BUNDLED_NAMES else wanted.model,
                backend=wanted.backend,
                threads=wanted.threads,
            )
            stack.push_async_callback(embedder.close)
            index = VectorOwner(embedder.identity, embedder.dimension, promote_above=settings.index.promote_at)
            index.start()
            stack.push_async_callback(asyncio.to_thread, index.close)
            bar = Bar("indexing", len(await store.entries.ids(embedder.identity)))
            async for block in store.entries.vectors(embedder.identity):
                scopes = [scope.tobytes() for scope in block.scopes]
                await index.add_many(block.ids, scopes, block.vectors, block.signatures, block.expires_ms)
                bar.advance(len(block.ids))
            bar.close()
            await index.settled()
            await index.snapshot(settings.data_dir / SNAPSHOT_NAME)
            return index.size
        except (IndexRoomError, OSError) as fault:
            raise ConfigError(f"the index cannot be rebuilt: {fault}") from fault


def run(settings: Settings, _chosen: argparse.Namespace) -> int:
    began_s = time.monotonic()
    count = asyncio.run(rebuild(settings))
    print(f"{count:,} vectors indexed in {time.monotonic() - began_s:.1f} s")
    return FINE
