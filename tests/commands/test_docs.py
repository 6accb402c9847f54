"""`ibid docs`: the manual at a terminal, from the installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.commands import docs
from proxy.commands import main as cli

PAGES = Path(__file__).parents[2] / "deploy" / "docs"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["docs", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_without_a_page_it_lists_every_page(capsys) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert docs.names() == sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
    assert [name for name in docs.names() if f"- {name}: " not in out] == []


@pytest.mark.parametrize("name", docs.names())
def test_a_page_is_printed_without_marks_and_file_names_of_pages(capsys, name: str) -> None:
    code, out, _ = run(capsys, name)
    assert (code, out[:2]) == (0, "# ")
    assert "<!--" not in out
    assert ".md)" not in out.replace("CHANGELOG.md)", "").replace("README.md)", "").replace("RESULTS.md)", "")


def test_links_say_where_they_lead() -> None:
    text = "[quickstart](quickstart.md) [the key](keys.md#scope) [CHANGELOG.md](../../CHANGELOG.md)\n<!-- a\nb -->\n[far](https://x/y)"
    assert docs.as_text(text) == "quickstart the key (keys) CHANGELOG.md\n[far](https://x/y)"


def test_an_unknown_page_names_the_likely_one_and_exits_2(capsys) -> None:
    code, out, err = run(capsys, "quikstart")
    assert (code, out) == (2, "")
    assert err.startswith("ibid: there is no page 'quikstart'; did you mean quickstart?")


def test_it_is_read_while_the_configuration_is_wrong(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBID_CONFIG", "/nowhere/ibid.toml")
    assert run(capsys, "configuration.md")[0] == 0
