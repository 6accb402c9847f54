"""Two answers compared: what makes them the same, what makes them differ, and what it costs the embedder."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import answers
from index import statement as answers_read
from index.answers import FALSE_ALARMS, MISSES, Comparer, likeness, probability
from index.closeness import Closeness, closeness
from index.errors import Overloaded
from index.statement import state

NEAR = Closeness(*[0.9] * 8)
FAR = Closeness(*[0.3] * 8)
COURTESIES = [
    "", "Sure! ", "Happy to help. ", "Thanks for your question. ", "Of course. ", "Hi there! ", "Gerne! ", "¡Claro! ",
    "Bien sûr ! ",
]  # fmt: skip
CLOSINGS = [
    "", " Let me know if you need anything else.", " Hope this helps!", " Have a nice day.",
    " Feel free to ask if something is unclear.", " Ich hoffe, das hilft!", " N'hésitez pas à me demander.",
]  # fmt: skip
OPEN = ("Open the settings and choose Billing.", "Billing is found in the settings of your account.")


class Model:
    """Matches by what it is given, counting calls."""

    def __init__(self, found: Closeness = NEAR) -> None:
        self.found = found
        self.calls: list[tuple[str, str]] = []
        self.waiting = 0

    async def match(self, one: str, other: str, tenant: str) -> Closeness:
        self.calls.append((one, other))
        return self.found


def compare(a: str, b: str, found: Closeness = NEAR) -> tuple[float, int]:
    model = Model(found)
    p = asyncio.run(Comparer(model.match, lambda: model.waiting).compare(a, b))
    return p, len(model.calls)


def alone(a: str, b: str) -> float:
    return asyncio.run(Comparer(None, lambda: 0).compare(a, b))


def test_equal_but_for_case_space_and_punctuation_is_the_same_and_costs_nothing() -> None:
    assert compare("Paris, the capital.", "paris  the Capital") == (0.999, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The capital of France is Paris.", "Paris is the capital of France, on the Seine."),
        ("Yes, you can return it within 30 days.", "Yes: returns are accepted for 30 days."),
        ("Check-in is from 3 pm.", "Check-in starts at 15:00."),
        ("Das dauert zwei Tage.", "Es dauert 2 Tage."),
    ],
)
def test_answers_that_state_the_same_are_the_same(a: str, b: str) -> None:
    assert compare(a, b)[0] > 0.5


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("It takes 2 hours by train.", "It takes 5 hours by train."),
        ("Yes, you can return it.", "No, you cannot return it."),
        ("The capital of France is Paris.", "The capital of Spain is Madrid."),
        ("Boil the eggs for a while.", "The bank is closed on Sundays."),
    ],
)
def test_answers_that_state_something_else_differ(a: str, b: str) -> None:
    assert compare(a, b, FAR)[0] < 0.5


@given(*[st.sampled_from(COURTESIES)] * 2, *[st.sampled_from(CLOSINGS)] * 2)
def test_courtesies_count_for_nothing(open_a: str, open_b: str, close_a: str, close_b: str) -> None:
    for a, b in (("It takes 2 hours by train.", "By train it is two hours."), OPEN, ("No.", "Yes, until Friday.")):
        assert alone(open_a + a + close_a, open_b + b + close_b) == alone(a, b)


def test_an_answer_that_is_a_courtesy_is_read_whole() -> None:
    assert state("Sure!").words == ("sure",)
    assert alone("Of course.", "Certainly!") < 0.999


@given(*[st.text(max_size=300)] * 2)
def test_comparing_is_symmetric_and_never_fails(a: str, b: str) -> None:
    assert 0.0 < alone(a, b) == alone(b, a) < 1.0


def test_sentences_are_aligned_wherever_they_stand() -> None:
    a = state("Open the settings and press the red button. The window closes at once.")
    b = state("The window closes at once after this: open the settings and press the red button. Nothing is lost.")
    found = likeness(a, b)
    assert found is not None
    assert found.aligned_high > 0.8


def test_only_what_is_open_goes_through_the_model() -> None:
    assert compare("It takes 2 hours by train.", "It takes 5 hours by train.")[1] == 0
    assert compare(*OPEN)[1] == 1


def test_what_the_model_sees_decides_what_is_open() -> None:
    assert compare(*OPEN, found=FAR)[0] < compare(*OPEN, found=NEAR)[0]


async def test_a_comparison_waits_for_a_busy_embedder_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PAUSE_S", 0.0)
    model = Model()
    looked = 0

    def waiting() -> int:
        nonlocal looked
        looked += 1
        return 1 if looked < 4 else 0

    await Comparer(model.match, waiting).compare(*OPEN)
    assert looked == 4

    async def overloaded(one: str, other: str, tenant: str) -> Closeness:
        raise Overloaded("full")

    comparer = Comparer(overloaded, lambda: 0)
    assert await comparer.compare(*OPEN) == probability(likeness(state(OPEN[0]), state(OPEN[1])))
    assert comparer.unmatched == 1


def test_only_the_beginning_goes_through_the_model() -> None:
    assert len(answers.head("word " * 500).split()) == answers.HEAD_WORDS


def test_a_long_answer_is_read_within_bounds() -> None:
    text = "\n".join(f"Step {i}: turn the handle number {i} to the left and wait." for i in range(5000))
    found = state(text)
    assert len(found.text) <= answers_read.READ_CHARACTERS
    assert len(found.parts) <= answers_read.PIECES


def test_closeness_is_symmetric_and_of_equal_states_one() -> None:
    chance = np.random.default_rng(3)
    one, other = (chance.normal(size=(n, 3, 8)) for n in (5, 9))
    one /= np.linalg.norm(one, axis=2, keepdims=True)
    other /= np.linalg.norm(other, axis=2, keepdims=True)
    half = one.astype(np.float16), other.astype(np.float16)
    assert closeness(*half) == pytest.approx(closeness(*half[::-1]), abs=1e-6)
    assert closeness(half[0], half[0]) == pytest.approx([1.0] * 8, abs=2e-3)
    assert closeness(*half).early_low <= closeness(*half).early_high < 1.0


def test_what_was_measured_is_consistent() -> None:
    assert 0 <= FALSE_ALARMS[0] < FALSE_ALARMS[1]
    assert 0 <= MISSES[0] < MISSES[1]
