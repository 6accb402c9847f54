"""What the pair guard is worth: pairs, traps and streams with and without it, and its time.

    python -m tests.bench.guard --data DIR [--head NAME=FILE ...]

DIR holds labelled files as `ibid evaluate` reads them (`pairs_*`, `stream_*`, gzip JSON lines); those that are absent
are left out. None of them is in this repository, and of them training reads banking77 and PAWS alone. Further heads,
e.g. those that `index.guard.training.train --leave-out` writes, become further rows. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.embedder import OnnxBackend
from index.guard.head import Guard, load_guard, parse
from index.kernels import veto_bits
from proxy.commands.evaluate import FORBIDDING, auc, open_texts
from proxy.commands.labelled import Asked, Pair, read
from proxy.commands.printing import Bar
from proxy.commands.rehearsal import Texts

Bits = NDArray[np.bool_]
Numbers = NDArray[np.float64]

LIMIT = 3000  # pairs of a file
BOUNDS = (0.80, 0.90, 0.95)
TRAPS = ("near_repeat", "number_date", "negation", "entity_swap", "scope")
PARAPHRASE = "paraphrase"
SERVED = 0.5  # of the paraphrases: where the trap shares are read
REPEATS = 300


class Head:
    """One guard's logits, of pairs of texts whose states the shared `Texts` keep."""

    def __init__(self, name: str, texts: Texts, guard: Guard) -> None:
        self.name = name
        self._texts = texts
        self._guard = guard

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Numbers:
        bar = Bar(self.name, len(pairs))
        found = []
        for a, b in pairs:
            found.append(self._guard.judge(self._texts.states(a), [self._texts.states(b)])[0])
            bar.advance(1)
        bar.close()
        return np.array(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guard", description="Measure the pair guard.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory of the converted model")
    parser.add_argument("--head", action="append", default=[], metavar="NAME=FILE")
    options = parser.parse_args(arguments)
    texts = asyncio.run(open_texts(options.work, "all-MiniLM-L6-v2", "onnx", 1))
    heads = [Head("shipped", texts, load_guard())]
    for name, _, file in (given.partition("=") for given in options.head):
        raw = Path(file).read_bytes()
        heads.append(Head(name, texts, Guard(parse(raw, sha256(raw).hexdigest()))))
    files = {path.name.partition(".")[0]: path for path in sorted(options.data.glob("*.jsonl.gz"))}
    pairs = {
        name: read(files[name])[1][:LIMIT]
        for name in ("pairs_fow", "pairs_qqp", "pairs_msrp", "pairs_paws_en")
        if name in files
    }
    streams = {
        name: read(files[name])[0]
        for name in ("stream_banking77", "stream_geography", "stream_atis", "stream_qqp")
        if name in files
    }
    texts.prepare(text for group in pairs.values() for pair in group for text in (pair.a, pair.b))
    texts.prepare(row.text for group in streams.values() for row in group)
    for table in (
        _ranking(texts, heads, pairs),
        _traps(texts, heads, pairs.get("pairs_fow", [])),
        *(_stream(texts, heads, name, rows) for name, rows in streams.items()),
        _timing(texts, heads[0]),
    ):
        print("\n".join(table), end="\n\n", flush=True)
    return 0


# -- pairs -------------------------------------------------------------------------------------------------------------


def _cosines(texts: Texts, pairs: Sequence[tuple[str, str]]) -> Numbers:
    found = []
    for a, b in pairs:
        one, other = texts.vector(a), texts.vector(b)
        found.append(-1.0 if one is None or other is None else float(one @ other))
    return np.array(found)


def _vetoed(texts: Texts, pairs: Sequence[tuple[str, str]]) -> Bits:
    return np.array([bool(veto_bits(texts.signature(a), texts.signature(b)) & FORBIDDING) for a, b in pairs])


def _ranking(texts: Texts, heads: Sequence[Head], groups: dict[str, list[Pair]]) -> Iterator[str]:
    """Area under the ROC curve of each head alone, and the share of each label that passes at logit 0."""
    yield (
        "| AUC; in brackets same / other above 0 | "
        + " | ".join(f"{name} ({len(pairs):,})" for name, pairs in groups.items())
        + " |"
    )
    yield "|---|" + "---|" * len(groups)
    cells = []
    for pairs in groups.values():
        same = np.array([pair.same for pair in pairs])
        cells.append(f"{auc(_cosines(texts, [(p.a, p.b) for p in pairs]), same):.3f}")
    yield "| cosine | " + " | ".join(cells) + " |"
    for head in heads:
        cells = []
        for pairs in groups.values():
            same = np.array([pair.same for pair in pairs])
            logits = head.logits([(pair.a, pair.b) for pair in pairs])
            above = logits > 0
            cells.append(f"{auc(logits, same):.3f} ({above[same].mean():.2f} / {above[~same].mean():.2f})")
        yield f"| {head.name} | " + " | ".join(cells) + " |"


def _traps(texts: Texts, heads: Sequence[Head], pairs: Sequence[Pair]) -> Iterator[str]:
    """Share served of each kind, serving from the similarity at which SERVED of the paraphrases are."""
    if not pairs:
        return
    both = [(pair.a, pair.b) for pair in pairs]
    kinds = np.array([pair.kind for pair in pairs])
    cosines, vetoed = _cosines(texts, both), _vetoed(texts, both)
    yield f"| traps ({len(pairs)}), served | from | paraphrase | " + " | ".join(TRAPS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(TRAPS)
    open_to_all = np.ones(len(pairs), np.bool_)
    rows: list[tuple[str, Bits]] = [("cosine", open_to_all), ("cosine, vetoes", ~vetoed)]
    for head in heads:
        passes = head.logits(both) > 0
        rows += [(f"cosine, {head.name}", passes), (f"cosine, vetoes, {head.name}", passes & ~vetoed)]
    for name, allowed in rows:
        true = np.sort(np.where(allowed, cosines, -1.0)[kinds == PARAPHRASE])[::-1]
        reached = float(true[int(np.ceil(SERVED * len(true))) - 1])
        for bound in (reached, *BOUNDS):
            if bound < 0:
                yield f"| {name} | - | never {SERVED:.0%}: {float((true > -1.0).mean()):.1%} pass |" + " |" * len(TRAPS)
                continue
            served = allowed & (cosines >= bound)
            cells = [f"{served[kinds == kind].mean():.1%}" for kind in (PARAPHRASE, *TRAPS)]
            yield f"| {name} | {bound:.3f} | " + " | ".join(cells) + " |"


# -- streams -----------------------------------------------------------------------------------------------------------


def _stream(texts: Texts, heads: Sequence[Head], name: str, rows: Sequence[Asked]) -> Iterator[str]:
    """Each question beside the most similar one before it: hits and wrong hits, with and without vetoes and guard."""
    kept = [(row, vector) for row in rows if (vector := texts.vector(row.text)) is not None]
    matrix = np.stack([vector for _, vector in kept])
    both, found, right = [], [], []
    for i in range(1, len(kept)):
        cosines = matrix[:i] @ matrix[i]
        at = int(np.argmax(cosines))
        if cosines[at] >= BOUNDS[0] and kept[at][0].text != kept[i][0].text:
            both.append((kept[at][0].text, kept[i][0].text))
            found.append(float(cosines[at]))
            right.append(kept[at][0].answer == kept[i][0].answer)
    similarity, same, vetoed = np.array(found), np.array(right), _vetoed(texts, both)
    columns = " | ".join(f"from {bound:.2f}: hits, wrong, right ones lost" for bound in BOUNDS)
    yield f"| {name} ({len(rows):,}) | {columns} |"
    yield "|---|" + "---|" * len(BOUNDS)
    options: list[tuple[str, Bits]] = [("cosine", np.ones(len(both), np.bool_)), ("vetoes", ~vetoed)]
    for head in heads:
        passes = head.logits(both) > 0
        options += [(head.name, passes), (f"vetoes, {head.name}", passes & ~vetoed)]
    for title, allowed in options:
        cells = []
        for bound in BOUNDS:
            alike = similarity >= bound
            hits, wrong = int((alike & allowed).sum()), int((alike & allowed & ~same).sum())
            lost = float((alike & same & ~allowed).sum()) / max(1, int((alike & same).sum()))
            cells.append(f"{hits}, {wrong} ({wrong / max(1, hits):.1%}), {lost:.1%}")
        yield f"| {title} | " + " | ".join(cells) + " |"


# -- time --------------------------------------------------------------------------------------------------------------


def _timing(texts: Texts, head: Head) -> Iterator[str]:
    """Milliseconds of the head on states at hand, and of encoding one text whose states are not, 13 tokens a text."""
    backend, guard = texts.backend, head._guard
    assert isinstance(backend, OnnxBackend)
    asked = "how do i change the address on my account and card"
    others = ("how can i change the address of my account and card",) * 3
    ids = backend.tokens(asked)
    states = [texts.states(text) for text in (asked, *others)]
    yield f"| p50, p99 of {REPEATS}, ms, {len(ids)} tokens with the special ones | one candidate | three |"
    yield "|---|---:|---:|"
    one = _times(lambda: guard.judge(states[0], states[1:2]))
    three = _times(lambda: guard.judge(states[0], states[1:]))
    yield f"| head, states at hand | {one} | {three} |"
    yield f"| one encoding with states | {_times(lambda: backend.encode_states([ids]))} | |"


def _times(call: object) -> str:
    assert callable(call)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        spent.append((time.perf_counter() - started) * 1e3)
    return f"{np.percentile(spent, 50):.2f}, {np.percentile(spent, 99):.2f}"


if __name__ == "__main__":
    sys.exit(main())
