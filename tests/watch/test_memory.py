"""Memory that runs short: whose bound it is, what is dropped first, and when requests are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proxy.watch.memory import NO_LIMIT, Memory, group_limit_bytes, resident_bytes

MIB = 1 << 20


def groups(folder: Path, lines: str, **limits: str) -> int | None:
    """The limit that these files tell; a name's "__" is a slash."""
    for name, word in limits.items():
        file = folder / "root" / name.replace("__", "/").replace("_max", ".max").replace("_limit", ".limit_in_bytes")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{word}\n")
    (folder / "cgroup").write_text(lines)
    return group_limit_bytes(folder / "cgroup", folder / "root")


def test_the_least_limit_on_the_way_to_the_root_counts_in_version_2(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/a/b\n", a__b__memory_max="max", a__memory_max=str(600 * MIB), memory_max="9999999999")
    assert found == 600 * MIB


def test_version_1_is_read_and_its_way_of_saying_none_understood(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/x\n4:memory:/docker/id\n0::/\n"
    assert groups(tmp_path, lines, memory__memory_limit=str(NO_LIMIT * 7)) is None
    assert groups(tmp_path, lines, memory__docker__id__memory_limit=str(512 * MIB)) == 512 * MIB


def test_inside_a_container_whose_path_is_not_seen_the_roots_own_file_counts(tmp_path: Path) -> None:
    assert groups(tmp_path, "4:memory:/docker/id\n", memory__memory_limit=str(600 * MIB)) == 600 * MIB


@pytest.mark.parametrize("text", ["", "0::/\n", "4:memory:/\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, text: str) -> None:
    assert groups(tmp_path, text) is None
    assert group_limit_bytes(tmp_path / "no such file") is None


def test_caches_go_before_requests_are_refused_and_both_end_when_there_is_room() -> None:
    used, told = [0], []
    held = [300]

    def drop() -> None:
        used[0] -= held[0]
        held[0] = 0

    memory = Memory(1_000, [drop], told.append, lambda: pytest.fail("cut"), lambda: used[0])
    steps = [(840, 0, []), (850, 1, []), (949, 2, []), (950, 3, [True]), (979, 4, [True]), (949, 5, [True, False])]
    for now_s, (bytes_, sheds, refused) in enumerate(steps):
        used[0], held[0] = bytes_, 300 if sheds < 3 else 0
        memory.look(float(now_s))
        assert (memory.sheds, told) == (sheds, refused)
        assert memory.is_short == (told[-1:] == [True])
    memory.look(5.5)
    assert memory.sheds == 5  # not again within the second


def test_at_the_end_something_under_way_is_cut_at_every_look_until_there_is_room() -> None:
    used = [979]

    def cut() -> None:
        used[0] -= 10

    memory = Memory(1_000, [], lambda _: None, cut, lambda: used[0])
    seen = []
    for used[0] in (979, 1_000):
        for beat in range(4):
            memory.look(beat / 50)
            seen.append(used[0])
    assert seen == [979, 979, 979, 979, 990, 980, 970, 970]


def test_real_memory_is_measured_and_given_back() -> None:
    before = resident_bytes()
    assert before > 10 * MIB
    cache = [np.ones(64 * MIB // 8)]
    assert resident_bytes() >= before + 60 * MIB
    told: list[bool] = []
    memory = Memory(resident_bytes(), [cache.clear], told.append, lambda: None)
    memory.look(0.0)
    assert (memory.sheds, cache) == (1, [])
    assert memory.used_share < 1.0


def test_without_a_bound_nothing_is_ever_dropped() -> None:
    memory = Memory(
        None, [lambda: pytest.fail("dropped")], lambda _: pytest.fail("refused"), lambda: pytest.fail("cut")
    )
    memory.look(0.0)
    assert memory.used_share == 0.0
