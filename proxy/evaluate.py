"""`ibid evaluate`: labelled questions through the shipped matching, in this process; hits and wrong hits counted.

The model, the signatures, the arena and its kernels, the policy's eligibility and the judge are the ones that serve;
what is left out is HTTP, SQL and the upstream, whose part the labels play. Two kinds of file, told apart by their
fields: a *stream* (`query`, `answer_id`) is asked in its order from an empty cache, a *pair* (`a`, `b`, `label`) stores
a and asks b with nothing else known. Semantic hits are counted; exact repeats are served before and counted apart.
"""

from __future__ import annotations

import gzip
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from index.batcher import load_backend
from index.embedder import Backend
from index.errors import TextTooLong
from index.features import compile_features
from index.kernels import compile_kernels
from index.learner import LEVELS, Learner
from index.tokens import signature as signature_of
from index.vectors import VectorOwner
from proxy.core import policy
from proxy.core.errors import BadRequest
from proxy.core.facts import Facts
from proxy.core.model import Candidate, Controls, Level, Rules
from proxy.judge import LEARN_FROM, Judge, Judged, Opinion, Place, comparison
from proxy.printing import Bar

BUDGETS: Final = (0.005, 0.01, 0.02, 0.05)
PEERS: Final = (
    ("GPTCache default, cosine .60", 0.60),
    ("cosine .80", 0.80),
    ("RedisVL default, cosine .90", 0.90),
    ("cosine .95", 0.95),
)
CANDIDATES: Final = 16
FAR_MS: Final = 1 << 52
LABELS: Final = ("perfect", "none")
SCOPE: Final = bytes(32)
PARAPHRASES: Final = ("paraphrase",)


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of a stream."""

    text: str
    answer: str
    is_first_turn: bool


@dataclass(frozen=True, slots=True)
class Pair:
    a: str
    b: str
    same: bool
    kind: str
    is_first_turn: bool = True


@dataclass(slots=True)
class Counts:
    """What came of one replay at one budget."""

    asked: int = 0
    exact: int = 0
    hits: int = 0
    wrong: int = 0
    audited: int = 0
    standings: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)


class Texts:
    """Vectors and signatures of texts, each computed once."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._vectors: dict[str, NDArray[np.float32] | None] = {}
        self._signatures: dict[str, NDArray[np.uint64]] = {}

    def prepare(self, texts: Iterable[str]) -> float:
        """Embed what is not known yet, equal lengths together as the embedder's owner does; seconds spent."""
        started = time.perf_counter()
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for text in new:
            try:
                ids = self.backend.tokens(text)
            except TextTooLong:
                self._vectors[text] = None
                continue
            by_length.setdefault(len(ids), []).append((text, ids))
        bar = Bar("embedding", len(new))
        for waiting in by_length.values():
            for at in range(0, len(waiting), self.backend.batch_limit):
                part = waiting[at : at + self.backend.batch_limit]
                vectors = self.backend.encode_tokens([ids for _, ids in part])
                for (text, _), vector in zip(part, vectors, strict=True):
                    self._vectors[text] = vector.copy()
                bar.advance(len(part))
        bar.close()
        return time.perf_counter() - started

    def vector(self, text: str) -> NDArray[np.float32] | None:
        """None for a text longer than the window."""
        return self._vectors[text]

    def signature(self, text: str) -> NDArray[np.uint64]:
        known = self._signatures.get(text)
        if known is None:
            known = self._signatures[text] = signature_of(text)
        return known


def read(path: Path) -> tuple[list[Asked], list[Pair]]:
    """The rows of a file, plain or gzip: one of the lists is empty. Raises BadRequest naming the line."""
    streams: list[Asked] = []
    pairs: list[Pair] = []
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as fault:
        raise BadRequest(f"{path}: cannot be read ({type(fault).__name__})", code="bad_file") from fault
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            if "query" in row:
                streams.append(Asked(_text(row["query"]), _text(row["answer_id"]), not row.get("context")))
            else:
                pairs.append(_pair(row))
        except (ValueError, KeyError, TypeError) as fault:
            raise BadRequest(
                f"{path}, line {number}: neither a stream row (query, answer_id) nor a pair (a, b, label)",
                code="bad_row",
            ) from fault
    if not streams and not pairs:
        raise BadRequest(f"{path}: no rows", code="bad_file")
    if streams and pairs:
        raise BadRequest(f"{path}: streams and pairs in one file", code="bad_file")
    return streams, pairs


