"""How close two texts are token by token, in the states of one pass of the embedding model over each."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from index.embedder import TokenStates

UNSURE: Final = 0.2  # the quantile that tells of the tokens which fit worst


class Closeness(NamedTuple):
    """Each token's best inner product with the other text's, -1...1, at the first and the last layer kept; `low` and
    `high` are of the two directions."""

    early_high: float
    early_low: float
    early_worst_high: float
    early_worst_low: float
    late_high: float
    late_low: float
    late_worst_high: float
    late_worst_low: float


def closeness(one: TokenStates, other: TokenStates) -> Closeness:
    """Of (tokens, layers, dimension) states, unit rows. Symmetric."""
    return Closeness(*_of_layer(one, other, 0), *_of_layer(one, other, -1))


def _of_layer(one: TokenStates, other: TokenStates, layer: int) -> tuple[float, float, float, float]:
    products = one[:, layer].astype(np.float32) @ other[:, layer].astype(np.float32).T
    best = products.max(axis=1), products.max(axis=0)
    means = sorted(float(row.mean()) for row in best)
    worst = sorted(float(np.quantile(row, UNSURE)) for row in best)
    return means[1], means[0], worst[1], worst[0]
