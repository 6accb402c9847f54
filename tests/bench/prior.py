"""How often an answer is wrong where the pair guard is sure: `python -m tests.bench.prior`, for `index.guard.prior`.

Streams of `tests.bench.reallife`, as authored: a question that is new is decided once, for the most similar earlier one
that no guard of knowledge forbids; what is served is not kept. Printed for each row are pairs, counted once over all
streams, and requests: a wording that is asked often counts as often.

`--held-out FILE`, a second head that one fold of the families has not taught (`make train-guard` writes it), adds
streams of that fold: questions with look-alikes made to be mistaken for them.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from index.guard.head import Guard, load_guard, parse
from index.guard.prior import ROWS
from index.guard.training.families import FOLDS, HELD_OUT, families
from index.kernels import veto_bits
from proxy.commands.evaluate import interval, open_texts
from proxy.commands.rehearsal import Texts
from proxy.core.policy import KNOWN
from tests.bench.reallife import QUESTIONS, STREAMS, Asked, questions, stream
from tests.models import converted_data_dir

SEEDS: Final = (5, 6, 7, 8, 9)
DRAWS: Final = 30  # questions drawn for each family of a stream
STRANGERS: Final = 0.88  # texts of two families that are nearer may ask the same after all: no decision is made on them


def served(asked: Sequence[Asked], texts: Texts, guard: Guard, alike: float, sure: float) -> dict[str, str]:
    """Text asked → the kept text whose answer it is given."""
    families_of = {one.text: one.meaning.partition("#")[0] for one in asked}
    first = list(families_of)
    texts.prepare(first)
    table = np.stack([vector for text in first if (vector := texts.vector(text)) is not None])
    found: dict[str, str] = {}
    for i, text in enumerate(first):
        cosines = table[:i] @ table[i]
        cosines[[first[j] in found for j in range(i)]] = -1.0
        for j in np.argsort(-cosines, kind="stable"):
            other = first[j]
            if cosines[j] < alike or not veto_bits(texts.signature(text), texts.signature(other)) & KNOWN:
                break
        else:
            continue
        is_stranger = cosines[j] >= STRANGERS and families_of[other] != families_of[text]
        if cosines[j] >= alike and not is_stranger:
            (logit,) = guard.judge(texts.states(text), [texts.states(other)])
            if sure < logit < np.inf:
                found[text] = other
    return found


def report(name: str, streams: Sequence[Sequence[Asked]], texts: Texts, guard: Guard) -> None:
    for budget, alike, sure in ROWS:
        pairs: dict[tuple[str, str], bool] = {}
        requests: Counter[bool] = Counter()
        for asked in streams:
            meaning = {one.text: one.meaning for one in asked}
            times = Counter(one.text for one in asked)
            for text, kept in served(asked, texts, guard, alike, sure).items():
                wrong = meaning[text] != meaning[kept]
                pairs[text, kept] = wrong
                requests[wrong] += times[text]
        mistaken, n = sum(pairs.values()), len(pairs)
        low, high = (100 * bound for bound in interval(mistaken, n))
        print(f"{name}, budget {budget}, from {alike}, above {sure}: {mistaken} wrong of {n} pairs", end=" ")
        print(f"({low:.1f} to {high:.1f} %); of requests {requests[True]} of {requests.total()}", flush=True)


def held_out(seed: int) -> list[Asked]:
    """A stream of the families that the head has not seen, a look-alike of each."""
    rng = Random(seed)
    rows: list[dict[str, Any]] = [
        {"id": one.id, "wordings": list(one.wordings), "lookalike": {"question": rng.choice(one.lookalikes)}}
        for one in families()
        if one.fold(FOLDS) == HELD_OUT
    ]
    return stream(rows, "authored", DRAWS * len(rows), seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.prior", description="Measure the guard's prior.")
    parser.add_argument("--held-out", type=Path, help="a second head that has not seen one fold of the families")
    options = parser.parse_args()
    texts = asyncio.run(open_texts(converted_data_dir(), "all-MiniLM-L6-v2", "onnx", 1))
    guard = load_guard()
    rows = questions(QUESTIONS)
    report("questions", [stream(rows, "authored", STREAMS["authored"], seed) for seed in SEEDS], texts, guard)
    if options.held_out:
        raw = options.held_out.read_bytes()
        blind = Guard(guard.first, parse(raw, sha256(raw).hexdigest()))
        report("families", [held_out(seed) for seed in SEEDS], texts, blind)


if __name__ == "__main__":
    main()
