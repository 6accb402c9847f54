"""How well are two answers compared? `python -m tests.bench.answers [--fit]`.

`answers.jsonl` holds questions, answers that say the same and answers to look-alikes, or wrong ones; written for ibid
by language models (Apache-2.0). Of every question each two of the same make a pair that must be called the same, each
of the same with each other one a pair that must not. Printed are false alarms (the same, called different: they make
ibid strict) and the sensitivity (the share of differing pairs that is noticed: what is missed is taken off the budget),
with the shipped weights and with weights fitted to nine tenths of the questions and tried on the last, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from itertools import combinations, product
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.answers import UNKNOWN_MEANING, WEIGHTS, Likeness, head, likeness
from index.model import BUNDLED
from proxy.commands.evaluate import interval, open_texts

FILE: Final = Path(__file__).with_name("answers.jsonl")
PARTS: Final = 10
ROUNDS: Final = 200
PRECISION: Final = 0.02
NAMES: Final = tuple(WEIGHTS)
BELOW: Final = ("clashing", "names", "polarity", "negation", "swapped")  # weights that may not be positive
DIFFERING: Final = 0.7
"""What a differing pair counts for in a fit, beside one of the same: what is overlooked costs the budget."""


class Pairs(NamedTuple):
    rows: NDArray[np.float64]  # (n, len(NAMES))
    same: NDArray[np.bool_]
    equal: NDArray[np.bool_]
    question: NDArray[np.int64]


async def described() -> Pairs:
    questions = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as data_dir:
        texts = await open_texts(Path(data_dir), BUNDLED, "onnx", 1)
        texts.prepare([head(text) for one in questions for text in (*one["same"], *one["other"])], "answers")
    rows, same, equal, question = [], [], [], []
    for number, one in enumerate(questions):
        pairs = [(*pair, True) for pair in combinations(one["same"], 2)]
        pairs += [(*pair, False) for pair in product(one["same"], one["other"])]
        for a, b, is_same in pairs:
            u, v = texts.vector(head(a)), texts.vector(head(b))
            meaning = UNKNOWN_MEANING if u is None or v is None else float(u @ v)
            found = likeness(a, b)
            rows.append(row_of(found, meaning))
            same.append(is_same)
            equal.append(found.equal)
            question.append(number)
    return Pairs(np.array(rows), np.array(same), np.array(equal), np.array(question))


def row_of(found: Likeness, meaning: float) -> list[float]:
    return [1.0 if name == "one" else meaning if name == "meaning" else getattr(found, name) for name in NAMES]


def fit(pairs: Pairs, use: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Logistic regression; questions count alike whatever the number of their pairs. Newton's method."""
    use = use & ~pairs.equal
    x, y = pairs.rows[use], pairs.same[use].astype(float)
    sizes = np.bincount(pairs.question[use], minlength=int(pairs.question.max()) + 1)
    count = np.where(y > 0, 1.0, DIFFERING) / sizes[pairs.question[use]]
    weights = np.zeros(len(NAMES))
    for _ in range(ROUNDS):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (count * (p - y)) + PRECISION * weights
        curvature = (x * (count * p * (1 - p))[:, None]).T @ x + PRECISION * np.eye(len(weights))
        weights = weights - 0.5 * np.linalg.solve(curvature, gradient)
        for name in BELOW:
            at = NAMES.index(name)
            weights[at] = min(weights[at], 0.0)
    return weights


def called_same(pairs: Pairs, weights: NDArray[np.float64]) -> NDArray[np.bool_]:
    return pairs.equal | (pairs.rows @ weights > 0.0)


def tell(name: str, pairs: Pairs, called: NDArray[np.bool_]) -> None:
    alarms, same = int((~called & pairs.same).sum()), int(pairs.same.sum())
    noticed, other = int((~called & ~pairs.same).sum()), int((~pairs.same).sum())
    low, high = interval(noticed, other)
    print(f"{name:<28}false alarms {alarms}/{same} ({alarms / same:.1%})   noticed {noticed}/{other} "
          f"({noticed / other:.1%}, 95 %: {low:.1%}-{high:.1%})")  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="print weights fitted to all questions")
    options = parser.parse_args()
    pairs = await described()
    shipped = np.array([WEIGHTS[name] for name in NAMES])
    tell("shipped", pairs, called_same(pairs, shipped))
    called = np.zeros(len(pairs.same), bool)
    for part in range(PARTS):
        held = pairs.question % PARTS == part
        called[held] = called_same(pairs, fit(pairs, ~held))[held]
    tell("fitted, on other questions", pairs, called)
    if options.fit:
        for name, weight in zip(NAMES, fit(pairs, np.ones(len(pairs.same), bool)), strict=True):
            print(f"    {name!r}: {weight:.1f},")


if __name__ == "__main__":
    asyncio.run(main())
