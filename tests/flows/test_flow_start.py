"""A start: never closed, never silent, nothing elsewhere, and clean to break off."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from index import batcher
from index.batcher import open_embedder
from proxy.commands.serve import banner
from proxy.upkeep import loading
from tests.flows.running import ROOT, Process, running, serving, until
from tests.upstream import ScriptedUpstream

PATIENCE_S = 1200.0
ASKED = "How do I reset the password of my account?"
OTHER = "Which bridge in Prague is the oldest one?"
STRANGERS = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


class Trap:
    """A proxy that takes every connection, remembers what it asked for, and refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readline()).decode("latin-1"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()


@pytest.fixture
async def trap() -> AsyncIterator[tuple[Trap, str]]:
    made = Trap()
    async with await asyncio.start_server(made.refuse, "127.0.0.1", 0) as server:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    place = Path(f"/proc/{pid}/status")
    return not place.exists() or "State:\tZ" in place.read_text()


async def log_says(served: Process, data_dir: Path, words: str) -> None:
    log = data_dir.with_suffix(".log")
    await until(lambda: words in log.read_text() or served.child.poll() is not None, PATIENCE_S)
    assert words in log.read_text()


async def test_a_first_start_asks_nobody_but_the_upstream_and_writes_only_in_its_directory(
    tmp_path: Path, up: ScriptedUpstream, trap: tuple[Trap, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing, conversion included, to a semantic hit and the end; with CI unset, which hides telemetry."""
    caught, address = trap
    home, data_dir = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    for name in ("CI", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "NO_PROXY", "no_proxy", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    env = {"HOME": str(home), "TMPDIR": str(tmp_path / "tmp"), **dict.fromkeys(STRANGERS, address)}
    (tmp_path / "tmp").mkdir()
    patient = {"embedding": {"deadline_ms": 5000}}
    async with serving(data_dir, up.url, patient, env=env, loaded=False) as served:
        first = await served.ask(ASKED)
        assert (first.status, first.cache, first.reason) == (200, "BYPASS", "loading")
        await served.ready()
        kept = "Which planet of the solar system has the most moons?"
        assert (await served.ask(kept)).cache == "MISS"
        async with asyncio.timeout(PATIENCE_S):
            while kept not in [entry["prompt"] for entry in await served.entries()]:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.02)
        again = await served.ask("Please tell me: which planet of the solar system has the most moons?")
        assert (again.cache, again.tier) == ("HIT", "semantic")
        served.child.send_signal(signal.SIGTERM)
        assert await served.stopped() == 0
    assert caught.asked == []
    assert list(home.rglob("*")) == []
    assert list((tmp_path / "tmp").rglob("*")) == []
    files = {path.relative_to(data_dir): stat.S_IMODE(path.lstat().st_mode) for path in data_dir.rglob("*")}
    wrong = {str(name): oct(mode) for name, mode in files.items() if mode not in (0o600, 0o700)}
    assert wrong == {}
    assert any(name.name == "model.onnx" for name in files)
    assert not [name for name in files if name.name.startswith((".tmp-", ".damaged-"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_a_first_start_that_is_broken_off_leaves_no_child(
    tmp_path: Path, up: ScriptedUpstream, number: signal.Signals
) -> None:
    data_dir = tmp_path / "data"
    async with serving(data_dir, up.url, loaded=False) as served:
        await log_says(served, data_dir, "converting the embedding model")
        await until(lambda: children_of(served.child.pid), PATIENCE_S)  # type: ignore[union-attr]
        converters = children_of(served.child.pid)  # type: ignore[union-attr]
        served.child.send_signal(number)
        assert await served.stopped() == (0 if number != signal.SIGKILL else -signal.SIGKILL)
        await until(lambda: all(map(is_gone, converters)))
    if number != signal.SIGKILL:
        assert [path.name for path in (data_dir / "models").glob(".tmp-*")] == []


async def test_meanwhile_exact_hits_are_served_and_what_needs_the_model_says_so(
    data_dir: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is held back by an event; everything else is the real thing."""
    may_open = asyncio.Event()

    async def held(*places: Any, **wanted: Any) -> Any:
        await may_open.wait()
        return await open_embedder(*places, **wanted)

    monkeypatch.setattr(loading, "open_embedder", held)
    async with running(data_dir, up.url, loaded=False) as ibid:
        first = await ibid.ask(ASKED)
        assert (first.status, first.cache, first.reason) == (200, "BYPASS", "loading")
        await ibid.settled()
        second = await ibid.ask(ASKED)
        assert (second.cache, second.tier) == ("HIT", "exact")
        async with ibid.session.get(ibid.admin_url + "/healthz") as response:
            assert response.status == 200
        async with ibid.session.get(ibid.admin_url + "/readyz") as response:
            state = await response.json()
            assert response.status == 503
        assert state["degraded"] == {"semantic": "loading"}
        assert set(state["loading"]) == {"about", "number", "of"}
        told = (await ibid.admin("GET", "/cache/stats"))["degraded"]
        assert [(one["part"], one["reason"]) for one in told] == [("semantic", "loading")]
        assert 'ibid_degraded{part="semantic"} 1.0' in await ibid.admin("GET", "/metrics")
        wrong = {"request_id": second.headers["x-request-id"], "verdict": "wrong"}
        assert (await ibid.admin("POST", "/cache/feedback", wrong))["quarantined"] is True
        explained = await ibid.admin(
            "POST", "/cache/explain", {"model": "m", "messages": [{"role": "user", "content": OTHER}]}
        )
        assert explained["reason"] == "loading"
        may_open.set()
        await ibid.app.settled()
        async with ibid.session.get(ibid.admin_url + "/readyz") as response:
            assert (response.status, await response.json()) == (200, {"ready": True, "degraded": {}})
        kept = "Which planet of the solar system has the most moons?"
        await ibid.fill(kept)
        reply = await ibid.ask("Please tell me: which planet of the solar system has the most moons?")
        assert (reply.cache, reply.tier) == ("HIT", "semantic")


WATCH_IMPORTS = """
import sys, threading

def heard(event, arguments):
    if event == "import":
        sys.stderr.write(f"imports {arguments[0]} on {threading.current_thread().name}\\n")

sys.addaudithook(heard)
"""


async def test_answering_imports_nothing(tmp_path: Path, data_dir: Path, up: ScriptedUpstream) -> None:
    """An import on the loop's thread stops every request, longest where another thread is at the same module."""
    (tmp_path / "sitecustomize.py").write_text(WATCH_IMPORTS)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    async with serving(data_dir, up.url, env=env, loaded=False) as served:
        first = await served.ask(ASKED)
        assert (first.status, first.reason) == (200, "loading")
        assert (await served.ask(ASKED, stream=True)).status == 200
        assert (await served.ask(OTHER, temperature="hot")).status == 400
        assert (await served.embed([ASKED, OTHER])).status == 200
        for path in ("/cache/stats", "/metrics", "/cache/entries", "/savings"):
            await served.admin("GET", path)
        log = data_dir.with_suffix(".log").read_text()
    started, answering = log.split("ibid serves", 1)
    assert "imports proxy.app on MainThread" in started
    assert re.findall("imports (.*) on MainThread", answering) == []


async def test_leaving_while_it_loads_waits_for_nothing(
    data_dir: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(loading, "open_embedder", never)
    async with running(data_dir, up.url, loaded=False) as ibid:
        assert (await ibid.ask(ASKED)).reason == "loading"
    assert not [thread.name for thread in threading.enumerate() if thread.name == "ibid-embedder"]
    assert not (data_dir / "index.snapshot").exists()


async def test_what_serves_less_well_than_configured_is_told_everywhere(
    data_dir: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that does not convert is served by torch, which gives no states to the pair guard."""

    class Torch:
        """The converted model under the name that torch would have."""

        states = ()

        def __init__(self, backend: Any) -> None:
            self._backend = backend
            self.identity = backend.identity.replace(":onnx:", ":torch:")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._backend, name)

    load = batcher.load_backend

    async def fall_back(*places: Any, **wanted: Any) -> Any:
        return Torch(await load(*places, **wanted))

    monkeypatch.setattr(batcher, "load_backend", fall_back)
    async with running(data_dir, up.url) as ibid:
        wanted = {"model": "torch_fallback", "pair_guard": "no_pair_guard"}
        async with ibid.session.get(ibid.admin_url + "/readyz") as response:
            assert (response.status, (await response.json())["degraded"]) == (200, wanted)
        told = (await ibid.admin("GET", "/cache/stats"))["degraded"]
        assert {one["part"]: one["reason"] for one in told} == wanted
        assert all(one["do"] and one["since_ms"] for one in told)
        metrics = await ibid.admin("GET", "/metrics")
        assert 'ibid_degraded{part="pair_guard"} 1.0' in metrics
        assert 'ibid_degraded{part="store"} 0.0' in metrics
        assert "degraded      pair_guard: no_pair_guard" in banner(ibid.app)
        assert "no_pair_guard" in {getattr(record, "reason", "") for record in caplog.records}


async def test_models_without_a_price_and_a_database_that_is_gone_are_told(exact: Any, up: ScriptedUpstream) -> None:
    await exact.ask("What does this cost?", model="nobody-has-priced-this")
    await exact.settled()
    await exact.app.store.ledger.flush()
    database = exact.app.store.database.path
    (part,) = (await exact.admin("GET", "/cache/stats"))["degraded"]
    assert (part["part"], part["reason"], part["why"]) == ("prices", "unpriced", "openai/nobody-has-priced-this")
    assert "ibid_unpriced_models 1.0" in await exact.admin("GET", "/metrics")
    aside = database.with_suffix(".aside")
    os.rename(database, aside)
    try:
        async with exact.session.get(exact.admin_url + "/readyz") as response:
            assert (await response.json())["degraded"] == {"store": "gone", "prices": "unpriced"}
    finally:
        os.rename(aside, database)
    async with exact.session.get(exact.admin_url + "/readyz") as response:
        assert (await response.json())["degraded"] == {"prices": "unpriced"}
