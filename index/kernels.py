"""Numba kernels of the index: contiguous arrays in, arrays out, no objects, no allocation inside loops.

A stored vector is a row of int16 fixed-point numbers with one float32 scale: half the memory of float32, inner products
within 1e-5 of it for embeddings. Which slots belong to a scope is a doubly linked list over int32 slot numbers, and
entry ids are found by an open-addressing table. Every kernel releases the GIL and is compiled by `compile_kernels`,
before ready; with NUMBA_DISABLE_JIT=1 the same functions run as plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from index.tokens import STAMP, WIDTH, WORDS

F = TypeVar("F", bound=Callable[..., Any])

EMPTY: Final = -1
"""An unused cell of the id table, and the end of a chain of slots."""

_FIXED_POINT: Final = np.float32(32767.0)


def _kernel(function: F) -> F:
    return cast(F, numba.njit(nogil=True, fastmath={"reassoc", "contract", "arcp"}, boundscheck=False)(function))


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
def quantise(vector: NDArray[np.float32], row: NDArray[np.int16]) -> float:
    """Write a vector as fixed point into `row`; returns its scale (value = row * scale)."""
    top = np.float32(0.0)
    for j in range(vector.shape[0]):
        x = abs(vector[j])
        top = max(x, top)
    scale = top / _FIXED_POINT if top > 0 else np.float32(1.0)
    for j in range(vector.shape[0]):
        row[j] = np.int16(np.rint(vector[j] / scale))
    return scale  # type: ignore[return-value]


@_kernel
def inner(row: NDArray[np.int16], scale: float, query: NDArray[np.float32]) -> float:
    """Inner product of one fixed-point row with a float32 query."""
    total = np.float32(0.0)
    for j in range(query.shape[0]):
        total += np.float32(row[j]) * query[j]
    return total * np.float32(scale)  # type: ignore[return-value]


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
    k = best_slots.shape[0]
    kept = 0
    for i in range(n):
        slot = slots[i]
        if slot < 0 or scopes[slot] != scope or expires_ms[slot] <= now_ms:
            continue
        similarity = np.float32(0.0)
        for j in range(query.shape[0]):
            similarity += np.float32(rows[slot, j]) * query[j]
        similarity *= scales[slot]
        if kept == k and not similarity > best_similarities[k - 1]:
            continue
        place = kept if kept < k else k - 1
        while place > 0 and best_similarities[place - 1] < similarity:
            best_similarities[place] = best_similarities[place - 1]
            best_slots[place] = best_slots[place - 1]
            place -= 1
        best_similarities[place] = similarity
        best_slots[place] = slot
        if kept < k:
            kept += 1
    for i in range(kept):
        best_vetoes[i] = veto_bits(query_signature, signatures[best_slots[i]])
    return kept


@_kernel
def _cell(entry_id: int, size: int) -> int:
    mixed = ((entry_id ^ (entry_id >> 31)) & 0xFFFFFFFF) * 0x5BD1E995  # below 2**63: no overflow in plain Python
    return int((mixed ^ (mixed >> 24)) & (size - 1))


@_kernel
def table_find(keys: NDArray[np.int64], values: NDArray[np.int32], entry_id: int) -> int:
    """Slot of an entry id, or -1. The table's size is a power of two and it is never full."""
    size = keys.shape[0]
    cell = _cell(entry_id, size)
    while values[cell] >= 0:
        if keys[cell] == entry_id:
            return int(values[cell])
        cell = (cell + 1) & (size - 1)
    return -1


@_kernel
def table_put(keys: NDArray[np.int64], values: NDArray[np.int32], entry_id: int, slot: int) -> None:
    size = keys.shape[0]
    cell = _cell(entry_id, size)
    while values[cell] >= 0 and keys[cell] != entry_id:
        cell = (cell + 1) & (size - 1)
    keys[cell] = entry_id
    values[cell] = slot


@_kernel
def table_take(keys: NDArray[np.int64], values: NDArray[np.int32], entry_id: int) -> int:
    """Remove an entry id; returns its slot or -1. Later cells move up, so no tombstones gather."""
    size = keys.shape[0]
    cell = _cell(entry_id, size)
    while values[cell] >= 0 and keys[cell] != entry_id:
        cell = (cell + 1) & (size - 1)
    if values[cell] < 0:
        return -1
    slot = int(values[cell])
    hole = cell
    cell = (cell + 1) & (size - 1)
    while values[cell] >= 0:
        home = _cell(keys[cell], size)
        if ((cell - home) & (size - 1)) >= ((cell - hole) & (size - 1)):
            keys[hole] = keys[cell]
            values[hole] = values[cell]
            hole = cell
        cell = (cell + 1) & (size - 1)
    values[hole] = -1
    return slot


@_kernel
def table_fill(keys: NDArray[np.int64], values: NDArray[np.int32], ids: NDArray[np.int64], n: int) -> None:
    """Enter ids[slot] for every live slot below n (a free slot has id -1)."""
    for slot in range(n):
        if ids[slot] >= 0:
            table_put(keys, values, ids[slot], slot)


@_kernel
def link(heads: NDArray[np.int32], after: NDArray[np.int32], ahead: NDArray[np.int32], scope: int, slot: int) -> None:
    """Put a slot at the head of its scope's chain."""
    head = heads[scope]
    after[slot] = head
    ahead[slot] = -1
    if head >= 0:
        ahead[head] = slot
    heads[scope] = slot


