"""Numba kernels of the index: contiguous arrays in, arrays out, no objects, no allocation inside loops.

A stored vector is a row of int16 fixed-point numbers with one float32 scale: half the memory of float32, inner products
within 1e-5 of it for embeddings. Which slots belong to a scope is a doubly linked list over int32 slot numbers, and
entry ids are found by an open-addressing table. Every kernel releases the GIL and is compiled by `compile_kernels`,
before ready; with NUMBA_DISABLE_JIT=1 the same functions run as plain Python.

There are few of them, each with one set of argument types, because compiling is most of a start: what NumPy does as
well in bulk (quantising, expiry, moving rows) is not here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from index.tokens import STAMP, WIDTH, WORDS

F = TypeVar("F", bound=Callable[..., Any])

EMPTY: Final = -1
"""An unused cell of the id table, and the end of a chain of slots."""

_compiling = threading.Lock()


def kernel(*, fastmath: set[str] | bool, inline: Literal["never", "always"] = "never") -> Callable[[F], F]:
    """Compiles at the first call, which releases the GIL. `fastmath`: what LLVM may assume of floats."""
    return cast(Callable[[F], F], numba.njit(nogil=True, fastmath=fastmath, boundscheck=False, inline=inline))


_FAST: Final = {"reassoc", "contract", "arcp"}
_kernel = kernel(fastmath=_FAST)
_part = kernel(fastmath=_FAST, inline="always")  # compiled within its kernels: alone it costs a start more


@_kernel
def veto_bits(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> int:
    """The veto set of two signatures, (WIDTH,) uint64 each: bit i is `tokens.GUARDS[i]`. Symmetric."""
    low = np.uint64(0xFFFFFFFF)
    s32 = np.uint64(32)
    one = np.uint64(1)
    out = 0
    for lane in range(3):
        x = a[lane] ^ b[lane]
        if x & low:
            out |= 1 << (2 * lane)
        if x >> s32:
            out |= 1 << (2 * lane + 1)
    fa = a[6]
    fb = b[6]
    # content words: two-pointer walk over two ascending lists of 16-bit digests
    only_a = 0
    only_b = 0
    named = False
    i = 0
    j = 0
    while i < WORDS or j < WORDS:
        wa = (a[8 + (i >> 2)] >> np.uint64(16 * (i & 3))) & np.uint64(0xFFFF) if i < WORDS else np.uint64(0)
        wb = (b[8 + (j >> 2)] >> np.uint64(16 * (j & 3))) & np.uint64(0xFFFF) if j < WORDS else np.uint64(0)
        if wa == 0 and wb == 0:
            break
        if wa == wb:
            i += 1
            j += 1
        elif wb == 0 or (wa != 0 and wa < wb):
            only_a += 1
            named = named or (fa >> np.uint64(i)) & one != 0
            i += 1
        else:
            only_b += 1
            named = named or (fb >> np.uint64(j)) & one != 0
            j += 1
    overflow = ((fa | fb) >> np.uint64(40)) & one != 0
    content_differs = (a[7] ^ b[7]) & low != 0
    if named or (overflow and (a[7] ^ b[7]) >> s32 != 0):
        out |= 1 << 6
    if ((fa ^ fb) >> np.uint64(24)) & one:
        out |= 1 << 7
    la = a[4] & ~a[5]
    ra = a[5] & ~a[4]
    lb = b[4] & ~b[5]
    rb = b[5] & ~b[4]
    if (la & rb) | (ra & lb):
        out |= 1 << 8
    qa = (fa >> np.uint64(25)) & np.uint64(15)
    qb = (fb >> np.uint64(25)) & np.uint64(15)
    if qa != qb and qa != 0 and qb != 0 and (qa <= 11 or qb <= 11):
        out |= 1 << 9
    script_differs = ((fa ^ fb) >> np.uint64(32)) & np.uint64(15) != 0
    tongue_a = (fa >> np.uint64(36)) & np.uint64(7)
    tongue_b = (fb >> np.uint64(36)) & np.uint64(7)
    hidden = ((fa | fb) >> np.uint64(39)) & one != 0
    foreign_rules = fa >> np.uint64(48) != np.uint64(STAMP) or fb >> np.uint64(48) != np.uint64(STAMP)
    if script_differs or hidden or foreign_rules or (tongue_a != tongue_b and tongue_a != 0 and tongue_b != 0):
        out |= 1 << 10
    if (a[3] ^ b[3]) & low:
        out |= 1 << 11
    if ((fa ^ fb) >> np.uint64(29)) & np.uint64(7):
        out |= 1 << 12
    if not content_differs and (a[3] ^ b[3]) >> s32:
        out |= 1 << 13
    if (only_a > 0 and only_b > 0) or (overflow and content_differs):
        out |= 1 << 14
    if (only_a > 0) != (only_b > 0):
        out |= 1 << 15
    return out


@_kernel
def chain(heads: NDArray[np.int32], after: NDArray[np.int32], scope: int, out: NDArray[np.int32]) -> int:
    """Write the slots of a scope into `out` ((n,) int32, large enough or cut); returns how many."""
    n = 0
    slot = heads[scope]
    while slot >= 0 and n < out.shape[0]:
        out[n] = slot
        n += 1
        slot = after[slot]
    return n


@_part
def _keep(best: NDArray[Any], similarities: NDArray[np.float32], kept: int, found: int, similarity: float) -> int:
    """Put one more among the `kept` best (k,), descending, after its equals; returns how many are kept now."""
    k = best.shape[0]
    if kept == k and not similarity > similarities[k - 1]:
        return kept
    place = kept if kept < k else k - 1
    while place > 0 and similarities[place - 1] < similarity:
        similarities[place] = similarities[place - 1]
        best[place] = best[place - 1]
        place -= 1
    similarities[place] = similarity
    best[place] = found
    return kept + 1 if kept < k else k


@_kernel
def rank(
    rows: NDArray[np.int16],
    scales: NDArray[np.float32],
    signatures: NDArray[np.uint64],
    scopes: NDArray[np.int32],
    expires_ms: NDArray[np.int64],
    slots: NDArray[np.int32],
    n: int,
    scope: int,
    now_ms: int,
    query: NDArray[np.float32],
    query_signature: NDArray[np.uint64],
    best_slots: NDArray[np.int32],
    best_similarities: NDArray[np.float32],
    best_vetoes: NDArray[np.int64],
) -> int:
    """Keep the most similar of slots[:n] that are of this scope and fresh, descending; returns how many were kept.

    rows (m, d) int16, scales (m,), signatures (m, WIDTH), scopes (m,) and expires_ms (m,) are the arena; the three
    `best_*` arrays (k,) are written. Equal similarities keep the order of `slots`.
    """
    kept = 0
    for i in range(n):
        slot = slots[i]
        if slot < 0 or scopes[slot] != scope or expires_ms[slot] <= now_ms:
            continue
        similarity = np.float32(0.0)
        for j in range(query.shape[0]):
            similarity += np.float32(rows[slot, j]) * query[j]
        similarity *= scales[slot]
        kept = _keep(best_slots, best_similarities, kept, slot, similarity)
    for i in range(kept):
        best_vetoes[i] = veto_bits(query_signature, signatures[best_slots[i]])
    return kept


@_kernel
def nearest(
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    query: NDArray[np.float32],
    best: NDArray[np.int64],
    similarities: NDArray[np.float32],
) -> int:
    """The rows most like a query, descending: row numbers into `best` (k,); returns how many.

    codes (m, d) int8, value = code * scales[row]. A quarter of the memory of float32 keeps a coarse quantizer in the
    processor's cache, where other work would otherwise push it out between two searches.
    """
    kept = 0
    for i in range(codes.shape[0]):
        similarity = np.float32(0.0)
        for j in range(query.shape[0]):
            similarity += np.float32(codes[i, j]) * query[j]
        similarity *= scales[i]
        kept = _keep(best, similarities, kept, i, similarity)
    return kept


@_kernel
def _cell(entry_id: int, last: int) -> int:
    mixed = ((entry_id ^ (entry_id >> 31)) & 0xFFFFFFFF) * 0x5BD1E995  # below 2**63: no overflow in plain Python
    return (mixed ^ (mixed >> 24)) & last


@_part
def _find(keys: NDArray[np.int64], values: NDArray[np.int32], entry_id: int) -> int:
    """The cell of an entry id, or the unused one where it belongs."""
    last = keys.shape[0] - 1
    cell = _cell(entry_id, last)
    while values[cell] >= 0 and keys[cell] != entry_id:
        cell = (cell + 1) & last
    return cell


@_kernel
def find_many(
    keys: NDArray[np.int64], values: NDArray[np.int32], entry_ids: NDArray[np.int64], out: NDArray[np.int32]
) -> int:
    """Slots of entry ids, in order, without the unknown; returns how many were written.

    keys and values (m,) are the table: m is a power of two, a cell with value -1 is unused, and it is never full.
    """
    n = 0
    for i in range(entry_ids.shape[0]):
        cell = _find(keys, values, entry_ids[i])
        if values[cell] >= 0:
            out[n] = values[cell]
            n += 1
    return n


@_kernel
def enter_many(
    keys: NDArray[np.int64],
    values: NDArray[np.int32],
    heads: NDArray[np.int32],
    after: NDArray[np.int32],
    ahead: NDArray[np.int32],
    ids: NDArray[np.int64],
    scopes: NDArray[np.int32],
    counts: NDArray[np.int32],
    slots: NDArray[np.int32],
) -> None:
    """Enter slots whose ids and scopes are already written: id table, head of the scope's chain, count per scope.

    The ids must not be in the table.
    """
    for i in range(slots.shape[0]):
        slot = slots[i]
        cell = _find(keys, values, ids[slot])
        keys[cell] = ids[slot]
        values[cell] = slot
        scope = scopes[slot]
        head = heads[scope]
        after[slot] = head
        ahead[slot] = -1
        if head >= 0:
            ahead[head] = slot
        heads[scope] = slot
        counts[scope] += 1


@_kernel
def leave_many(
    keys: NDArray[np.int64],
    values: NDArray[np.int32],
    heads: NDArray[np.int32],
    after: NDArray[np.int32],
    ahead: NDArray[np.int32],
    ids: NDArray[np.int64],
    scopes: NDArray[np.int32],
    counts: NDArray[np.int32],
    entry_ids: NDArray[np.int64],
    out: NDArray[np.int32],
) -> int:
    """Undo `enter_many` for entry ids; unknown ones are passed over. Writes the slots, returns how many.

    The slots keep their ids and scopes for the caller. Later cells of the table move up, so no tombstones gather.
    """
    last = keys.shape[0] - 1
    n = 0
    for i in range(entry_ids.shape[0]):
        hole = _find(keys, values, entry_ids[i])
        slot = values[hole]
        if slot < 0:
            continue
        cell = (hole + 1) & last
        while values[cell] >= 0:
            home = _cell(keys[cell], last)
            if ((cell - home) & last) >= ((cell - hole) & last):
                keys[hole] = keys[cell]
                values[hole] = values[cell]
                hole = cell
            cell = (cell + 1) & last
        values[hole] = -1
        if ahead[slot] >= 0:
            after[ahead[slot]] = after[slot]
        else:
            heads[scopes[slot]] = after[slot]
        if after[slot] >= 0:
            ahead[after[slot]] = ahead[slot]
        counts[scopes[slot]] -= 1
        out[n] = slot
        n += 1
    return n


def compiles() -> bool:
    """False where Numba was told to compile nothing: the kernels are plain Python then, and slow."""
    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


def compile_kernels(dimension: int = 384) -> None:
    """Compile every kernel for the types the index uses, by running each once. About 2.5 s; never inside a request.

    Any thread may call it, and while one does the others wait; afterwards it returns at once.
    """
    with _compiling:
        rows = np.zeros((4, dimension), np.int16)
        scales = np.ones(4, np.float32)
        signatures = np.zeros((4, WIDTH), np.uint64)
        vector = np.zeros(dimension, np.float32)
        heads, counts = np.full(2, -1, np.int32), np.zeros(2, np.int32)
        after, ahead = np.full(4, -1, np.int32), np.full(4, -1, np.int32)
        slots, scopes = np.zeros(1, np.int32), np.zeros(4, np.int32)
        ids, expires = np.zeros(4, np.int64), np.zeros(4, np.int64)
        table = np.zeros(8, np.int64), np.full(8, -1, np.int32)
        enter_many(*table, heads, after, ahead, ids, scopes, counts, slots)
        find_many(*table, ids[:1], slots)
        chain(heads, after, 0, slots)
        best = (np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros(2, np.int64))
        rank(rows, scales, signatures, scopes, expires, slots, 1, 0, -1, vector, signatures[0], *best)
        nearest(np.zeros((4, dimension), np.int8), scales, vector, np.zeros(1, np.int64), np.zeros(1, np.float32))
        leave_many(*table, heads, after, ahead, ids, scopes, counts, ids[:1], slots)
        veto_bits(signatures[0], signatures[1])
