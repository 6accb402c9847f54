"""A vector index for tests of other rooms: exact, in the caller's thread, nothing but NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index.errors import IndexFault
from index.tokens import STAMP, WIDTH, WORDS
from index.vectors import Candidate

LOW = 0xFFFFFFFF


def words_of(signature: list[int]) -> dict[int, bool]:
    """Content words of a signature's lanes: digest → is a named entity."""
    digests = [signature[8 + i // 4] >> 16 * (i % 4) & 0xFFFF for i in range(WORDS)]
    return {digest: bool(signature[6] >> i & 1) for i, digest in enumerate(digests) if digest}


def vetoes_of(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> int:
    """The twin of `kernels.veto_bits`, in sets and plain integers."""
    a, b = [int(x) for x in left], [int(x) for x in right]
    found = [half for lane in range(3) for half in ((a[lane] ^ b[lane]) & LOW != 0, (a[lane] ^ b[lane]) >> 32 != 0)]
    words_a, words_b = words_of(a), words_of(b)
    only_a, only_b = words_a.keys() - words_b.keys(), words_b.keys() - words_a.keys()
    named = any(words_a[w] for w in only_a) or any(words_b[w] for w in only_b)
    overflow = (a[6] | b[6]) >> 40 & 1 == 1
    content_differs = (a[7] ^ b[7]) & LOW != 0
    flags = a[6], b[6]
    questions = [flag >> 25 & 15 for flag in flags]
    tongues = [flag >> 36 & 7 for flag in flags]
    one_sided = [(x & ~y, y & ~x) for x, y in ((a[4], a[5]), (b[4], b[5]))]
    (left_a, right_a), (left_b, right_b) = one_sided
    found += [
        named or (overflow and a[7] >> 32 != b[7] >> 32),
        (flags[0] ^ flags[1]) >> 24 & 1 == 1,
        left_a & right_b != 0 or right_a & left_b != 0,
        questions[0] != questions[1] and 0 not in questions and min(questions) <= 11,
        (flags[0] ^ flags[1]) >> 32 & 15 != 0
        or (flags[0] | flags[1]) >> 39 & 1 == 1
        or any(flag >> 48 != STAMP for flag in flags)
        or (tongues[0] != tongues[1] and 0 not in tongues),
        (a[3] ^ b[3]) & LOW != 0,
        (flags[0] ^ flags[1]) >> 29 & 7 != 0,
        not content_differs and a[3] >> 32 != b[3] >> 32,
        bool(only_a and only_b) or (overflow and content_differs),
        bool(only_a) != bool(only_b),
    ]
    return sum(1 << i for i, is_set in enumerate(found) if is_set)


class FakeVectorIndex:
    """Keeps every vector as given and compares with all of a scope."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.rows: dict[int, tuple[bytes, NDArray[np.float32], NDArray[np.uint64], int]] = {}

    def _check(self, vector: NDArray[np.float32]) -> None:
        if vector.shape != (self.dimension,) or vector.dtype != np.float32:
            raise IndexFault("a vector of another shape or type")
        if not abs(float(np.dot(vector, vector)) - 1) <= 1e-3:
            raise IndexFault("not a unit vector")

    async def search(
        self, scope: bytes, vector: NDArray[np.float32], signature: NDArray[np.uint64], now_ms: int, k: int = 8
    ) -> list[Candidate]:
        self._check(vector)
        found = [
            Candidate(entry_id, float(np.dot(row, vector)), vetoes_of(signature, signs), signs)
            for entry_id, (owner, row, signs, expires_ms) in self.rows.items()
            if owner == scope and expires_ms > now_ms
        ]
        return sorted(found, key=lambda candidate: -candidate.similarity)[:k]

    def add(
        self, entry_id: int, scope: bytes, vector: NDArray[np.float32], signature: NDArray[np.uint64], expires_ms: int
    ) -> None:
        self._check(vector)
        if entry_id < 0:
            raise IndexFault("entry ids are not negative")
        self.rows[entry_id] = (scope, vector.copy(), signature.copy(), expires_ms)

    def remove(self, entry_ids: Sequence[int]) -> None:
        for entry_id in entry_ids:
            self.rows.pop(entry_id, None)

    def compare(
        self, vector: NDArray[np.float32], signature: NDArray[np.uint64], row_vector: bytes, row_signature: bytes
    ) -> tuple[float, int]:
        if len(row_vector) != 4 * self.dimension or len(row_signature) != 8 * WIDTH:
            return math.nan, 0
        row, signs = np.frombuffer(row_vector, "<f4"), np.frombuffer(row_signature, "<u8")
        if not abs(float(np.dot(row, row)) - 1) <= 1e-3 or int(signs[6]) >> 48 != STAMP:
            return math.nan, 0
        return float(np.dot(vector, row)), vetoes_of(signature, signs)
