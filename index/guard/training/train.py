"""Train the pair guard's two heads: one command, one seed, CPU.

    python -m index.guard.training.train --data DIR --into index/guard [--held-out FILE] [--leave-out DIR]

DIR holds the licensed pairs, gzip JSON lines: `stream_banking77.jsonl.gz` ({"query", "answer_id"}; CC BY 4.0, PolyAI)
and `pairs_paws_en.jsonl.gz` ({"a", "b", "label"}; PAWS-Wiki, Google, free use with attribution). Everything else is
generated, and for the second head drawn of the families of questions beside this file. No other file of DIR is opened;
`tests/bench/guard.py` and `tests/bench/prior.py` measure.

The token states come of the model as it is served (`index.convert`), so the head learns from what it will see. torch is
imported here alone, and only when something is fitted.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from index.batcher import load_backend
from index.embedder import Backend
from index.guard.head import FIRST, MAX_TOKENS, SECOND
from index.guard.training.families import FOLDS, HELD_OUT, families, from_families
from index.guard.training.generate import Pair, around, from_grammar
from index.guard.training.learn import Recipe, States, Weights, fit
from index.model import locate
from index.quiet import library

log = logging.getLogger(__name__)

MEANINGS = 3  # drawn of each frame
NEIGHBOURS = 30
ALIKE = 0.55  # cosine from which two questions of a bank count as neighbours
CLOSEST = 0.6  # share of the neighbours with another answer that may become a pair: the nearer ones
INTENT_PAIRS = 4500  # of each label
SECOND_VISITS = 200_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m index.guard.training.train", description="Train the pair guard.")
    parser.add_argument("--data", type=Path, required=True, help="directory of the licensed pairs")
    parser.add_argument("--into", type=Path, required=True, help="directory of the weight files to write")
    parser.add_argument("--held-out", type=Path, help="also a second head without one fold of the families, as FILE")
    parser.add_argument("--leave-out", type=Path, help="also train without each source in turn, into this directory")
    parser.add_argument("--work", type=Path, help="where the converted model is kept between runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        backend = asyncio.run(load_backend(work))
        source = locate(None, work / "models").digest
        sources = training_pairs(options.data, backend, options.seed)
        states, _ = encode(backend, texts_of(sources.values()))
        written = families()
        told, vectors = encode(backend, [text for family in written for text in family.texts])
        kin = from_families(written, vectors, options.seed)
        made, _ = encode(backend, [text for text in texts_of([kin]) if text not in vectors])
    fits = limited(sources, states)
    about = {"source": source, "states": ",".join(map(str, backend.states))}
    log.info("pairs: %s", ", ".join(f"{name} {len(pairs)}" for name, pairs in fits.items()))
    one_thread()

    def train(path: Path, pairs: list[Pair], states: States, recipe: Recipe) -> None:
        raw = save(exported(fit(pairs, states, recipe, log.info), recipe), about)
        path.write_bytes(raw)
        log.info("%s: %d bytes, sha256 %s", path, len(raw), sha256(raw).hexdigest())

    first = Recipe(seed=options.seed)
    second = replace(first, visits=SECOND_VISITS, wholes=True)
    with_families = States.joined([states, told, made])

    def train_second(path: Path, kin: list[Pair]) -> None:
        train(path, every(limited(sources | {"families": kin}, with_families)), with_families, second)

    train(options.into / FIRST, every(fits), states, first)
    train_second(options.into / SECOND, kin)
    if options.held_out:
        seen = [family for family in written if family.fold(FOLDS) != HELD_OUT]
        train_second(options.held_out, from_families(seen, vectors, options.seed))
    if options.leave_out:
        options.leave_out.mkdir(parents=True, exist_ok=True)
        for left_out in fits:
            others = {name: pairs for name, pairs in fits.items() if name != left_out}
            train(options.leave_out / f"without-{left_out}.safetensors", every(others), states, first)
        unedited = {name: [pair for pair in pairs if not is_edited(pair)] for name, pairs in fits.items()}
        train(options.leave_out / "without-edits.safetensors", every(unedited), states, first)
    return 0


def is_edited(pair: Pair) -> bool:
    return pair.kind.startswith(("edit", "both"))


def one_thread() -> None:
    """Sums are then always taken in the same order, so a seed fixes the weights."""
    torch = library("torch")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# Pairs.


def training_pairs(data: Path, backend: Backend, seed: int) -> dict[str, list[Pair]]:
    """Pairs by source. The licensed ones are also reworded, edited and restricted."""
    rng = Random(seed)
    rows = read(data / "pairs_paws_en.jsonl.gz")
    paws = [Pair(row["a"], row["b"], int(row["label"]), "paws", "paws") for row in rows]
    intents = intent_pairs(read(data / "stream_banking77.jsonl.gz"), backend, rng)
    return {
        "grammar": from_grammar(rng, MEANINGS),
        "banking77": intents + around([pair[:2] for pair in intents if pair.label], "banking77", rng),
        "paws": paws + around([pair[:2] for pair in paws if pair.label], "paws", rng),
    }


def intent_pairs(rows: Sequence[Any], backend: Backend, rng: Random) -> list[Pair]:
    """Neighbours among questions with known answers: as many with the same answer as with another."""
    texts = [row["query"] for row in rows]
    _, vectors = encode(backend, texts)
    table = np.stack([vectors[text] for text in texts])
    same: list[Pair] = []
    other: list[Pair] = []
    for i, text in enumerate(texts):
        cosines = table @ table[i]
        cosines[i] = -1.0
        near = [j for j in np.argsort(-cosines, kind="stable")[:NEIGHBOURS] if cosines[j] >= ALIKE]
        alike = [j for j in near if rows[j]["answer_id"] == rows[i]["answer_id"]]
        unlike = [j for j in near if rows[j]["answer_id"] != rows[i]["answer_id"]]
        if alike:
            same.append(Pair(text, texts[rng.choice(alike)], 1, "banking77", "intent"))
        if unlike:
            nearer = unlike[: max(1, round(len(unlike) * CLOSEST))]
            other.append(Pair(text, texts[rng.choice(nearer)], 0, "banking77", "intent"))
    rng.shuffle(same)
    rng.shuffle(other)
    return same[:INTENT_PAIRS] + other[:INTENT_PAIRS]


def read(path: Path) -> list[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts_of(groups: Iterable[Sequence[Pair]]) -> list[str]:
    return list(dict.fromkeys(text for pairs in groups for pair in pairs for text in pair[:2]))


def limited(groups: dict[str, list[Pair]], states: States) -> dict[str, list[Pair]]:
    """Without the pairs of which a text is too long for the guard, or has no token."""
    return {
        name: [pair for pair in pairs if pair.a in states.place and pair.b in states.place]
        for name, pairs in groups.items()
    }


def every(sources: dict[str, list[Pair]]) -> list[Pair]:
    pairs = [pair for group in sources.values() for pair in group]
    Random(0).shuffle(pairs)
    return pairs


# States.


def encode(backend: Backend, texts: Sequence[str]) -> tuple[States, dict[str, NDArray[np.float32]]]:
    """States of the texts that the guard may judge, and the vector of each text. About 200 texts a second."""
    rows = sorted(((backend.tokens(text), text) for text in dict.fromkeys(texts)), key=lambda row: len(row[0]))
    parts, place, vectors = [], {}, {}
    first = 0
    at = 0
    while at < len(rows):
        length = len(rows[at][0])
        upto = at + 1
        while upto < len(rows) and upto - at < backend.batch_limit and len(rows[upto][0]) == length:
            upto += 1
        batch = rows[at:upto]
        found, states = backend.encode_states([ids for ids, _ in batch])
        for (_, text), vector, one in zip(batch, found, states, strict=True):
            vectors[text] = vector
            if 0 < len(one) <= MAX_TOKENS:
                parts.append(one)
                place[text] = (first, first + len(one))
                first += len(one)
        at = upto
    return States(np.concatenate(parts), place), vectors


# Weights.


def exported(model: Any, recipe: Recipe) -> dict[str, NDArray[np.float16]]:
    """The module's parameters as `head` multiplies them: matrices (in, out), constant factors inside, float16."""
    weights: Weights = {name: value.numpy().astype(np.float32) for name, value in model.state_dict().items()}
    dimension = weights["project.weight"].shape[1] // len(weights["beta"])
    weights["project.weight"] *= dimension**0.5
    weights["key.weight"] *= recipe.width**-0.25
    weights["verdict.weight"] = weights["verdict.weight"][0]
    return {
        name: np.ascontiguousarray(value.T if value.ndim == 2 else value, dtype=np.float16)
        for name, value in sorted(weights.items())
    }


if __name__ == "__main__":
    sys.exit(main())
