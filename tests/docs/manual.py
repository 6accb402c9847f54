"""Reads the manual: README.md and the pages of deploy/docs, their links, tables and snippets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "deploy" / "docs"
README = ROOT / "README.md"
LANGUAGES = frozenset({"sh", "python", "toml", "sql", "json", "yaml", "text"})
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MADE = re.compile(r"<!-- made: ([a-z-]+) -->.*?<!-- end: \1 -->", re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def pages() -> list[Path]:
    return [README, *sorted(DOCS.glob("*.md"))]


@dataclass(frozen=True)
class Snippet:
    """`printed`: the text right behind it that says what it prints; "" without one."""

    page: str
    line: int
    language: str
    text: str
    printed: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(language: str, paths: list[Path] | None = None) -> list[Snippet]:
    found = (one for path in paths or pages() for one in snippets_in(path.name, path.read_text()))
    return [one for one in found if one.language == language]


def snippets_in(page: str, text: str) -> Iterator[Snippet]:
    for found in _FENCE.finditer(text):
        behind = re.match(r"\n+(?:It prints:\n+)?```text\n(.*?)^```$", text[found.end() :], re.MULTILINE | re.DOTALL)
        line = text.count("\n", 0, found.start()) + 1
        yield Snippet(page, line, found[1], found[2], behind[1] if behind else "")


def prose(text: str) -> str:
    """Without snippets and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def anchor(heading: str) -> str:
    """The name GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    counted: Counter[str] = Counter()
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        name = anchor(heading)
        found.add(f"{name}-{counted[name]}" if counted[name] else name)
        counted[name] += 1
    return found


def dead_links(path: Path, text: str) -> list[str]:
    """Links to a file that is not there, or to a heading that it does not have."""
    dead = []
    for link in _LINK.findall(prose(text)):
        if "://" in link:
            continue
        file, _, name = link.partition("#")
        target = path.parent / file if file else path
        if (file and not target.exists()) or (
            name and name not in anchors(text if target == path else target.read_text())
        ):
            dead.append(link)
    return dead


RUN = 10
"""Words in a row that are no chance."""


def said_twice(texts: list[str]) -> list[str]:
    """Runs of RUN words of prose that stand more than once in all of these together, and repeated rows of tables.

    Two rows of one table are the same when their first cells are. What is made of the code may repeat itself.
    """
    runs: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    twice = []
    for text in texts:
        told = prose(_MADE.sub("", text))
        words = re.findall(r"[\w'`.\-/:$*]+", re.sub(r"^[|#].*$", "", told, flags=re.MULTILINE).lower())
        runs.update(" ".join(words[at : at + RUN]) for at in range(len(words) - RUN + 1))
        for table_text in re.findall(r"(?:^\|.*\n?)+", told, re.MULTILINE):
            found = table_text.splitlines()[2:]
            rows.update(" ".join(row.split()) for row in found)
            first = Counter(row.split("|")[1].strip() for row in found)
            twice += [cell for cell, count in first.items() if count > 1 and cell.startswith("`")]
    return [*twice, *(one for one, count in (rows + runs).items() if count > 1)]


def table(text: str, heading: str) -> list[str]:
    """The rows of the first table whose head begins with `heading`."""
    start = text.index(heading)
    return text[start:].partition("\n\n")[0].splitlines()[2:]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))
