"""What two texts show about having the same answer, as numbers: one row per group of candidates.

Candidates whose answers were found to be the same form a group; what is asked of a group is asked of its most similar
member. Everything comes from signatures, similarities and counts kept by a learner, so no text is needed; one Numba
kernel does a lookup's candidates together (8 candidates: 8 µs, 2-core AMD EPYC, November 2026).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from index import kernels
from index.tokens import GUARDS, STAMP, WIDTH, WORDS

OWN: Final = (
    "one",
    "similarity",
    "closeness",  # -log(1 - similarity)
    "margin",  # to the best candidate of another group
    "votes",  # log of how many candidates are of this group
    "share",  # of this group in the candidates, weighted by exp(25 x similarity)
    "unmatched_asked",  # summed rarity of the words only the new text has
    "unmatched_kept",  # and only the stored one has
    "word_worst",  # the worst record among unmatched words
    "word_sum",  # and the sum of their records
    "group_size",  # log of entries in the group
    "group_record",  # log ratio of right to wrong so far
)
FEATURES: Final = OWN + GUARDS
"""Names of the columns. The last are the veto bits, 0 or 1."""
WIDTH_FEATURES: Final = len(FEATURES)
WORD_CELLS: Final = 4096
"""Words are counted by their 16-bit digest, folded; two words that share a cell share a record."""
UNMATCHED: Final = 2 * WORDS
CANDIDATES: Final = 16
_SHARPNESS: Final = 25.0
_ALONE: Final = 0.05  # margin taken when every candidate is of one group
_ONLY: Final = 0.3  # and when there is one candidate


_kernel = kernels.kernel(fastmath=False)


@_kernel
def digests(signature: NDArray[np.uint64], out: NDArray[np.int64]) -> int:
    """Content words of a signature into `out` (WORDS,), ascending; returns how many."""
    n = 0
    for lane in range(8, 14):
        for quarter in range(4):
            word = (signature[lane] >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)
            if word != np.uint64(0):
                out[n] = np.int64(word)
                n += 1
    return n


@_kernel
def describe(
    asked: NDArray[np.uint64],
    signatures: NDArray[np.uint64],
    similarities: NDArray[np.float32],
    groups: NDArray[np.int64],
    sizes: NDArray[np.float64],
    records: NDArray[np.float64],
    seen: float,
    frequency: NDArray[np.float32],
    wrong: NDArray[np.float32],
    right: NDArray[np.float32],
    rows: NDArray[np.float64],
    places: NDArray[np.int64],
    words: NDArray[np.int64],
) -> int:
    """Describe each group among k candidates, best first; returns how many groups.

    asked (WIDTH,), signatures (k, WIDTH), similarities (k,) descending, groups (k,), sizes and records (k,) of the
    candidate's group. frequency, wrong and right (WORD_CELLS,) count words of `seen` texts. Written: rows (k, F),
    places (k,) of each group's best candidate, words (k, UNMATCHED) cells of unmatched words, -1 where there are fewer.
    """
    k = similarities.shape[0]
    cells = frequency.shape[0] - 1
    mine = np.empty(WORDS, np.int64)
    theirs = np.empty(WORDS, np.int64)
    n_mine = digests(asked, mine)
    total = 0.0
    for i in range(k):
        total += np.exp(25.0 * (similarities[i] - similarities[0]))
    found = 0
    for i in range(k):
        first = True
        for j in range(i):
            if groups[j] == groups[i]:
                first = False
                break
        if not first:
            continue
        other = -2.0
        votes = 0.0
        share = 0.0
        for j in range(k):
            if groups[j] == groups[i]:
                votes += 1.0
                share += np.exp(25.0 * (similarities[j] - similarities[0]))
            elif similarities[j] > other:
                other = similarities[j]
        similarity = float(similarities[i])
        if other < -1.5:
            other = min(float(similarities[k - 1]), similarity - 0.05) if k > 1 else similarity - 0.3
        n_theirs = digests(signatures[i], theirs)
        rarity_mine = 0.0
        rarity_theirs = 0.0
        worst = 0.0
        record = 0.0
        unmatched = 0
        a = 0
        b = 0
        while a < n_mine or b < n_theirs:
            if a < n_mine and b < n_theirs and mine[a] == theirs[b]:
                a += 1
                b += 1
                continue
            if b >= n_theirs or (a < n_mine and mine[a] < theirs[b]):
                cell = mine[a] & cells
                rarity_mine += np.log((seen + 2.0) / (frequency[cell] + 1.0))
                a += 1
            else:
                cell = theirs[b] & cells
                rarity_theirs += np.log((seen + 2.0) / (frequency[cell] + 1.0))
                b += 1
            words[found, unmatched] = cell
            unmatched += 1
            if wrong[cell] + right[cell] > 0.0:
                evidence = np.log((wrong[cell] + 0.5) / (right[cell] + 1.0))
                record += evidence
                worst = max(worst, evidence)
        for j in range(unmatched, words.shape[1]):
            words[found, j] = -1
        row = rows[found]
        row[0] = 1.0
        row[1] = similarity
        row[2] = -np.log(max(1.0 - similarity, 1e-3))
        row[3] = similarity - other
        row[4] = np.log(votes)
        row[5] = share / total
        row[6] = rarity_mine
        row[7] = rarity_theirs
        row[8] = worst
        row[9] = record
        row[10] = np.log(max(sizes[i], 1.0))
        row[11] = records[i]
        vetoes = kernels.veto_bits(asked, signatures[i])
        for bit in range(row.shape[0] - 12):
            row[12 + bit] = float((vetoes >> bit) & 1)
        places[found] = i
        found += 1
    return found


@_kernel
def update(
    weights: NDArray[np.float64], spreads: NDArray[np.float64], row: NDArray[np.float64], same: float, skipped: int
) -> None:
    """One step of online logistic regression for every fold but `skipped` (-1: all).

    weights (folds, F), spreads (folds, F, F): mean and covariance of a Gaussian, updated by Laplace's approximation
    with the Hessian of this row added to the precision (Sherman and Morrison 1950 for its inverse).
    """
    size = row.shape[0]
    pushed = np.empty(size)
    for fold in range(weights.shape[0]):
        if fold == skipped:
            continue
        z = 0.0
        for i in range(size):
            z += weights[fold, i] * row[i]
        p = 1.0 / (1.0 + np.exp(-max(-30.0, min(30.0, z))))
        curvature = max(p * (1.0 - p), 0.002)
        spread = spreads[fold]
        length = 0.0
        for i in range(size):
            total = 0.0
            for j in range(size):
                total += spread[i, j] * row[j]
            pushed[i] = total
            length += total * row[i]
        shrink = curvature / (1.0 + curvature * length)
        for i in range(size):
            for j in range(size):
                spread[i, j] -= shrink * pushed[i] * pushed[j]
        step = (same - p) / (1.0 + curvature * length)
        for i in range(size):
            weights[fold, i] += step * pushed[i]


def compile_features() -> None:
    """Compile the kernels for the types a learner uses; about 2 s, never inside a request."""
    signatures = np.zeros((2, WIDTH), np.uint64)
    signatures[:, 6] = np.uint64(STAMP) << np.uint64(48)
    numbers, counts = np.zeros(2), np.zeros(WORD_CELLS, np.float32)
    rows, places, words = buffers(2)
    describe(
        signatures[0], signatures, np.ones(2, np.float32), np.zeros(2, np.int64), numbers, numbers, 0.0, counts, counts,
        counts, rows, places, words,
    )  # fmt: skip
    update(np.zeros((1, WIDTH_FEATURES)), np.eye(WIDTH_FEATURES)[None], rows[0], 1.0, -1)


def buffers(k: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """rows (k, F), places (k,) and words (k, UNMATCHED) for `describe` to write."""
    return np.zeros((k, WIDTH_FEATURES)), np.zeros(k, np.int64), np.full((k, UNMATCHED), -1, np.int64)
