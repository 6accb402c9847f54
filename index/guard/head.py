"""The pair guard: whether one answer serves two texts, from the token states that their embeddings came of.

It has two heads. In each, both sides' tokens are projected, softly aligned with the other side's, compared token by
token, pooled and judged; both directions share every weight and the two are joined by sums and differences, so the
logit does not depend on which text was asked. NumPy only: `index.guard.training.learn` is the same in torch, and a test
holds the two together.

The *first* head refuses. The *second* learned from families of questions with look-alikes made to be mistaken for them,
and sees the two texts' likeness as wholes, too. It is asked where the first lets a pair pass, and makes the guard less
sure, never more, and refuses nothing: what they err on together is rare (`index.guard.prior`).

The weights belong to one embedding model, which they name; with any other they are not used.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from index.errors import ModelFault

Array = NDArray[np.float32]
States = NDArray[np.float16] | NDArray[np.float32]

FIRST, SECOND = "weights.safetensors", "second.safetensors"
SHA256 = {
    FIRST: "245d20a59b4a0706d3a44598c3e6442b399c7f106890bd108b5c443d7143e0cb",
    SECOND: "8dca19a1b92d153c316cc2838fab3c616ccc7d091d142e87bf087a8cc3d196c9",
}
MAX_TOKENS = 44  # of a text, special tokens not counted; what the training saw. Longer texts get no opinion
MAX_KEPT = 3  # stored texts that one asked text is compared with
NO_OPINION = math.inf
UNSURE = 1e-6  # the logit of a pair that passes and of which the second head thinks no good

_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""Abramowitz and Stegun 7.1.26: error at most 1.5e-7."""


class _Side(NamedTuple):
    """What a head computes of one text alone."""

    projected: Array  # (tokens, width)
    states: Array  # (layers, tokens, dimension)
    whole: Array  # (layers, dimension), unit rows: the text's direction in each layer


@dataclass(frozen=True, slots=True)
class Head:
    """The weights, float32, and what they belong to. Not changed after loading; any thread may judge.

    Names are those of `learn.build`, with matrices as (in, out) and the constant factors of its forward pass inside.
    """

    source: str  # digest of the embedding model whose states the weights were fitted on
    states: tuple[int, ...]  # its layers
    weights: dict[str, Array]

    @property
    def sees_wholes(self) -> bool:
        """Whether it was fitted on how alike the texts are as wholes, beside their tokens."""
        return len(self.weights["verdict.weight"]) > len(self.weights["judge.bias"])

    def judge(self, asked: States | None, kept: Sequence[States | None]) -> list[float]:
        """As `Guard.judge`."""
        mine = self._side(asked) if asked is not None and _can_judge(asked) else None
        return [
            self._logit(mine, self._side(other)) if mine and other is not None and _can_judge(other) else NO_OPINION
            for other in kept
        ]

    def _side(self, states: States) -> _Side:
        w = self.weights
        x = states.astype(np.float32, copy=False)
        h = x.reshape(len(x), -1) @ w["project.weight"]
        h += w["project.bias"]
        h -= h.mean(axis=1, keepdims=True)
        h /= np.sqrt(np.einsum("tw,tw->t", h, h)[:, None] / h.shape[1] + np.float32(1e-5))
        h *= w["norm.weight"]
        h += w["norm.bias"]
        whole = x.sum(axis=0)
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
        return _Side(h, np.ascontiguousarray(x.transpose(1, 0, 2)), whole)

    def _logit(self, one: _Side, other: _Side) -> float:
        w = self.weights
        (ha, xa, ta), (hb, xb, tb) = one, other
        cosines = xa @ xb.transpose(0, 2, 1)  # (layers, tokens of a, tokens of b)
        match = (ha @ w["key.weight"]) @ (hb @ w["key.weight"]).T
        match += np.tensordot(w["beta"], cosines, 1)
        pa = self._pool(ha, hb, match, cosines)
        pb = self._pool(hb, ha, match.T, cosines.transpose(0, 2, 1))
        features = (pa + pb, np.abs(pa - pb))
        wholes = (np.float32(4) * np.einsum("ld,ld->l", ta, tb) - np.float32(2),) if self.sees_wholes else ()
        hidden = _gelu(np.concatenate((*features, *wholes)) @ w["judge.weight"] + w["judge.bias"])
        return float(np.concatenate((hidden, *wholes)) @ w["verdict.weight"] + w["verdict.bias"][0])

    def _pool(self, mine: Array, theirs: Array, match: Array, cosines: Array) -> Array:
        w = self.weights
        attention: Array = np.exp(match - match.max(axis=1, keepdims=True))
        attention /= attention.sum(axis=1, keepdims=True)
        found = attention @ theirs
        best = cosines.max(axis=2).T
        attended = (cosines * attention).sum(axis=2).T
        order = _order(attention)
        compared = np.concatenate((mine, found, np.abs(mine - found), mine * found, best, attended, order), axis=1)
        tokens = _gelu(compared @ w["compare.weight"] + w["compare.bias"]) @ w["refine.weight"] + w["refine.bias"]
        total = tokens.sum(axis=0)
        return np.concatenate((total / np.float32(len(tokens)), tokens.max(axis=0), total / np.float32(8)))


