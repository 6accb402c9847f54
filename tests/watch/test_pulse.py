"""The pulse beats while something is asked and rests while nothing is."""

from __future__ import annotations

import asyncio

import pytest

from proxy.watch import pulse
from proxy.watch.memory import Memory
from proxy.watch.pulse import BEAT_S, REST_S, Pulse


class Clock:
    """Time that passes in sleeps alone; what is asked of the program at which sleep; ends after `beats`."""

    def __init__(self, asked_at: set[int], beats: int) -> None:
        self.now_s, self.count, self.slept = 0.0, 0, []
        self._asked_at, self._beats = asked_at, beats

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        if len(self.slept) == self._beats:
            raise asyncio.CancelledError
        self.count += len(self.slept) in self._asked_at
        self.slept.append(delay_s)
        self.now_s += delay_s


async def beaten(monkeypatch: pytest.MonkeyPatch, asked_at: set[int], beats: int) -> tuple[Clock, Pulse, list[float]]:
    clock, found, seconds = Clock(asked_at, beats), Pulse(), []
    monkeypatch.setattr(pulse.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(pulse.asyncio, "sleep", clock.sleep)
    memory = Memory(None, (), lambda _: None, lambda: None)
    with pytest.raises(asyncio.CancelledError):
        await found.run(memory, seconds.append, lambda: clock.count)
    monkeypatch.undo()
    return clock, found, seconds


async def test_after_a_second_without_requests_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found, seconds = await beaten(monkeypatch, set(), 90)
    first_rest = clock.slept.index(REST_S)
    assert 49 <= first_rest <= 51
    assert set(clock.slept[:first_rest]) == {BEAT_S}
    assert set(clock.slept[first_rest:]) == {REST_S}
    assert 4 <= len(seconds) <= 5, "what rides along still does so once a second"
    assert found.longest_ms == pytest.approx(0.0, abs=1e-6), "resting is no stall"


async def test_the_next_request_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, _, _ = await beaten(monkeypatch, {60}, 80)
    assert clock.slept[60] == REST_S
    assert set(clock.slept[61:]) == {BEAT_S}


async def test_it_does_not_rest_while_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, _, _ = await beaten(monkeypatch, set(range(0, 400, 30)), 400)
    assert set(clock.slept) == {BEAT_S}
