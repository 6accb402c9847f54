"""`ibid evaluate`: how often the shipped matching is right on labelled questions, beside fixed similarities.

Semantic hits are counted apart from exact ones, and every share comes with its count and a 95 % interval.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv  # type: ignore[import-untyped]

from index.batcher import guard_for, load_backend
from index.errors import ModelFault
from index.learner import Learner
from index.levels import LEVELS
from index.vectors import VectorOwner
from proxy.commands import plot, printing
from proxy.commands.codes import FINE
from proxy.commands.labelled import SCOPE, Asked, Pair, Readings, read_readings
from proxy.commands.labelled import read as read_labelled
from proxy.commands.rehearsal import Rehearsal, Texts, compile_matching, is_eligible, nearest
from proxy.core import policy
from proxy.core.errors import ConfigError
from proxy.core.model import Candidate, Rules
from proxy.judging.judge import Judge, Place, objection
from proxy.settings.config import Settings

BUDGETS: Final = (0.005, 0.01, 0.02, 0.05)
PEERS: Final = (
    ("cosine .60 (GPTCache's default)", 0.60),
    ("cosine .80", 0.80),
    ("cosine .90 (RedisVL's default)", 0.90),
    ("cosine .95", 0.95),
)
PAIRS_AT_ONCE: Final = 2048
FORBIDDING: Final = policy.ALWAYS | policy.mask("negation", "antonyms", "direction")
"""Guards under which a pair counts as refused when no evidence is at hand."""


async def open_texts(data_dir: Path, model: str, backend: str, threads: int) -> Texts:
    """The model alone, as it serves. Raises ConfigError."""
    try:
        loaded = await load_backend(data_dir, model=model, backend=backend, threads=threads)
        guard = guard_for(loaded)
    except ModelFault as fault:
        raise ConfigError(f"the embedding model cannot be used: {fault}") from fault
    compile_matching(loaded.dimension)
    return Texts(loaded, guard)


def evaluate(
    path: Path,
    texts: Texts,
    rules: Rules,
    *,
    budgets: Sequence[float] = BUDGETS,
    labels: str = "perfect",
    shuffles: int = 0,
    readings: Readings | None = None,
) -> dict[str, Any]:
    """What one file shows. Raises BadRequest for a file that is neither kind."""
    rows, pairs = read_labelled(path)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    if rows:
        embed_s = texts.prepare((row.text for row in rows), name)
        found = stream(texts, rows, rules, budgets, labels, shuffles, readings)
    else:
        found = judged_pairs(texts, pairs, rules, name)
        embed_s = found.pop("embed_s")
    return {"file": name, **found, "embed_s": round(embed_s, 1)}


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(
    texts: Texts,
    rows: Sequence[Asked],
    rules: Rules,
    budgets: Sequence[float],
    labels: str,
    shuffles: int,
    readings: Readings | None = None,
) -> dict[str, Any]:
    """The curve over budgets: in the file's order, or over as many shuffles."""
    best, right = nearest(texts, rows)
    found: list[dict[str, Any]] = []
    for budget in budgets:
        runs = []
        for seed in range(max(1, shuffles)):
            ordered = list(rows)
            if shuffles:
                random.Random(seed).shuffle(ordered)
            run = Rehearsal(texts, rules, budget, labels=labels, seed=seed, readings=readings)
            for row in ordered:
                run.ask(row)
            runs.append(run)
        found.append(_summary(budget, runs))
    return {
        "kind": "stream",
        "asked": len(rows),
        "labels": labels,
        "shuffles": shuffles,
        "budgets": found,
        "static": static_curve(best, right, len(rows), budgets),
        "peers": peers(best, right, len(rows)),
    }


