"""Background tasks: a failure is reported, and a stop ends them all."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from proxy.tasks import Tasks


async def test_a_failure_is_logged_and_counted_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failed: list[str] = []
    tasks = Tasks(failed.append)
    done = asyncio.Event()

    async def broken() -> None:
        raise ValueError("no room")

    async def sound() -> None:
        done.set()

    tasks.spawn(broken(), "store")
    tasks.spawn(sound(), "sweep")
    with caplog.at_level(logging.ERROR):
        await tasks.close(5)
    assert failed == ["store"]
    assert done.is_set()
    assert [(r.getMessage(), r.__dict__["task"]) for r in caplog.records] == [("background task failed", "store")]
    assert "no room" in caplog.text


async def test_a_task_nobody_holds_is_not_collected() -> None:
    tasks = Tasks()
    go, seen = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        await go.wait()
        seen.set()

    tasks.spawn(wait(), "wait")
    await asyncio.sleep(0)
    gc.collect()
    go.set()
    assert await tasks.close(5) == 0
    assert seen.is_set()
    assert len(tasks) == 0


async def test_close_cancels_what_does_not_end_and_counts_no_failure() -> None:
    failed: list[str] = []
    tasks = Tasks(failed.append)
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    tasks.spawn(forever(), "forever")
    assert await tasks.close(0) == 1
    assert ended.is_set()
    assert failed == []


async def test_nothing_starts_after_close() -> None:
    tasks = Tasks()
    await tasks.close(0)

    async def late() -> None:
        raise AssertionError("ran")

    with pytest.raises(RuntimeError, match="'late' was started after close"):
        tasks.spawn(late(), "late")
