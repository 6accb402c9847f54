"""Does a trained score beat cosine on a family it has not seen? `python -m tests.bench.transfer STREAM STREAM...`

Each stream is asked in its order and every miss is kept, so that all of it can be judged: for each question the best
group of answers under a score, and whether it was right. Three scores: cosine alone, the shipped weights set by hand
(`index.learner.PRIOR`), and weights trained on all the other streams. Printed is the largest share of questions that a
threshold chosen in hindsight serves with at most 1, 2 and 5 % wrong among the served: a ceiling, equal for all three.
Guards that no evidence overrules apply to all.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.features import FEATURES
from index.learner import PRIOR, Learner
from index.model import BUNDLED
from index.vectors import VectorOwner
from proxy.commands.evaluate import open_texts
from proxy.commands.labelled import SCOPE, Asked, read
from proxy.commands.rehearsal import FAR_MS, Texts, is_eligible
from proxy.core.model import Rules
from proxy.core.policy import ALWAYS
from proxy.request.pipeline import CANDIDATES

BUDGETS: Final = (0.01, 0.02, 0.05)
ALIKE: Final = 0.60  # pairs less alike are not trained on: they are never served
ROUNDS: Final = 20
PRECISION: Final = 10.0  # of every weight around the one set by hand
PAIRS: Final = 3000.0  # that each family counts for, whatever its size
RISING: Final = [FEATURES.index(name) for name in ("similarity", "closeness", "margin", "votes", "share")]
COSINE: Final = np.array([float(name == "similarity") for name in FEATURES])
BY_HAND: Final = np.array([PRIOR.get(name, 0.0) for name in FEATURES])


class Family(NamedTuple):
    name: str
    asked: int
    rows: NDArray[np.float64]  # (n, F), one per group of candidates
    right: NDArray[np.float64]  # (n,)
    question: NDArray[np.int64]  # (n,) which question the group was a candidate for


def describe(name: str, stream: Sequence[Asked], texts: Texts) -> Family:
    """Every question's groups of candidates, as the shipped learner describes them, from its own earlier traffic."""
    texts.prepare((one.text for one in stream), name)
    index = VectorOwner(texts.identity, texts.dimension, promote_above=1 << 30)
    learner = Learner()
    kept: list[int] = []
    ids: dict[str, int] = {}
    rows, right, question = [], [], []
    for at, one in enumerate(stream):
        vector = texts.vector(one.text)
        if vector is None or not is_eligible(one.text, one.is_first_turn, Rules()):
            continue
        signature = texts.signature(one.text)
        answer = ids.setdefault(one.answer, len(ids))
        found = [c for c in index.find_now(SCOPE, vector, signature, 0, CANDIDATES) if not c.vetoes & ALWAYS]
        if found:
            for group in learner.consider(
                signature,
                np.stack([c.signature for c in found]),
                np.array([c.similarity for c in found], np.float32),
                np.array([kept[c.entry_id] for c in found], np.int64),
            ):
                rows.append(group.row.copy())
                right.append(float(group.group_id == answer))
                question.append(at)
        learner.see(signature)
        learner.store(answer)
        index.add_now(len(kept), SCOPE, vector, signature, FAR_MS)
        kept.append(answer)
    return Family(name, len(stream), np.array(rows), np.array(right), np.array(question))


def served(family: Family, weights: NDArray[np.float64]) -> list[float]:
    """Share of questions served at each of BUDGETS, under the best threshold in hindsight."""
    scores = family.rows @ weights
    order = np.lexsort((-scores, family.question))
    first = order[np.flatnonzero(np.diff(family.question[order], prepend=-1))]  # each question's best group
    ranked = first[np.argsort(-scores[first], kind="stable")]
    wrong = np.cumsum(1.0 - family.right[ranked])
    counts = np.arange(1, len(ranked) + 1)
    return [float(np.max(np.where(wrong <= budget * counts, counts, 0)) / family.asked) for budget in BUDGETS]


def train(families: Sequence[Family]) -> NDArray[np.float64]:
    """Logistic regression around the weights set by hand; families count alike. Newton's method."""
    rows, right, counts = [], [], []
    for family in families:
        alike = family.rows[:, FEATURES.index("similarity")] >= ALIKE
        rows.append(family.rows[alike])
        right.append(family.right[alike])
        counts.append(np.full(int(alike.sum()), PAIRS / max(1, alike.sum())))
    x, y, count = np.concatenate(rows), np.concatenate(right), np.concatenate(counts)
    precision = np.full(len(FEATURES), PRECISION)
    precision[0] = 0.3
    weights = BY_HAND.copy()
    for _ in range(ROUNDS):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (count * (p - y)) + precision * (weights - BY_HAND)
        curvature = (x * (count * p * (1 - p))[:, None]).T @ x + np.diag(precision)
        weights = weights - np.linalg.solve(curvature, gradient)
        weights[RISING] = np.maximum(weights[RISING], 0.0)
    return weights


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streams", nargs="+", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        texts = await open_texts(Path(data_dir), BUNDLED, "onnx", 1)
        families = [
            describe(path.name.split(".")[0].removeprefix("stream_"), read(path)[0], texts) for path in options.streams
        ]
    print(f"{'share served at <= 1 / 2 / 5 % wrong':<38}{'cosine':<19}{'by hand':<19}trained on the others")
    for family in families:
        others = [other for other in families if other is not family]
        scores = [COSINE, BY_HAND, train(others)] if others else [COSINE, BY_HAND]
        cells = (" ".join(f"{share:.3f}" for share in served(family, weights)) for weights in scores)
        print(f"{family.name:<38}" + "".join(f"{cell:<19}" for cell in cells), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
