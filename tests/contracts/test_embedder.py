"""The Embedder port: one suite for the fake and for the bundled model on each ONNX backend.

Agreement promised here, as cosine to sentence-transformers: fp32 at least 0.9999 for every text; int8 at least 0.985
for every English text of three words or more, and 0.99 in their mean; at least 0.94 for anything else. Measured 22 Nov
2026, int8 to fp32, mean and smallest: 1,748 English prompts of three words or more (QQP, banking77, prompts) 0.9935
and 0.9861; 200 single words 0.9880 and 0.9541; 150 pairs of words 0.9905 and 0.9732; 100 German sentences 0.9893 and
0.9704.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import tokens
from index.artefact import INT8, ONNX, artefact_directory, open_artefact
from index.batcher import EmbedderOwner, guard_for
from index.embedder import OnnxBackend
from index.errors import EmbedderFault, Overloaded, TextTooLong
from index.guard.head import MAX_TOKENS, NO_OPINION
from index.model import locate
from index.quiet import SILENCE
from tests.fakes import FakeEmbedder
from tests.models import converted_data_dir
from tests.waiting import PATIENCE_S

ENGLISH = (
    "How do I reset my password?",
    "What's the best way to cook a steak medium rare in a cast iron pan?",
    "Who was president of the United States in 1974, and what did he resign over?",
    "Is it safe to mix ibuprofen and paracetamol?",
    "Convert 72 degrees Fahrenheit to Celsius.",
    "I was charged twice for the same transfer, can I get my money back?",
    "Write a haiku about autumn rain on a tin roof.",
    "What does `git rebase --onto` do?",
    "SELECT name FROM users WHERE id = 7; -- why is this slow?",
    "The patient shall be informed of the risks of the operation. " * 6,
    "Summarise the following in one line: " + "the river rose slowly over the fields, and the village slept. " * 14,
)
OTHER = (
    "why",
    "cause",
    "myself friend",
    "Wie setze ich mein Passwort zurück?",
    "Er wurde in Österreich geboren und zog später mit seiner Familie nach Köln.",
    "Was kostet eine Fahrkarte von Berlin nach München?",
)
TEXTS = ENGLISH + OTHER


class Gated:
    """A real backend whose calls wait for `gate`."""

    def __init__(self, backend: OnnxBackend) -> None:
        self._backend = backend
        self.identity, self.dimension, self.window = backend.identity, backend.dimension, backend.window
        self.batch_limit, self.states = backend.batch_limit, backend.states
        self.tokens, self.encode = backend.tokens, backend.encode
        self.gate = threading.Event()
        self.gate.set()

    def encode_tokens(self, rows: Sequence[list[int]]) -> Any:
        self.gate.wait(PATIENCE_S)
        return self._backend.encode_tokens(rows)

    def encode_states(self, rows: Sequence[list[int]]) -> Any:
        self.gate.wait(PATIENCE_S)
        return self._backend.encode_states(rows)


@cache
def onnx_backend(name: str) -> OnnxBackend:
    models = converted_data_dir() / "models"
    digest = locate(None, models).digest
    return OnnxBackend(open_artefact(artefact_directory(models, digest, name), digest))


class Subject:
    """An embedder with room for `queue` texts, and the handles to hold it still."""

    def __init__(self, name: str, queue: int) -> None:
        self.embedder: FakeEmbedder | EmbedderOwner
        if name == "fake":
            self.embedder = self._fake = FakeEmbedder(queue=queue)
        else:
            self._gated = Gated(onnx_backend(name))
            self.embedder = EmbedderOwner(
                self._gated,
                queue=queue,
                lru=0,
                encode_deadline_s=PATIENCE_S,
                queue_deadline_s=PATIENCE_S,
                guard=guard_for(self._gated),
            )

    def hold(self) -> None:
        if isinstance(self.embedder, EmbedderOwner):
            self._gated.gate.clear()
        else:
            self._fake.held = asyncio.Event()

    def release(self) -> None:
        if isinstance(self.embedder, EmbedderOwner):
            self._gated.gate.set()
        elif self._fake.held is not None:
            self._fake.held.set()


@asynccontextmanager
async def running(name: str) -> AsyncIterator[Subject]:
    made = Subject(name, queue=4)
    if isinstance(made.embedder, EmbedderOwner):
        await made.embedder.start()
    yield made
    made.release()
    if isinstance(made.embedder, EmbedderOwner):
        await made.embedder.close()


@pytest.fixture(params=["fake", ONNX, INT8])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with running(request.param) as made:
        yield made


@pytest.fixture(params=["fake", ONNX, INT8])
async def verifier(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """Those with a guard."""
    async with running(request.param) as made:
        yield made


async def test_a_vector_is_float32_of_its_dimension_and_of_unit_length(subject: Subject) -> None:
    for text in (*TEXTS[:10], "", " ", "東京 😀", "x" * 300):
        vector = await subject.embedder.embed(text)
        assert vector.shape == (subject.embedder.dimension,)
        assert vector.dtype == np.float32
        assert abs(float(np.linalg.norm(vector)) - 1.0) <= 1e-3
        assert not vector.flags.writeable


async def test_a_text_gives_the_same_vector_every_time_and_beside_any_other(subject: Subject) -> None:
    alone = [await subject.embedder.embed(text) for text in ENGLISH[1:5]]
    together = await asyncio.gather(*(subject.embedder.embed(text) for text in ENGLISH[1:5]))
    for one, other in zip(alone, together, strict=True):
        assert float(one @ other) >= 1 - 1e-5


async def test_alike_texts_are_nearer_than_others(subject: Subject) -> None:
    ask = subject.embedder.embed
    base = await ask("how do i reset my password")
    near = await ask("how can i reset my password")
    far = await ask("best pizza places around rome")
    assert float(base @ near) > 0.8 > 0.5 > float(base @ far)


async def test_a_text_is_too_long_by_its_last_token_and_not_before(subject: Subject) -> None:
    special = 0 if subject.embedder.identity.startswith("fake") else 2
    whole = subject.embedder.window - special
    assert (await subject.embedder.embed("word " * whole)).shape == (subject.embedder.dimension,)
    with pytest.raises(TextTooLong):
        await subject.embedder.embed("word " * (whole + 1))
    with pytest.raises(TextTooLong):
        await subject.embedder.embed("word " * 100_000)


async def test_a_full_embedder_says_so_at_once_and_the_texts_in_it_are_answered(subject: Subject) -> None:
    subject.hold()
    asking = [asyncio.create_task(subject.embedder.embed(f"question number {n}")) for n in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await subject.embedder.embed("one more question")
    subject.release()
    assert len(await asyncio.gather(*asking)) == 4
    assert (await subject.embedder.embed("one more question")).shape == (subject.embedder.dimension,)


async def test_the_identity_names_model_backend_and_window(subject: Subject) -> None:
    model, backend, window = subject.embedder.identity.split(":")
    assert model
    assert backend
    assert int(window) == subject.embedder.window


async def test_a_signature_is_that_of_the_token_room(subject: Subject) -> None:
    signature = subject.embedder.signature("not 7 dogs")
    assert signature.shape == (tokens.WIDTH,)
    assert signature.dtype == np.uint64
    assert np.array_equal(signature, tokens.signature("not 7 dogs"))


BASE = "how do i book a table for 4 people in the restaurant"


async def test_a_guard_lets_a_rewording_pass_and_refuses_what_differs(verifier: Subject) -> None:
    assert verifier.embedder.can_verify
    kept = (
        "how can i book a table for 4 people in the restaurant",
        "how do i book a table for 9 people in the restaurant",
        "what is the best month for planting roses",
    )
    reworded, number, unlike = await verifier.embedder.verify(BASE, kept)
    assert reworded > 0 > max(number, unlike)


async def test_a_text_passes_against_itself_and_which_was_asked_does_not_matter(verifier: Subject) -> None:
    other = "how do i not book a table for 4 people in the restaurant"
    assert (await verifier.embedder.verify(BASE, [BASE]))[0] > 0
    (there,) = await verifier.embedder.verify(BASE, [other])
    (back,) = await verifier.embedder.verify(other, [BASE])
    assert there == pytest.approx(back, abs=1e-3)
    assert there < 0


async def test_on_a_long_or_empty_text_a_guard_has_no_opinion(verifier: Subject) -> None:
    for strange in ("word " * (MAX_TOKENS + 1), "word " * 10_000, ""):
        assert await verifier.embedder.verify(BASE, [strange]) == [NO_OPINION]
        assert await verifier.embedder.verify(strange, [BASE]) == [NO_OPINION]


async def test_a_full_embedder_refuses_to_verify_at_once(verifier: Subject) -> None:
    verifier.hold()
    asking = [asyncio.create_task(verifier.embedder.verify(BASE, [f"question number {n}"])) for n in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await verifier.embedder.verify(BASE, ["one more question"])
    verifier.release()
    assert [len(logits) for logits in await asyncio.gather(*asking)] == [1] * 4


@pytest.mark.parametrize("count", [0, 4])
async def test_one_to_three_texts_are_verified(verifier: Subject, count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        await verifier.embedder.verify(BASE, [BASE] * count)


async def test_only_the_beginnings_of_texts_are_matched() -> None:
    made = EmbedderOwner(onnx_backend(ONNX), queue=4, lru=0, encode_deadline_s=60.0)
    assert made.can_match
    await made.start()
    try:
        long = f"{BASE} " + " ".join(f"and {word}" for word in BASE.split() * 4)
        assert min(await made.match(BASE, BASE)) > 0.99
        assert await made.match(f"{long} this way", f"{long} or another") == await made.match(long, long)
        assert max(await made.match(BASE, "the best month for planting roses")) < 0.99
        with pytest.raises(EmbedderFault):
            await made.match(BASE, "")
    finally:
        await made.close()


async def test_without_a_guard_an_embedder_says_so() -> None:
    made = EmbedderOwner(onnx_backend(ONNX), queue=4, lru=0)
    assert not made.can_verify
    with pytest.raises(EmbedderFault):
        await made.verify(BASE, [BASE])


def test_states_come_of_the_run_that_gives_the_vector() -> None:
    backend = onnx_backend(ONNX)
    rows = [backend.tokens(text) for text in ("how do birds fly", "how do fish swim")]
    vectors, states = backend.encode_states(rows)
    assert np.array_equal(vectors, backend.encode_tokens(rows))
    assert states.shape == (2, len(rows[0]) - 2, len(backend.states), backend.dimension)
    assert np.abs(np.linalg.norm(states.astype(np.float32), axis=3) - 1).max() <= 2e-3
    alone = backend.encode_states(rows[:1])[1][0]
    assert np.abs(alone.astype(np.float32) - states[0]).max() <= 2e-3


REFERENCE = """
import json, sys
import numpy as np
from pathlib import Path
from sentence_transformers import SentenceTransformer
from index.embedder import TorchBackend
from index.errors import TextTooLong
from index.model import locate
texts, out = json.load(sys.stdin), Path(sys.argv[1])
files = locate(None, out)
model = SentenceTransformer(str(files.directory), device="cpu", local_files_only=True)
np.save(out / "reference.npy", model.encode(texts, batch_size=1, normalize_embeddings=True, show_progress_bar=False))
torch = TorchBackend(files)
np.save(out / "torch.npy", np.stack([torch.encode(text) for text in texts]))
try:
    torch.encode("word " * 255)