@dataclass(frozen=True, slots=True)
class Guard:
    """One head, and perhaps a second that was fitted on the same states."""

    first: Head
    second: Head | None = None

    @property
    def source(self) -> str:
        return self.first.source

    @property
    def states(self) -> tuple[int, ...]:
        return self.first.states

    def judge(self, asked: States | None, kept: Sequence[States | None]) -> list[float]:
        """Logits, above 0 where one answer serves both texts. A text is (tokens, layers, dimension), unit rows.

        NO_OPINION for a pair with None, with a text without tokens, or with one of more than MAX_TOKENS.
        """
        found = self.first.judge(asked, kept)
        passing = [place for place, logit in enumerate(found) if 0.0 < logit < NO_OPINION]
        if self.second is not None and passing:
            doubts = self.second.judge(asked, [kept[place] for place in passing])
            for place, logit in zip(passing, doubts, strict=True):
                found[place] = max(UNSURE, min(found[place], logit))
        return found


def load_guard() -> Guard:
    """The guard that is shipped. Raises ModelFault when a file is missing or is not the one that was shipped.

    From now on NumPy's BLAS uses one thread in this process: the head's products are large enough for it to wake
    others, which then spin. Measured 25 Nov 2026, 3 pairs of 13 + 13 tokens every 20 ms, 2 cores: 25 ms of processor
    time a call with two threads, 2.1 ms with one, at the same latency. threadpoolctl is imported here by name, because
    importing it sets an environment variable.
    """
    guard = Guard(_shipped(FIRST), _shipped(SECOND))
    importlib.import_module("threadpoolctl").threadpool_limits(limits=1, user_api="blas")
    return guard


def _shipped(name: str) -> Head:
    try:
        raw = importlib.resources.files("index.guard").joinpath(name).read_bytes()
    except OSError as error:
        raise ModelFault(f"the guard's weights cannot be read: {error.strerror}") from error
    return parse(raw, SHA256[name])


def parse(raw: bytes, digest: str) -> Head:
    """A head from a weight file of this SHA-256. Raises ModelFault for any other, and for one that is not whole."""
    if (found := sha256(raw).hexdigest()) != digest:
        raise ModelFault(f"the guard's weights are damaged: sha256 {found}, not {digest}")
    try:
        size = int.from_bytes(raw[:8], "little")
        about: dict[str, str] = json.loads(raw[8 : 8 + size])["__metadata__"]
        weights = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in load(raw).items()}
        layers = tuple(int(layer) for layer in about["states"].split(","))
        return Head(about["source"], layers, weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFault("the guard's weights are no safetensors file of this program") from error


def _can_judge(states: States) -> bool:
    return 0 < len(states) <= MAX_TOKENS


def _order(attention: Array) -> Array:
    """(tokens, 2): how far the tokens before and after each are from being its neighbours on the other side too."""
    where = attention @ np.arange(attention.shape[1], dtype=np.float32)
    jump = np.zeros(len(where) + 1, dtype=np.float32)
    np.tanh((where[1:] - where[:-1] - np.float32(1)) / np.float32(2), out=jump[1:-1])
    return np.stack((jump[:-1], jump[1:]), axis=1)


def _gelu(x: Array) -> Array:
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    tail = np.float32(_ERF[4]) * t
    for factor in _ERF[3::-1]:
        tail += np.float32(factor)
        tail *= t
    tail *= np.exp(-z * z)  # 1 - erf(|x| / sqrt 2)
    out: Array = np.maximum(x, np.float32(0)) - np.abs(x) * tail * np.float32(0.5)
    return out
