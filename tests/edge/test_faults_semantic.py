"""Fault catalogue, meaning: model, vectors and snapshot may fail in any way; only hits are lost, never correctness."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.batcher import EmbedderOwner
from index.errors import ModelFault, TextTooLong
from proxy.core.allowance import Allowance
from proxy.core.errors import ConfigError
from proxy.upkeep import loading
from tests.edge.faults_app import UNHURRIED, Running, ibid, question, serving, until, up
from tests.upstream import ScriptedUpstream
from tests.waiting import PATIENCE_S

__all__ = ["ibid", "up"]  # fixtures

ASKED = "How does one reset the password of a home router?"
REWORDED = "How does one reset the password, of a home router?"  # the same words: the same vector and token classes
OTHER = "Which bridge in Prague is the oldest one?"
SNAPSHOT = Path("data") / "index.snapshot"


class ScriptedModel:
    """A backend: the same words, the same vector. `gate` holds calls, `spoil` changes what they return."""

    window = 32
    states: tuple[int, ...] = ()  # it gives none of tokens
    batch_limit = 8

    def __init__(self, identity: str = "scripted:one:32", dimension: int = 64) -> None:
        self.identity = identity
        self.dimension = dimension
        self.gate = threading.Event()
        self.gate.set()
        self.spoil: Callable[[np.ndarray], np.ndarray] | None = None
        self.calls = 0

    def tokens(self, text: str) -> list[int]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        if len(words) > self.window:
            raise TextTooLong("too many words")
        return [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little") for word in words]

    def encode_tokens(self, rows: Sequence[list[int]]) -> np.ndarray:
        self.calls += 1
        self.gate.wait(PATIENCE_S)
        vectors = np.zeros((len(rows), self.dimension), np.float32)
        for vector, row in zip(vectors, rows, strict=True):
            for token in row:
                vector[token % self.dimension] += 1.0
            vector /= max(float(np.linalg.norm(vector)), 1e-9)
        return self.spoil(vectors) if self.spoil else vectors

    def encode(self, text: str) -> np.ndarray:
        return self.encode_tokens([self.tokens(text)])[0]


def same_for_all(vectors: np.ndarray) -> np.ndarray:
    """The worst embedder there is: everything is alike."""
    vectors[:] = 0
    vectors[:, 0] = 1
    return vectors


UNGUARDED = "[cache]\naudit_share = 0\npair_guard = false"  # a scripted model has none


@contextlib.asynccontextmanager
async def semantic(folder: Path, up: ScriptedUpstream, model: ScriptedModel, toml: str = "") -> AsyncIterator[Running]:
    """A whole ibid whose model is scripted; its owner, thread, deadlines, index and gate are the real ones."""

    async def needs_no_conversion(*_: object, **__: object) -> bool:
        return False

    async def open_scripted(_data_dir: Path, **wanted: Any) -> EmbedderOwner:
        for name in ("model", "backend", "threads", "guarded"):
            del wanted[name]
        owner = EmbedderOwner(model, **wanted)
        await owner.start()
        return owner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "open_embedder", open_scripted)
        patch.setattr(loading, "needs_conversion", needs_no_conversion)
        toml = toml if "[cache]" in toml else toml + "\n[cache]\n"
        async with serving(folder, up, toml.replace("[cache]", UNGUARDED)) as running:
            try:
                yield running
            finally:
                model.gate.set()


async def vectors_kept(ibid: Running) -> int:
    await ibid.settled()
    ((count,),) = await ibid.app.store.database.rows("SELECT count(*) FROM entry WHERE embedding IS NOT NULL")
    return int(count)


async def kept(ibid: Running, *texts: str) -> None:
    for text in texts:
        await ibid.ask(question(text))
    await ibid.settled()
    await ibid.pipeline.index.ids()  # type: ignore[union-attr]  # its owner has taken them in


async def test_reworded_is_a_hit_when_nothing_fails(tmp_path: Path, up: ScriptedUpstream) -> None:
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED, OTHER)
        reply = await ibid.ask(question(REWORDED))
        assert reply.is_hit
        assert reply.headers["x-cache-tier"] == "semantic"
        assert reply.text.endswith(ASKED)


# --- model ----------------------------------------------------------------------------------------------------------


def broken_folder(folder: Path) -> str:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"rubbish")
    return str(model)


@pytest.mark.parametrize("name", ["missing", "broken", "not here, and no network"])
async def test_without_a_model_it_starts_and_serves_exact_hits(tmp_path: Path, up: ScriptedUpstream, name: str) -> None:
    model = {"missing": "/nowhere/model", "broken": "", "not here, and no network": "some/other-model"}[name]
    model = model or broken_folder(tmp_path)
    async with serving(tmp_path, up, f"[embedding]\nmodel = {json.dumps(model)}\n") as ibid:
        first = await ibid.ask(question(ASKED))
        assert (first.status, first.headers["x-cache"], first.headers["x-cache-reason"]) == (
            200, "BYPASS", "embedder_down",
        )  # fmt: skip
        await ibid.settled()
        assert (await ibid.ask(question(ASKED))).is_hit
        assert not (await ibid.ask(question(REWORDED))).is_hit
        ready = await ibid.admin("/readyz")
        assert (ready.status, json.loads(ready.body)["degraded"]) == (200, {"semantic": "embedder_down"})


async def test_without_a_model_that_is_required_it_does_not_start(tmp_path: Path, up: ScriptedUpstream) -> None:
    with pytest.raises(ConfigError, match="semantic lookups are required"):
        async with serving(tmp_path, up, "[embedding]\nmodel = '/nowhere/model'\nrequire_semantic = true\n"):
            pass


async def test_a_model_that_cannot_warm_up_is_no_model(
    tmp_path: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object, **__: object) -> EmbedderOwner:
        raise ModelFault("the checksum does not match")

    monkeypatch.setattr(loading, "open_embedder", fails)
    async with serving(tmp_path, up, "") as ibid:
        assert (await ibid.ask()).headers["x-cache-reason"] == "embedder_down"


async def test_a_model_that_hangs_costs_its_deadline_once_and_is_believed_again(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    model = ScriptedModel()
    async with semantic(tmp_path, up, model, "[embedding]\ndeadline_ms = 1000\n") as ibid:
        embedder = ibid.pipeline.embedder
        assert isinstance(embedder, EmbedderOwner)
        await kept(ibid, ASKED)
        model.gate.clear()
        reply = await ibid.ask(question(OTHER))
        assert (reply.status, reply.headers["x-cache-reason"]) == (200, "embedder_late")
        assert "fwd=bypass" in reply.headers["cache-status"]
        assert "detail=embedder_late" in reply.headers["cache-status"]
        others = [await ibid.ask(question(f"{OTHER} And number {n}?")) for n in range(5)]
        assert {other.headers["x-cache-reason"] for other in others} == {"embedder_late"}
        assert embedder.faults == 1, "while it hangs nobody waits for it"
        assert (await ibid.ask(question(ASKED))).is_hit
        assert ibid.faults()["embedder_late"] >= 6
        assert await vectors_kept(ibid) == 1
        model.gate.set()
        await ibid.until_hit(question(REWORDED))


def raises(_vectors: np.ndarray) -> np.ndarray:
    raise RuntimeError("onnxruntime failed")


SPOILED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raises": raises,
    "NaN": lambda v: np.full_like(v, np.nan),
    "infinite": lambda v: np.full_like(v, np.inf),
    "zero": np.zeros_like,
    "not of unit length": lambda v: v * 3,
    "short": lambda v: v[:, :-1],
    "long": lambda v: np.concatenate([v, v], axis=1),
    "one row too few": lambda v: v[:-1],
    "nothing": lambda v: np.empty((0, 0), np.float32),
}


@pytest.mark.parametrize("name", SPOILED)
async def test_a_vector_that_is_none_reaches_neither_index_nor_sql(
    tmp_path: Path, up: ScriptedUpstream, name: str
) -> None:
    model = ScriptedModel()
    async with semantic(tmp_path, up, model) as ibid:
        await kept(ibid, ASKED)
        model.spoil = SPOILED[name]
        for stream in (False, True):
            reply = await ibid.ask(question(f"{OTHER} {'Yes' if stream else 'No'}?", stream=stream))
            assert (reply.status, reply.headers["x-cache-reason"]) == (200, "embedder_down")
        assert await vectors_kept(ibid) == 1
        assert ibid.pipeline.index.size == 1  # type: ignore[union-attr]
        assert (await ibid.ask(question(f"{OTHER} No?"))).is_hit, "kept for its exact wording"
        model.spoil = None
        assert (await ibid.ask(question(REWORDED))).is_hit


async def test_a_full_embedder_is_a_bypass_at_once(tmp_path: Path, up: ScriptedUpstream) -> None:
    model = ScriptedModel()
    toml = UNHURRIED + "queue = 3\n"
    async with semantic(tmp_path, up, model, toml) as ibid:
        embedder = ibid.pipeline.embedder
        assert isinstance(embedder, EmbedderOwner)
        model.gate.clear()
        asking = [asyncio.create_task(ibid.ask(question(f"Question number {n} of a crowd?"))) for n in range(60)]
        done: set[asyncio.Task[Any]] = set()
        async with asyncio.timeout(PATIENCE_S):
            while len(done) < 50:
                await asyncio.sleep(0.01)
                assert embedder.queue_length <= 3
                done = {task for task in asking if task.done()}
        assert {task.result().headers["x-cache-reason"] for task in done} == {"embedder_busy"}
        assert {task.result().status for task in done} == {200}
        model.gate.set()
        assert {reply.status for reply in await asyncio.gather(*asking)} == {200}
        assert ibid.faults() == {"embedder_busy": 57}, "the three that got in waited as long as a call may take"


def bearer(number: int) -> str:
    return f"Authorization: Bearer sk-{number}"


async def test_one_tenants_misses_do_not_keep_another_from_the_embedder(tmp_path: Path, up: ScriptedUpstream) -> None:
    model = ScriptedModel()
    async with semantic(tmp_path, up, model, "[embedding]\nqueue = 4\ndeadline_ms = 20000\n") as ibid:
        embedder, index = ibid.pipeline.embedder, ibid.pipeline.index
        assert isinstance(embedder, EmbedderOwner)
        assert index is not None
        await index.ids()  # its kernels are compiled
        embedder._queue_deadline_s, model.batch_limit = PATIENCE_S, 1
        model.gate.clear()
        flood = [asyncio.create_task(ibid.ask(question(f"Question number {n} of a flood?"))) for n in range(10)]
        await until(lambda: embedder.overloaded == 6)
        asked = [asyncio.create_task(ibid.ask(question(ASKED), credential=bearer(n))) for n in range(2)]
        await until(lambda: embedder.overloaded == 8)  # two of the flood gave way
        model.gate.set()
        assert {reply.headers["x-cache-reason"] for reply in await asyncio.gather(*asked)} == {"no_candidate"}
        await asyncio.wait(flood)


async def test_near_copies_beyond_the_keys_allowance_are_looked_up_exactly_only(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    near = [f"How does one reset the password of a home router number {n}?" for n in range(8)]
    toml = "[cache]\nsemantic_misses_per_min = 5\n"
    async with semantic(tmp_path, up, ScriptedModel(), toml) as ibid:
        assert ibid.pipeline.index is not None
        await ibid.pipeline.index.ids()  # its kernels are compiled
        ibid.pipeline.finder.misses = Allowance(5, named=1)  # as if thousands of keys were known already
        replies = [await ibid.ask(question(text)) for text in near]
        assert [reply.headers["x-cache-reason"] for reply in replies[5:]] == ["too_many_misses"] * 3
        assert "too_many_misses" not in {reply.headers["x-cache-reason"] for reply in replies[:5]}
        assert "x-cache-similarity" not in replies[5].headers
        await ibid.settled()
        assert (await ibid.ask(question(near[0]))).headers["x-cache-tier"] == "exact"
        for number in range(20):  # many another key does not make room for this one
            await ibid.ask(question(OTHER), credential=bearer(number))
        assert (await ibid.ask(question(ASKED))).headers["x-cache-reason"] == "too_many_misses"


async def test_an_index_that_died_is_a_bypass(tmp_path: Path, up: ScriptedUpstream) -> None:
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED)
        await asyncio.to_thread(ibid.pipeline.index.close)  # type: ignore[union-attr]
        reply = await ibid.ask(question(REWORDED))
        assert (reply.status, reply.headers["x-cache"], reply.headers["x-cache-reason"]) == (
            200,
            "BYPASS",
            "index_down",
        )
        assert (await ibid.ask(question(ASKED))).is_hit
        assert await ibid.stored() == 2, "answers are kept for their exact wording"


async def test_a_text_beyond_the_window_is_exact_only(tmp_path: Path, up: ScriptedUpstream) -> None:
    model = ScriptedModel()
    model.spoil = same_for_all
    async with semantic(tmp_path, up, model) as ibid:
        opening = "Please summarise the following report for me " + "word " * 40
        texts = [opening + ending for ending in ("and name the winner", "and name the loser")]
        for text in texts:
            reply = await ibid.ask(question(text))
            assert (reply.headers["x-cache"], reply.headers["x-cache-reason"]) == ("MISS", "too_long")
        assert await vectors_kept(ibid) == 0
        for text in texts:
            assert (await ibid.ask(question(text))).text.endswith(text)
        assert "too_long" not in ibid.faults(), "a property of the text, not a fault"


@pytest.mark.parametrize(
    "twin", ["ca\u200bf\u00e9", "\u202ecaf\u00e9\u202c", "c\u0430f\u00e9"], ids=["zero width", "bidi", "homoglyph"]
)
async def test_a_twin_in_disguise_is_never_matched_however_alike(
    tmp_path: Path, up: ScriptedUpstream, twin: str
) -> None:
    model = ScriptedModel()
    model.spoil = same_for_all
    async with semantic(tmp_path, up, model) as ibid:
        plain, disguised = "Is the caf\u00e9 near the river open", f"Is the {twin} near the river open"
        await kept(ibid, plain)
        calls = model.calls
        reply = await ibid.ask(question(disguised))
        assert not reply.is_hit
        assert reply.headers["x-cache-reason"] in ("invisible", "mixed_script")
        assert model.calls == calls, "not even embedded"
        await ibid.settled()
        assert (await ibid.ask(question(disguised))).text.endswith(disguised)


async def test_an_embedder_to_which_all_is_alike_is_stopped_by_the_guards(tmp_path: Path, up: ScriptedUpstream) -> None:
    model = ScriptedModel()
    model.spoil = same_for_all
    async with semantic(tmp_path, up, model) as ibid:
        await kept(ibid, "How many people lived in Berlin in 1990?")
        for other in (
            "How many people lived in Berlin in 1991?",
            "How many people lived in Vienna in 1990?",
            "How many people never lived in Berlin in 1990?",
        ):
            reply = await ibid.ask(question(other))
            assert not reply.is_hit, other
            assert reply.text.endswith(other)


# --- entries without a vector ---------------------------------------------------------------------------------------


async def progress(ibid: Running) -> dict[str, int]:
    found: dict[str, int] = json.loads((await ibid.admin("/cache/stats")).body)["reindex"]
    return found


async def found_by_meaning(ibid: Running, stored: str, reworded: str) -> None:
    reply = await ibid.ask(question(reworded))
    assert (reply.is_hit, reply.headers.get("x-cache-tier"), reply.text.endswith(stored)) == (True, "semantic", True)


LATE = [ASKED] + [f"What is the height of the mountain named number{n} of the northern range?" for n in range(24)]


async def test_what_was_stored_while_the_model_was_late_gets_its_vector_without_a_restart(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    model = ScriptedModel()
    async with semantic(tmp_path, up, model, "[embedding]\ndeadline_ms = 100\n") as ibid:
        model.gate.clear()
        for text in LATE:
            assert not (await ibid.ask(question(text))).is_hit
        assert await vectors_kept(ibid) == 0
        model.gate.set()
        index = ibid.pipeline.index
        assert index is not None
        await until(lambda: index.size == len(LATE))
        assert await vectors_kept(ibid) == len(LATE)
        await found_by_meaning(ibid, ASKED, REWORDED)
        assert (await progress(ibid))["failed"] == 0


async def test_what_has_no_vector_at_the_start_gets_one_and_what_cannot_have_one_stops_nothing(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    long = "What does all of this mean: " + " ".join(f"word{n}" for n in range(40))
    async with serving(tmp_path, up, "[cache]\nsemantic = false\n") as ibid:
        for text in (long, ASKED, OTHER):
            await ibid.ask(question(text))
        await ibid.settled()
    for _ in range(2):
        model = ScriptedModel()
        async with semantic(tmp_path, up, model) as ibid:
            index = ibid.pipeline.index
            assert index is not None
            await until(lambda: index.size == 2)  # noqa: B023
            await found_by_meaning(ibid, ASKED, REWORDED)
            assert await vectors_kept(ibid) == 2
            rows = await ibid.app.store.database.rows("SELECT count(*) FROM entry WHERE embedder IS NULL")
            assert rows[0][0] == 0, "too long is known of it, and not found out at every start"
            assert not (await progress(ibid))["running"]
            assert (await ibid.ask(question(long))).is_hit


async def test_a_text_on_which_the_model_fails_does_not_keep_others_waiting(
    tmp_path: Path, up: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.admin.reindex.REST_S", 0.0)
    model = ScriptedModel()
    encode = model.encode_tokens
    cursed = model.tokens("cursed")[0]

    def sometimes(rows: Sequence[list[int]]) -> np.ndarray:
        if any(cursed in row for row in rows):
            raise RuntimeError("not this one")
        return encode(rows)

    model.encode_tokens = sometimes  # type: ignore[method-assign]
    async with serving(tmp_path, up, "[cache]\nsemantic = false\n") as ibid:
        for text in ("Is this text of a question cursed or is it not?", ASKED):
            await ibid.ask(question(text))
        await ibid.settled()
    async with semantic(tmp_path, up, model) as ibid:
        index = ibid.pipeline.index
        assert index is not None
        await until(lambda: index.size == 1)
        await found_by_meaning(ibid, ASKED, REWORDED)
        reindex = ibid.app.semantic.reindex
        assert reindex is not None
        await until(lambda: not reindex.running)
        told = await progress(ibid)
        assert (told["done"], told["total"], told["failed"]) == (2, 2, 1)


# --- snapshot -------------------------------------------------------------------------------------------------------


def flip(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 0x40
    path.write_bytes(raw)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe_of_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]) and None,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more") and None,
    "a bit in the front": lambda path: flip(path, 0.05),
    "a bit in the vectors": lambda path: flip(path, 0.3),
    "a bit in the trailer": lambda path: flip(path, 0.9),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)) and None,
    "a folder": into_folder,
    "a dangling link": to_pipe_of_nothing,
    "mode 000": lambda path: path.chmod(0),
    "sound": lambda path: None,
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_damaged_snapshot_is_rebuilt_from_sql_and_never_believed(
    tmp_path: Path, up: ScriptedUpstream, name: str
) -> None:
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED, OTHER)
    snapshot = tmp_path / SNAPSHOT
    DAMAGE[name](snapshot)
    model = ScriptedModel()
    async with semantic(tmp_path, up, model) as ibid:
        calls = model.calls
        for text, owner in ((REWORDED, ASKED), (OTHER.rstrip("?"), OTHER)):
            reply = await ibid.ask(question(text))
            assert (reply.is_hit, reply.text.endswith(owner)) == (True, True)
        assert model.calls - calls <= 2, "rebuilt from vectors, not embedded again"
    if name not in ("deleted", "mode 000", "sound", "a dangling link"):
        assert snapshot.with_name(snapshot.name + ".bad").exists()


async def test_a_snapshot_of_another_embedder_or_dimension_is_not_compared(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED)
    for model in (ScriptedModel("scripted:two:32"), ScriptedModel("scripted:wide:32", dimension=128)):
        model.spoil = same_for_all
        async with semantic(tmp_path, up, model) as ibid:
            before = ibid.asked
            assert not (await ibid.ask(question(REWORDED + f" {model.dimension}"))).is_hit
            assert ibid.asked == before + 1
            assert (await ibid.ask(question(ASKED))).is_hit, "its exact wording needs no vector"
            assert ibid.pipeline.index.size <= 1  # type: ignore[union-attr]
            snapshot = tmp_path / SNAPSHOT
            bad = snapshot.with_name(snapshot.name + ".bad")
            assert bad.exists(), "kept for whoever wants to know why"
            bad.unlink()


async def test_a_snapshot_newer_than_sql_proposes_nothing_that_is_gone(tmp_path: Path, up: ScriptedUpstream) -> None:
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED, OTHER)
        path = ibid.app.store.database.path
        assert path is not None
    with sqlite3.connect(path, isolation_level="IMMEDIATE", timeout=PATIENCE_S) as connection:
        connection.execute("DELETE FROM entry WHERE prompt = ?", (ASKED,))
    connection.close()
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        assert ibid.pipeline.index.size == 1  # type: ignore[union-attr]
        before = ibid.asked
        reply = await ibid.ask(question(REWORDED))
        assert (reply.is_hit, ibid.asked) == (False, before + 1)
        assert (await ibid.ask(question(OTHER.rstrip("?")))).is_hit


async def test_a_snapshot_older_than_sql_is_completed(tmp_path: Path, up: ScriptedUpstream) -> None:
    snapshot = tmp_path / SNAPSHOT
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, ASKED)
    shutil.copy(snapshot, tmp_path / "older")
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        await kept(ibid, OTHER)
    shutil.copy(tmp_path / "older", snapshot)
    async with semantic(tmp_path, up, ScriptedModel()) as ibid:
        assert ibid.pipeline.index.size == 2  # type: ignore[union-attr]
        assert (await ibid.ask(question(OTHER.rstrip("?")))).text.endswith(OTHER)


async def test_a_row_that_goes_under_a_loaded_index_is_a_miss_and_its_vector_leaves(
    tmp_path: Path, up: ScriptedUpstream
) -> None:
    async with semantic(tmp_path, up, ScriptedModel(), "[cache]\nhot_bytes = 0\n") as ibid:
        await kept(ibid, ASKED, OTHER)
        assert (await ibid.ask(question(REWORDED))).is_hit
        path = ibid.app.store.database.path
        assert path is not None
        await ibid.settled()
        with sqlite3.connect(path, isolation_level="IMMEDIATE", timeout=PATIENCE_S) as connection:
            connection.execute("DELETE FROM entry WHERE prompt = ?", (ASKED,))
        connection.close()
        before = ibid.asked
        reply = await ibid.ask(question(REWORDED + "!"))
        assert (reply.is_hit, ibid.asked) == (False, before + 1)
        await ibid.settled()
        assert set((await ibid.pipeline.index.ids()).tolist()) == {2, 3}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        "embedding = (SELECT embedding FROM entry WHERE id = 2)",
        "embedding = zeroblob(length(embedding))",
        "embedding = x'00'",
        "embedder = 'scripted:two:32'",
        "signature = zeroblob(length(signature))",
        "scope = zeroblob(32)",
        "prompt = 'Which bridge?'",
        "answer = (SELECT answer FROM entry WHERE id = 2)",
    ],
)
async def test_a_row_edited_under_a_loaded_index_never_answers(
    tmp_path: Path, up: ScriptedUpstream, change: str
) -> None:
    async with semantic(tmp_path, up, ScriptedModel(), "[cache]\nhot_bytes = 0\n") as ibid:
        await kept(ibid, ASKED, OTHER)
        path = ibid.app.store.database.path
        assert path is not None
        await ibid.settled()
        with sqlite3.connect(path, isolation_level="IMMEDIATE", timeout=PATIENCE_S) as connection:
            connection.execute(f"UPDATE entry SET {change} WHERE id = 1")
        connection.close()
        before = ibid.asked
        reply = await ibid.ask(question(REWORDED))
        assert (reply.status, reply.is_hit, ibid.asked) == (200, False, before + 1)
        assert reply.text.endswith(REWORDED)
