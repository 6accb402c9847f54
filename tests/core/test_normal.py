"""Normal forms: what they take away, and what they never touch."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.fingerprint import normal_key_of
from proxy.core.normal import MIN_WORDS, normal_form

WORDS = (
    "how do i reset my password what is the limit for transfers per day can you cancel order not never without 12 30 "
    "4.5 euros US us Berlin cats no don't thanks please hello wie lange dauert das Sie sie nicht cómo cambio mi clave "
    "comment faire sans compte 3 zwei two second -5 1,000 50 100"
).split()
texts = st.builds(
    lambda words, end: " ".join(words) + end,
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    st.sampled_from(["", "?", "!", ".", " ?", "..."]),
)
questions = st.sampled_from(
    [
        "How do I reset my password", "What is the limit for 12 transfers", "Wie lange dauert das",
        "Comment faire sans compte",
        "¿Cómo cambio mi clave", "Why is it not free", "cancel my order 30",
    ]
)  # fmt: skip
openings = st.sampled_from(
    [
        "", "Hi, ", "hello, ", "Hey there! ", "quick question: ", "Good morning, ", "Please tell me: ", "Hi team - ",
        "Could you help me? ", "I was wondering, ", "Hallo, ", "Guten Tag! ", "Kurze Frage: ", "Bonjour, ", "Hola, ",
        "Hi! Quick question: ", "Bonjour ! Petite question : ", "Entschuldigung, ", "Buenos días, ",
    ]
)  # fmt: skip
closings = st.sampled_from(
    ["", " Thanks!", "? Thanks in advance.", ", please", " cheers", "? Danke!", "? Vielen Dank", " s'il vous plaît ?",
     "? Merci d'avance", " Gracias!", ", por favor"]
)  # fmt: skip
cases = st.sampled_from([str, str.lower, str.upper])


@given(questions, openings, closings, cases, st.sampled_from(["", " ", "  \n"]))
def test_manners_case_and_space_do_not_count(question, opening, closing, case, space):  # type: ignore[no-untyped-def]
    dressed = space + opening + case(question).replace(" ", "  ") + closing + space
    assert normal_form(dressed) == normal_form(question) is not None


@given(st.one_of(texts, st.text(max_size=60)))
def test_it_is_idempotent_and_never_empty(text: str) -> None:
    form = normal_form(text)
    if form is not None:
        assert normal_form(form) == form
        assert len(re.findall(r"[^\W_]+(?:'[^\W_]+)*", form)) >= MIN_WORDS


@given(st.one_of(texts, st.text(max_size=60)))
def test_what_is_left_stands_in_the_text_as_it_was(text: str) -> None:
    form = normal_form(text)
    if form is not None and text.isascii():
        assert form.lower() in " ".join(text.lower().split())


NEGATIONS = {"not", "no", "never", "without", "don't", "nicht", "sans"}


@given(texts, texts)
def test_texts_of_one_form_have_the_same_numbers_and_negations(a: str, b: str) -> None:
    if normal_form(a) is None or normal_form(a) != normal_form(b):
        return
    for pattern in (r"-?\d[\d.,]*\d|\d", r"[a-z']+"):
        found = [
            [w for w in re.findall(pattern, text.lower()) if pattern[0] == "-" or w in NEGATIONS] for text in (a, b)
        ]
        assert found[0] == found[1]


@given(texts, st.integers(0, 11), st.sampled_from(["7", "not", "don't", "nicht", "no"]))
def test_a_number_or_a_negation_more_is_another_form(text: str, place: int, more: str) -> None:
    words = text.split()
    changed = " ".join((*words[:place], more, *words[place:]))
    assert normal_form(text) is None or normal_form(changed) != normal_form(text)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do you say thank you?", "How do you say"),
        ("How do you say hello thanks", "How do you say hello"),
        ("What is 5! please", "What is 5 please"),
        ("Tell me a joke", "A joke"),
        ("Hello world in Python", "world in Python"),
        ("Können Sie schwimmen?", "Können sie schwimmen?"),
        ("Is it allowed in the US", "Is it allowed in the us"),
        ("Please Please Me album", "Me album"),
        ("Could you help me move house", "move house"),
        ("say no thanks", "say no"),
        ("How much is 1,000", "How much is 1000"),
    ],
)
def test_what_carries_meaning_stays(a: str, b: str) -> None:
    assert normal_form(a) is None or normal_form(a) != normal_form(b)


@pytest.mark.parametrize(
    "text",
    [
        "what does `ls -A` do",
        'what does "No" mean',
        "what does \u201eNein\u201c mean",
        "is a == b true",
        "x = 5; why",
        "what is foo_bar for",
        "def f(x):\n    return x",
        "İstanbul nerede",
        "\u043a\u0430\u043a \u0434\u0435\u043b\u0430",
        "\u0131\u015f\u0131k nedir bu",
        "Hi, python?",
        "thanks",
        "Python",
        "",
        "see https://a.example/b now",
        "what is 'it' here",
        "mail me@example.org now",
        "C++ or C#",
        "a " * 2000,
    ],
)
def test_code_quotes_other_scripts_and_single_words_have_none(text: str) -> None:
    assert normal_form(text) is None


def test_a_key_belongs_to_its_scope() -> None:
    a, b = b"a" * 32, b"b" * 32
    assert normal_key_of(a, "how are you") != normal_key_of(b, "how are you")
    assert normal_key_of(a, "how are you") != normal_key_of(a, "who are you")
    assert len(normal_key_of(a, "x y")) == 32
