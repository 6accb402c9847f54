"""A judge's memory of one level of traffic: which likeness meant the same answer here, and which did not.

Every miss that had a candidate gives a free label: the new answer was fetched anyway and can be compared with the one
that would have been served. From these labels a learner keeps a logistic regression (online, Gaussian posterior,
starting from PRIOR), a record of words and of answer groups, and the labelled decisions themselves, so that the error
at any bound can be counted. Four weight vectors are trained, each without a quarter of the decisions, and a decision is
counted under the one that has not seen it (cross-fitting); what serves is their mean. A decision that would not be
served whatever its log-odds (the pair guard refuses it) trains the weights and counts as no evidence.

A label is certain (somebody who knows, or answers equal to the letter), or noisy: a comparison of answers, which errs,
and whose `wrong` says how likely they differ. The weights learn from both; they are counted apart. A decision that was
served is labelled only when it is audited, with probability q, and then stands for 1 / q of its kind.

Log-odds rise with similarity: the weights of similarity, closeness, margin, votes and share are never used below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.features import FEATURES, WIDTH_FEATURES, WORD_CELLS, buffers, describe, digests, update
from index.levels import LEVELS
from index.tokens import WORDS

FOLDS: Final = 4
RING: Final = 4000
"""Labelled decisions kept; the oldest go first."""
GROUPS: Final = 20_000
WRONG_FROM: Final = 0.5

PRIOR: Final[dict[str, float]] = {
    "one": -12.5,
    "similarity": 12.0,
    "margin": 3.0,
    "share": 2.0,
    "votes": 0.7,
    "word_worst": -0.4,
    "word_sum": -0.1,
    "group_size": -0.1,
    "group_record": 0.1,
    "numbers": -2.0,
    "units": -2.0,
    "dates": -2.0,
    "ids": -2.0,
    "quoted": -2.0,
    "code": -2.0,
    "entities": -0.6,
    "negation": -2.5,
    "antonyms": -2.5,
    "question": -0.6,
    "script": -2.0,
    "direction": -2.5,
    "order": -1.0,
}
"""Weights before the first label, set by hand after fits to four streams; features not named start at 0.

They rank, they do not serve: nothing is served on log-odds before labels of the same traffic have counted the error.
Weights trained on some streams helped on others (banking77 at 2 %: .27 to .34 of requests against .24), but not on
every one, and what may be shipped to train on is too little: not shipped (November 2026).
"""
PRECISION: Final = 3.0
"""Of every weight; the intercept's is 0.3. About a dozen labels move a weight by its own size."""
STUBBORN: Final[dict[str, float]] = {"negation": 10.0, "antonyms": 10.0, "direction": 10.0}
_RISING: Final = np.array([FEATURES.index(n) for n in ("similarity", "closeness", "margin", "votes", "share")])


class Considered(NamedTuple):
    """One group of candidates, described."""

    place: int  # of its most similar candidate, in the order given
    group_id: int
    row: NDArray[np.float64]  # (F,)
    words: NDArray[np.int64]  # cells of unmatched words, (n,)
    log_odds: float


class Counts(NamedTuple):
    """Labelled decisions at or above each of LEVELS, certain and noisy ones, and the wrong or alarming among them: as
    they are, and weighted by how many decisions each label stands for."""

    n: list[float]
    wrong: list[float]
    noisy: list[float]
    alarms: list[float]
    weighted: list[float]
    weighted_wrong: list[float]
    weighted_noisy: list[float]
    weighted_alarms: list[float]


