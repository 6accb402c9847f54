"""Rows of batches, on both databases."""

from __future__ import annotations

import os
from typing import Any

import pytest

from proxy.batch.files import FileWriter, LineFile
from proxy.core.batches import CHUNK_BYTES, BatchFile, Deferred, Job, LineRow, Part
from tests.rows import HOUR_MS, NOON_MS

TENANT, OTHER = "t" * 64, "u" * 64


def file(name: str = "f", **changes: Any) -> BatchFile:
    fields: dict[str, Any] = {
        "id": name, "tenant": TENANT, "purpose": "batch", "filename": "a.jsonl", "size_bytes": 0,
        "created_ms": NOON_MS, "expires_ms": NOON_MS + HOUR_MS,
    }  # fmt: skip
    return BatchFile(**{**fields, **changes})


def job(name: str = "j", **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "id": name, "tenant": TENANT, "dialect": "openai", "path": "/v1/embeddings", "status": "in_progress",
        "input_file_id": "f", "created_ms": NOON_MS, "deadline_ms": NOON_MS + HOUR_MS,
        "expires_ms": NOON_MS + HOUR_MS, "headers": (("accept", "x"),), "metadata": {"a": "é"}, "times": {"x": 1},
        "errors": [], "key_id": "key_a",
    }  # fmt: skip
    return Job(**{**fields, **changes})


async def write(store, name: str, raw: bytes, piece: int = 100_000) -> BatchFile:
    writer = FileWriter(store.batches, file(name))
    await writer.begin()
    for start in range(0, len(raw), piece):
        await writer.write(raw[start : start + piece])
    return await writer.end("told.jsonl")


async def test_a_file_is_seen_when_it_is_whole_and_only_by_its_owner(store):
    batches = store.batches
    raw = os.urandom(2 * CHUNK_BYTES + 7)
    await batches.begin_file(file())
    assert await batches.file("f", TENANT) is None
    assert await batches.bytes_of_files(TENANT) == (0, 0)
    kept = await write(store, "f", raw)
    assert kept == file(size_bytes=len(raw), filename="told.jsonl")
    assert await batches.file("f", TENANT) == kept
    assert await batches.file("f", OTHER) is None
    assert b"".join([chunk async for chunk in batches.chunks("f")]) == raw
    assert await batches.files(TENANT) == [kept]
    assert await batches.files(OTHER) == []
    assert await batches.bytes_of_files(TENANT) == (len(raw), len(raw))
    assert await batches.bytes_of_files(OTHER) == (len(raw), 0)
    await batches.delete_file("f")
    assert await batches.file("f", TENANT) is None
    assert [chunk async for chunk in batches.chunks("f")] == []


async def test_lines_are_found_again_by_number_wherever_chunks_end(store):
    lines = [b"%d:" % n + b"x" * (n * 997 % 5000) for n in range(1500)]
    lines[700] = b"7" * (CHUNK_BYTES + 5)
    await write(store, "f", b"\n\n".join(lines) + b"\n \n")
    found = LineFile(store.batches, "f", 5000)
    seen = [line async for line in found.scan()]
    assert seen == [line if len(line) <= 5000 else None for line in lines]
    assert len(found) == 1500
    for number in (1499, 0, 701, 699, 700, 3):
        assert await found.read(number) == lines[number]


async def test_a_job_comes_back_as_it_was_saved(store):
    batches = store.batches
    made = job()
    await batches.create_job(made, "w", NOON_MS)
    assert await batches.job("j", TENANT) == made
    assert await batches.job("j", OTHER) is None
    made.count("ok", 5)
    made.reach("finalizing", NOON_MS + 1)
    made.errors = [{"code": "c"}]
    part = Part(0, "openai", "m", "batch_1", "file-1", "running", 2, NOON_MS)
    lines = [LineRow(0, "ok", None, b"one\n"), LineRow(1, "sent", 0), LineRow(2, "error", None, b"three\n")]
    assert await batches.save(made, lines, [part], "w", NOON_MS) == "finalizing"
    assert await batches.job("j", TENANT) == made
    assert await batches.jobs(TENANT, "openai") == [made] == await batches.unfinished()
    assert await batches.jobs(TENANT, "anthropic") == []
    assert await batches.states("j") == [(0, "ok", None), (1, "sent", 0), (2, "error", None)]
    assert await batches.parts("j") == [part]
    assert await batches.known_parts(["batch_1", "batch_2"]) == {"batch_1"}
    assert await batches.known_parts([]) == set()
    await batches.save(made, [LineRow(1, "expired", None, b"two\n")], [], "w", NOON_MS)
    outputs = {
        part: b"".join([piece async for piece in batches.results("j", part)]) for part in ("output", "error", "")
    }
    assert outputs == {"output": b"one\n", "error": b"two\nthree\n", "": b"one\ntwo\nthree\n"}
    assert await batches.result("j", 1) == b"two\n"
    assert await batches.result("j", 9) is None
    await batches.delete_job(made)
    assert await batches.job("j", TENANT) is None
    assert await batches.states("j") == []


