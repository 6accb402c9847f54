"""A made-up help desk: questions in many wordings, each class with one canned answer. No data set, no licence."""

from __future__ import annotations

import random
from typing import NamedTuple

FORMS = (
    "How do I {}?",
    "How can I {}?",
    "What do I have to do to {}?",
    "Is there a way to {}?",
    "I want to {}, what should I do",
    "Please tell me how to {}.",
    "Can someone explain how I {}?",
    "what is the best way to {}",
    "I need help: how do I {}?",
    "Show me how to {}",
)
TASKS: tuple[tuple[str, ...], ...] = (
    ("reset the router", "restart the router", "set the router back"),
    ("cancel a booking", "call off a booking", "withdraw a booking"),
    ("change the delivery address", "send a parcel to another address", "update where a parcel goes"),
    ("export the report as a spreadsheet", "save the report as a spreadsheet", "get the report into a spreadsheet"),
    ("import contacts from a file", "load contacts from a file", "read contacts in from a file"),
    ("turn on dark mode", "enable the dark theme", "switch to dark colours"),
    ("turn off dark mode", "disable the dark theme", "leave dark colours"),
    ("invite a colleague", "add a colleague to the team", "bring a colleague into the team"),
    ("remove a colleague", "take a colleague off the team", "delete a colleague from the team"),
    ("clean the coffee machine", "descale the coffee machine", "wash the coffee machine"),
    ("replace the printer cartridge", "change the ink of the printer", "put new ink into the printer"),
    ("pair the headphones", "connect the headphones", "link the headphones"),
)
PLACES = ("", " at home", " in the office", " on the phone", " with the app", " on a tablet", " at work", " abroad")
COUNTS = (2, 3, 5, 12)


class Question(NamedTuple):
    text: str
    answer: str


def answer_of(task: int, count: int | None) -> str:
    """One canned answer a class; every two state different things."""
    name = TASKS[task][0]
    steps = "" if count is None else f" It takes {count} minutes."
    return f"To {name}, open page {task * 7 + 11} of the manual and follow it.{steps}"


def stream(n: int, seed: int = 0) -> list[Question]:
    """n distinct questions; some ask within how many minutes, and then the number is part of the class."""
    rng = random.Random(seed)
    seen: set[str] = set()
    found: list[Question] = []
    while len(found) < n:
        task = rng.randrange(len(TASKS))
        count = rng.choice(COUNTS) if rng.random() < 0.25 else None
        what = rng.choice(TASKS[task]) + rng.choice(PLACES) + ("" if count is None else f" in {count} minutes")
        text = rng.choice(FORMS).format(what)
        if rng.random() < 0.3:
            text = rng.choice(("Hello, ", "Hi there! ", "Quick question: ", "Sorry to bother you, ")) + text
        if text not in seen:
            seen.add(text)
            found.append(Question(text, answer_of(task, count)))
    return found
