"""The embedder's owner, driven by a scripted model on its real thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from index import batcher
from index.batcher import EmbedderOwner
from index.errors import EmbedderFault, EmbedderLate, ModelFault, Overloaded, TextTooLong
from index.guard.head import MAX_TOKENS, NO_OPINION, Guard, Head
from tests.waiting import PATIENCE_S


class Scripted:
    """A backend whose token is a word; `gate` holds calls, `spoil` changes what they return."""

    identity = "scripted:test:60"
    dimension = 8
    window = 60
    states = (0, 1)

    def __init__(self, batch_limit: int = 8) -> None:
        self.batch_limit = batch_limit
        self.calls: list[int] = []
        self.encoded: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.spoil: Callable[[np.ndarray], np.ndarray] | None = None
        self.hang_in_tokens = False
        self.threads: set[str] = set()

    def tokens(self, text: str) -> list[int]:
        if self.hang_in_tokens:
            self.entered.set()
            self.gate.wait(PATIENCE_S)
        ids = [sum(word.encode()) for word in text.split()]
        if len(ids) > self.window:
            raise TextTooLong("too many words")
        return ids

    def encode_tokens(self, rows: Sequence[list[int]]) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        self.calls.append(len(rows))
        self.encoded.extend(tuple(row) for row in rows)
        self.entered.set()
        self.gate.wait(PATIENCE_S)
        vectors = np.zeros((len(rows), self.dimension), dtype=np.float32)
        for vector, row in zip(vectors, rows, strict=True):
            vector[sum(row) % self.dimension] = 1.0
        return self.spoil(vectors) if self.spoil else vectors

    def encode_states(self, rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        vectors = self.encode_tokens(rows)
        states = np.zeros((len(rows), len(rows[0]) - 2, 2, self.dimension), np.float16)
        for state, row in zip(states, rows, strict=True):
            angles = np.array(row[1:-1])[:, None] % 97
            state[:, :, 0], state[:, :, 1] = np.cos(angles), np.sin(angles)
        return vectors, states

    def encode(self, text: str) -> np.ndarray:
        return self.encode_tokens([self.tokens(text)])[0]

    def hold(self) -> None:
        self.entered.clear()
        self.gate.clear()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, PATIENCE_S)

    def saw(self, text: str) -> int:
        return self.encoded.count(tuple(sum(word.encode()) for word in text.split()))


class Comparing(Guard):
    """A guard to which texts are the same whose states are; `spoil` is raised by every judgement."""

    spoil: BaseException | None = None

    def __init__(self) -> None:
        super().__init__(Head("", (0, 1), {}))

    def judge(self, asked: np.ndarray | None, kept: Sequence[np.ndarray | None]) -> list[float]:
        if type(self).spoil is not None:
            raise type(self).spoil
        if asked is None:
            return [NO_OPINION] * len(kept)
        return [NO_OPINION if one is None else 1.0 if np.array_equal(asked, one) else -1.0 for one in kept]


@asynccontextmanager
async def running(backend: Scripted, **settings: Any) -> AsyncIterator[EmbedderOwner]:
    settings = {"encode_deadline_s": PATIENCE_S, "queue_deadline_s": PATIENCE_S} | settings
    owner = EmbedderOwner(backend, **settings)
    await owner.start()
    backend.calls.clear()
    backend.encoded.clear()
    backend.entered.clear()
    try:
        yield owner
    finally:
        backend.gate.set()
        await owner.close()


async def settle() -> None:
    """Let tasks that were just made run up to their first wait."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_model_is_warm_before_start_returns_and_runs_on_its_own_thread() -> None:
    backend = Scripted()
    owner = EmbedderOwner(backend)
    assert not owner.is_ready
    await owner.start()
    assert owner.is_ready
    assert len(backend.encoded) == len(batcher.WARM_UP)
    assert backend.threads == {"ibid-embedder"}
    assert (owner.embedded, owner.lru_hits, owner.queue_length) == (0, 0, 0)
    await owner.close()
    assert not owner.is_ready


async def test_a_vector_is_read_only_and_of_unit_length() -> None:
    async with running(Scripted()) as owner:
        vector = await owner.embed("one two")
        assert vector.shape == (8,)
        assert vector.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 2.0


async def test_identical_texts_in_flight_are_embedded_once() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.embed("same words")) for _ in range(50)]
        await backend.reached()
        assert owner.queue_length == 1
        backend.gate.set()
        vectors = await asyncio.gather(*asking)
        assert backend.saw("same words") == 1
        assert all(vector is vectors[0] for vector in vectors)
        assert owner.joined == 49