async def test_results_are_read_in_pieces_and_in_order(store):
    await store.batches.create_job(job(), "w", NOON_MS)
    lines = [LineRow(n, "ok", None, b"%d\n" % n) for n in range(1200)]
    await store.batches.save(job(), lines[::-1], [], "w", NOON_MS)
    pieces = [piece async for piece in store.batches.results("j", "output")]
    assert len(pieces) == 5
    assert b"".join(pieces) == b"".join([b"%d\n" % n for n in range(1200)])


async def test_somebody_elses_cancelling_reaches_the_process_that_works(store):
    batches = store.batches
    made = job()
    await batches.create_job(made, "w", NOON_MS)
    assert await batches.cancel("j", {"cancelling": 7})
    assert await batches.save(made, (), (), "w", NOON_MS) == "cancelling"
    assert (await batches.job("j", TENANT)).times == {"cancelling": 7}
    made.reach("cancelled", 9)
    assert await batches.save(made, (), (), "w", NOON_MS) == "cancelled"
    assert not await batches.cancel("j", {})
    assert await batches.unfinished() == []


async def test_a_job_is_worked_on_by_one_process(store):
    batches = store.batches
    await batches.create_job(job(), "w", NOON_MS)
    is_fleet = store.database.dialect == "postgresql"
    assert await batches.claim("j", "v", NOON_MS - 1, NOON_MS + 5) is not is_fleet
    assert await batches.claim("j", "v", NOON_MS + 1, NOON_MS + 5)
    assert await batches.save(job(), (), (), "w", NOON_MS) is None
    assert not await batches.claim("nobody", "v", NOON_MS, NOON_MS)
    await batches.create_job(job("ended", status="completed"), "", 0)
    assert not await batches.claim("ended", "v", NOON_MS, NOON_MS)


def call(name: str, **changes: Any) -> Deferred:
    fields: dict[str, Any] = {
        "id": name, "tenant": TENANT, "path_qs": "/v1/embeddings", "headers": (("accept", "x"),), "needs_owner": True,
        "body": b"{}", "created_ms": NOON_MS, "deadline_ms": None, "expires_ms": NOON_MS + HOUR_MS,
        "key_id": "key_a",
    }  # fmt: skip
    return Deferred(**{**fields, **changes})


async def test_a_deferred_call_is_open_until_it_has_a_reply_or_a_batch(store):
    batches = store.batches
    for name in "abc":
        await batches.put_deferred(call(name), "w", NOON_MS)
    assert await batches.deferred("a", TENANT) == call("a")
    assert await batches.deferred("a", OTHER) is None
    is_fleet = store.database.dialect == "postgresql"
    assert await batches.claim_deferred("a", "v", NOON_MS - 1, NOON_MS) is not is_fleet
    assert await batches.claim_deferred("a", "v", NOON_MS + 1, NOON_MS)
    await batches.settle_deferred("a", b"reply")
    assert not await batches.claim_deferred("a", "v", NOON_MS + 9, NOON_MS)
    await batches.join_deferred("j", ["c", "b"])
    assert [one.id for one in await batches.open_deferred()] == ["b", "c"]  # that batch was never made
    await batches.create_job(job(), "w", NOON_MS)
    assert await batches.open_deferred() == []
    assert await batches.deferred("b", TENANT) == call("b", job_id="j", number=1)
    assert (await batches.deferred("a", TENANT)).reply == b"reply"


@pytest.mark.parametrize("late", [False, True])
async def test_what_has_expired_is_gone(store, late):
    batches = store.batches
    await write(store, "f", b"{}\n")
    await batches.begin_file(file("begun"))
    await batches.create_job(job(), "w", NOON_MS)
    await batches.save(job(), [LineRow(0, "ok", None, b"x")], [], "w", NOON_MS)
    await batches.put_deferred(call("d"), "w", NOON_MS)
    await batches.housekeep(NOON_MS + HOUR_MS + (1 if late else -1))
    there = [await batches.file("f", TENANT), await batches.job("j", TENANT), await batches.deferred("d", TENANT)]
    assert [one is None for one in there] == [late] * 3
    assert await batches.states("j") == ([] if late else [(0, "ok", None)])
    rows = (await store.queries.run_readonly("SELECT id FROM batch_file", row_limit=9)).rows
    assert len(rows) == (0 if late else 2)
    chunks = (await store.queries.run_readonly("SELECT file_id FROM batch_chunk", row_limit=9)).rows
    assert len(chunks) == (0 if late else 1)
