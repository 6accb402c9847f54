"""`ibid evaluate`: files read strictly, hits and wrong hits counted, intervals and curves as textbooks have them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from proxy.commands import evaluate, plot
from proxy.commands import main as cli
from proxy.commands.labelled import Asked, Pair, Readings, digest, read, read_readings
from proxy.commands.rehearsal import Rehearsal, Texts
from proxy.core.errors import BadRequest
from proxy.core.model import Rules
from tests.flows.questions import stream
from tests.models import converted_data_dir


@pytest.fixture(scope="module")
def texts() -> Texts:
    import asyncio

    return asyncio.run(evaluate.open_texts(converted_data_dir(), "all-MiniLM-L6-v2", "onnx", 1))


def rows_of(n: int, seed: int = 0) -> list[Asked]:
    return [Asked(question.text, question.answer) for question in stream(n, seed)]


def test_streams_and_pairs_are_told_apart_plain_or_packed(tmp_path: Path) -> None:
    plain, packed = tmp_path / "s.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_text('{"query":"a","answer_id":1,"context":[]}\n\n{"query":"b","answer_id":"x","context":["c"]}\n')
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    lines = [{"a": "x", "b": "y", "label": 1, "kind": "paraphrase"}, {"a": conversation, "b": conversation, "label": 0}]
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert read(plain) == ([Asked("a", "1", True), Asked("b", "x", False)], [])
    assert read(packed) == ([], [Pair("x", "y", True, "paraphrase"), Pair("r", "r", False, "different", False)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("[1]\n", ":1: not an object"),
        ('{"query":"a","answer_id":1}\nnot json\n', ":2: not JSON"),
        ('{"query":"a"}\n', ":1: neither"),
        ('{"a":"x","b":2,"label":1}\n', ":1: neither"),
        ('{"query":"a","answer_id":1}\n{"a":"x","b":"y","label":1}\n', "streams and pairs"),
    ],
)
def test_a_file_that_is_neither_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(BadRequest, match=said):
        read(file)


def test_readings_hold_in_either_order_and_may_name_texts_by_digest(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    rows = [{"a": "x", "b": "y", "same": True}, {"a": digest("p"), "b": digest("q"), "same": False}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_readings(file)
    assert len(found) == 2
    assert (found.same("x", "y"), found.same("y", "x"), found.same("q", "p")) == (True, True, False)
    assert found.same("x", "q") is None


@pytest.mark.parametrize("row", ['{"a":"x","b":"y"}', '{"a":"x","b":1,"same":true}', '{"a":"x","b":"y","same":1}'])
def test_a_reading_that_is_none_names_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(row)
    with pytest.raises(BadRequest, match="1: a reading has"):
        read_readings(file)


@pytest.mark.parametrize(
    ("wrong", "hits", "low", "high"),
    [(0, 0, 0, 1), (0, 100, 0.0, 0.0362), (1, 100, 0.000253, 0.0545), (5, 100, 0.0164, 0.1128), (100, 100, 0.9638, 1)],
)
def test_intervals_are_clopper_and_pearsons(wrong: int, hits: int, low: float, high: float) -> None:
    assert evaluate.interval(wrong, hits) == pytest.approx((low, high), abs=1e-4)


def test_auc_counts_ties_half() -> None:
    same = np.array([True, True, False, False])
    assert evaluate.auc(np.array([3.0, 2.0, 1.0, 0.0]), same) == 1.0
    assert evaluate.auc(np.array([1.0, 1.0, 1.0, 1.0]), same) == 0.5
    assert evaluate.auc(np.array([1.0]), np.array([True])) is None


def test_the_static_curve_is_the_loosest_similarity_within_each_budget() -> None:
    best = np.array([0.99, 0.98, 0.97, 0.96, 0.95], np.float32)
    right = np.array([True, True, False, True, True])
    (tight, loose) = evaluate.static_curve(best, right, 10, [0.1, 0.25])
    assert (tight["hits"], tight["wrong"], tight["hit_rate"]) == (2, 0, 0.2)
    assert (loose["hits"], loose["wrong"]) == (5, 1)
    assert evaluate.peers(best, right, 10)[3] == {"rule": "cosine .95", "hits": 5, "hit_rate": 0.5, "wrong": 1}


def test_a_stream_is_served_within_its_budget_and_better_than_any_fixed_similarity(texts: Texts) -> None:
    rows = rows_of(1200)
    texts.prepare(row.text for row in rows)
    found = evaluate.stream(texts, rows, Rules(), [0.02], "perfect", 0)
    (row,) = found["budgets"]
    assert row["within"]
    assert row["hits"] > 300
    assert row["hits"] > found["static"][0]["hits"]
    assert row["audited"] < row["hits"]
    assert sum(row["standings"].values()) == row["hits"]


def test_without_labels_only_the_start_region_serves(texts: Texts) -> None:
    rows = rows_of(300)
    texts.prepare(row.text for row in rows)
    (row,) = evaluate.stream(texts, rows, Rules(), [0.01], "none", 0)["budgets"]
    assert set(row["standings"]) <= {"start"}
    assert row["audited"] == 0


def test_labels_that_err_serve_less_than_perfect_ones(texts: Texts) -> None:
    rows = rows_of(1200)
    texts.prepare(row.text for row in rows)
    perfect, answers = (
        evaluate.stream(texts, rows, Rules(), [0.02], labels, 2)["budgets"][0] for labels in ("perfect", "answers")
    )
    assert answers["within"]
    assert 0 < answers["hits"] < perfect["hits"]


def test_labels_of_answers_are_those_of_the_texts_where_there_are_texts(texts: Texts) -> None:
    """Every answer is told in the same words, or every one in others: what the ids say of them teaches nothing."""
    rows = rows_of(600)
    texts.prepare(row.text for row in rows)
    alike = [replace(row, told=f"{'Sure! ' * (n % 2)}The router is reset with a pin.") for n, row in enumerate(rows)]
    apart = [replace(row, told=f"{row.text} That takes {n} minutes and {7 * n} euros.") for n, row in enumerate(rows)]
    trusting, doubting = (
        evaluate.stream(texts, told, Rules(), [0.02], "answers", 0)["budgets"][0] for told in (alike, apart)
    )
    assert trusting["error"] > 0.04  # ids differ, answers do not
    assert trusting["hits"] > 2 * doubting["hits"]


def test_an_answers_text_is_read_with_its_question(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"query": "a?", "answer_id": 1, "answer": "Yes, on Mondays."}\n{"query": "b?", "answer_id": 2}\n')
    rows, _ = read(file)
    assert [row.told for row in rows] == ["Yes, on Mondays.", ""]


def test_exact_repeats_and_later_turns_are_counted_apart(texts: Texts) -> None:
    run = Rehearsal(texts, Rules(), 0.01)
    texts.prepare(["How do I reset the router?", "And then what should I do?"])
    for row in (Asked("How do I reset the router?", "a"), Asked("How do I reset the router?", "a")):
        run.ask(row)
    run.ask(Asked("And then what should I do?", "b", is_first_turn=False))
    assert (run.counts.asked, run.counts.exact, run.counts.hits) == (3, 1, 0)
    assert run.counts.reasons["exact_only"] == 1


INTO, OUT_OF = "How do I get into the attic of a house?", "How do I get out of the attic of a house?"


def test_the_pair_guard_refuses_here_as_it_does_when_serving(texts: Texts) -> None:
    texts.prepare([INTO, OUT_OF])
    for guarded in (True, False):
        run = Rehearsal(texts, Rules(start_similarity=0.85, pair_guard=guarded), 0.01)
        run.ask(Asked(INTO, "a"))
        assert run.ask(Asked(OUT_OF, "b")).hit is not guarded
        assert run.counts.reasons.get("pair_guard", 0) == guarded
        pair = Pair(INTO, OUT_OF, False, "scope")
        found = evaluate.judged_pairs(texts, [pair], Rules(start_similarity=0.85, pair_guard=guarded))
        assert found["cold"]["hits"] == (not guarded)


def test_a_model_without_a_guard_is_rehearsed_as_it_serves(texts: Texts) -> None:
    bare = Texts(texts.backend)
    bare.prepare([INTO, "How can I get into the attic of a house?"])
    run = Rehearsal(bare, Rules(), 0.01)
    run.ask(Asked(INTO, "a"))
    assert not run.ask(Asked("How can I get into the attic of a house?", "a")).hit
    assert run.counts.reasons == {"no_guard": 1}


def test_a_reading_corrects_a_label_and_the_pair_is_named(texts: Texts) -> None:
    a, b = "How do I reset the router of my office?", "How can I reset the router of my office?"
    texts.prepare([a, b])
    for readings, read_wrong, unread in (
        (Readings(), 1, 1),
        (Readings([(b, a, True)]), 0, 0),
        (Readings([(a, b, False)]), 1, 0),
    ):
        run = Rehearsal(texts, Rules(), 0.01, readings=readings)
        run.ask(Asked(a, "1"))
        run.ask(Asked(b, "2"))
        counts = run.counts
        assert (counts.hits, counts.wrong, counts.read_wrong, counts.unread) == (1, 1, read_wrong, unread)
        assert counts.doubtful == [(a, b)]


def test_pairs_show_what_is_served_cold_and_of_each_kind(texts: Texts) -> None:
    pairs = [
        Pair("How do I reset the router?", "How can I reset the router?", True, "paraphrase"),
        Pair("Book a table for 2 people tonight please", "Book a table for 3 people tonight please", False, "number"),
        Pair("How do I turn on the lamp?", "How do I turn off the lamp?", False, "negation"),
    ]
    texts.prepare(text for pair in pairs for text in (pair.a, pair.b))
    found = evaluate.judged_pairs(texts, pairs, Rules())
    assert found["cold"]["by_kind"] == {"negation": [0, 1], "number": [0, 1], "paraphrase": [1, 1]}
    assert found["auc_judge"] == 1.0
    assert "3 pairs" in evaluate.report({"file": "f", **found})


def test_the_command_prints_tables_or_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "stream.jsonl", tmp_path / "curve.svg"
    file.write_text("\n".join(json.dumps({"query": q.text, "answer_id": q.answer}) for q in stream(150)))
    data = ["--data-dir", str(converted_data_dir())]
    assert cli.main(["evaluate", str(file), *data, "--max-error", "0.05", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "stream: 150 questions, file order, labels: perfect" in shown
    assert "cosine .95" in shown
    assert picture.read_text().startswith("<svg")
    assert cli.main(["evaluate", str(file), *data, "--max-error", "0.05", "--shuffles", "2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["budgets"][0]["runs"] == 2
    assert cli.main(["evaluate", str(file), *data, "--max-error", "7"]) == 2
    assert cli.main(["evaluate", str(tmp_path / "absent.jsonl"), *data]) == 2


def test_a_plot_without_streams_is_still_a_picture() -> None:
    assert plot.svg([]).startswith("<svg")