async def test_a_text_seen_before_is_answered_without_the_model() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        first = await owner.embed("seen before")
        backend.hold()
        assert await owner.embed("seen before") is first
        assert (owner.embedded, owner.lru_hits) == (1, 1)


async def test_the_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    backend = Scripted()
    async with running(backend, lru=2) as owner:
        for text in ("alpha", "beta", "alpha", "gamma", "alpha", "beta"):
            await owner.embed(text)
        assert (backend.saw("alpha"), backend.saw("beta"), backend.saw("gamma")) == (1, 2, 1)


async def test_the_memory_holds_no_text() -> None:
    async with running(Scripted()) as owner:
        await owner.embed("confidential words")
        assert "confidential" not in repr(owner._known)
        assert all(isinstance(digest, bytes) and len(digest) == 16 for digest in owner._known)


async def test_a_full_queue_refuses_at_once_and_grows_no_further() -> None:
    backend = Scripted()
    async with running(backend, queue=3) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.embed(f"text {n}")) for n in range(3)]
        await backend.reached()
        for n in range(1000):
            with pytest.raises(Overloaded):
                await owner.embed(f"other {n}")
        assert owner.queue_length == 3
        assert owner.overloaded == 1000
        backend.gate.set()
        assert len(await asyncio.gather(*asking)) == 3


async def test_one_tenants_flood_neither_fills_the_queue_for_another_nor_goes_before_it() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, queue=16) as owner:
        backend.hold()
        flood = [asyncio.create_task(owner.embed(f"flood {i}", "loud")) for i in range(40)]
        await backend.reached()
        await settle()
        assert owner.queue_length == 16
        others = [asyncio.create_task(owner.embed(f"one {i}", f"quiet {i}")) for i in range(5)]
        await settle()
        assert owner.queue_length == 16
        backend.gate.set()
        assert all(len(vector) == 8 for vector in await asyncio.gather(*others))
        done = await asyncio.gather(*flood, return_exceptions=True)
        assert [isinstance(one, Overloaded) for one in done] == [False] * 11 + [True] * 29  # the newest gave way
        order = [sum(word.encode()) for word in ("flood", "one")]
        assert [row[0] for row in backend.encoded[:7]] == [order[0]] * 2 + [order[1]] * 5


async def test_a_caller_that_left_is_not_encoded_for_and_frees_its_place() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, queue=2) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("first"))
        await backend.reached()
        leaver = asyncio.create_task(owner.embed("leaver"))
        await settle()
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert owner.queue_length == 1
        third = asyncio.create_task(owner.embed("third"))
        backend.gate.set()
        await asyncio.gather(first, third)
        assert backend.saw("leaver") == 0


async def test_one_caller_leaving_does_not_disturb_another_with_the_same_text() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("first"))
        await backend.reached()
        leaver, stayer = (asyncio.create_task(owner.embed("shared")) for _ in range(2))
        await settle()
        leaver.cancel()
        backend.gate.set()
        assert (await stayer).shape == (8,)
        await first
        assert leaver.cancelled()


async def test_a_hung_model_fails_its_callers_refuses_new_ones_and_is_believed_again_when_it_returns() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, encode_deadline_s=0.05) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.embed(text)) for text in ("hanging", "behind it")]
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(result) for result in results] == [EmbedderLate, EmbedderLate]
        assert not owner.is_ready
        with pytest.raises(EmbedderFault):
            await owner.embed("new text")
        assert owner.queue_length == 0
        returned = asyncio.Event()
        owner._answer = lambda *args: (EmbedderOwner._answer(owner, *args), returned.set())  # type: ignore[method-assign]
        backend.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            await returned.wait()
        assert owner.is_ready
        assert backend.saw("behind it") == 0
        await owner.embed("hanging")
        assert backend.saw("hanging") == 1, "the late vector was remembered"
        assert owner.faults == 1


async def test_a_tokenizer_that_hangs_is_treated_like_a_model_that_hangs() -> None:
    backend = Scripted()
    async with running(backend, encode_deadline_s=0.05) as owner:
        backend.hold()
        backend.hang_in_tokens = True
        with pytest.raises(EmbedderFault):
            await owner.embed("some text")
        returned = asyncio.Event()
        owner._returned = lambda: (EmbedderOwner._returned(owner), returned.set())  # type: ignore[method-assign]
        backend.gate.set()
        backend.hang_in_tokens = False
        async with asyncio.timeout(PATIENCE_S):
            await returned.wait()
        owner._encode_deadline_s = PATIENCE_S
        assert (await owner.embed("some text")).shape == (8,)


