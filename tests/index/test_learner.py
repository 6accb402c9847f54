"""Features and learner against their NumPy twins, and what a learner promises."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import features
from index.features import FEATURES, OWN, WORD_CELLS, buffers, describe, update
from index.kernels import veto_bits
from index.learner import FOLDS, RING, Considered, Learner
from index.levels import LEVELS
from index.tokens import GUARDS, WORDS, signature

TEXTS = (
    "How do I reset the router of my office",
    "How can I reset my office router",
    "How do I reset 2 routers",
    "Which bank opened in Prague first",
    "cancel the booking from Boston to Denver",
    "cancel the booking from Denver to Boston",
    "",
)
SIGNATURES = [signature(text) for text in TEXTS]
PICKS = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=8)


def words_of(signs: np.ndarray) -> list[int]:
    return [w for lane in range(8, 14) for q in range(4) if (w := int(signs[lane]) >> 16 * q & 0xFFFF)]


def described(
    asked: np.ndarray,
    signs: list[np.ndarray],
    similarities: list[float],
    groups: list[int],
    counts: dict[str, np.ndarray],
) -> dict[int, dict[str, float]]:
    """The twin: one row by name for each group, in plain Python."""

    def rarity(cells: list[int]) -> float:
        return sum(float(np.log((counts["seen"] + 2) / (counts["frequency"][c] + 1))) for c in cells)

    rows = {}
    for i, group in enumerate(groups):
        if group in groups[:i]:
            continue
        others = [s for s, g in zip(similarities, groups, strict=True) if g != group]
        if others:
            other = max(others)
        else:
            other = min(similarities[-1], similarities[i] - 0.05) if len(groups) > 1 else similarities[i] - 0.3
        weights = np.exp(25.0 * (np.array(similarities) - similarities[0]))
        mine = np.array([g == group for g in groups])
        only_asked = [w & (WORD_CELLS - 1) for w in words_of(asked) if w not in words_of(signs[i])]
        only_kept = [w & (WORD_CELLS - 1) for w in words_of(signs[i]) if w not in words_of(asked)]
        known = [c for c in only_asked + only_kept if counts["wrong"][c] + counts["right"][c] > 0]
        records = [np.log((counts["wrong"][c] + 0.5) / (counts["right"][c] + 1)) for c in known]
        vetoes = int(veto_bits(asked, signs[i]))
        rows[group] = {
            "one": 1.0,
            "similarity": similarities[i],
            "closeness": -np.log(max(1 - similarities[i], 1e-3)),
            "margin": similarities[i] - other,
            "votes": np.log(mine.sum()),
            "share": weights[mine].sum() / weights.sum(),
            "unmatched_asked": rarity(only_asked),
            "unmatched_kept": rarity(only_kept),
            "word_worst": max([0.0, *records]),
            "word_sum": sum(records),
            "group_size": 0.0,
            "group_record": 0.0,
            **{guard: float(vetoes >> bit & 1) for bit, guard in enumerate(GUARDS)},
        }
    return rows


@given(st.integers(0, len(TEXTS) - 1), PICKS, st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 99))
def test_describe_agrees_with_its_twin(asked: int, picks: list[int], groups: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = len(picks)
    similarities = np.sort(rng.uniform(0.5, 1.0, k).astype(np.float32))[::-1].copy()
    counts = {
        "seen": 50.0,
        "frequency": rng.integers(0, 40, WORD_CELLS).astype(np.float32),
        "wrong": rng.integers(0, 3, WORD_CELLS).astype(np.float32),
        "right": rng.integers(0, 3, WORD_CELLS).astype(np.float32),
    }
    signs = [SIGNATURES[i] for i in picks]
    rows, places, words = buffers(k)
    chosen = np.array(groups[:k], np.int64)
    n = describe(
        SIGNATURES[asked], np.stack(signs), similarities, chosen, np.ones(k), np.zeros(k), counts["seen"],
        counts["frequency"], counts["wrong"], counts["right"], rows, places, words,
    )  # fmt: skip
    twin = described(SIGNATURES[asked], signs, [float(s) for s in similarities], groups[:k], counts)
    assert [int(chosen[places[i]]) for i in range(n)] == list(twin)
    for i, row in enumerate(twin.values()):
        assert rows[i] == pytest.approx([row[name] for name in FEATURES], abs=1e-4)
        unmatched = set(words_of(SIGNATURES[asked])) ^ set(words_of(signs[places[i]]))
        assert sorted(words[i][words[i] >= 0]) == sorted(w & (WORD_CELLS - 1) for w in unmatched)


def test_update_is_one_step_of_laplaces_approximation() -> None:
    rng = np.random.default_rng(0)
    size = 5
    weights, spreads = rng.normal(size=(2, size)), np.stack([np.eye(size) * 0.3] * 2)
    row = rng.normal(size=size)
    expected_w, expected_s = weights.copy(), spreads.copy()
    p = 1 / (1 + np.exp(-expected_w[1] @ row))
    curvature = max(p * (1 - p), 0.002)
    precision = np.linalg.inv(spreads[1]) + curvature * np.outer(row, row)
    expected_s[1] = np.linalg.inv(precision)
    expected_w[1] = weights[1] + spreads[1] @ row * (1.0 - p) / (1 + curvature * row @ spreads[1] @ row)
    update(weights, spreads, row, 1.0, 0)
    assert weights == pytest.approx(expected_w)
    assert spreads == pytest.approx(expected_s)


def test_features_are_named_once_and_fit_their_buffers() -> None:
    assert len(set(FEATURES)) == features.WIDTH_FEATURES == len(OWN) + len(GUARDS)
    rows, places, words = buffers(3)
    assert (rows.shape, places.shape, words.shape) == ((3, len(FEATURES)), (3,), (3, 2 * WORDS))


def consider(learner: Learner, similarity: float, stored: int = 1, group: int = 7) -> Considered:
    return learner.consider(
        SIGNATURES[0], SIGNATURES[stored][None], np.array([similarity], np.float32), np.array([group])
    )[0]


def test_labels_move_what_they_speak_of() -> None:
    learner = Learner()
    before = consider(learner, 0.9).log_odds
    for _ in range(30):
        one = consider(learner, 0.9)
        learner.learn(one.row, one.words, 7, 1.0)
    assert consider(learner, 0.9).log_odds < before - 1.0
    assert consider(learner, 0.9, group=8).log_odds < before


@given(st.lists(st.tuples(st.floats(0.6, 0.999), st.booleans()), max_size=60))
def test_log_odds_rise_with_similarity_whatever_was_learned(labels: list[tuple[float, bool]]) -> None:
    learner = Learner()
    for similarity, wrong in labels:
        one = consider(learner, similarity)
        learner.learn(one.row, one.words, 7, float(wrong))
    odds = [consider(learner, s).log_odds for s in np.linspace(0.6, 0.999, 25)]
    assert odds == sorted(odds)


def test_decisions_are_counted_at_or_above_each_level_and_weighted() -> None:
    learner = Learner()
    rng = random.Random(0)
    for i in range(300):
        similarity = rng.uniform(0.6, 0.99)
        one = consider(learner, similarity, group=i)
        learner.learn(one.row, one.words, i, float(similarity < 0.8), weight=2.0)
    counts = learner.levels()
    assert len(counts.n) == len(LEVELS)
    assert counts.n == sorted(counts.n, reverse=True)
    assert counts.wrong == sorted(counts.wrong, reverse=True)
    assert counts.weighted == [2 * n for n in counts.n]
    assert counts.weighted_wrong == [2 * n for n in counts.wrong]
    assert counts.wrong[0] > counts.wrong[20]
    assert Learner().levels().n == [0.0] * len(LEVELS)


def test_only_the_newest_decisions_are_kept() -> None:
    learner = Learner()
    one = consider(learner, 0.99)
    for i in range(RING + 50):
        learner.learn(one.row, one.words, 7, float(i < 50))
    counts = learner.levels()
    assert learner.labelled == RING + 50
    assert max(counts.n) == RING
    assert max(counts.wrong) == 0.0
    assert FOLDS == 4
