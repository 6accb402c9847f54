"""How well are two answers compared? `python -m tests.bench.answers [--fit]`.

`answers.jsonl` holds questions, answers that say the same and answers to look-alikes, or wrong ones;
`answers_dev.jsonl` questions in four wordings with a look-alike each. Both were written for ibid by language models
(Apache-2.0). Of every question each two of the same make a pair that must be called the same, each of the same with
each other one a pair that must not; every answer is dressed in courtesies by chance, as models do. Printed are, by
file, the area under the curve, false alarms (the same, called different), what is missed (different, called the same)
and the error of calibration, of trees fitted to nine tenths of the questions and tried on the last, in turn; the share
of pairs that is left to the model; and the processor's time. `--fit` writes `index/answers.json` and
`index/measured.py`, fitted to all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import roc_auc_score

import index.answers
from index.answers import EQUAL, SETTLED, Likeness, Trees, head, likeness, trees_from
from index.closeness import Closeness, closeness
from index.embedder import Backend, TokenStates
from index.guard.head import MAX_TOKENS
from index.model import BUNDLED
from index.statement import state
from proxy.commands.evaluate import interval, open_texts

FOLDER: Final = Path(__file__).parent
FILES: Final = ("answers.jsonl", "answers_dev.jsonl")
WRITTEN: Final = Path(index.answers.__file__).parent
PARTS: Final = 10
BEFORE: Final = (
    "", "", "", "Sure! ", "Happy to help. ", "Thanks for your question. ", "Of course. ", "Hi there! ",
    "Great question! ",
)  # fmt: skip
AFTER: Final = (
    "", "", "", " Let me know if you need anything else.", " Hope this helps!", " Have a nice day.",
    " Feel free to ask if something is unclear.",
)  # fmt: skip
COLUMNS: Final = (*Likeness._fields, *Closeness._fields)
ALONE: Final = len(Likeness._fields)


class Pairs(NamedTuple):
    rows: NDArray[np.float64]  # (n, len(COLUMNS))
    same: NDArray[np.bool_]
    equal: NDArray[np.bool_]
    question: NDArray[np.int64]
    file: NDArray[np.int64]
    count: NDArray[np.float64]  # what a pair counts for: a question's pairs of the same as much as its others, 1 each


def questions() -> Iterator[tuple[int, list[str], list[str]]]:
    """(place of the file, answers that say the same, answers that say something else)"""
    for place, name in enumerate(FILES):
        for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                one = json.loads(line)
                other = one["other"] if "other" in one else [one["lookalike"]["answer"]]
                yield place, one.get("same") or one["answers_same"], other


class Matcher:
    """Token states of what answers begin with, each made once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[str, TokenStates] = {}

    def match(self, one: str, other: str) -> Closeness:
        return closeness(self._states(one), self._states(other))

    def _states(self, text: str) -> TokenStates:
        if text not in self._known:
            ids = self._backend.tokens(text)
            ids = [*ids[: MAX_TOKENS + 1], ids[-1]] if len(ids) > MAX_TOKENS + 2 else ids
            self._known[text] = self._backend.encode_states([ids])[1][0]
        return self._known[text]


async def described() -> Pairs:
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as data_dir:
        matcher = Matcher((await open_texts(Path(data_dir), BUNDLED, "onnx", 1)).backend)
    rows, labels = [], []
    read_s = matched_s = 0.0
    for number, (file, same, other) in enumerate(questions()):
        pairs = [(*pair, True) for pair in combinations(same, 2)]
        pairs += [(*pair, False) for pair in product(same, other)]
        for a, b, is_same in pairs:
            started = time.process_time()
            one, two = (state(chance.choice(BEFORE) + text + chance.choice(AFTER)) for text in (a, b))
            found = likeness(one, two)
            read = time.process_time()
            close = matcher.match(head(one.text), head(two.text))
            read_s += read - started
            matched_s += time.process_time() - read
            rows.append((*(found or [0.0] * ALONE), *close))
            share = 1.0 / sum(label == is_same for *_, label in pairs)
            labels.append((is_same, found is None, number, file, share))
    print(f"{len(rows)} pairs, processor time of each: {read_s / len(rows) * 1e3:.2f} ms read, "
          f"{matched_s / len(matcher._known) * 2e3:.1f} ms matched in the model")  # fmt: skip
    columns = [np.array(column) for column in zip(*labels, strict=True)]
    return Pairs(np.array(rows), *columns)


def fit(pairs: Pairs, use: NDArray[np.bool_], columns: int) -> Trees:
    """Trees over the first `columns`, to the pairs of `use`."""
    use = use & ~pairs.equal
    model = GradientBoostingClassifier(
        n_estimators=150, max_depth=3, learning_rate=0.06, subsample=0.7, min_samples_leaf=8, random_state=0
    )
    model.fit(pairs.rows[use, :columns], pairs.same[use], sample_weight=pairs.count[use])
    return trees_from(written(model))