async def test_waiting_too_long_for_a_turn_is_overload_not_a_fault() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("first"))
        await backend.reached()
        owner._disarm()
        owner._queue_deadline_s = 0.02
        with pytest.raises(Overloaded):
            await owner.embed("second")
        backend.gate.set()
        assert (await first).shape == (8,)
        assert (owner.overloaded, owner.faults) == (1, 0)


async def test_a_long_call_does_not_put_off_the_deadline_of_those_behind_it() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("first"))
        await backend.reached()
        owner._queue_deadline_s = 0.02
        (encoding,) = owner._jobs.values()
        encoding.asked_s -= 1.0  # it has been in the model for longer than the queue deadline
        owner._disarm()
        owner._check()
        async with asyncio.timeout(PATIENCE_S / 2):
            with pytest.raises(Overloaded):
                await owner.embed("second")
        backend.gate.set()
        assert (await first).shape == (8,)


async def test_warm_up_leaves_the_usual_deadlines_in_force() -> None:
    owner = EmbedderOwner(Scripted(), encode_deadline_s=0.05, queue_deadline_s=0.5)
    await owner.start()
    assert owner._watch is None
    assert (owner._encode_deadline_s, owner._queue_deadline_s) == (0.05, 0.5)
    await owner.close()


async def test_close_does_not_wait_for_a_model_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batcher, "CLOSE_S", 0.02)
    backend = Scripted()
    async with running(backend) as owner:
        backend.hold()
        asking = asyncio.create_task(owner.embed("hanging"))
        await backend.reached()
        with caplog.at_level(logging.WARNING, logger="index.batcher"):
            async with asyncio.timeout(PATIENCE_S):
                await owner.close()
        with pytest.raises(EmbedderFault):
            await asking
        assert "left behind" in caplog.text
        with pytest.raises(EmbedderFault):
            await owner.embed("after closing")


async def test_close_ends_the_thread_and_may_be_called_twice() -> None:
    async with running(Scripted()) as owner:
        await owner.close()
        await owner.close()
        owner._thread.join(PATIENCE_S)
        assert not owner._thread.is_alive()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda v: v * np.float32("nan"), id="NaN"),
        pytest.param(lambda v: v * np.float32("inf"), id="infinite"),
        pytest.param(lambda v: v * np.float32(0), id="zero"),
        pytest.param(lambda v: v * np.float32(1.01), id="not of unit length"),
        pytest.param(lambda v: v[:, :4], id="another dimension"),
        pytest.param(lambda v: v[0], id="one row short of a matrix"),
        pytest.param(lambda v: v.astype(np.float64), id="another type"),
        pytest.param(lambda v: [][1], id="raises"),
        pytest.param(lambda v: v + "x", id="raises a type error"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
async def test_a_bad_vector_is_a_fault_is_not_remembered_and_the_thread_lives_on(spoil: Any) -> None:
    backend = Scripted()
    async with running(backend) as owner:
        backend.spoil = spoil
        with pytest.raises(EmbedderFault):
            await owner.embed("some text")
        backend.spoil = None
        assert (await owner.embed("some text")).shape == (8,)
        assert (owner.faults, owner.embedded, owner.queue_length) == (1, 1, 0)


async def test_a_thread_that_dies_of_a_bug_fails_its_callers_and_all_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bug(BaseException):
        pass

    def die(vectors: np.ndarray) -> np.ndarray:
        raise Bug

    monkeypatch.setattr(threading, "excepthook", lambda report: None)
    backend = Scripted()
    async with running(backend) as owner:
        backend.spoil = die
        with pytest.raises(EmbedderFault):
            await owner.embed("some text")
        owner._thread.join(PATIENCE_S)
        with pytest.raises(EmbedderFault):
            await owner.embed("some text")
        assert not owner.is_ready


async def test_texts_of_equal_length_share_a_call_and_others_never_do() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.embed("the first"))]
        await backend.reached()
        asking += [asyncio.create_task(owner.embed(text)) for text in ("a b c", "d", "e f g", "h", "i j k")]
        await settle()
        backend.gate.set()
        await asyncio.gather(*asking)
        assert backend.calls == [1, 3, 2]


async def test_a_call_takes_no_more_tokens_than_fit_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "CALL_TOKENS", 6)
    backend = Scripted()
    async with running(backend) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.embed("first"))]
        await backend.reached()
        asking += [asyncio.create_task(owner.embed(f"a b {n}")) for n in range(4)]
        asking += [asyncio.create_task(owner.embed("one two three four five six seven eight"))]
        await settle()
        backend.gate.set()
        await asyncio.gather(*asking)
        assert backend.calls == [1, 2, 2, 1]


