"""An approximate index for one large scope: FAISS inverted lists of int8 codes, removable by a hash direct map.

FAISS only proposes entry ids; the arena's kernel filters and rescores them. Built by the builder thread from copies,
then handed over to the owner thread: never used by two threads at once.

Where the time goes was measured at 100 000 entries (November 2026, 2-core AMD EPYC, AVX2). Comparing a query with every
centroid in float32 costs 40 µs alone and 170 µs when other work has pushed 1.4 MB of centroids out of the cache: here
they are int8 and a kernel of our own finds the lists. FAISS decodes 8-bit codes to float before multiplying, 90 ns a
vector, unless they are "direct signed": then vectors and query are whole numbers and it takes a third.

faiss-cpu 1.15's wheel skips BLAS below 128 000 queries at once, which makes training 3-6 times slower (measured
November 2026); the threshold is lowered here.
"""

from __future__ import annotations

from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from index import kernels
from index.errors import IndexFault

RECALL_GOAL: Final = 0.995
PROPOSALS: Final = 16
_PROBES: Final = (4, 6, 8, 12, 16, 24, 32, 48, 64)
_TOP: Final = 127
QUERIES: Final = 1024
_POINTS_PER_LIST: Final = 24
_LISTS: Final = 3.6
_LIKENESS: Final = 0.93
"""Cosine of a perturbed query to its member: what a reworded question has in the field."""


def prepare_thread() -> None:
    """FAISS settings of this thread and process: one OpenMP thread, BLAS for batches."""
    faiss.omp_set_num_threads(1)
    faiss.cvar.distance_compute_blas_threshold = 20


def perturbed(
    vectors: NDArray[np.float32], rng: np.random.Generator, likeness: float = _LIKENESS
) -> NDArray[np.float32]:
    """Unit vectors (n, d) at the given cosine to each of `vectors`, in random directions."""
    noise = rng.standard_normal(vectors.shape).astype(np.float32)
    noise -= np.einsum("ij,ij->i", noise, vectors)[:, None] * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return np.ascontiguousarray(likeness * vectors + np.sqrt(1 - likeness**2) * noise, dtype=np.float32)


class Approximate:
    """Proposes entry ids of one scope. `built_for` is the number of entries it was trained on."""

    def __init__(self, index: Any, scale: float, built_for: int) -> None:
        self._index = index
        self._scale = np.float32(scale)
        self.built_for = built_for
        self.probes = _PROBES[0]
        self.recall = 0.0
        centroids = index.quantizer.reconstruct_n(0, index.nlist)
        self._scales = np.abs(centroids).max(axis=1) / np.float32(_TOP) + np.float32(1e-12)
        self._centroids = np.rint(centroids / self._scales[:, None]).astype(np.int8)

    @classmethod
    def train(cls, sample: NDArray[np.float32], size: int) -> Approximate:
        """An empty index for about `size` entries, trained on `sample` (n, d). Raises IndexFault."""
        prepare_thread()
        dimension = sample.shape[1]
        lists = max(8, min(int(_LISTS * size**0.5), sample.shape[0] // 8))
        quantizer = faiss.IndexFlatIP(dimension)
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, dimension, lists, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT, False
        )
        index.own_fields = True
        quantizer.this.disown()  # type: ignore[attr-defined]
        index.cp.niter = 8
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = _POINTS_PER_LIST
        index.cp.spherical = True
        try:
            index.train(sample)
        except RuntimeError as fault:
            raise IndexFault("training failed") from fault
        index.set_direct_map_type(
            faiss.DirectMap.Hashtable  # type: ignore[attr-defined]
        )
        return cls(index, _TOP / float(np.abs(sample).max()), size)

    @staticmethod
    def sample_size(size: int) -> int:
        """How many vectors `train` wants of `size`; a quarter is always left to measure recall with."""
        return min(size * 3 // 4, max(1024, int(_LISTS * size**0.5) * _POINTS_PER_LIST))

    @property
    def size(self) -> int:
        return int(self._index.ntotal)

    def _codes(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors as whole numbers -127...127, which is what FAISS stores and multiplies without converting."""
        codes = vectors * self._scale
        np.rint(codes, out=codes)
        return np.clip(codes, -_TOP, _TOP, out=codes)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Enter vectors (n, d) whose ids are not in it."""
        self._index.add_with_ids(self._codes(vectors), ids)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Forget ids; unknown ones are passed over."""
        self._index.remove_ids(faiss.IDSelectorArray(ids))

    def propose(self, query: NDArray[np.float32], n: int) -> NDArray[np.int64]:
        """Entry ids (n,) for one query (d,), best first by codes, -1 where there are fewer."""
        lists = np.empty((1, self.probes), np.int64)
        likeness = np.empty(lists.shape, np.float32)
        kernels.nearest(self._centroids, self._scales, query, lists[0], likeness[0])
        self._index.nprobe = lists.shape[1]
        _, found = self._index.search_preassigned(self._codes(query[None]), n, lists, likeness)
        ids: NDArray[np.int64] = found[0]
        return ids

    def tune(self, queries: NDArray[np.float32], exact: NDArray[np.int64], n: int = PROPOSALS) -> bool:
        """Choose the fewest probes whose recall@1 reaches the goal; whether any did.

        queries (m, d); exact (m,) the id that an exact scan finds first. Recall counts it among n proposals, since the
        kernel rescores them exactly.
        """
        lists = len(self._centroids)
        for probes in _PROBES:
            self.probes = min(probes, lists)
            found = np.stack([self.propose(query, n) for query in queries])
            self.recall = float(np.mean(np.any(found == exact[:, None], axis=1)))
            if self.recall >= RECALL_GOAL + 0.001:
                return True
        return False


class ExactBest:
    """The most similar id of each query, found block by block."""

    def __init__(self, queries: NDArray[np.float32]) -> None:
        self.queries = queries
        self.ids = np.full(queries.shape[0], -1, np.int64)
        self._best = np.full(queries.shape[0], -2.0, np.float32)

    def see(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        similarities = self.queries @ vectors.T
        where = np.argmax(similarities, axis=1)
        values = similarities[np.arange(where.shape[0]), where]
        better = values > self._best
        self._best[better] = values[better]
        self.ids[better] = ids[where[better]]


def sample_queries(vectors: NDArray[np.float32], seed: int = 7) -> NDArray[np.float32]:
    """Perturbed members, (n, d), one per vector: what recall is measured with."""
    return perturbed(vectors, np.random.default_rng(seed))
