"""A memo stays within its bytes, by its own count and by that of the interpreter."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.memo import ENTRY_BYTES, Memo

LIMIT = 16 * ENTRY_BYTES


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3 * ENTRY_BYTES)), max_size=200))
def test_it_stays_within_its_bytes_and_forgets_the_oldest_first(puts: list[tuple[int, int]]) -> None:
    memo: Memo[int, object] = Memo(LIMIT)
    order: dict[int, tuple[object, int]] = {}
    for key, size in puts:
        value = object()
        memo.put(key, value, size)
        order.pop(key, None)
        if size + ENTRY_BYTES <= LIMIT // 8:
            order[key] = value, size + ENTRY_BYTES
        while sum(kept for _, kept in order.values()) > LIMIT:
            del order[next(iter(order))]
        assert memo.size_bytes == sum(kept for _, kept in order.values()) <= LIMIT
        assert len(memo) == len(order)
        for known in range(31):
            assert memo.get(known) is (order[known][0] if known in order else None)


def test_what_is_too_large_to_keep_takes_the_place_of_nothing_but_its_own_old_value() -> None:
    memo: Memo[str, str] = Memo(LIMIT)
    memo.put("small", "kept", 10)
    memo.put("large", "before", 10)
    memo.put("large", "after", LIMIT)
    assert (memo.get("small"), memo.get("large"), len(memo)) == ("kept", None, 1)


def test_the_interpreter_counts_no_more_than_the_memo_does() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        memo: Memo[tuple[str, int], bytes] = Memo(1 << 20)
        for number in range(20_000):
            memo.put((f"key {number}", number), bytes(number % 200), 200 + number % 200)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held <= memo.size_bytes <= memo.limit_bytes
