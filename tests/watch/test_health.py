"""The register of what is degraded: one truth for the banner, /readyz, stats, metrics and log."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from proxy.meaning import Meaning
from proxy.watch.health import REMEDIES, Health, Trouble, remedy_of

ROOT = Path(__file__).parents[2]


def test_a_part_stands_from_when_it_was_first_seen_until_it_is_sound(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    found: list[Trouble | None] = [None]
    health = Health(lambda: now[0])
    health.watch("store", lambda: found[0])
    assert (health.reasons(), health.told(), health.is_degraded("store")) == ({}, [], False)
    found[0] = Trouble("full", "no room")
    with caplog.at_level(logging.INFO):
        assert health.reasons() == {"store": "full"}
        now[0], found[0] = 105.0, Trouble("full", "still no room")
        (told,) = health.told()
        assert told == {
            "part": "store", "reason": "full", "since_ms": 100_000, "why": "still no room", "do": REMEDIES["full"],
        }  # fmt: skip
        assert health.is_degraded("store")
        found[0] = Trouble("down")
        assert health.told()[0]["since_ms"] == 105_000
        found[0] = None
        assert health.reasons() == {}
    assert not health.is_degraded("store")
    assert [record.getMessage() for record in caplog.records] == ["degraded", "degraded", "sound again"]


def test_every_reason_that_is_watched_says_what_to_do() -> None:
    source = (ROOT / "proxy" / "upkeep" / "troubles.py").read_text()
    words = set(re.findall(r'Trouble\("(\w+)"', source)) | set(re.findall(r'else "(\w+)"\)', source))
    assert len(words) >= 6
    assert words <= REMEDIES.keys()
    assert remedy_of("what nobody thought of") == "see the log"


async def test_meaning_is_loading_until_it_is_known_what_there_is() -> None:
    meaning = Meaning()
    assert (meaning.is_loading, meaning.reason, meaning.embedder, meaning.waiting) == (True, "loading", None, 0)
    meaning.close("embedder_down", "no model")
    await meaning.settled()
    assert (meaning.is_loading, meaning.reason, meaning.identity) == (False, "embedder_down", "")
