"""Two answers compared: what makes them the same, what makes them differ, and what it costs the embedder."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from index import answers
from index.answers import Comparer, likeness, probability
from index.errors import Overloaded


class Meaning:
    """Embeds by a table, counting calls."""

    def __init__(self, similarity: float) -> None:
        self.vectors = [np.array([1.0, 0.0], np.float32)]
        self.other = np.array([similarity, (1 - similarity**2) ** 0.5], np.float32)
        self.calls: list[str] = []
        self.waiting = 0

    async def embed(self, text: str, tenant: str) -> np.ndarray:
        self.calls.append(text)
        return self.vectors[0] if len(self.calls) % 2 else self.other


def compare(a: str, b: str, similarity: float) -> tuple[float, int]:
    meaning = Meaning(similarity)
    found = asyncio.run(Comparer(meaning.embed, lambda: meaning.waiting).compare(a, b))
    return found, len(meaning.calls)


def test_equal_but_for_case_space_and_punctuation_is_the_same_and_costs_nothing() -> None:
    assert compare("Paris, the capital.", "paris  the Capital", 0.0) == (0.999, 0)


@pytest.mark.parametrize(
    ("a", "b", "similarity"),
    [
        ("The capital of France is Paris.", "Paris is the capital of France, on the Seine.", 0.9),
        ("Press and hold the reset button for 10 seconds.", "Hold the reset button pressed for ten seconds.", 0.93),
        ("Yes, you can return it within 30 days.", "Yes: returns are accepted for 30 days.", 0.85),
    ],
)
def test_answers_that_state_the_same_are_the_same(a: str, b: str, similarity: float) -> None:
    assert compare(a, b, similarity)[0] > 0.5


@pytest.mark.parametrize(
    ("a", "b", "similarity"),
    [
        ("It takes 2 hours by train.", "It takes 5 hours by train.", 0.95),
        ("Yes, you can return it.", "No, you cannot return it.", 0.9),
        ("The capital of France is Paris.", "The capital of Spain is Madrid.", 0.7),
        ("Boil the eggs for a while.", "The bank is closed on Sundays.", 0.05),
    ],
)
def test_answers_that_state_something_else_differ(a: str, b: str, similarity: float) -> None:
    assert compare(a, b, similarity)[0] < 0.5


def test_comparing_is_symmetric() -> None:
    a, b = "It takes 2 hours from Paris.", "From Lyon it is three hours, or so."
    assert likeness(a, b) == pytest.approx(likeness(b, a))


def test_probability_rises_with_meaning() -> None:
    found = likeness("It takes two hours.", "Two hours are needed for it.")
    values = [probability(found, m / 10) for m in range(-10, 11)]
    assert values == sorted(values)


async def test_a_comparison_waits_for_a_busy_embedder_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PAUSE_S", 0.0)
    meaning = Meaning(0.9)
    looked = 0

    def waiting() -> int:
        nonlocal looked
        looked += 1
        return 1 if looked < 4 else 0

    a, b = "Hold the button for two seconds.", "Two seconds is how long to hold the button."
    found = await Comparer(meaning.embed, waiting).compare(a, b)
    assert looked > 4

    async def overloaded(text: str, tenant: str) -> np.ndarray:
        raise Overloaded("full")

    comparer = Comparer(overloaded, lambda: 0)
    assert 0.0 < await comparer.compare(a, b) < found
    assert comparer.unembedded == 1


def test_only_the_beginning_is_embedded() -> None:
    assert len(answers.head("word " * 500).split()) == answers.HEAD_WORDS
