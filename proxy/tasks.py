"""Supervised background tasks: every one keeps a reference, reports its failure, and is ended at shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)


T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """What `work` returns, run on a thread of its own that nobody waits for when the program ends meanwhile."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result, fault = None, None
        try:
            result = work()
        except BaseException as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, fault)

    threading.Thread(target=run, name="ibid-aside", daemon=True).start()
    return await done


def _ignore(_name: str) -> None:
    return None


class Tasks:
    """Background tasks of one event loop. Owned by the composition root, which awaits `close`.

    `on_failure` is called with the task's name for each one that raised: the hook for a counter.
    """

    def __init__(self, on_failure: Callable[[str], None] = _ignore) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._on_failure = on_failure
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def closed(self) -> bool:
        """No further task is taken."""
        return self._closed

    def spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """The running task. Its exception is logged and counted, never lost. Raises RuntimeError after `close`."""
        if self._closed:
            coro.close()
            raise RuntimeError(f"background task {name!r} was started after close")
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error, extra={"task": task.get_name()})
            self._on_failure(task.get_name())

    async def close(self, timeout_s: float) -> int:
        """Wait for what is running, at most `timeout_s`, then cancel the rest; returns how many were cancelled."""
        self._closed = True
        if not self._running:
            return 0
        _done, late = await asyncio.wait(self._running, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("background tasks cancelled", extra={"tasks": sorted(task.get_name() for task in late)})
            _done, deaf = await asyncio.wait(late, timeout=1.0)  # a task that swallows its cancellation is left behind
            if deaf:
                log.error("tasks ignored cancel", extra={"tasks": sorted(task.get_name() for task in deaf)})
        return len(late)
