"""`ibid savings reconcile`: a provider's file against the database, from a shell."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from pathlib import Path

import pytest

from proxy.commands import main as cli
from proxy.core.model import Usage
from proxy.store.store import open_store
from tests.core.test_reconcile import ANTHROPIC, EMBEDDINGS, OPENAI, bucket
from tests.rows import call, list_price, outcome


@pytest.fixture(autouse=True)
def _ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls to OpenAI, one to Anthropic, an embedding, all of 2026-11-22."""
    for name in [name for name in os.environ if name.startswith("IBID_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IBID_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    async def fill() -> None:
        store = await open_store(None, tmp_path / "data", price=list_price)
        calls = (call("a", model="gpt-4o"), call("b", model="gpt-4o", usage=Usage(50, 5, 25)))
        store.ledger.record(outcome("q", calls=calls))
        cloud = call("c", upstream="anthropic", model="claude-haiku-4-5-20251001", usage=Usage(100, 5, 30, 20))
        store.ledger.record(outcome("r", calls=(cloud,)))
        vector = call("v", model="text-embedding-3-small", usage=Usage(9, 0))
        store.ledger.record(outcome("e", endpoint="/v1/embeddings", calls=(vector,)))
        await store.close()

    asyncio.run(fill())


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(("savings", *arguments))
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (OPENAI + f"{bucket()},2,p,,,gpt-4o-2024-08-06,false,default,150,25,25,0,0\n", 1),
        (EMBEDDINGS + f"{bucket()},9,1,p,text-embedding-3-small\n", 1),
        (ANTHROPIC + "2026-11-22,claude-haiku-4-5-20251001,k,D,standard,≤ 200k,50,20,0,30,5,0,global,\n", 1),
        ("day,model,tier,calls,in_tok,out_tok,cost_usd\n"
         "2026-11-22,gpt-4o,default,2,150,25,0.0002275\n"
         "2026-11-22,claude-haiku-4-5,default,1,100,5,0.000098\n"
         "2026-11-22,text-embedding-3-small,default,1,9,0,0.000009\n", 3),
    ],
)  # fmt: skip
def test_an_export_of_what_was_called_is_equal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, lines: int
) -> None:
    (tmp_path / "bill.csv").write_text(text)
    code, out, err = run(capsys, "reconcile", "bill.csv", "--format", "json")
    assert (code, err) == (0, "")
    assert [row["status"] for row in json.loads(out)] == ["equal"] * (lines + 1)


def test_what_differs_is_told_line_by_line_and_the_operator_must_act(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "upstream,day,model,tier,calls,in_tok,cost_usd\n"
    text += "openai,2026-11-22,gpt-4o,default,2,151,0.5\nopenai,2026-11-20,o3,flex,1,10,0\n"
    (tmp_path / "bill.csv").write_text(text)
    code, out, err = run(capsys, "reconcile", "bill.csv", "--upstream", "openai", "--format", "csv")
    assert code == 2
    assert err == "ibid: 3 of 3 lines are not equal: 1 differs, 1 only in invoice, 1 only in ledger\n"
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["line"], row["day"], row["model"], row["status"]) for row in rows] == [
        ("3", "2026-11-20", "o3", "only in invoice"),
        ("2", "2026-11-22", "gpt-4o", "differs"),
        ("", "2026-11-22", "text-embedding-3-small", "only in ledger"),
        ("", "total", "", "differs"),
    ]
    assert (rows[1]["invoice_in_tok"], rows[1]["ledger_in_tok"], rows[1]["in_tok_difference"]) == ("151", "150", "1")
    assert rows[1]["difference_nusd"] == str(500_000_000 - 227_500)
    code, out, _ = run(capsys, "reconcile", "bill.csv", "--until", "2026-11-20", "--json")
    assert [row["day"] for row in json.loads(out)] == ["2026-11-20", "total"]
    code, out, _ = run(capsys, "RECONCILE".lower(), "bill.csv")
    assert out.startswith("line  day         model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reconcile",), "name the file"),
        (("reconcile", "absent.csv"), "absent.csv: No such file"),
        (("reconcile", "odd.csv"), "odd.csv: no header of a known export; expected one of: OpenAI completions usage"),
        (("reconcile", "."), "Is a directory"),
        (("reconcile", "odd.csv", "--since", "yesterday"), "since"),
        (("total", "odd.csv"), "go with `ibid savings reconcile`"),
        (("--upstream", "openai"), "go with `ibid savings reconcile`"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_an_upstream_nobody_configured_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bill.csv").write_text("day,model,calls\n2026-11-22,m,1\n")
    code, _, err = run(capsys, "reconcile", "bill.csv", "--upstream", "opnai")
    assert (code, err) == (2, "ibid: --upstream: no upstream named opnai is configured\n")
