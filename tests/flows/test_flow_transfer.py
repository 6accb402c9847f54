"""Stored answers leave as lines and come back as they were, into this installation or another."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import sys
from typing import Any

import pytest

from proxy.admin import transfer
from tests.flows.running import EXACT_ONLY, ROOT, TOKEN, Ibid, running
from tests.waiting import until

LINES = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"}


@pytest.fixture(params=["sqlite", "postgresql"])
async def full(request: pytest.FixtureRequest, data_dir, up):
    """ibid with some answers, on each database."""
    database = request.getfixturevalue("pg_url") if request.param == "postgresql" else None
    async with running(data_dir, up.url, EXACT_ONLY, database) as ibid:
        for number in range(40):  # more than are read at once
            await ibid.ask(f"How deep is well {number}?", cache={"tags": [f"doc:{number}"], "namespace": "wells"})
        await ibid.ask("Was ist ein Häuschen? 🏠", temperature=0)
        await ibid.embed(["one", "two"])
        await ibid.settled()
        yield ibid


async def export(ibid: Ibid, query: str = "") -> bytes:
    async with ibid.session.get(f"{ibid.admin_url}/cache/export{query}", headers=LINES) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        return await response.read()


async def take_in(ibid: Ibid, lines: bytes, query: str = "") -> dict[str, Any]:
    async with ibid.session.post(f"{ibid.admin_url}/cache/import{query}", data=lines, headers=LINES) as response:
        assert response.status == 200, await response.text()
        return json.loads(await response.text())


def ids(lines: bytes) -> list[int]:
    return [line["id"] for line in map(json.loads, lines.splitlines()) if line["ibid"] == "entry"]


async def flush(ibid: Ibid) -> int:
    return int((await ibid.admin("POST", "/cache/flush", {"confirm": "flush"}))["count"])


async def test_what_was_exported_comes_back_as_it_was(full: Ibid):
    lines = await export(full)
    count = await flush(full)
    assert len(ids(lines)) == count == 43
    assert json.loads(lines.splitlines()[-1]) == {"ibid": "end", "after": max(ids(lines)), "entries": count}
    report = await take_in(full, lines)  # the flush removed them: they stay away unless told
    assert (report["read"], report["stored"], report["purged"]) == (count, 0, count)
    assert (await take_in(full, lines, "?purged=true&dry_run=true"))["stored"] == count
    assert await full.entries() == []
    report = await take_in(full, lines, "?purged=true")
    assert (report["stored"], report["is_whole"], report["is_foreign"]) == (count, True, False)
    hit = await full.ask("How deep is well 7?", cache={"tags": ["doc:7"], "namespace": "wells"})
    assert (hit.cache, (await full.ask("Was ist ein Häuschen? 🏠", temperature=0)).cache) == ("HIT", "HIT")
    again = await export(full)

    def told(one: bytes) -> list[dict[str, Any]]:
        entries = [line for line in map(json.loads, one.splitlines()) if line["ibid"] == "entry"]
        return sorted([{**entry, "id": 0} for entry in entries], key=lambda entry: entry["fingerprint"])

    assert told(again) == told(lines)
    report = await take_in(full, lines)
    assert (report["stored"], report["there"] + report["purged"]) == (0, count)


async def test_an_export_goes_on_after_any_entry(full: Ibid):
    everything = ids(await export(full))
    middle = everything[len(everything) // 2]
    assert ids(await export(full, f"?after={middle}")) == [one for one in everything if one > middle]
    assert len(ids(await export(full, "?namespace=wells"))) == 40


async def test_no_line_that_was_changed_is_stored(full: Ibid):
    """Whatever field of a line is changed, left out or of another type."""
    lines = await export(full)
    await flush(full)
    head, line, *_ = lines.splitlines()
    good = json.loads(line)
    spoilt = [b"{", b"[]", b'"entry"', b"\xff", line[:-9]]
    for name, value in good.items():
        if name not in ("id", "tags", "request_id"):  # of these the checksum says nothing
            for other in (None, 7, "x", [], {}, True, f"{value}0", "0" * 64):
                if other != value:
                    spoilt.append(json.dumps({**good, name: other}).encode())
    report = await take_in(full, b"\n".join([head, *spoilt]), "?purged=true")
    assert (report["stored"], report["is_whole"]) == (0, False), await full.entries()
    assert report["refused"] == len(spoilt)
    assert len(report["refused_lines"]) == 20
    assert report["refused_lines"][0]["line"] == 2


async def test_what_was_found_wrong_is_not_brought_back(full: Ibid):
    lines = await export(full)
    (wrong, *_) = ids(lines)
    await full.admin("POST", "/cache/feedback", {"entry_id": wrong, "verdict": "wrong"})
    report = await take_in(full, lines, "?purged=true")
    assert (report["stored"], report["there"]) == (0, 43)
    assert wrong not in ids(await export(full))


async def test_another_installation_is_told_and_with_the_same_secret_it_hits(full: Ibid, data_dir, up, tmp_path):
    lines = await export(full)
    for name, is_foreign in (("same", False), ("other", True)):
        directory = tmp_path / name
        directory.mkdir(mode=0o700)
        if not is_foreign:
            shutil.copy(data_dir / "installation-secret", directory)
        async with running(directory, up.url, EXACT_ONLY) as there:
            report = await take_in(there, lines)
            assert (report["stored"], report["is_foreign"]) == (43, is_foreign)
            hit = await there.ask("How deep is well 7?", cache={"tags": ["doc:7"], "namespace": "wells"})
            assert hit.cache == ("MISS" if is_foreign else "HIT")


async def test_imported_questions_get_their_vectors(ibid: Ibid, up):
    await ibid.fill("How do I reset my password?")
    lines = await export(ibid)
    await flush(ibid)
    await take_in(ibid, lines, "?purged=true")

    async def is_embedded() -> bool:
        return bool(await ibid.sql("SELECT id FROM entry WHERE embedding IS NOT NULL"))

    await until(is_embedded)
    await until(lambda: ibid.app.pipeline.index.size == 1)


async def test_what_is_no_export_is_refused_whole(full: Ibid):
    for body in (b"", b"{}", b'{"ibid": "export", "format": 99}', b"hello"):
        async with full.session.post(f"{full.admin_url}/cache/import", data=body, headers=LINES) as response:
            if body:
                assert response.status == 400
                assert json.loads(await response.text())["error"]["code"] == "invalid_export"


async def test_a_line_without_an_end_is_cut_off():
    async def endless():
        while True:
            yield b"x" * 1_000_000

    with pytest.raises(transfer.BadRequest, match="longer"):
        async for _ in transfer.lines(endless()):
            pass


async def ibid_command(ibid: Ibid, *arguments: str) -> tuple[int, str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", *arguments, "--admin", f"127.0.0.1:{ibid.app.admin_port}",
        cwd=ROOT, env=env | {"IBID_ADMIN_TOKEN": TOKEN}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()
    return process.returncode or 0, out.decode(), errors.decode()


async def test_the_commands_write_a_private_file_go_on_and_take_it_in(full: Ibid, tmp_path):
    file = tmp_path / "answers.jsonl"
    assert await ibid_command(full, "export", str(file)) == (0, "", "entries exported: 43\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    code, _, errors = await ibid_command(full, "export", str(file))
    assert (code, "exists" in errors) == (2, True)  # nothing is overwritten
    newest = max(ids(file.read_bytes()))
    await full.fill("What came later?")
    assert (await ibid_command(full, "export", str(file), "--after", str(newest)))[2] == "entries exported: 1\n"
    await flush(full)
    code, out, errors = await ibid_command(full, "import", str(file), "--purged")
    assert (code, errors) == (0, "")
    assert out == "44 of 44 entries stored\n"
    assert "44 there already" in (await ibid_command(full, "import", str(file), "--purged"))[1]
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(file.read_bytes()[:-200])
    code, out, _ = await ibid_command(full, "import", str(cut), "--purged")
    assert "not whole" in out