def _text(value: Any) -> str:
    """Answers may be named by any JSON value; texts are texts."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _pair(row: Mapping[str, Any]) -> Pair:
    a, b = row["a"], row["b"]
    same = row["label"] in (1, True, "1")
    kind = str(row.get("kind") or ("same" if same else "different"))
    if isinstance(a, list):  # conversations: what counts is the last turn after all before it
        return Pair(_content(a[-1]), _content(b[-1]), same, kind, is_first_turn=len(a) == 1 and len(b) == 1)
    if not isinstance(a, str) or not isinstance(b, str):
        raise TypeError
    return Pair(a, b, same, kind)


def _content(message: Any) -> str:
    return str(message["content"]) if isinstance(message, Mapping) else str(message)


def is_eligible(text: str, is_first_turn: bool, rules: Rules) -> bool:
    """Whether the shipped policy would look for this prompt's like at all."""
    facts = Facts(model="m", prompt=text, context=(), settings={}, first_turn=is_first_turn, user_turns=1)
    return policy.classify(facts, Controls(), rules).level is Level.FULL


class Replay:
    """One cache, one judge, one budget."""

    def __init__(self, texts: Texts, rules: Rules, max_error: float, labels: str, seed: int = 0) -> None:
        self.counts = Counts()
        self.lookup_s = 0.0
        self.lookups = 0
        self._texts = texts
        self._rules = rules
        self._max_error = max_error
        self._learns = labels != "none"
        self._rng = random.Random(seed)
        self._judge = Judge(rules, Learner, LEVELS)
        self._index = VectorOwner(texts.backend.identity, texts.backend.dimension, promote_above=1 << 30)
        self._answers: list[str] = []
        self._exact: dict[str, int] = {}

    def ask(self, asked: Asked) -> None:
        counts = self.counts
        counts.asked += 1
        if asked.text in self._exact:
            counts.exact += 1
            return
        vector = self._texts.vector(asked.text)
        if vector is None or not is_eligible(asked.text, asked.is_first_turn, self._rules):
            counts.reasons["exact_only"] = counts.reasons.get("exact_only", 0) + 1
            return
        signature = self._texts.signature(asked.text)
        place = Place(SCOPE, "", "tenant", asked.text.encode("utf-8", "replace"))
        started = time.perf_counter()
        candidates = self._search(vector, signature)
        opinion = self._judge.consider(place, signature, candidates, self._max_error)
        chosen = opinion.chosen
        self.lookup_s += time.perf_counter() - started
        self.lookups += 1
        self._judge.see(place, signature)
        audited, weight = True, 1.0
        if chosen is not None:
            audited, weight = self._serve(opinion, chosen, asked)
        elif opinion.judged:
            reason = opinion.judged[0].reason
            counts.reasons[reason] = counts.reasons.get(reason, 0) + 1
        if self._learns and audited:
            self._label(opinion, asked, weight, served=chosen is not None)
        if chosen is None or audited:
            self._store(place, asked, vector, signature, candidates)

    def _search(self, vector: NDArray[np.float32], signature: NDArray[np.uint64]) -> list[Candidate]:
        found = self._index.find_now(SCOPE, vector, signature, 0, CANDIDATES)
        return [Candidate(*one) for one in found]

    def _serve(self, opinion: Opinion, chosen: Judged, asked: Asked) -> tuple[bool, float]:
        """Count a hit; whether it is audited, and so its truth becomes known, and how many it then stands for."""
        counts = self.counts
        assert chosen.standing is not None
        share = self._judge.audit_share(opinion, chosen)
        audited = self._learns and self._rng.random() < share
        self._judge.serve(opinion.place)
        wrong = self._answers[chosen.candidate.entry_id] != asked.answer
        counts.hits += 1
        counts.audited += audited
        counts.wrong += wrong
        counts.standings[chosen.standing.value] = counts.standings.get(chosen.standing.value, 0) + 1
        return audited, 1.0 / max(share, 1e-9)

    def _label(self, opinion: Opinion, asked: Asked, weight: float, *, served: bool) -> None:
        judged = opinion.decision
        if judged is None or judged.candidate.similarity < LEARN_FROM:
            return
        same = self._answers[judged.candidate.entry_id] == asked.answer
        label = comparison(
            opinion, judged, p_same=float(same), weight=weight, served=served, source="audit" if served else "forward",
            request_id="", embedder="", ts_ms=0,
        )  # fmt: skip
        self._judge.apply(label)

    def _store(
        self,
        place: Place,
        asked: Asked,
        vector: NDArray[np.float32],
        signature: NDArray[np.uint64],
        candidates: Sequence[Candidate],
    ) -> None:
        entry_id = len(self._answers)
        self._answers.append(asked.answer)
        self._exact[asked.text] = entry_id
        self._index.add_now(entry_id, SCOPE, vector, signature, FAR_MS)
        group = entry_id
        if self._learns:
            same = (c.entry_id for c in candidates if self._answers[c.entry_id] == asked.answer)
            group = self._judge.group_of(next(same, entry_id))
        self._judge.enter(place, entry_id, group)