def written(model: GradientBoostingClassifier) -> dict[str, list[float]]:
    """What `trees_from` reads. A leaf above the last level is repeated below."""
    found: dict[str, list[float]] = {"start": [0.0], "features": [], "thresholds": [], "leaves": []}
    weight = model.init_.class_prior_
    found["start"] = [round(float(np.log(weight[1] / weight[0])), 4)]
    for (tree,) in model.estimators_:
        nodes = [0]
        for place in range(15):
            node = nodes[place]
            is_leaf = tree.tree_.children_left[node] < 0
            nodes += [node, node] if is_leaf else [tree.tree_.children_left[node], tree.tree_.children_right[node]]
            if place < 7:
                found["features"].append(0 if is_leaf else int(tree.tree_.feature[node]))
                # rounded as the model sees it: its rows are float32
                found["thresholds"].append(0.0 if is_leaf else float(f"{tree.tree_.threshold[node]:.7g}"))
            else:
                found["leaves"].append(round(model.learning_rate * float(tree.tree_.value[node][0][0]), 4))
    return found


def given(trees: Trees, pairs: Pairs) -> NDArray[np.float64]:
    """Probabilities of being the same."""
    odds = np.array([trees.log_odds(row) for row in pairs.rows])
    return np.where(pairs.equal, EQUAL, 1.0 / (1.0 + np.exp(-odds)))


def crossed(pairs: Pairs, columns: int) -> NDArray[np.float64]:
    """Probabilities of trees that did not see the question."""
    found = np.zeros(len(pairs.same))
    part = np.random.default_rng(0).permutation(int(pairs.question.max()) + 1) % PARTS
    for k in range(PARTS):
        held = part[pairs.question] == k
        found[held] = given(fit(pairs, ~held, columns), pairs)[held]
    return found


def staged(alone: NDArray[np.float64], matched: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the comparer says: the model is only asked where likeness leaves it open."""
    return np.where((alone > SETTLED[0]) & (alone < SETTLED[1]), matched, alone)


def tell(name: str, pairs: Pairs, found: NDArray[np.float64], use: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    same, p, count = pairs.same[use], found[use], pairs.count[use]
    alarms, missed = int((p[same] < 0.5).sum()), int((p[~same] >= 0.5).sum())
    low, high = interval(alarms, same.sum())
    least, most = interval(missed, (~same).sum())
    print(f"{name:<34}AUC {roc_auc_score(same, p, sample_weight=count):.3f}   "
          f"alarms {alarms}/{same.sum()} ({alarms / same.sum():.1%}, 95 %: {low:.1%}-{high:.1%})   "
          f"missed {missed}/{(~same).sum()} ({missed / (~same).sum():.1%}, {least:.1%}-{most:.1%})   "
          f"calibration {calibration_error(p, same, count):.3f}")  # fmt: skip
    return alarms, int(same.sum()), missed, int((~same).sum())


def calibration_error(p: NDArray[np.float64], same: NDArray[np.bool_], count: NDArray[np.float64]) -> float:
    """Mean distance between what was said and what was so, over ten steps of probability."""
    step = np.minimum((p * 10).astype(int), 9)
    gaps = [abs((count * (p - same))[step == k].sum()) for k in range(10)]
    return float(sum(gaps) / count.sum())


MEASURED: Final = '''\
"""How often comparing answers errs. Written by `python -m tests.bench.answers --fit`; not by hand."""

from __future__ import annotations

from typing import Final

FALSE_ALARMS: Final = ({alarms}, {same})
"""Pairs that say the same and were called different, of so many; on questions left out of the fit."""
MISSES: Final = ({missed}, {other})
"""Pairs that say something different and were called the same, of so many; on questions left out of the fit."""
'''


def write(pairs: Pairs, errors: tuple[int, int, int, int]) -> None:
    everything = np.ones(len(pairs.same), bool)
    trees: dict[str, Any] = {}
    for name, columns in (("alone", ALONE), ("matched", len(COLUMNS))):
        found = fit(pairs, everything, columns)
        flat = {field: np.ravel(value).tolist() for field, value in found._asdict().items()}
        trees[name] = flat
    (WRITTEN / index.answers.FILE).write_text(json.dumps(trees, separators=(",", ":")) + "\n", encoding="ascii")
    alarms, same, missed, other = errors
    (WRITTEN / "measured.py").write_text(
        MEASURED.format(alarms=alarms, same=same, missed=missed, other=other),
        encoding="ascii",
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="write what is fitted to all questions")
    options = parser.parse_args()
    pairs = await described()
    alone, matched = crossed(pairs, ALONE), crossed(pairs, len(COLUMNS))
    both = staged(alone, matched)
    for name, found in (("without the model", alone), ("with the model", matched), ("staged", both)):
        for place, file in enumerate(FILES):
            tell(f"{name}, {file}", pairs, found, pairs.file == place)
    errors = tell("staged, all", pairs, both, np.ones(len(pairs.same), bool))
    is_open = (alone > SETTLED[0]) & (alone < SETTLED[1]) & ~pairs.equal
    print(f"{is_open.mean():.0%} of the pairs are left to the model")
    if options.fit:
        write(pairs, errors)


if __name__ == "__main__":
    asyncio.run(main())
