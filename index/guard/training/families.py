"""Pairs of question families: wordings that ask one thing, and look-alikes that ask something else.

A file of `data/families/` holds a family a line, JSON: `id`, `domain`, `wordings` (one right answer serves each of
them), `lookalikes` (near in words; the wordings' answer would be wrong for each, and theirs for one another). All of
them were written for this program, a tenth in German, French and Spanish.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, product
from random import Random

import numpy as np
from numpy.typing import NDArray

from index.guard.training.edits import reword
from index.guard.training.generate import Pair, around

FOLDS = 5
HELD_OUT = 0  # the fold that `train --held-out` leaves out
UNLIKE = 12  # pairs of a wording and a look-alike that are drawn of a family
UNLIKE_TWINS = 4  # pairs of two look-alikes, likewise
EDITED = 4  # pairs of wordings that are also reworded, edited and restricted
REWORDED = (0, 0, 0, 0, 0, 1)  # changes to a side of a pair, each as likely
STRANGERS = 1  # nearest texts of other families that a text is paired with
UNRELATED = (0.4, 0.8)  # cosines of such a pair: farther ones teach nothing, nearer ones may ask the same after all


@dataclass(frozen=True, slots=True)
class Family:
    id: str
    domain: str
    wordings: tuple[str, ...]
    lookalikes: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return self.wordings + self.lookalikes

    def fold(self, count: int) -> int:
        """0 to count - 1, by its name alone: a family that is added moves no other."""
        return int.from_bytes(sha256(self.id.encode()).digest()[:4], "big") % count


def families() -> list[Family]:
    """All that are shipped, in the order of their files' names."""
    folder = importlib.resources.files("index.guard.training").joinpath("data", "families")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".jsonl")), key=lambda file: file.name)
    rows = (json.loads(line) for file in files for line in file.read_text("utf-8").splitlines() if line)
    return [Family(row["id"], row["domain"], tuple(row["wordings"]), tuple(row["lookalikes"])) for row in rows]


def from_families(chosen: Sequence[Family], vectors: Mapping[str, NDArray[np.float32]], seed: int) -> list[Pair]:
    """Pairs within each family, some of their texts reworded; the wordings' edits; and texts of unlike families.

    `vectors` has the unit vector of every text of theirs. What is made of one family does not depend on the others, but
    for the last kind, which leaves the texts as they are.
    """
    return [pair for family in chosen for pair in _within(family, seed)] + _strangers(chosen, vectors)


def _within(family: Family, seed: int) -> Iterator[Pair]:
    rng = Random(f"{seed} {family.id}")
    same = list(combinations(family.wordings, 2))
    unlike = list(product(family.wordings, family.lookalikes))
    twins = list(combinations(family.lookalikes, 2))
    for pairs, label, kind in (
        (same, 1, "wording"),
        (_some(unlike, UNLIKE, rng), 0, "look-alike"),
        (_some(twins, UNLIKE_TWINS, rng), 0, "twins"),
    ):
        for a, b in pairs:
            yield Pair(_perhaps_reworded(a, rng), _perhaps_reworded(b, rng), label, "families", kind)
    yield from around(_some(same, EDITED, rng), "families", rng)


def _some(pairs: Sequence[tuple[str, str]], most: int, rng: Random) -> list[tuple[str, str]]:
    return rng.sample(pairs, min(most, len(pairs)))


def _perhaps_reworded(text: str, rng: Random) -> str:
    return reword(text, rng, rng.choice(REWORDED))


def _strangers(chosen: Sequence[Family], vectors: Mapping[str, NDArray[np.float32]]) -> list[Pair]:
    texts = [(text, family.id) for family in chosen for text in family.texts]
    owner = np.array([family for _, family in texts])
    table = np.stack([vectors[text] for text, _ in texts])
    low, high = UNRELATED
    found = []
    for i, (text, family) in enumerate(texts):
        cosines = np.where(owner == family, -1.0, table @ table[i])
        near = [j for j in np.argsort(-cosines, kind="stable")[: 4 * STRANGERS] if low <= cosines[j] <= high]
        found += [Pair(text, texts[j][0], 0, "families", "stranger") for j in near[:STRANGERS]]
    return found
