"""The embedder's owner: concurrent texts in, unit vectors out, one thread, bounded everywhere.

States of a text: known (in the LRU: answered on the loop) → in flight (one job, however many callers ask for it) →
answered, refused or abandoned. Tenants take turns (`index.turns`). The loop owns everything except `_waiting`, which
loop and owner thread share under `_turn`; the owner thread takes from it, encodes without the lock, and hands results
back with `call_soon_threadsafe`.

Two deadlines. `encode_deadline_s` bounds one call of the model: when it passes, every job fails with EmbedderLate and
new texts are refused at once until the call returns, after HANGS_S with EmbedderFault. `queue_deadline_s` bounds the
wait before a call begins: past it the text is refused as Overloaded. One loop timer watches both, armed only while jobs
are in flight. The vectors of a call that was given up on are still remembered when it returns.

Taking equal-length texts together, ONNX fp32, 256 QQP questions (mean 15.4 tokens), 1 thread, machine shared with other
work, 22 Nov 2026, texts/s against 124-132 one at a time: 4 waiting 136-141, 16 waiting 163-171, 64 waiting 180-186.
It pays, never pads, and is kept; a call takes at most CALL_TOKENS tokens, so that it stays inside its deadline. int8
and torch stay at one text a call.

A verification (`verify`), or a match of answers (`match`), is one more thing in flight: it waits in the same queue
under the same deadlines, and the owner thread judges it alone, after encoding those of its texts whose token states it
does not have. The thread keeps states of the texts it encoded, `states_bytes` of them: they come of the same run as the
vector.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, thread_time
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from index import tokens
from index.artefact import INT8, ONNX, artefact_directory, converted
from index.closeness import Closeness, closeness
from index.embedder import Backend, OnnxBackend, TokenStates, TorchBackend, Vector, identity_of
from index.errors import EmbedderFault, EmbedderLate, IndexRoomError, ModelFault, Overloaded, TextTooLong
from index.guard.head import MAX_KEPT, MAX_TOKENS, Guard, load_guard
from index.model import locate
from index.states import StatesKept, restored
from index.turns import Turns

log = logging.getLogger(__name__)

CALL_TOKENS = 128  # texts of equal length share a call up to this many tokens; a longer text goes alone
LOOK_AHEAD = 64  # waiting texts whose length the owner learns
CHARACTERS_PER_TOKEN = 64  # a text longer than this many per token of the window is too long without counting
UNIT_TOLERANCE = 1e-3
WARM_UP = ("ready", "How do I reset the password of my account, and how long does it take?")
WARM_UP_S = 60.0
QUEUE_DEADLINE_S = 1.0
CONVERT_TIMEOUT_S = 1800.0  # 20 s on a quiet machine, five minutes seen on a busy one; requests do not wait for it
HANGS_S = 10.0  # a call that takes longer is no longer late: the model hangs
CLOSE_S = 1.0
SPECIAL_TOKENS = 2  # the first and the last of a text, which have no place in its states
BACKEND_FAULTS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
BACKENDS = (ONNX, INT8, "torch")
STATES_BYTES = 64 << 20


class _Job:
    """One text in flight. `waiters` belong to the loop, `ids` to the owner thread."""

    __slots__ = ("asked_s", "digest", "ids", "tenant", "text", "waiters")

    def __init__(self, digest: bytes, tenant: str, text: str, asked_s: float) -> None:
        self.digest = digest
        self.tenant = tenant
        self.text = text
        self.asked_s = asked_s
        self.ids: list[int] | None = None
        self.waiters: list[asyncio.Future[Vector]] = []


class _Verification:
    """One asked text and those it is compared with, in flight; the asked one is first. `is_match`: two texts whose
    beginnings are matched, not judged."""

    __slots__ = ("asked_s", "digest", "is_match", "tenant", "texts", "waiters")

    def __init__(
        self, digest: bytes, tenant: str, texts: Sequence[tuple[bytes, str]], asked_s: float, *, is_match: bool = False
    ) -> None:
        self.digest = digest
        self.tenant = tenant
        self.texts = texts
        self.asked_s = asked_s
        self.is_match = is_match
        self.waiters: list[asyncio.Future[Any]] = []


def _digest(tenant: str, text: str) -> bytes:
    try:
        return hashlib.blake2b(f"{tenant}\0{text}".encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:
        raise EmbedderFault("the text holds a lone surrogate") from error


def _within(ids: Sequence[int]) -> bool:
    """Whether the guard may have an opinion on a text of these tokens."""
    return 0 < len(ids) - SPECIAL_TOKENS <= MAX_TOKENS


J = TypeVar("J", _Job, _Verification)


class EmbedderOwner:
    """Owns `backend` and the thread that runs it. Made and used on one loop; `start` before use, `close` after."""

    def __init__(
        self,
        backend: Backend,
        *,
        queue: int = 256,
        lru: int = 4096,
        encode_deadline_s: float = 0.150,
        queue_deadline_s: float = QUEUE_DEADLINE_S,
        guard: Guard | None = None,
        states_bytes: int = STATES_BYTES,
    ) -> None:
        self.identity = backend.identity
        self.dimension = backend.dimension
        self.window = backend.window
        self.embedded = 0  # texts that went through the model
        self.lru_hits = 0
        self.joined = 0  # callers that shared a text already in flight
        self.overloaded = 0
        self.too_long = 0
        self.faults = 0  # calls of the model that failed, hung or gave a bad vector
        self.verified = 0  # pairs of texts that the guard judged
        self.matching_s = 0.0  # processor time of `match`, of the owner's thread
        self.states_made = 0  # texts that were encoded for a verification
        self._backend = backend
        self._limit = queue
        self._lru_limit = lru
        self._encode_deadline_s = encode_deadline_s
        self._queue_deadline_s = queue_deadline_s
        self._guard = guard
        self._states = StatesKept(states_bytes)
        self._known: OrderedDict[bytes, Vector] = OrderedDict()
        self._jobs: dict[bytes, _Job | _Verification] = {}
        self._hung = False
        self._watch: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event = asyncio.Event()
        self._turn = threading.Condition()
        self._waiting: Turns[_Job | _Verification] = Turns()
        self._closing = False
        self._sheds = False  # set on the loop, taken by the owner thread
        self._busy_since: float | None = None  # written by the owner thread, read by the watch
        self._thread = threading.Thread(target=self._own, name="ibid-embedder", daemon=True)

    @property
    def queue_length(self) -> int:
        """Texts in flight: waiting and being encoded."""
        return len(self._jobs)

    @property
    def is_ready(self) -> bool:
        return self._loop is not None and not self._hung and not self._closing and self._thread.is_alive()

    @property
    def trouble(self) -> str:
        """The reason texts are refused with just now: "embedder_late", "embedder_down"; "" when they are not."""
        if self.is_ready:
            return ""
        return EmbedderLate.reason if self._is_late else EmbedderFault.reason

    @property
    def _is_late(self) -> bool:
        since = self._busy_since
        alive = self._hung and not self._closing and self._thread.is_alive()
        return alive and (since is None or monotonic() - since < HANGS_S)

    @property
    def can_verify(self) -> bool:
        """Whether there is a guard for this model."""
        return self._guard is not None

    @property
    def can_match(self) -> bool:
        """Whether the model gives states of tokens."""
        return bool(self._backend.states)

    async def start(self) -> None:
        """Start the thread and encode the warm-up texts. Raises EmbedderFault when the model does not answer."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        usual = self._encode_deadline_s, self._queue_deadline_s
        self._encode_deadline_s = self._queue_deadline_s = WARM_UP_S
        try:
            for text in WARM_UP:
                await self.embed(text)
            if self.can_verify:
                await self.verify(WARM_UP[0], WARM_UP[1:])
        finally:
            self._encode_deadline_s, self._queue_deadline_s = usual
            self._disarm()
        self._known.clear()
        self.embedded = self.verified = 0

    async def embed(self, text: str, tenant: str = "") -> Vector:
        """(dimension,) float32, unit, read-only. `tenant` keeps apart who may profit from a text seen before.

        Raises Overloaded at once when full, TextTooLong, EmbedderFault.
        """
        if len(text) > CHARACTERS_PER_TOKEN * self.window:
            self.too_long += 1
            raise TextTooLong(f"{len(text)} characters, window {self.window} tokens")
        digest = _digest(tenant, text)
        if (known := self._known.get(digest)) is not None:
            self._known.move_to_end(digest)
            self.lru_hits += 1
            return known
        loop = self._ready_loop()
        job = self._jobs.get(digest)
        if job is None:
            job = self._enqueue(_Job(digest, tenant, text, monotonic()))
        else:
            self.joined += 1
        assert isinstance(job, _Job)
        waiter: asyncio.Future[Vector] = loop.create_future()
        job.waiters.append(waiter)
        try:
            return await waiter
        finally:
            self._settle(job, waiter)

    async def verify(self, asked: str, kept: Sequence[str], tenant: str = "") -> list[float]:
        """The guard's logit for each of 1 to MAX_KEPT stored texts: above 0 where one answer serves both.

        +inf, no opinion, for a pair with a text of no token or of more than index.guard.head.MAX_TOKENS. A guard may
        only refuse: how high a logit is says nothing more. Raises Overloaded at once when full, EmbedderFault also when
        `can_verify` is false.
        """
        if not 1 <= len(kept) <= MAX_KEPT:
            raise ValueError(f"{len(kept)} stored texts, not 1 to {MAX_KEPT}")
        if self._guard is None:
            raise EmbedderFault("there is no guard for this model")
        texts = [(_digest(tenant, text), text) for text in (asked, *kept)]
        return list(await self._compared(tenant, texts, is_match=False))

    async def match(self, one: str, other: str, tenant: str = "") -> Closeness:
        """How close the tokens that two texts begin with are, MAX_TOKENS of each. Raises Overloaded at once when full,
        EmbedderFault also when `can_match` is false, and for a text without tokens."""
        if not self.can_match:
            raise EmbedderFault("the model gives no token states")
        texts = [(_digest(f"{tenant}\0match", text), text) for text in (one, other)]
        found: Closeness = await self._compared(tenant, texts, is_match=True)
        return found

    async def _compared(self, tenant: str, texts: Sequence[tuple[bytes, str]], *, is_match: bool) -> Any:
        digest = b"".join(one for one, _ in texts)
        loop = self._ready_loop()
        job = self._jobs.get(digest)
        if job is None:
            job = self._enqueue(_Verification(digest, tenant, texts, monotonic(), is_match=is_match))
        else:
            self.joined += 1
        assert isinstance(job, _Verification)
        waiter: asyncio.Future[Any] = loop.create_future()
        job.waiters.append(waiter)
        try:
            return await waiter
        finally:
            self._settle(job, waiter)

    def signature(self, text: str) -> NDArray[np.uint64]:
        """Token classes of a text, (index.tokens.WIDTH,) uint64."""
        return tokens.signature(text)

    def shed(self) -> None:
        """Forget vectors, and token states before the next text: memory is short."""
        self._known.clear()
        self._sheds = True

    async def close(self) -> None:
        """Fail what is in flight and end the thread. A call of the model that hangs is left behind after CLOSE_S."""
        if self._closing:
            return
        with self._turn:
            self._closing = True
            self._waiting.clear()
            self._turn.notify()
        self._disarm()
        self._fail(list(self._jobs.values()), EmbedderFault("the embedder is closed"))
        if not self._thread.is_alive():
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._ended.wait()
        except TimeoutError:
            log.warning("the embedder hangs; its thread is left behind")

    # On the loop.

    def _ready_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or not self.is_ready:
            if self._is_late:
                raise EmbedderLate("the model is late with an earlier text")
            raise EmbedderFault("the embedder hangs or is closed")
        return self._loop

    def _enqueue(self, job: J) -> J:
        if len(self._jobs) >= self._limit:
            self._make_room(job.tenant)
        self._jobs[job.digest] = job
        with self._turn:
            self._waiting.add(job)
            self._turn.notify()
        if self._watch is None:
            self._arm(min(self._encode_deadline_s, self._queue_deadline_s))
        return job

    def _make_room(self, tenant: str) -> None:
        """Another tenant with more waiting gives way, by its newest. Raises Overloaded when there is none."""
        self.overloaded += 1
        full = Overloaded(f"{self._limit} texts in flight")
        with self._turn:
            late = self._waiting.gives_way(tenant)
            if late is None:
                raise full
            self._waiting.drop(late)
        self._fail([late], full)

    def _settle(self, job: _Job | _Verification, waiter: asyncio.Future[Any]) -> None:
        """A caller has its result, or gave up; a job nobody waits for is not done."""
        if waiter.done() and not waiter.cancelled():
            waiter.exception()  # seen, even when the caller was cancelled just now
            return
        if waiter in job.waiters:
            job.waiters.remove(waiter)
        if job.waiters or self._jobs.get(job.digest) is not job:
            return
        with self._turn:
            if job in self._waiting:
                self._waiting.drop(job)
                del self._jobs[job.digest]

    def _answer(self, jobs: Sequence[_Job], vectors: Vector) -> None:
        self._hung = False
        self.embedded += len(jobs)
        for job, row in zip(jobs, vectors, strict=True):
            vector = row.copy()
            vector.flags.writeable = False
            self._remember(job.digest, vector)
            self._hand_over(job, vector)

    def _verified(self, job: _Verification, found: list[float] | Closeness, made: int) -> None:
        self._hung = False
        self.verified += 0 if job.is_match else len(found)
        self.states_made += made
        self._hand_over(job, found)

    def _hand_over(self, job: _Job | _Verification, result: Any) -> None:
        if self._jobs.get(job.digest) is job:
            del self._jobs[job.digest]
        for waiter in job.waiters:
            if not waiter.done():
                waiter.set_result(result)

    def _refuse(self, jobs: Sequence[_Job | _Verification], error: IndexRoomError) -> None:
        """The owner thread's refusal of these jobs."""
        self._hung = False
        if isinstance(error, TextTooLong):
            self.too_long += len(jobs)
        else:
            self.faults += 1
        self._fail(jobs, error)

    def _fail(self, jobs: Sequence[_Job | _Verification], error: IndexRoomError) -> None:
        for job in jobs:
            if self._jobs.get(job.digest) is job:
                del self._jobs[job.digest]
            for waiter in job.waiters:
                if not waiter.done():
                    waiter.set_exception(type(error)(*error.args))

    def _remember(self, digest: bytes, vector: Vector) -> None:
        if self._lru_limit <= 0:
            return
        self._known[digest] = vector
        self._known.move_to_end(digest)
        while len(self._known) > self._lru_limit:
            self._known.popitem(last=False)

    def _arm(self, delay_s: float) -> None:
        assert self._loop is not None
        self._watch = self._loop.call_later(max(delay_s, 0.001), self._check)

    def _disarm(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _returned(self) -> None:
        """The owner thread looked and found nothing left to encode."""
        self._hung = False

    def _check(self) -> None:
        """The watch: fail all behind a hung call, refuse what waited too long, sleep until the next expiry."""
        self._watch = None
        now = monotonic()
        since = self._busy_since
        if since is not None and now - since >= self._encode_deadline_s:
            self._hung = True
            self.faults += 1
            with self._turn:
                self._waiting.clear()
            fault = EmbedderLate(f"no vector within {self._encode_deadline_s * 1e3:g} ms")
            self._fail(list(self._jobs.values()), fault)
            return
        with self._turn:
            late = [job for job in self._waiting if now - job.asked_s >= self._queue_deadline_s]
            for job in late:
                self._waiting.drop(job)
            oldest = min((job.asked_s for job in self._waiting), default=now)
        if late:
            self.overloaded += len(late)
            self._fail(late, Overloaded(f"waited {self._queue_deadline_s:g} s for the model"))
        if self._jobs:
            busy_s = self._encode_deadline_s - (now - since if since is not None else 0.0)
            self._arm(min(busy_s, self._queue_deadline_s - (now - oldest)))

    def _end(self) -> None:
        self._ended.set()
        self._fail(list(self._jobs.values()), EmbedderFault("the embedder's thread ended"))

    # On the owner thread.

    def _own(self) -> None:
        try:
            while (batch := self._take()) is not None:
                if self._sheds:
                    self._sheds = False
                    self._states.clear()
                if isinstance(batch, _Verification):
                    self._verify(batch)
                elif batch:
                    self._encode(batch)
                else:
                    self._tell(self._returned)
        finally:
            self._tell(self._end)

    def _take(self) -> list[_Job] | _Verification | None:
        """The job whose turn it is and, where the backend allows, those of its length; [] to look again; None to
        stop."""
        with self._turn:
            while not self._waiting and not self._closing:
                self._turn.wait()
            if self._closing:
                return None
            ahead = self._waiting.ahead(LOOK_AHEAD if self._backend.batch_limit > 1 else 1)
            if isinstance(first := ahead[0], _Verification):
                self._waiting.take(first)
                return first
        ready = [job for job in ahead if isinstance(job, _Job) and self._count(job)]
        self._busy_since = None
        if not ready:
            return []
        length = len(ready[0].ids or ())
        room = max(1, min(self._backend.batch_limit, CALL_TOKENS // max(length, 1)))
        batch = [job for job in ready if len(job.ids or ()) == length][:room]
        with self._turn:
            batch = [job for job in batch if job in self._waiting]
            for job in batch:
                self._waiting.take(job)
        return batch

    def _count(self, job: _Job) -> bool:
        """Learn the text's tokens; False when it is refused."""
        if job.ids is not None:
            return True
        error: IndexRoomError
        self._busy_since = monotonic()
        try:
            job.ids = self._backend.tokens(job.text)
        except IndexRoomError as refusal:
            error = refusal
        except BACKEND_FAULTS as trouble:
            error = EmbedderFault(f"the tokenizer raised {type(trouble).__name__}")
        else:
            return True
        with self._turn:
            if job in self._waiting:
                self._waiting.drop(job)
        self._tell(self._refuse, [job], error)
        return False

    def _encode(self, batch: list[_Job]) -> None:
        self._busy_since = monotonic()
        try:
            vectors = self._vectors([(job.digest, job.ids or []) for job in batch])
        except IndexRoomError as fault:
            self._busy_since = None
            self._tell(self._refuse, batch, fault)
        except BACKEND_FAULTS as trouble:
            self._busy_since = None
            self._tell(self._refuse, batch, EmbedderFault(f"the model raised {type(trouble).__name__}"))
        else:
            self._busy_since = None
            self._tell(self._answer, batch, vectors)

    def _vectors(self, rows: Sequence[tuple[bytes, list[int]]]) -> Vector:
        """Vectors of texts of equal length, inspected; their states are kept where the guard may want them."""
        ids = [row for _, row in rows]
        if self._guard is None or not _within(ids[0]):
            vectors = self._backend.encode_tokens(ids)
            self._inspect(vectors, len(rows))
            return vectors
        vectors, states = self._backend.encode_states(ids)
        self._inspect(vectors, len(rows))
        for (digest, _), one in zip(rows, states, strict=True):
            self._states.put(digest, one)
        return vectors

    def _verify(self, job: _Verification) -> None:
        started_s = thread_time()
        try:
            made, found = 0, []
            for digest, text in job.texts:
                states = self._states.get(digest)
                if states is None and (states := self._make_states(digest, text, cut=job.is_match)) is not None:
                    made += 1
                found.append(states)
            self._busy_since = monotonic()
            result = self._matched(found) if job.is_match else self._judged(found)
        except IndexRoomError as fault:
            self._busy_since = None
            self._tell(self._refuse, [job], fault)
        except BACKEND_FAULTS as trouble:
            self._busy_since = None
            self._tell(self._refuse, [job], EmbedderFault(f"the guard raised {type(trouble).__name__}"))
        else:
            self._busy_since = None
            self._tell(self._verified, job, result, made)
        finally:
            self.matching_s += (thread_time() - started_s) * job.is_match

    def _judged(self, states: list[TokenStates | None]) -> list[float]:
        assert self._guard is not None
        return self._guard.judge(states[0], states[1:])

    @staticmethod
    def _matched(states: list[TokenStates | None]) -> Closeness:
        one, other = states
        if one is None or other is None:
            raise EmbedderFault("a text without tokens, or too long, cannot be matched")
        return closeness(one, other)

    def _make_states(self, digest: bytes, text: str, *, cut: bool = False) -> TokenStates | None:
        """One more call of the model; None for a text without tokens, or of too many where it may not be `cut`."""
        if len(text) > CHARACTERS_PER_TOKEN * MAX_TOKENS:
            return None
        self._busy_since = monotonic()
        try:
            ids = self._backend.tokens(text)
        except TextTooLong:
            return None
        if cut and len(ids) > MAX_TOKENS + SPECIAL_TOKENS:
            ids = [*ids[: MAX_TOKENS + 1], ids[-1]]
        if not _within(ids):
            return None
        vectors, states = self._backend.encode_states([ids])
        self._inspect(vectors, 1)
        return restored(self._states.put(digest, states[0]))

    def _inspect(self, vectors: Vector, count: int) -> None:
        """Raise EmbedderFault unless `vectors` is (count, dimension) float32 of finite unit rows."""
        if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
            raise EmbedderFault("the model gave something else than float32")
        if vectors.shape != (count, self.dimension):
            raise EmbedderFault(f"the model gave shape {vectors.shape}, not {(count, self.dimension)}")
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        if not np.all(np.abs(lengths - 1.0) <= UNIT_TOLERANCE):  # NaN and infinity fail this too
            raise EmbedderFault("the model gave a vector that is not of unit length")

    def _tell(self, what: object, *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *arguments)  # type: ignore[arg-type]
        except RuntimeError:
            log.debug("the loop is closed; a result of the embedder is dropped")


async def open_embedder(
    data_dir: Path,
    *,
    model: str | None = None,
    backend: str = ONNX,
    threads: int = 1,
    queue: int = 256,
    lru: int = 4096,
    encode_deadline_s: float = 0.150,
    queue_deadline_s: float = QUEUE_DEADLINE_S,
    states_bytes: int = STATES_BYTES,
    guarded: bool = True,
    convert_timeout_s: float = CONVERT_TIMEOUT_S,
) -> EmbedderOwner:
    """A warmed owner of `model` (None: the bundled one), with its guard if there is one; the caller closes it.

    The first call for a model converts it into `data_dir`/models in a child process. A model that does not convert is
    served by torch, with a warning. Raises ModelFault (files missing, damaged or changed) and EmbedderFault (warm-up).
    """
    loaded = await load_backend(
        data_dir, model=model, backend=backend, threads=threads, convert_timeout_s=convert_timeout_s
    )
    owner = EmbedderOwner(
        loaded,
        queue=queue,
        lru=lru,
        encode_deadline_s=encode_deadline_s,
        queue_deadline_s=queue_deadline_s,
        guard=await asyncio.to_thread(guard_for, loaded) if guarded else None,
        states_bytes=states_bytes,
    )
    try:
        await owner.start()
    except BaseException:
        await owner.close()
        raise
    return owner


async def needs_conversion(data_dir: Path, *, model: str | None, backend: str) -> bool:
    """Whether opening this model has to convert it first, as far as names tell. Raises ModelFault."""
    if backend == "torch":
        return False
    models = data_dir / "models"
    files = await asyncio.to_thread(locate, model, models)
    return not artefact_directory(models, files.digest, backend).exists()


def guard_for(backend: Backend) -> Guard | None:
    """The guard, if it was fitted on the states of this model. Raises ModelFault when it is damaged.

    It was fitted on fp32 and is used with int8 as well: of 500 QQP pairs 1.0 % fall on the other side of 0 (0.6 % are
    refused more, 0.4 % less), the logits correlate at .998 (25 Nov 2026).
    """
    guard = load_guard()
    known = [identity_of(guard.source, name, backend.window) for name in (ONNX, INT8)]
    return guard if backend.identity in known and backend.states == guard.states else None


async def load_backend(
    data_dir: Path,
    *,
    model: str | None = None,
    backend: str = ONNX,
    threads: int = 1,
    convert_timeout_s: float = CONVERT_TIMEOUT_S,
) -> Backend:
    """The model alone, for who calls it from one thread. As `open_embedder`, without the warm-up. Raises ModelFault."""
    if backend not in BACKENDS:
        raise ModelFault(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    models = data_dir / "models"
    files = await asyncio.to_thread(locate, model, models)
    if backend != "torch":
        try:
            artefact = await converted(files, models, backend, convert_timeout_s)
            return await asyncio.to_thread(OnnxBackend, artefact, threads)
        except ModelFault as fault:
            log.warning("serving %s with torch: %s", files.name, fault)
    return await asyncio.to_thread(TorchBackend, files, threads)