async def test_a_backend_that_must_work_alone_gets_one_text_at_a_time() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend) as owner:
        await asyncio.gather(*(owner.embed(f"text {n}") for n in range(20)))
        assert backend.calls == [1] * 20


async def test_each_caller_gets_the_vector_of_its_own_text() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        texts = [f"{'w ' * (n % 5)}{chr(97 + n % 26)}{n}" for n in range(60)]
        vectors = await asyncio.gather(*(owner.embed(text) for text in texts))
        for text, vector in zip(texts, vectors, strict=True):
            assert np.array_equal(vector, backend.encode(text))


async def test_a_text_beyond_the_window_is_refused_without_the_model() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        with pytest.raises(TextTooLong):
            await owner.embed("w " * 61)
        with pytest.raises(TextTooLong):
            await owner.embed("w" * 100_000)
        assert backend.calls == []
        assert (owner.too_long, owner.faults, owner.queue_length) == (2, 0, 0)


async def test_a_lone_surrogate_is_a_fault_of_that_text_only() -> None:
    async with running(Scripted()) as owner:
        with pytest.raises(EmbedderFault):
            await owner.embed("bad \ud800 text")
        assert owner.is_ready


async def test_a_model_that_does_not_convert_is_served_by_torch_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    async def refuse(*args: object) -> None:
        raise ModelFault("it has a layer without a twin")

    monkeypatch.setattr(batcher, "converted", refuse)
    monkeypatch.setattr(batcher, "TorchBackend", lambda files, threads: Scripted())
    with caplog.at_level(logging.WARNING, logger="index.batcher"):
        owner = await batcher.open_embedder(tmp_path)
    assert owner.identity == Scripted.identity
    assert "without a twin" in caplog.text
    await owner.close()


async def test_an_unknown_backend_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ModelFault, match="tensorrt"):
        await batcher.open_embedder(tmp_path, backend="tensorrt")


# Verifying.

ASKED = "<s> how tall is the tower </s>"  # the first and last token of a text have no states
ALIKE = "<q> how tall is the tower </q>"
OTHER = "<s> how wide is the tower </s>"


async def test_each_stored_text_is_judged_against_the_asked_one_on_the_owners_thread() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        assert owner.can_verify
        assert await owner.verify(ASKED, [ALIKE, OTHER, ASKED]) == [1.0, -1.0, 1.0]
        assert await owner.verify(OTHER, [ALIKE]) == [-1.0]
        assert backend.threads == {"ibid-embedder"}
        assert (owner.verified, owner.queue_length, owner.faults) == (4, 0, 0)


async def test_without_a_guard_nothing_is_verified_and_no_states_are_made() -> None:
    backend = Scripted()
    async with running(backend) as owner:
        assert not owner.can_verify
        with pytest.raises(EmbedderFault):
            await owner.verify(ASKED, [ALIKE])
        await owner.embed(ASKED)
        assert owner._states.held_bytes == 0


@pytest.mark.parametrize("count", [0, 4])
async def test_one_to_three_texts_are_verified(count: int) -> None:
    async with running(Scripted(), guard=Comparing()) as owner:
        with pytest.raises(ValueError, match=str(count)):
            await owner.verify(ASKED, [ALIKE] * count)


async def test_a_text_that_was_embedded_or_verified_is_not_encoded_again() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        await owner.embed(ASKED)
        await owner.verify(ASKED, [ALIKE, OTHER])
        await owner.verify(ASKED, [OTHER])
        assert [backend.saw(text) for text in (ASKED, ALIKE, OTHER)] == [1, 1, 1]
        assert owner.states_made == 2


async def test_states_are_kept_up_to_their_bytes_and_the_least_recently_used_leave() -> None:
    backend = Scripted()
    one = 5 * 2 * (8 + 4)  # tokens, layers, a byte for each of the dimensions and a scale
    async with running(backend, guard=Comparing(), states_bytes=2 * one) as owner:
        await owner.verify(ASKED, [ALIKE])
        await owner.verify(ASKED, [OTHER])
        await owner.verify(ASKED, [ALIKE])
        assert [backend.saw(text) for text in (ASKED, ALIKE, OTHER)] == [1, 2, 1]
        assert owner._states.held_bytes == 2 * one
    async with running(backend, guard=Comparing(), states_bytes=0) as owner:
        assert await owner.verify(ASKED, [ASKED]) == [1.0]
        assert owner._states.held_bytes == 0