except TextTooLong:
    refused = True
else:
    refused = False
print(json.dumps({"identity": torch.identity, "window": torch.window, "refused": refused}))
"""


class Reference:
    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(out)]
        done = subprocess.run(
            command,
            input=json.dumps(TEXTS),
            env={**os.environ, **SILENCE},
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        self.vectors = np.load(out / "reference.npy")
        self.torch_vectors = np.load(out / "torch.npy")
        self.torch = json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """sentence-transformers' own vectors of TEXTS, computed in a child process."""
    return Reference(tmp_path_factory.mktemp("reference"))


def cosines(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return (found.astype(np.float64) * reference).sum(axis=1)


def test_fp32_agrees_with_sentence_transformers(reference: Reference) -> None:
    found = np.stack([onnx_backend(ONNX).encode(text) for text in TEXTS])
    assert cosines(found, reference.vectors).min() >= 0.9999


def test_int8_agrees_with_sentence_transformers_within_its_own_bound(reference: Reference) -> None:
    found = np.stack([onnx_backend(INT8).encode(text) for text in TEXTS])
    agreement = cosines(found, reference.vectors)
    english, other = agreement[: len(ENGLISH)], agreement[len(ENGLISH) :]
    assert english.min() >= 0.985
    assert english.mean() >= 0.99
    assert other.min() >= 0.94


def test_the_torch_backend_agrees_with_sentence_transformers_and_refuses_long_text(reference: Reference) -> None:
    assert cosines(reference.torch_vectors, reference.vectors).min() >= 0.99999
    assert reference.torch["refused"]
    digest = onnx_backend(ONNX).identity.split(":")[0]
    assert reference.torch["identity"] == f"{digest}:torch:{reference.torch['window']}"


def test_texts_of_equal_length_get_the_vector_they_get_alone() -> None:
    backend = onnx_backend(ONNX)
    rows = [backend.tokens(text) for text in ("how do magnets work", "how do planes fly", "why do cats purr")]
    assert len({len(row) for row in rows}) <= 2
    for row in rows:
        twin = [*row[:1], *reversed(row[1:-1]), *row[-1:]]
        together = backend.encode_tokens([row, twin])
        assert float(together[0] @ backend.encode_tokens([row])[0]) >= 1 - 1e-5
        assert float(together[1] @ backend.encode_tokens([twin])[0]) >= 1 - 1e-5


@given(text=st.text(max_size=400))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_gives_a_finite_unit_vector_or_is_too_long(text: str) -> None:
    backend = onnx_backend(INT8)
    try:
        vector = backend.encode(text)
    except TextTooLong:
        return
    assert np.isfinite(vector).all()
    assert abs(float(np.linalg.norm(vector)) - 1.0) <= 1e-3
