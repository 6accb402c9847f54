"""Hot rows: bounded by bytes, also while only hits come."""

from __future__ import annotations

from proxy.core.model import Answer, Entry
from proxy.hot import FORM_OVERHEAD_BYTES, HotRows
from tests.rows import draft

ANSWER = Answer({"role": "assistant", "content": "yes"}, "stop", "m", None, None)


def test_forms_of_rows_that_are_only_served_count_and_drive_others_out() -> None:
    hot = HotRows(64 * 1024)
    rows = [hot.put(Entry(number, draft(f"q{number}"), b""), ANSWER) for number in range(8)]
    for _ in range(100):
        for row in rows:
            hot.grew(row, 500)
            assert hot.size_bytes <= hot.limit_bytes
    assert len(hot) < 8
    assert all(row.size_bytes > 100 * (500 + FORM_OVERHEAD_BYTES) for row in rows)