@_kernel
def unlink(heads: NDArray[np.int32], after: NDArray[np.int32], ahead: NDArray[np.int32], scope: int, slot: int) -> None:
    """Take a slot out of its scope's chain."""
    if ahead[slot] >= 0:
        after[ahead[slot]] = after[slot]
    else:
        heads[scope] = after[slot]
    if after[slot] >= 0:
        ahead[after[slot]] = ahead[slot]


@_kernel
def find_many(
    keys: NDArray[np.int64], values: NDArray[np.int32], entry_ids: NDArray[np.int64], out: NDArray[np.int32]
) -> int:
    """Slots of entry ids, in order, without the unknown; returns how many were written."""
    n = 0
    for i in range(entry_ids.shape[0]):
        if entry_ids[i] >= 0:
            slot = table_find(keys, values, entry_ids[i])
            if slot >= 0:
                out[n] = slot
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
    """Enter slots whose ids and scopes are already written: id table, chain, count per scope."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        table_put(keys, values, ids[slot], slot)
        link(heads, after, ahead, scopes[slot], slot)
        counts[scopes[slot]] += 1


@_kernel
def move_slot(
    source: int,
    target: int,
    rows: NDArray[np.int16],
    scales: NDArray[np.float32],
    signatures: NDArray[np.uint64],
    ids: NDArray[np.int64],
    scopes: NDArray[np.int32],
    expires_ms: NDArray[np.int64],
    heads: NDArray[np.int32],
    after: NDArray[np.int32],
    ahead: NDArray[np.int32],
    keys: NDArray[np.int64],
    values: NDArray[np.int32],
) -> None:
    """Move one live slot into a free one, with its links and its place in the id table."""
    for j in range(rows.shape[1]):
        rows[target, j] = rows[source, j]
    for j in range(signatures.shape[1]):
        signatures[target, j] = signatures[source, j]
    scales[target] = scales[source]
    ids[target] = ids[source]
    scopes[target] = scopes[source]
    expires_ms[target] = expires_ms[source]
    unlink(heads, after, ahead, scopes[source], source)
    link(heads, after, ahead, scopes[target], target)
    table_put(keys, values, ids[target], target)
    ids[source] = -1
    scopes[source] = -1


@_kernel
def write_many(
    vectors: NDArray[np.float32], slots: NDArray[np.int32], rows: NDArray[np.int16], scales: NDArray[np.float32]
) -> None:
    """Quantise vectors (n, d) into rows[slots]."""
    for i in range(slots.shape[0]):
        scales[slots[i]] = quantise(vectors[i], rows[slots[i]])


@_kernel
def restore(
    rows: NDArray[np.int16], scales: NDArray[np.float32], slots: NDArray[np.int32], out: NDArray[np.float32]
) -> None:
    """Fixed point back to float32: out[i] = rows[slots[i]] * scale."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        for j in range(rows.shape[1]):
            out[i, j] = np.float32(rows[slot, j]) * scales[slot]


@_kernel
def expired(
    ids: NDArray[np.int64],
    expires_ms: NDArray[np.int64],
    start: int,
    stop: int,
    now_ms: int,
    out: NDArray[np.int64],
) -> int:
    """Write ids of live slots in [start, stop) that are past their time into `out`; returns how many."""
    n = 0
    for slot in range(start, stop):
        if ids[slot] >= 0 and expires_ms[slot] <= now_ms and n < out.shape[0]:
            out[n] = ids[slot]
            n += 1
    return n


def compile_kernels(dimension: int = 384) -> None:
    """Compile every kernel for the types the index uses, by running each once. About 4 s; never inside a request."""
    rows = np.zeros((4, dimension), np.int16)
    scales = np.ones(4, np.float32)
    signatures = np.zeros((4, WIDTH), np.uint64)
    vector = np.zeros(dimension, np.float32)
    heads = np.full(2, -1, np.int32)
    after, ahead, slots, scopes = (np.full(4, -1, np.int32) for _ in range(4))
    ids, expires, out = (np.zeros(4, np.int64) for _ in range(3))
    keys, values = np.zeros(8, np.int64), np.full(8, -1, np.int32)
    quantise(vector, rows[0])
    inner(rows[0], scales[0], vector)
    veto_bits(signatures[0], signatures[1])
    link(heads, after, ahead, 0, 0)
    chain(heads, after, 0, slots)
    best = (np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros(2, np.int64))
    rank(rows, scales, signatures, scopes, expires, slots, 1, 0, 0, vector, signatures[0], *best)
    unlink(heads, after, ahead, 0, 0)
    table_put(keys, values, 1, 0)
    table_find(keys, values, 1)
    table_take(keys, values, 1)
    table_fill(keys, values, ids, 1)
    where = np.zeros(1, np.int32)
    find_many(keys, values, ids, slots)
    heads[:], keys[:], values[:], scopes[:] = -1, 0, -1, 0
    enter_many(keys, values, heads, after, ahead, ids, scopes, np.zeros(2, np.int32), where)
    move_slot(0, 1, rows, scales, signatures, ids, scopes, expires, heads, after, ahead, keys, values)
    write_many(vector[None], where, rows, scales)
    restore(rows, scales, where, np.zeros((1, dimension), np.float32))
    expired(ids, expires, 0, 1, 0, out)
