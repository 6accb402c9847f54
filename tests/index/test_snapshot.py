"""A snapshot is believed whole or not at all."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import snapshot
from index.errors import SnapshotRefused
from index.tokens import WIDTH, signature
from index.vectors import VectorOwner

D, N = 16, 300
SIGN = signature("how do I reset my password")
ALICE, BOB = b"a" * 32, b"b" * 32


def units(n: int = N) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


async def saved(path: Path) -> None:
    owner = VectorOwner("model-1", D)
    owner.start()
    scopes = [ALICE if i % 2 else BOB for i in range(N)]
    await owner.add_many(np.arange(N), scopes, units(), np.tile(SIGN, (N, 1)), np.arange(N) + 1000)
    owner.remove([7])
    await owner.snapshot(path)
    owner.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "index"
    asyncio.run(saved(path))
    return path.read_bytes()


async def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "index"
    await saved(path)
    assert [p.name for p in path.parent.iterdir()] == ["index"]
    assert path.stat().st_mode & 0o777 == 0o600
    owner = VectorOwner.load(path, "model-1", D)
    owner.start()
    assert (await owner.ids()).tolist() == [i for i in range(N) if i != 7]
    assert (await owner.search(ALICE, units()[9], SIGN, 0, 1))[0].entry_id == 9
    assert (await owner.search(ALICE, units()[8], SIGN, 0, 1))[0].entry_id != 8
    assert await owner.search(BOB, units()[8], SIGN, 5000) == []
    owner.add(1000, ALICE, units()[0], SIGN, 1 << 50)
    assert (await owner.search(ALICE, units()[0], SIGN, 2000))[0].entry_id == 1000
    owner.close()


def refused(path: Path, identity: str = "model-1", dimension: int = D) -> None:
    with pytest.raises(SnapshotRefused):
        VectorOwner.load(path, identity, dimension)


def test_an_absent_snapshot_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    refused(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_refused_and_the_file_kept(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "index"
    path.write_bytes(damaged)
    refused(path)
    assert not path.exists()
    assert (tmp_path / "index.bad").read_bytes() == damaged


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_is_refused(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "index"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(path)


@pytest.mark.parametrize("damage", ["zeroed", "empty", "foreign", "directory", "full directory"])
def test_what_is_no_snapshot_is_set_aside(whole: bytes, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index"
    if "directory" in damage:
        path.mkdir()
        if damage == "full directory":
            (path / "x").write_text("x")
            (tmp_path / "index.bad").write_text("an earlier one")
    else:
        path.write_bytes({"zeroed": bytes(len(whole)), "empty": b"", "foreign": b"SQLite format 3\0" * 99}[damage])
    refused(path)
    assert not path.exists()
    assert any(p.name.startswith("index.bad") for p in tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_snapshot_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(whole)
    path.chmod(0)
    refused(path)


@pytest.mark.parametrize(("identity", "dimension"), [("model-2", D), ("model-1", D * 2)])
def test_vectors_of_another_embedder_never_enter(whole: bytes, tmp_path: Path, identity: str, dimension: int) -> None:
    path = tmp_path / "index"
    path.write_bytes(whole)
    refused(path, identity, dimension)


def test_other_rules_of_the_token_classes_are_refused(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index"
    path.write_bytes(whole)
    monkeypatch.setattr(snapshot, "STAMP", snapshot.STAMP + 1)
    refused(path)


async def test_a_disk_that_refuses_leaves_the_earlier_snapshot_and_the_index_alone(tmp_path: Path) -> None:
    path = tmp_path / "index"
    await saved(path)
    before = path.read_bytes()
    owner = VectorOwner.load(path, "model-1", D)
    owner.start()
    with pytest.raises(SnapshotRefused):
        await owner.snapshot(path / "below-a-file")
    assert path.read_bytes() == before
    assert (await owner.search(ALICE, units()[9], SIGN, 0, 1))[0].entry_id == 9
    owner.close()


def test_the_width_of_signatures_is_part_of_the_format(whole: bytes) -> None:
    assert f'"width": {WIDTH}'.encode() in whole