def nearest(texts: Texts, rows: Sequence[Asked]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of each row, similarity to the most similar earlier one and whether its answer is the same: a cache that serves
    on similarity alone and stores every miss is no better than this."""
    kept = [(row, vector) for row in rows if (vector := texts.vector(row.text)) is not None]
    if not kept:
        return np.zeros(0, np.float32), np.zeros(0, np.bool_)
    matrix = np.stack([vector for _, vector in kept])
    best, right = np.full(len(kept), -1.0, np.float32), np.zeros(len(kept), np.bool_)
    for i in range(1, len(kept)):
        similarities = matrix[:i] @ matrix[i]
        at = int(np.argmax(similarities))
        best[i], right[i] = similarities[at], kept[at][0].answer == kept[i][0].answer
    return best, right


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
    return [
        {
            "rule": name,
            "hits": int((best >= bound).sum()),
            "hit_rate": float((best >= bound).sum()) / asked if asked else 0.0,
            "wrong": int((~right[best >= bound]).sum()),
        }
        for name, bound in PEERS
    ]


def evaluate_stream(
    texts: Texts, rows: Sequence[Asked], rules: Rules, budgets: Sequence[float], labels: str, shuffles: int
) -> dict[str, Any]:
    best, right = nearest(texts, rows)
    result: dict[str, Any] = {"kind": "stream", "asked": len(rows), "labels": labels, "budgets": []}
    for budget in budgets:
        runs = []
        for seed in range(max(1, shuffles)):
            ordered = list(rows)
            if shuffles:
                random.Random(seed).shuffle(ordered)
            replay = Replay(texts, rules, budget, labels, seed)
            for row in ordered:
                replay.ask(row)
            runs.append(replay)
        result["budgets"].append(_summary(budget, runs))
    result["static"] = static_curve(best, right, len(rows), budgets)
    result["peers"] = peers(best, right, len(rows))
    return result


def _summary(budget: float, runs: Sequence[Replay]) -> dict[str, Any]:
    hits, wrong = sum(r.counts.hits for r in runs), sum(r.counts.wrong for r in runs)
    asked = sum(r.counts.asked for r in runs)
    low, high = interval(wrong, hits)
    lookups = sum(r.lookups for r in runs)
    within = sum(interval(r.counts.wrong, r.counts.hits)[0] <= budget for r in runs)
    standings: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for run in runs:
        for name, n in run.counts.standings.items():
            standings[name] = standings.get(name, 0) + n
        for name, n in run.counts.reasons.items():
            reasons[name] = reasons.get(name, 0) + n
    return {
        "max_error": budget,
        "runs": len(runs),
        "hit_rate": hits / asked if asked else 0.0,
        "hits": hits,
        "wrong": wrong,
        "error": wrong / hits if hits else 0.0,
        "interval": [low, high],
        "runs_within": within,
        "worst_error": max((r.counts.wrong / r.counts.hits for r in runs if r.counts.hits), default=0.0),
        "exact": sum(r.counts.exact for r in runs),
        "audited": sum(r.counts.audited for r in runs),
        "standings": standings,
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "us_per_lookup": round(1e6 * sum(r.lookup_s for r in runs) / lookups, 1) if lookups else 0.0,
    }


def evaluate_pairs(texts: Texts, pairs: Sequence[Pair], rules: Rules, budgets: Sequence[float]) -> dict[str, Any]:
    """Each pair in a scope of its own: what is served before there is any evidence, and how the judge ranks."""
    rows = [_judge_pair(texts, pair, rules) for pair in pairs]
    similarity = np.array([row[0] for row in rows])
    log_odds = np.array([row[1] for row in rows])
    serves = np.array([row[2] for row in rows])
    allowed = np.array([row[3] for row in rows])
    same = np.array([pair.same for pair in pairs])
    kinds = [pair.kind for pair in pairs]
    hits, wrong = int(serves.sum()), int((serves & ~same).sum())
    result = {
        "kind": "pairs",
        "asked": len(pairs),
        "same": int(same.sum()),
        "served": {
            "hits": hits,
            "wrong": wrong,
            "interval": interval(wrong, hits),
            "of_same": int((serves & same).sum()),
        },
        "auc_similarity": auc(similarity, same),
        "auc_judge": auc(np.where(allowed, log_odds, -99.0), same),
        "by_kind": {kind: _share(serves, kinds, kind) for kind in sorted(set(kinds))},
    }
    wanted = np.array([same[i] and kinds[i] in (*PARAPHRASES, "same") for i in range(len(pairs))])
    if wanted.any():
        ranked = np.where(allowed, log_odds, -99.0)
        bound = float(np.sort(ranked[wanted])[::-1][(int(wanted.sum()) - 1) // 2])
        at = (ranked >= bound) & allowed
        result["at_half_of_paraphrases"] = {
            "log_odds": bound,
            "reached": float((at & wanted).sum() / wanted.sum()),
            "by_kind": {kind: _share(at, kinds, kind) for kind in sorted(set(kinds))},
        }
    return result


def _judge_pair(texts: Texts, pair: Pair, rules: Rules) -> tuple[float, float, bool, bool]:
    """similarity, log-odds, whether it is served, whether no guard forbids it."""
    a, b = texts.vector(pair.a), texts.vector(pair.b)
    if a is None or b is None:
        return -1.0, -99.0, False, False
    one, other = texts.signature(pair.a), texts.signature(pair.b)
    index = VectorOwner(texts.backend.identity, texts.backend.dimension)
    similarity, vetoes = index.compare(b, other, a.astype("<f4").tobytes(), one.astype("<u8").tobytes())
    judge = Judge(rules, Learner, LEVELS)
    place = Place(SCOPE, "", "tenant", b"")
    opinion = judge.consider(place, other, [Candidate(0, similarity, vetoes, one)], rules.max_error_rate)
    eligible = pair.is_first_turn and is_eligible(pair.b, True, rules) and is_eligible(pair.a, True, rules)
    judged = opinion.judged[0]
    forbidden = bool(vetoes & policy.mask("numbers", "units", "dates", "ids", "quoted", "code", "script", "negation",
                                          "antonyms", "direction"))  # fmt: skip
    return similarity, judged.log_odds, eligible and opinion.chosen is not None, eligible and not forbidden


def _share(served: NDArray[np.bool_], kinds: Sequence[str], kind: str) -> list[int]:
    """[served, of how many]."""
    mine = np.array([k == kind for k in kinds])
    return [int((served & mine).sum()), int(mine.sum())]


def auc(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float | None:
    """Chance that a same pair ranks above a different one, ties half; None without both."""
    n, m = int(same.sum()), int((~same).sum())
    if not n or not m:
        return None
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ordered = scores[order]
    start = 0
    for i in range(1, len(scores) + 1):
        if i == len(scores) or ordered[i] != ordered[start]:
            ranks[order[start:i]] = (start + i + 1) / 2
            start = i
    return float((ranks[same].sum() - n * (n + 1) / 2) / (n * m))


def interval(wrong: int, hits: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of wrong / hits, by bisection of the binomial tails; (0, 1) without hits."""
    if hits <= 0:
        return 0.0, 1.0
    tail = (1.0 - confidence) / 2

    def at_most(k: int, p: float) -> float:
        from math import exp, lgamma, log

        if p <= 0.0:
            return 1.0
        if p >= 1.0:
            return 1.0 if k >= hits else 0.0
        top = lgamma(hits + 1)
        return min(1.0, sum(
            exp(top - lgamma(i + 1) - lgamma(hits - i + 1) + i * log(p) + (hits - i) * log(1 - p)) for i in range(k + 1)
        ))  # fmt: skip

    def solve(crossed: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if crossed(middle) else (middle, high)
        return (low + high) / 2

    lower = 0.0 if wrong == 0 else solve(lambda p: 1.0 - at_most(wrong - 1, p) >= tail)
    upper = 1.0 if wrong == hits else solve(lambda p: at_most(wrong, p) <= tail)
    return lower, upper


async def open_texts(data_dir: Path, model: str | None, backend: str, threads: int) -> Texts:
    """Raises ModelFault."""
    loaded = await load_backend(data_dir, model=model, backend=backend, threads=threads)
    compile_kernels(loaded.dimension)
    compile_features()
    return Texts(loaded)
