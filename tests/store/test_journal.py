"""What is on file outlives its process, cut anywhere, and says the same when it is read again."""

from __future__ import annotations

import errno
import os
from itertools import accumulate
from pathlib import Path

import orjson
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from proxy.core.model import Call, Outcome, Usage, again
from proxy.store import journal
from proxy.store.journal import Journal, Recurred
from proxy.store.ledger import SqlLedger
from proxy.store.store import open_store
from tests.rows import call, hit, list_price, outcome

NUMBERS = st.integers(0, 2**53)
TIMES = st.floats(0, 1e6)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
USAGES = st.none() | st.builds(Usage, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
CALLS = st.builds(
    Call,
    id=TEXTS, ts_ms=NUMBERS, upstream=TEXTS, model=TEXTS, purpose=TEXTS, tier=TEXTS, won=st.booleans(), usage=USAGES,
    usage_basis=TEXTS, status=st.integers(0, 599), ttft_ms=st.none() | TIMES, total_ms=TIMES,
    shaped_by=st.lists(TEXTS, max_size=2).map(tuple),
)  # fmt: skip
OUTCOMES = st.builds(
    outcome,
    st.uuids(version=4).map(lambda one: one.hex),
    ts_ms=NUMBERS, tag=TEXTS, model_served=TEXTS, similarity=st.none() | TIMES, entry_id=st.none() | NUMBERS,
    stream=st.booleans(), usage=USAGES, calls=st.lists(CALLS, max_size=2).map(tuple), key_id=st.none() | TEXTS,
    baseline_ms=st.none() | TIMES, ttft_ms=st.none() | TIMES, total_ms=TIMES,
)  # fmt: skip
KINDS = [hit(f"kind-{n}", entry_id=n, tag="tag-é").recurring for n in range(3)]
RECURRED = st.builds(Recurred, st.sampled_from(KINDS), st.uuids(version=4).map(lambda one: one.hex), NUMBERS, TIMES)
RECORDED = st.lists(OUTCOMES | RECURRED, max_size=12)


def taken(into: Journal | SqlLedger, recorded: list[Outcome | Recurred]) -> None:
    for one in recorded:
        if isinstance(into, Journal):
            assert into.append_again(*one) if isinstance(one, Recurred) else into.append(one)
        elif isinstance(one, Recurred):
            into.record_again(*one)
        else:
            into.record(one)


def whole(one: Outcome | Recurred) -> Outcome:
    return again(*one, one.total_ms) if isinstance(one, Recurred) else one


def read_all(directory: Path) -> list[Outcome | Recurred | None]:
    kept = Journal(directory)
    kept.find()
    return [one for path in kept.sealed for one in journal.read(path)]


@given(recorded=RECORDED, segment=st.sampled_from([1, 900, 1 << 20]))
def test_what_was_appended_is_read_again_whatever_the_size_of_a_segment(tmp_path_factory, recorded, segment):
    directory = tmp_path_factory.mktemp("journal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEGMENT_BYTES", segment)
        taken(Journal(directory), recorded)
    assert read_all(directory) == recorded
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


@given(recorded=RECORDED.filter(bool), data=st.data())
def test_a_file_cut_at_any_byte_loses_what_was_cut_and_nothing_else(tmp_path_factory, recorded, data):
    directory = tmp_path_factory.mktemp("journal")
    kept = Journal(directory)
    sizes = []
    for one in recorded:
        before = kept.size_bytes
        taken(kept, [one])
        sizes.append(kept.size_bytes - before)
    (path,) = directory.iterdir()
    cut = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, cut)
    found = read_all(directory)
    ends = list(accumulate(sizes))
    sure = sum(end <= cut for end in ends)
    if sure < len(ends) and cut == ends[sure] - 1:
        sure += 1  # all but its line end
    assert found[:sure] == recorded[:sure]
    assert found[sure:] in ([], [None])


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(recorded=st.lists(OUTCOMES.map(lambda one: one._replace(ts_ms=1_795_348_800_000, calls=(call(one.request_id),)))
                         | RECURRED.map(lambda one: one._replace(ts_ms=1_795_348_800_000)), min_size=1, max_size=12),
       share=st.floats(0, 1), inserted=st.booleans())  # fmt: skip
