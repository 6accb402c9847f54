"""Which upstreams offer a batch API: asked once each, and remembered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from proxy.batch.headers import RawHeaders
from proxy.batch.providers.anthropic import AnthropicBatches
from proxy.batch.providers.openai import OpenAIBatches
from proxy.batch.providers.provider import NoBatchApi, Provider, Refused
from proxy.batch.providers.wire import Wire
from proxy.core.batches import ENDPOINTS
from proxy.core.dialects.routes import MESSAGES_PATH
from proxy.core.errors import UpstreamError
from proxy.ports import Upstream

log = logging.getLogger(__name__)

BELIEF_S = 60.0  # how long an answer that says nothing of the API, only of this moment or client, is believed
BELIEFS = 1024
PROBE_S = 10.0  # for its answer: others wait for it as well


class Offers:
    """What this process knows of the batch APIs of its upstreams."""

    def __init__(self, upstream: Upstream, without_batches: Iterable[str], clock: Callable[[], float]) -> None:
        wire = Wire(upstream)
        self._providers: dict[str, Provider] = {"openai": OpenAIBatches(wire), "anthropic": AnthropicBatches(wire)}
        self._clock = clock
        self._known: dict[str, bool] = dict.fromkeys(without_batches, False)  # by upstream
        self._believed: dict[tuple[str, RawHeaders | None], tuple[bool, float]] = {}  # and until when; None: by anybody
        self._probing: dict[str, asyncio.Lock] = {}

    def provider(self, path: str) -> Provider:
        return self._providers[family_of_path(path)]

    def known(self, upstream: str) -> bool | None:
        """Whether an upstream has a batch API; None when that is not known yet."""
        return self._known.get(upstream)

    def remember_none(self, upstream: str) -> None:
        self._known[upstream] = False

    async def probe(self, upstream: str, path: str, headers: RawHeaders) -> bool:
        """Ask an upstream once; while it cannot say, it is believed to have one, and handing in will show."""
        async with self._probing.setdefault(upstream, asyncio.Lock()):
            known = self._known.get(upstream)
            if known is not None:
                return known
            for asker in (headers, None):
                believed, until_s = self._believed.get((upstream, asker), (False, 0.0))
                if self._clock() < until_s:
                    return believed
            try:
                async with asyncio.timeout(PROBE_S):
                    found = await self.provider(path).is_there(upstream, headers)
            except TimeoutError:
                return self._believe(upstream, None, found=True)
            except Refused as refused:
                return self._believe(upstream, headers, found=refused.status not in (400, 401, 403))
            except UpstreamError:
                return self._believe(upstream, headers, found=True)
            except NoBatchApi:
                found = False
            self._known[upstream] = found
            log.info("asked for a batch API", extra={"upstream": upstream, "found": found})
            return found

    def _believe(self, upstream: str, asker: RawHeaders | None, *, found: bool) -> bool:
        if len(self._believed) >= BELIEFS:
            self._believed.clear()
        self._believed[upstream, asker] = found, self._clock() + BELIEF_S
        return found


def family_of_path(path: str) -> str:
    return "anthropic" if path == MESSAGES_PATH else "openai"


def is_batchable(path: str) -> bool:
    """Whether providers take requests of this path in their batches."""
    return path in ENDPOINTS or path == MESSAGES_PATH