def _summary(budget: float, runs: Sequence[Rehearsal]) -> dict[str, Any]:
    counts = [run.counts for run in runs]
    hits, wrong = sum(c.hits for c in counts), sum(c.wrong for c in counts)
    asked, audited = sum(c.asked for c in counts), sum(c.audited for c in counts)
    low, high = interval(wrong, hits)
    lookups = sorted(second for run in runs for second in run.lookup_s)
    read_wrong, unread = sum(c.read_wrong for c in counts), sum(c.unread for c in counts)
    read_low, read_high = interval(read_wrong, hits)
    return {
        "max_error": budget,
        "runs": len(runs),
        "hit_rate": hits / asked if asked else 0.0,
        "hits": hits,
        "wrong": wrong,
        "error": wrong / hits if hits else 0.0,
        "interval": [low, high],
        "within": low <= budget,
        "runs_within": sum(interval(c.wrong, c.hits)[0] <= budget for c in counts),
        "read_wrong": read_wrong,  # as `wrong`, less what a reader found to be right after all
        "read_error": read_wrong / hits if hits else 0.0,
        "read_interval": [read_low, read_high],
        "read_within": read_low <= budget,
        "unread": unread,
        "exact": sum(c.exact for c in counts),
        "audited": audited,
        "audited_share": audited / hits if hits else 0.0,
        "standings": _added([c.standings for c in counts]),
        "reasons": dict(sorted(_added([c.reasons for c in counts]).items(), key=lambda item: -item[1])),
        "lookup_us_p50": round(1e6 * lookups[len(lookups) // 2], 1) if lookups else None,
        "lookup_us_p99": round(1e6 * lookups[len(lookups) * 99 // 100], 1) if lookups else None,
        "doubtful": sorted({pair for c in counts for pair in c.doubtful}),
    }


def _added(many: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in many:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def static_curve(
    best: NDArray[np.float32], right: NDArray[np.bool_], asked: int, budgets: Sequence[float]
) -> list[dict[str, Any]]:
    """The loosest fixed similarity whose share of wrong hits is within each budget, chosen in hindsight."""
    order = np.argsort(-best, kind="stable")
    wrong = np.cumsum(~right[order])
    hits = np.arange(1, len(order) + 1)
    rows = []
    for budget in budgets:
        fine = np.flatnonzero(wrong <= budget * hits)
        n = int(fine[-1]) + 1 if len(fine) else 0
        rows.append(
            {
                "max_error": budget,
                "threshold": float(best[order[n - 1]]) if n else None,
                "hit_rate": n / asked if asked else 0.0,
                "hits": n,
                "wrong": int(wrong[n - 1]) if n else 0,
            }
        )
    return rows


def peers(best: NDArray[np.float32], right: NDArray[np.bool_], asked: int) -> list[dict[str, Any]]:
    """What fixed similarities would have served, and how much of it wrong."""
    return [
        {
            "rule": name,
            "hits": int((best >= bound).sum()),
            "hit_rate": float((best >= bound).sum()) / asked if asked else 0.0,
            "wrong": int((~right[best >= bound]).sum()),
        }
        for name, bound in PEERS
    ]


# -- pairs -------------------------------------------------------------------------------------------------------------


def judged_pairs(texts: Texts, pairs: Sequence[Pair], rules: Rules, name: str = "pairs") -> dict[str, Any]:
    """Each pair in a cache of its own: what is served before there is any evidence, and how the judge ranks.

    At the point where half of the true paraphrases are served, the share served of every kind of trap.
    """
    judged: list[tuple[float, float, bool, bool]] = []
    embed_s = 0.0
    for start in range(0, len(pairs), PAIRS_AT_ONCE):  # the guard is asked about all: one pass gives it what it needs
        block = pairs[start : start + PAIRS_AT_ONCE]
        what = f"{name} {start + len(block):,} of {len(pairs):,}"
        embed_s += texts.prepare((text for pair in block for text in (pair.a, pair.b)), what, with_states=True)
        judged += [_judge_pair(texts, pair, rules) for pair in block]
        texts.drop_states()
    rows = np.array(judged)
    similarity, log_odds, serves, allowed = rows[:, 0], rows[:, 1], rows[:, 2] > 0, rows[:, 3] > 0
    same = np.array([pair.same for pair in pairs])
    kinds = [pair.kind for pair in pairs]
    hits, wrong = int(serves.sum()), int((serves & ~same).sum())
    ranked = np.where(allowed, log_odds, -99.0)
    wanted = np.array([pair.same and pair.kind in ("paraphrase", "same") for pair in pairs])
    result: dict[str, Any] = {
        "kind": "pairs",
        "embed_s": embed_s,
        "asked": len(pairs),
        "same": int(same.sum()),
        "cold": {
            "hits": hits,
            "wrong": wrong,
            "interval": interval(wrong, hits),
            "by_kind": {kind: _share(serves, kinds, kind) for kind in sorted(set(kinds))},
        },
        "auc_similarity": auc(similarity, same),
        "auc_judge": auc(ranked, same),
    }
    if wanted.any():
        bound = float(np.sort(ranked[wanted])[::-1][(int(wanted.sum()) - 1) // 2])
        at = (ranked >= bound) & allowed
        plain = similarity >= float(np.sort(similarity[wanted])[::-1][(int(wanted.sum()) - 1) // 2])
        result["at_half_of_paraphrases"] = {
            "reached": float((at & wanted).sum() / wanted.sum()),
            "by_kind": {kind: _share(at, kinds, kind) for kind in sorted(set(kinds))},
            "cosine_by_kind": {kind: _share(plain, kinds, kind) for kind in sorted(set(kinds))},
        }
    return result


def _judge_pair(texts: Texts, pair: Pair, rules: Rules) -> tuple[float, float, bool, bool]:
    """similarity, log-odds, whether it is served, whether no guard forbids it."""
    a, b = texts.vector(pair.a), texts.vector(pair.b)
    if a is None or b is None:
        return -1.0, -99.0, False, False
    one, other = texts.signature(pair.a), texts.signature(pair.b)
    index = VectorOwner(texts.identity, texts.dimension)
    similarity, vetoes = index.compare(b, other, a.astype("<f4").tobytes(), one.astype("<u8").tobytes())
    judge = Judge(rules, Learner, LEVELS)
    place = Place(SCOPE, "", "tenant", b"")
    opinion = judge.consider(place, other, [Candidate(0, similarity, vetoes, one)], rules.max_error_rate)
    eligible = pair.is_first_turn and is_eligible(pair.b, True, rules) and is_eligible(pair.a, True, rules)
    if texts.can_verify:
        opinion.logits[0] = texts.logit(pair.b, pair.a)
    passes = not objection(opinion, opinion.judged[0], judge, can_verify=texts.can_verify)
    served = eligible and passes and opinion.chosen is not None
    return similarity, opinion.judged[0].log_odds, served, eligible and passes and not vetoes & FORBIDDING


def _share(served: NDArray[np.bool_], kinds: Sequence[str], kind: str) -> list[int]:
    """[served, of how many]."""
    mine = np.array([k == kind for k in kinds])
    return [int((served & mine).sum()), int(mine.sum())]


# -- counting ----------------------------------------------------------------------------------------------------------


def auc(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float | None:
    """Chance that a same pair ranks above a different one, ties half; None without both."""
    ours, others = scores[same], np.sort(scores[~same])
    if not len(ours) or not len(others):
        return None
    above = np.searchsorted(others, ours, "left") + np.searchsorted(others, ours, "right")  # a tie counts once of twice
    return float(above.sum() / (2 * len(ours) * len(others)))


def interval(wrong: int, hits: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of wrong / hits; (0, 1) without hits."""
    tail = (1.0 - confidence) / 2
    low = float(betaincinv(wrong, hits - wrong + 1, tail)) if wrong else 0.0
    high = float(betaincinv(wrong + 1, hits - wrong, 1.0 - tail)) if wrong < hits else 1.0
    return low, high


# -- showing -----------------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
    """One file's result for people."""
    if found["kind"] == "pairs":
        return _report_pairs(found)
    order = f"{found['shuffles']} shuffles" if found["shuffles"] else "file order"
    lines = [f"{found['file']}: {found['asked']:,} questions, {order}, labels: {found['labels']}; semantic hits alone"]
    rows: list[list[Any]] = []
    for row, fixed in zip(found["budgets"], found["static"], strict=True):
        low, high = row["interval"]
        rows.append(
            [
                f"{row['max_error']:.1%}",
                f"{row['hit_rate']:.3f}",
                f"{row['wrong']}/{row['hits']}",
                f"{row['error']:.2%}" if row["hits"] else "-",
                f"{low:.2%}-{high:.2%}" if row["hits"] else "-",
                f"{row['read_wrong']} ({row['unread']} unread)" if row["wrong"] else "0",
                f"{row['audited_share']:.0%}",
                f"{fixed['hit_rate']:.3f} at {fixed['threshold']:.3f}" if fixed["hits"] else "0",
            ]
        )
    columns = ("budget", "hits/asked", "wrong/hits", "error", "95 %", "wrong as read", "audited", "best fixed cosine")
    lines.append(printing.as_table(columns, rows))
    fixed_rows = [
        [peer["rule"], f"{peer['hit_rate']:.3f}", f"{peer['wrong']}/{peer['hits']}",
         f"{peer['wrong'] / peer['hits']:.2%}" if peer["hits"] else "-"] for peer in found["peers"]
    ]  # fmt: skip
    lines.append(printing.as_table(("fixed rule", "hits/asked", "wrong/hits", "error"), fixed_rows))
    last = found["budgets"][-1]
    lines.append(
        f"exact repeats {last['exact']:,}; lookup p50 {last['lookup_us_p50']} us, p99 {last['lookup_us_p99']} us; "
        f"not served at {last['max_error']:.1%}: "
        + ", ".join(f"{name} {count:,}" for name, count in list(last["reasons"].items())[:8])
        + "\n"
    )
    return "\n".join(lines)


def _report_pairs(found: Mapping[str, Any]) -> str:
    cold = found["cold"]
    low, high = cold["interval"]
    aucs = " and ".join(
        f"{name} {value:.3f}" for name, value in
        (("cosine", found["auc_similarity"]), ("judge", found["auc_judge"])) if value is not None
    )  # fmt: skip
    head = (
        f"{found['file']}: {found['asked']:,} pairs, {found['same']:,} the same; without any evidence {cold['hits']:,} "
        f"would be served, {cold['wrong']} wrong ({low:.2%}-{high:.2%})" + (f"; AUC: {aucs}" if aucs else "")
    )
    at = found.get("at_half_of_paraphrases", {}).get("by_kind", {})
    plain = found.get("at_half_of_paraphrases", {}).get("cosine_by_kind", {})
    rows = [
        [kind, _of(cold["by_kind"][kind]), _of(at[kind]) if at else "-", _of(plain[kind]) if plain else "-"]
        for kind in cold["by_kind"]
    ]
    columns = ("kind", "served cold", "served where half of paraphrases are", "the same by cosine alone")
    return head + "\n" + printing.as_table(columns, rows)


def _of(share: Sequence[int]) -> str:
    return f"{share[0]}/{share[1]} ({share[0] / share[1]:.1%})" if share[1] else "0"


def run(settings: Settings, chosen: argparse.Namespace) -> int:
    wanted = settings.embedding
    if not settings.data_dir.parent.is_dir():
        raise ConfigError(f"data directory {settings.data_dir}: the folder {settings.data_dir.parent} does not exist")
    budgets = chosen.max_error or BUDGETS
    if not all(0.0 < budget < 1.0 for budget in budgets):
        raise ConfigError("--max-error takes shares between 0 and 1")
    readings = read_readings(Path(chosen.readings)) if chosen.readings else None
    texts = asyncio.run(open_texts(settings.data_dir, wanted.model, wanted.backend, os.cpu_count() or 1))
    results = []
    for file in chosen.files:
        found = evaluate(
            Path(file), texts, settings.rules, budgets=budgets, labels=chosen.labels, shuffles=chosen.shuffles,
            readings=readings,
        )  # fmt: skip
        results.append(found)
        if not chosen.json:
            print(report(found), flush=True)
    if chosen.json:
        sys.stdout.write(printing.as_json(results))
    if chosen.plot:
        try:
            Path(chosen.plot).write_text(plot.svg(results), "utf-8")
        except OSError as error:
            raise ConfigError(f"{chosen.plot}: {error.strerror}") from error
    return FINE