async def test_a_process_that_ends_anywhere_is_made_good_by_the_next_one_once(
    tmp_path_factory, recorded, share, inserted
):
    """Cut at any byte, whether or not SQL has the rows already: each outcome once, with its call and its saving."""
    directory = tmp_path_factory.mktemp("data")
    store = await open_store(None, directory, price=list_price)
    taken(store.ledger, recorded)
    (path,) = [file for file in directory.iterdir() if file.name.startswith("ledger-")]
    killed = path.read_bytes()
    await store.close()
    assert not path.exists()
    if not inserted:
        for file in directory.glob("ibid.db*"):
            file.unlink()
    path.write_bytes(killed[: round(len(killed) * share)])
    sure = [one for one in journal.read(path) if one is not None]
    store = await open_store(None, directory, price=list_price)
    calls = "(SELECT COUNT(*) FROM upstream_call WHERE request_id = request.id)"
    rows = await store.database.rows(f"SELECT id, {calls} FROM request")
    wanted = {one.request_id: len(whole(one).calls) for one in (recorded if inserted else sure)}
    assert {row[0]: row[1] for row in rows} == wanted
    assert len(rows) == len(wanted)
    assert not (await store.queries.named("balance")).rows
    assert not path.exists()
    await store.close()


def test_the_journal_forgets_what_is_in_sql_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 2_000)
    kept = Journal(tmp_path)
    made = [outcome(f"q{n}") for n in range(12)]
    taken(kept, made)
    kept.forget(7)
    left = read_all(tmp_path)
    assert left == made[12 - len(left) :]
    assert 5 <= len(left) < 12
    assert kept.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    kept.forget(12)
    assert read_all(tmp_path) == []
    assert kept.size_bytes == 0
    taken(kept, made[:1])
    assert read_all(tmp_path) == made[:1]  # after it was emptied, too


def test_a_release_with_other_fields_reads_them_by_name(tmp_path):
    kept = Journal(tmp_path)
    taken(kept, [outcome()])
    (path,) = tmp_path.iterdir()
    (_, names), (_, values) = map(orjson.loads, path.read_bytes().splitlines())
    lines = (["fields", ["new", *reversed(names)]], ["one", [1, *reversed(values)]])
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    assert read_all(tmp_path) == [outcome()]


def test_a_field_that_came_later_has_its_default(tmp_path):
    kept = Journal(tmp_path)
    taken(kept, [outcome()])
    (path,) = tmp_path.iterdir()
    (_, names), (_, values) = map(orjson.loads, path.read_bytes().splitlines())
    at = names.index("looked")
    lines = (["fields", names[:at] + names[at + 1 :]], ["one", values[:at] + values[at + 1 :]])
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    assert read_all(tmp_path) == [outcome()]


def test_a_full_journal_takes_nothing_and_says_so_until_there_is_room(tmp_path, caplog):
    kept = Journal(tmp_path, limit_bytes=3_000)
    took = [kept.append(outcome(f"q{n}")) for n in range(9)]
    assert took == sorted(took, reverse=True)
    assert 0 < sum(took) < 9
    assert kept.state == "journal_full"
    assert caplog.text.count("takes no rows") == 1
    kept.forget(sum(took))
    assert kept.append(outcome())
    assert kept.state == "ok"


@pytest.mark.parametrize(("number", "state"), [(errno.ENOSPC, "journal_full"), (errno.EIO, "journal_down")])
def test_a_disk_that_fails_leaves_no_files_behind_and_no_half_line(tmp_path, monkeypatch, number, state):
    kept = Journal(tmp_path)
    taken(kept, [outcome("before")])

    def fail(descriptor, line):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", fail)
        assert not any(kept.append(outcome(f"q{n}")) for n in range(20))
        assert kept.state == state
        assert len(list(tmp_path.iterdir())) == 1
    taken(kept, [outcome("after")])
    assert read_all(tmp_path) == [outcome("before"), outcome("after")]


def test_a_write_that_stops_half_way_is_taken_back(tmp_path, monkeypatch):
    kept = Journal(tmp_path)
    taken(kept, [outcome("before")])
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", lambda descriptor, line: write(descriptor, line[:40]))
        assert not kept.append(outcome("half"))
    taken(kept, [outcome("after")])
    assert read_all(tmp_path) == [outcome("before"), outcome("after")]


def test_what_json_cannot_say_is_not_taken(tmp_path):
    kept = Journal(tmp_path)
    assert not kept.append(outcome(tag="\ud800"))
    assert not kept.append_again(hit(tag="\ud800").recurring, "q", 1, 2.0)
    assert read_all(tmp_path) == []