class Learner:
    """Not thread-safe; about 0.6 MB when full. Takes and keeps numbers only."""

    def __init__(self) -> None:
        prior = np.array([PRIOR.get(name, 0.0) for name in FEATURES])
        precision = np.array([STUBBORN.get(name, PRECISION) for name in FEATURES])
        precision[0] = 0.3
        self.labelled = 0  # decisions that are evidence, ever
        self.names: Sequence[str] = FEATURES
        self._weights = np.tile(prior, (FOLDS, 1))
        self._spreads = np.tile(np.diag(1.0 / precision), (FOLDS, 1, 1))
        self._used = self._served()
        self._rows = np.zeros((256, WIDTH_FEATURES), np.float32)
        self._wrong = np.zeros(256)
        self._certain = np.zeros(256)
        self._counts_for = np.zeros(256)
        self._folds = np.zeros(256, np.int8)
        self._seen = 0.0
        self._frequency = np.zeros(WORD_CELLS, np.float32)
        self._word_wrong = np.zeros(WORD_CELLS, np.float32)
        self._word_right = np.zeros(WORD_CELLS, np.float32)
        self._groups: dict[int, list[float]] = {}  # id → entries, right, wrong

    def consider(
        self,
        signature: NDArray[np.uint64],
        signatures: NDArray[np.uint64],
        similarities: NDArray[np.float32],
        groups: NDArray[np.int64],
    ) -> list[Considered]:
        """Groups of candidates, most probable first.

        signature (WIDTH,); signatures (k, WIDTH), similarities (k,) descending and groups (k,) of the candidates.
        """
        k = len(similarities)
        if not k:
            return []
        known = [self._groups.get(group) for group in groups.tolist()]
        sizes = np.array([1.0 if g is None else g[0] for g in known])
        records = np.array([0.0 if g is None else np.log((g[1] + 1.0) / (g[2] + 1.0)) for g in known])
        rows, places, words = buffers(k)
        n = describe(
            signature, signatures, similarities, groups, sizes, records, self._seen, self._frequency, self._word_wrong,
            self._word_right, rows, places, words,
        )  # fmt: skip
        odds = rows[:n] @ self._used
        found = [
            Considered(int(places[i]), int(groups[places[i]]), rows[i], words[i][words[i] >= 0], float(odds[i]))
            for i in range(n)
        ]
        found.sort(key=lambda one: -one.log_odds)
        return found

    def log_odds(self, row: NDArray[np.float64]) -> float:
        return float(row @ self._used)

    def see(self, signature: NDArray[np.uint64]) -> None:
        """A text was asked here: its words are that much less rare."""
        found = np.zeros(WORDS, np.int64)
        n = digests(signature, found)
        self._frequency[np.unique(found[:n] & (WORD_CELLS - 1))] += 1.0
        self._seen += 1.0

    def store(self, group_id: int) -> None:
        """An entry joined a group, or founded it."""
        self._group(group_id)[0] += 1.0

    def learn(
        self,
        row: NDArray[np.float64],
        words: NDArray[np.int64],
        group_id: int,
        wrong: float,
        weight: float = 1.0,
        certain: bool = True,
    ) -> None:
        """A label of one decision: how likely the group's answer was the wrong one (0...1; from WRONG_FROM on it counts
        as wrong), and for how many decisions like it the label stands; with 0 it is no evidence."""
        fold = self.labelled % FOLDS
        if weight > 0.0:
            self._keep(row, float(wrong > WRONG_FROM), weight, fold, certain)
        group = self._group(group_id)
        group[1] += 1.0 - wrong
        group[2] += wrong
        cells = np.unique(words)
        self._word_right[cells] += np.float32(1.0 - wrong)
        self._word_wrong[cells] += np.float32(wrong)
        update(self._weights, self._spreads, row, 1.0 - wrong, fold)
        self._used = self._served()

    def levels(self) -> Counts:
        """Labelled decisions at or above each of LEVELS."""
        n = min(self.labelled, RING)
        if not n:
            return Counts(*([0.0] * len(LEVELS) for _ in Counts._fields))
        odds = np.einsum("ij,ij->i", self._rows[:n], _rising(self._weights)[self._folds[:n]])
        order = np.argsort(-odds)
        wrong, certain, weights = self._wrong[:n][order], self._certain[:n][order], self._counts_for[:n][order]
        places = np.searchsorted(-odds[order], -np.array(LEVELS), side="right")

        def summed(values: NDArray[np.float64]) -> list[float]:
            total: list[float] = np.concatenate([[0.0], np.cumsum(values)])[places].tolist()
            return total

        noisy = 1.0 - certain
        plain = (certain, certain * wrong, noisy, noisy * wrong)
        return Counts(*map(summed, plain), *(summed(weights * values) for values in plain))

    def _served(self) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = _rising(self._weights.mean(axis=0, keepdims=True))[0]
        return weights

    def _group(self, group_id: int) -> list[float]:
        group = self._groups.get(group_id)
        if group is None:
            if len(self._groups) >= GROUPS:
                del self._groups[next(iter(self._groups))]
            group = self._groups[group_id] = [0.0, 0.0, 0.0]
        return group

    def _keep(self, row: NDArray[np.float64], wrong: float, weight: float, fold: int, certain: bool) -> None:
        size = len(self._wrong)
        if self.labelled == size < RING:
            more = min(RING, 2 * size)
            self._rows = np.resize(self._rows, (more, WIDTH_FEATURES))
            self._wrong, self._counts_for = np.resize(self._wrong, more), np.resize(self._counts_for, more)
            self._certain = np.resize(self._certain, more)
            self._folds = np.resize(self._folds, more)
        at = self.labelled % RING
        self._rows[at], self._wrong[at], self._counts_for[at], self._folds[at] = row, wrong, weight, fold
        self._certain[at] = certain
        self.labelled += 1


def _rising(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = weights.copy()
    weights[:, _RISING] = np.maximum(weights[:, _RISING], 0.0)
    return weights
