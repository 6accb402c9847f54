"""Measure `index.guard.prior`: how often an answer is wrong, by similarity and logit, before a scope has labels.

    python -m index.guard.training.prior --head FILE

FILE is a head that has not seen one fold of the families (`train --held-out FILE`, part of `make train-guard`). Streams
are made of that fold, the head judges them as a lookup would, and what is printed belongs into `index/guard/prior.py`:
its table, its coefficients and its limits.

A stream asks Zipf-popular questions, LOOKALIKES of them a look-alike of the family instead of one of its wordings, as
they stand or as people type them. A question counts when its text is new. It is decided once: of the NEAREST texts
before it, at or above FLOOR and without a veto that nothing overrules, the one with the highest logit; wrong when that
one is no wording of the same question. Decisions about the same two texts count once, over all streams.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import betaincinv  # type: ignore[import-untyped]

from index.batcher import load_backend
from index.guard.head import Guard, parse
from index.guard.training.edits import retyped
from index.guard.training.families import FOLDS, HELD_OUT, Family, families
from index.guard.training.learn import States
from index.guard.training.train import encode
from index.kernels import veto_bits
from index.tokens import GUARDS, signature

log = logging.getLogger(__name__)

STREAMS = 6  # of each kind
DRAWS = 30  # questions drawn for each family of a stream
LOOKALIKES = 0.26  # share of the draws that ask a look-alike
TWINS = 2  # look-alikes of a family that occur in one stream
NEAREST = 16
FLOOR = 0.6
ALIKE = 0.88  # texts of two families that are nearer may ask the same after all: no decision is made on them
KNOWN = ("numbers", "units", "dates", "ids", "quoted", "code", "script", "order")
"""Vetoes that no evidence overrules, as `proxy.core.policy.ALWAYS`; and `order`, which the head is blind to: the wrong
pairs with the highest logits are of that kind ("I put diesel in my petrol car")."""
_KNOWN_BITS = sum(1 << GUARDS.index(name) for name in KNOWN)

SIMILARITIES = (0.6, 0.7, 0.8, 0.9, 1.01)
LOGITS = (-99.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 99.0)
BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
LEAST = 30  # decisions before a limit may stand
CONFIDENCE = 0.95

Numbers = NDArray[np.float64]


class Asked(NamedTuple):
    text: str
    meaning: str
    family: str


class Decision(NamedTuple):
    similarity: float
    logit: float
    wrong: bool


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m index.guard.training.prior", description="Measure the prior.")
    parser.add_argument("--head", type=Path, required=True, help="weight file that has not seen the fold")
    parser.add_argument("--work", type=Path, help="where the converted model is kept between runs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raw = options.head.read_bytes()
    guard = parse(raw, sha256(raw).hexdigest())
    streams = list(streams_of([family for family in families() if family.fold(FOLDS) == HELD_OUT]))
    with tempfile.TemporaryDirectory() as scratch:
        backend = asyncio.run(load_backend(options.work or Path(scratch)))
        states, vectors = encode(backend, [asked.text for stream in streams for asked in stream])
    found: dict[tuple[str, str], Decision] = {}
    for stream in streams:
        found |= decided(stream, vectors, states, guard)
    print("\n".join(report(np.array(list(found.values()), dtype=np.float64))))
    return 0


# Streams.


def streams_of(chosen: Sequence[Family]) -> Iterator[list[Asked]]:
    """First-seen questions of STREAMS streams as the texts stand, and of as many as people type them."""
    for number in range(STREAMS):
        for typed in (False, True):
            yield _stream(chosen, Random(number), typed)


def _stream(chosen: Sequence[Family], rng: Random, typed: bool) -> list[Asked]:
    order = rng.sample(list(chosen), len(chosen))
    popularity = [1 / (place + 1) for place in range(len(order))]
    wordings = {family.id: rng.sample(family.wordings, len(family.wordings)) for family in order}
    twins = {family.id: rng.sample(family.lookalikes, min(TWINS, len(family.lookalikes))) for family in order}
    asked: dict[str, Asked] = {}
    for family in rng.choices(order, popularity, k=DRAWS * len(order)):
        if rng.random() < LOOKALIKES:
            text = meaning = rng.choice(twins[family.id])
        else:
            known, meaning = wordings[family.id], family.id
            text = rng.choices(known, [(place + 1) ** -0.7 for place in range(len(known))])[0]
        if text not in asked:
            asked[text] = Asked(retyped(text, rng) if typed else text, meaning, family.id)
    return list(asked.values())


def decided(
    stream: Sequence[Asked], vectors: Mapping[str, NDArray[np.float32]], states: States, guard: Guard
) -> dict[tuple[str, str], Decision]:
    """By the text asked and the one chosen; questions without a candidate make none."""
    table = np.stack([vectors[asked.text] for asked in stream])
    signatures = [signature(asked.text) for asked in stream]
    found = {}
    for i in range(1, len(stream)):
        cosines = table[:i] @ table[i]
        near = [
            j
            for j in np.argsort(-cosines, kind="stable")[:NEAREST]
            if cosines[j] >= FLOOR
            and (cosines[j] < ALIKE or stream[j].family == stream[i].family)
            and not veto_bits(signatures[i], signatures[j]) & _KNOWN_BITS
        ]
        if near:
            logits = guard.judge(states.of(stream[i].text), [states.of(stream[j].text) for j in near])
            best = int(np.argmax(logits))
            if np.isfinite(logits[best]):
                kept = stream[near[best]]
                wrong = kept.meaning != stream[i].meaning
                found[stream[i].text, kept.text] = Decision(float(cosines[near[best]]), logits[best], wrong)
    return found


# What is printed. A decision is a row: similarity, logit, 1 if wrong.


def report(decisions: Numbers) -> Iterator[str]:
    coefficients = fitted(decisions)
    estimated = estimates(decisions, coefficients)
    yield f"# {len(decisions)} decisions, {int(decisions[:, 2].sum())} of them wrong"
    yield "# similarity, logit: wrong / decisions, 95 % interval"
    for low, high in pairwise(SIMILARITIES):
        for least, most in pairwise(LOGITS):
            inside = (decisions[:, 0] >= low) & (decisions[:, 0] < high)
            inside &= (decisions[:, 1] >= least) & (decisions[:, 1] < most)
            n, wrong = int(inside.sum()), int(decisions[inside, 2].sum())
            if n:
                lower, upper = interval(wrong, n)
                shown = f"{lower:.3f} to {upper:.3f}, fitted {estimated[inside].mean():.3f}"
                yield f"# {low:.1f} to {high:.1f}, {least:g} to {most:g}: {wrong} / {n}, {shown}"
    yield f"COEFFICIENTS = ({', '.join(f'{value:.4f}' for value in coefficients)})"
    yield "LIMITS = ("
    for budget in BUDGETS:
        limit, n, wrong = limit_of(estimated, decisions[:, 2], budget)
        yield f"    ({budget}, {limit:.4f}),  # {wrong} / {n}"
    yield ")"


def fitted(decisions: Numbers) -> Numbers:
    """Constant, and factors of logit and similarity, both at most 0, of the log-odds that a decision is wrong."""
    columns = np.column_stack([np.ones(len(decisions)), decisions[:, 1], decisions[:, 0]])
    sign = np.where(decisions[:, 2] > 0, -1.0, 1.0)

    def loss(weights: Numbers) -> float:
        return float(np.logaddexp(0.0, sign * (columns @ weights)).sum())

    bounds = [(None, None), (None, 0.0), (None, 0.0)]
    found: Numbers = minimize(loss, np.zeros(3), bounds=bounds, method="L-BFGS-B").x
    return found


def estimates(decisions: Numbers, coefficients: Numbers) -> Numbers:
    odds = coefficients[0] + coefficients[1] * decisions[:, 1] + coefficients[2] * decisions[:, 0]
    found: Numbers = 1 / (1 + np.exp(-odds))
    return found


def limit_of(estimated: Numbers, wrong: Numbers, budget: float) -> tuple[float, int, int]:
    """The highest estimate up to which the share of wrong decisions is within the budget; how many, how many wrong.

    0 where fewer than LEAST are.
    """
    order = np.argsort(estimated, kind="stable")
    count = np.arange(1, len(order) + 1)
    among = np.cumsum(wrong[order])
    inside = np.flatnonzero((among <= budget * count) & (count >= LEAST))
    if not len(inside):
        return 0.0, 0, 0
    last = inside[-1]
    return float(estimated[order[last]]), int(count[last]), int(among[last])


def interval(wrong: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's, at CONFIDENCE."""
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(wrong, n - wrong + 1, tail)) if wrong else 0.0
    high = float(betaincinv(wrong + 1, n - wrong, 1 - tail)) if wrong < n else 1.0
    return low, high


if __name__ == "__main__":
    sys.exit(main())
