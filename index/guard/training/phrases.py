"""The words that pairs are made of, from `data/`. Everything there was written for this program.

In a file a backslash at the end joins two lines.

- `frames/*.txt`: what people ask. A block (from one `#` to the next) is one subject; each line in it is one question,
  its wordings parted by bars, and goes on in lines that begin with one. Two wordings of a line have one answer; two
  lines of a block never do, although they share words and slots: they are the hard neighbours. `[a/b]` stands for
  either, `{city}` for a value of that slot type, `{city1}` and `{city2}` for two different ones. `~` before a line says
  that its two slots may change places without changing the question.
- `slots.txt`: one slot type a line, values parted by commas, wordings of one value by bars. Two values of a type never
  mean the same.
- `same.txt`: phrases that may stand for each other, one group a line. `exclusive.txt`: words of which one cannot stand
  for another, likewise.
- `adjuncts.txt`: restrictions, each narrowing any question; groups a line, members by commas, wordings by bars.
- `qualifiers.txt`: words that narrow a noun when put before it. `lists.toml`: the short lists.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from functools import cache

FRAMES = ("devices_and_travel", "everyday", "learning", "service")


def frames() -> list[str]:
    """Every file's lines: titles, and questions with all their wordings on one line."""
    return [line for name in FRAMES for line in _read(f"frames/{name}.txt").replace("\n  | ", " | ").splitlines()]


def lines(name: str) -> list[str]:
    """Of slots, same, exclusive, adjuncts or qualifiers."""
    return _read(f"{name}.txt").splitlines()


@cache
def short(name: str) -> tuple[str, ...]:
    """One of the short lists."""
    return tuple(tomllib.loads(_read("lists.toml"))[name])


def _read(name: str) -> str:
    text = importlib.resources.files("index.guard.training").joinpath("data", *name.split("/")).read_text("utf-8")
    return text.replace("\\\n", "").strip()
