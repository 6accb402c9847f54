"""Would another vector serve more? `python -m tests.bench.adapter DIR [--pairs 50000]`; nothing of it is shipped.

Two ways past the frozen model, measured as `tests.bench.transfer` measures scores: each question of a stream takes the
best of its 16 nearest earlier ones, and printed is the largest share that a threshold chosen in hindsight serves with
at most 1, 2 and 5 % wrong.

*Contrastive*: a linear map of 384 dimensions, from the identity, trained on the pair guard's own licensed and generated
pairs (same: alike; other: apart; the rest of the batch apart), once with all sources and once with each left out.
*Own*: the whitening of what differs inside a namespace's answers, from verdicts on its earlier questions alone, made
anew every REFIT questions: what per-namespace training could learn.

DIR holds the streams and the two licensed files that `index.guard.training.train` reads.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from index.guard.training.generate import Pair
from index.guard.training.train import every, training_pairs
from index.model import BUNDLED
from index.quiet import library
from proxy.commands.evaluate import open_texts
from proxy.commands.labelled import Asked, read
from proxy.commands.rehearsal import Texts, is_eligible
from proxy.core.model import Rules

BUDGETS: Final = (0.01, 0.02, 0.05)
NEAREST: Final = 16
REFIT: Final = 250
VERDICTS: Final = 3  # answers a new question is compared with, as serving compares
SHRINK: Final = 0.3  # of the within-answer scatter, towards the identity
EPOCHS: Final = 4
BATCH: Final = 256
TEMPERATURE: Final = 0.07
KEEP: Final = 2e-3  # pull towards the identity

Vectors = NDArray[np.float32]


def contrastive(pairs: Sequence[Pair], texts: Texts, seed: int) -> Vectors:
    """A (384, 384) map to multiply vectors with."""
    torch = library("torch")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    known = [pair for pair in pairs if texts.vector(pair.a) is not None and texts.vector(pair.b) is not None]
    a, b = (
        torch.from_numpy(np.stack([texts.vector(text) for text in side]))  # type: ignore[arg-type]
        for side in ([pair.a for pair in known], [pair.b for pair in known])
    )
    same = torch.tensor([bool(pair.label) for pair in known])
    eye = torch.eye(a.shape[1])
    change = torch.zeros_like(eye, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=1e-3)
    for _ in range(EPOCHS):
        order = rng.permutation(len(known))
        for at in range(0, len(order) - BATCH, BATCH):
            part = torch.from_numpy(order[at : at + BATCH])
            x, y = (torch.nn.functional.normalize(side[part] @ (eye + change), dim=1) for side in (a, b))
            logits = x @ y.T / TEMPERATURE
            alike = same[part]
            own = torch.diagonal(logits)
            others = torch.logsumexp(logits.masked_fill(torch.eye(BATCH, dtype=torch.bool), -1e9), dim=1)
            attract = (torch.logaddexp(own, others) - own)[alike].mean()
            repel = torch.nn.functional.softplus(own - 0.75 / TEMPERATURE)[~alike].mean()
            loss = attract + repel + KEEP * (change**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (eye + change.detach()).numpy()


class Own:
    """Whitening by the scatter inside answers, of the verdicts so far."""

    def __init__(self, dimension: int) -> None:
        self._scatter = np.zeros((dimension, dimension))
        self._n = 0
        self.map: Vectors = np.eye(dimension, dtype=np.float32)

    def same(self, a: Vectors, b: Vectors) -> None:
        difference = (a - b).astype(np.float64)
        self._scatter += np.outer(difference, difference)
        self._n += 1

    def refit(self) -> None:
        if self._n < len(self._scatter) // 4:
            return
        scatter = self._scatter / self._n
        scatter = (1 - SHRINK) * scatter + SHRINK * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
        values, axes = np.linalg.eigh(scatter)
        self.map = (axes * values**-0.5 @ axes.T).astype(np.float32)


def replay(stream: Sequence[Asked], texts: Texts, fixed: Vectors | None, *, own: bool) -> list[float]:
    """Share of questions served at each of BUDGETS, in hindsight."""
    asked = [one for one in stream if texts.vector(one.text) is not None]
    asked = [one for one in asked if is_eligible(one.text, one.is_first_turn, Rules())]
    table = np.stack([texts.vector(one.text) for one in asked])  # type: ignore[arg-type]
    ids: dict[str, int] = {}
    groups = np.array([ids.setdefault(one.answer, len(ids)) for one in asked])
    mapped = unit(table @ fixed) if fixed is not None else table
    learned = Own(table.shape[1])
    best, right = np.full(len(asked), -1.0), np.zeros(len(asked), bool)
    for i in range(1, len(asked)):
        cosines = table[:i] @ table[i]
        near = np.argpartition(-cosines, min(NEAREST, i) - 1)[:NEAREST]
        scores = mapped[near] @ mapped[i]
        at = int(np.argmax(scores))
        best[i], right[i] = scores[at], groups[near[at]] == groups[i]
        if not own:
            continue
        compared: list[int] = []
        for j in near[np.argsort(-scores)]:
            if groups[j] not in [groups[k] for k in compared]:
                compared.append(int(j))
        for j in compared[:VERDICTS]:
            if groups[j] == groups[i]:
                learned.same(table[i], table[j])
        if i % REFIT == 0:
            learned.refit()
            mapped = unit(table @ learned.map)
    order = np.argsort(-best, kind="stable")
    wrong, counts = np.cumsum(~right[order]), np.arange(1, len(order) + 1)
    return [float(np.max(np.where(wrong <= budget * counts, counts, 0)) / len(stream)) for budget in BUDGETS]


def unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        texts = await open_texts(Path(data_dir), BUNDLED, "onnx", 1)
        sources = training_pairs(options.data, texts.backend, options.seed)
        names = ("banking77", "geography", "atis", "qqp")
        streams = {name: read(options.data / f"stream_{name}.jsonl.gz")[0] for name in names}
        texts.prepare([one.text for stream in streams.values() for one in stream], "streams")
        texts.prepare([text for pairs in sources.values() for pair in pairs for text in (pair.a, pair.b)], "pairs")
    maps: dict[str, Vectors | None] = {"cosine": None}
    for left_out in (None, *sources):
        pairs = every({name: found for name, found in sources.items() if name != left_out})
        Random(options.seed).shuffle(pairs)
        name = "contrastive" if left_out is None else f"contrastive without {left_out}"
        maps[name] = contrastive(pairs[: options.pairs], texts, options.seed)
    print(f"{'share served at <= 1 / 2 / 5 % wrong':<38}" + "".join(f"{name:<20}" for name in streams))
    for name, fixed in [*maps.items(), ("own verdicts", None)]:
        rows = (replay(stream, texts, fixed, own=name == "own verdicts") for stream in streams.values())
        cells = (" ".join(f"{share:.3f}" for share in row) for row in rows)
        print(f"{name:<38}" + "".join(f"{cell:<20}" for cell in cells), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