async def test_what_one_tenant_asked_is_encoded_again_for_another() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        await owner.verify(ASKED, [ALIKE], "one")
        await owner.verify(ASKED, [ALIKE], "other")
        assert [backend.saw(text) for text in (ASKED, ALIKE)] == [2, 2]


@pytest.mark.parametrize("strange", ["w " * (MAX_TOKENS + 3), "w " * 70, "w" * 100_000, "", "<s> </s>"])
async def test_on_a_text_that_is_too_long_or_empty_there_is_no_opinion_and_the_model_is_not_asked(strange: str) -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        assert await owner.verify(ASKED, [strange, OTHER]) == [NO_OPINION, -1.0]
        assert await owner.verify(strange, [ASKED]) == [NO_OPINION]
        assert len(backend.encoded) == 2
        await owner.verify(ASKED, ["w " * (MAX_TOKENS + 2)])
        assert owner.faults == 0


async def test_the_same_verification_in_flight_is_done_once() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        backend.hold()
        asking = [asyncio.create_task(owner.verify(ASKED, [ALIKE, OTHER])) for _ in range(20)]
        await backend.reached()
        assert owner.queue_length == 1
        backend.gate.set()
        results = await asyncio.gather(*asking)
        assert results == [[1.0, -1.0]] * 20
        results[0].clear()
        assert results[1] == [1.0, -1.0]
        assert (owner.verified, owner.joined) == (2, 19)


async def test_a_verification_waits_its_turn_among_the_texts() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, guard=Comparing(), queue=3) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("<s> first </s>"))
        await backend.reached()
        order: list[str] = []
        verifying = asyncio.create_task(owner.verify(ASKED, [ALIKE]))
        verifying.add_done_callback(lambda task: order.append("verified"))
        await settle()
        last = asyncio.create_task(owner.embed("<s> last </s>"))
        last.add_done_callback(lambda task: order.append("embedded"))
        await settle()
        with pytest.raises(Overloaded):
            await owner.verify(ASKED, [OTHER])
        backend.gate.set()
        await asyncio.gather(first, verifying, last)
        assert order == ["verified", "embedded"]


async def test_a_verification_nobody_waits_for_is_not_done() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, guard=Comparing()) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("<s> first </s>"))
        await backend.reached()
        leaver = asyncio.create_task(owner.verify(ASKED, [ALIKE]))
        await settle()
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert owner.queue_length == 1
        backend.gate.set()
        await first
        assert backend.saw(ASKED) == 0


async def test_a_verification_that_waits_too_long_is_overload_and_one_that_hangs_a_fault() -> None:
    backend = Scripted(batch_limit=1)
    async with running(backend, guard=Comparing()) as owner:
        backend.hold()
        first = asyncio.create_task(owner.embed("<s> first </s>"))
        await backend.reached()
        owner._disarm()
        owner._queue_deadline_s = 0.02
        with pytest.raises(Overloaded):
            await owner.verify(ASKED, [ALIKE])
        backend.gate.set()
        await first
    async with running(backend, guard=Comparing(), encode_deadline_s=0.05) as owner:
        backend.hold()
        with pytest.raises(EmbedderFault):
            await owner.verify(ASKED, [ALIKE])
        assert not owner.is_ready


async def test_a_guard_that_fails_is_a_fault_and_the_thread_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        for trouble in (ValueError("shapes"), EmbedderFault("the model")):
            monkeypatch.setattr(Comparing, "spoil", trouble)
            with pytest.raises(EmbedderFault):
                await owner.verify(ASKED, [ALIKE])
        monkeypatch.setattr(Comparing, "spoil", None)
        assert await owner.verify(ASKED, [ALIKE]) == [1.0]
        assert owner.faults == 2


async def test_a_bad_vector_of_a_verified_text_is_a_fault_and_its_states_are_not_kept() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        backend.spoil = lambda vectors: vectors * np.float32("nan")
        with pytest.raises(EmbedderFault):
            await owner.verify(ASKED, [ALIKE])
        backend.spoil = None
        assert await owner.verify(ASKED, [ALIKE]) == [1.0]


async def test_closing_fails_a_verification_in_flight() -> None:
    backend = Scripted()
    async with running(backend, guard=Comparing()) as owner:
        backend.hold()
        verifying = asyncio.create_task(owner.verify(ASKED, [ALIKE]))
        await backend.reached()
        closing = asyncio.create_task(owner.close())
        with pytest.raises(EmbedderFault):
            await verifying
        backend.gate.set()
        await closing
        with pytest.raises(EmbedderFault):
            await owner.verify(ASKED, [ALIKE])
