"""The manual as text: lengths, links, nothing said twice; and that each of these searches finds what it looks for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.manual import (
    DOCS,
    LANGUAGES,
    README,
    ROOT,
    anchors,
    dead_links,
    pages,
    prose,
    said_twice,
    snippets,
    snippets_in,
)  # fmt: skip

LONGEST_README = 160
LONGEST_PAGE = 400
NAMES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")


def tracked_texts() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_no_page_is_longer_than_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_PAGE


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_a_page_says_what_it_answers_in_its_first_three_lines(path: Path) -> None:
    title, blank, answer = path.read_text().splitlines()[:3]
    assert re.fullmatch(r"# \S.*", title)
    assert blank == ""
    assert re.match(r"[A-Za-z]", answer)


@pytest.mark.parametrize("path", tracked_texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text()) == []


def test_the_search_for_dead_links_finds_them(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# B\n\n## It's `here`: now\n\n```sh\n# not a heading\n```\n## Twice\n## Twice\n")
    text = (
        "# A\n[file](b.md) [heading](b.md#its-here-now) [own](#a) [second](b.md#twice-1) [far](https://x/y)\n"
        "[no file](c.md) [no heading](b.md#there) [a comment](b.md#not-a-heading) [own](#b)\n"
        "```text\n[in a snippet](d.md)\n```\n"
    )
    assert dead_links(tmp_path / "a.md", text) == ["c.md", "b.md#there", "b.md#not-a-heading", "#b"]
    assert anchors("# A b\n# A b\n") == {"a-b", "a-b-1"}


def test_the_list_and_the_readme_name_every_page() -> None:
    for path in (DOCS / "index.md", README):
        linked = re.findall(r"\]\((?:deploy/docs/)?([\w-]+)\.md\)", path.read_text())
        assert sorted(set(linked) - {"CHANGELOG"}) == NAMES


def test_nothing_is_said_twice() -> None:
    assert said_twice([path.read_text() for path in pages()]) == []


def test_the_search_for_what_is_said_twice_finds_it() -> None:
    long = "This sentence is long enough to be noticed, when it stands in two pages."
    head, row = "| x | y |\n| --- | --- |", "| `a` | b |"
    one = f"{head}\n{row}\n\n{long}\n"
    found = said_twice([one, one])
    assert found[0] == row
    assert "this sentence is long enough to be noticed when it" in found
    assert said_twice([f"Broken here: {long}", long.replace(" to ", "\nto ")]) != []
    assert said_twice([f"{head}\n| `a` | b |\n| `a` | c |\n"]) == ["`a`"]
    assert said_twice([one, f"{head}\n| `b` | b |\n\n```text\n{long}\n```\nshort\n"]) == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_every_snippet_names_its_language(path: Path) -> None:
    text = path.read_text()
    found = list(snippets_in(path.name, text))
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE))
    assert {one.language for one in found} <= LANGUAGES | ({""} if path.stem == "internals" else set())


def test_snippets_of_every_language_are_found() -> None:
    for language in LANGUAGES:
        assert snippets(language), language


@pytest.mark.parametrize("snippet", snippets("json"), ids=str)
def test_json_snippets_parse(snippet) -> None:
    json.loads(snippet.text)


def test_terms_of_ours_are_explained_on_the_page_that_is_named_for_them() -> None:
    for name, term in (("keys", "scope"), ("keys", "tenant"), ("lanes", "lane"), ("verdicts", "embedding")):
        text = prose((DOCS / f"{name}.md").read_text()).lower()
        assert re.search(rf"\*{term}\*|^a {term} is|the {term} is", text, re.MULTILINE), term


def test_the_changelog_begins_with_a_released_version_and_what_to_do() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?([\d.]+)\]? - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    version = re.search(r'^version = "([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert versions[0] == version[1]
    first = text.partition(f"## {versions[0]}")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.+)$", first, re.MULTILINE)[0] == "What to do when you upgrade"
