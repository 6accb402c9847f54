"""Pairs of questions with labels, from the grammar and from licensed texts; a seed fixes every one of them.

A pair's label is 1 where one answer serves both. In the grammar it follows from the meaning, never from the wording:
a meaning is a frame, the value of each slot, and what was added. Around one meaning a *family* is made: other wordings
of it, and near misses (another value, exchanged values, a neighbouring question, a hard edit, a restriction).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

from index.guard.training import phrases
from index.guard.training.edits import adjuncts, hard_edit, restrict, reword

_SLOT = re.compile(r"\{([a-z_]+)(\d?)\}")
_EITHER = re.compile(r"\[([^\]]*)\]")
_A_VOWEL = re.compile(r"\b([aA]) (?=[aeiouAEIOU](?!s |ne |ni|ser|uro))")
LINKS = (" also, ", " and ", " and also: ", " one more thing: ", " besides that, ", " second question: ")

USUAL_WORDINGS = 3.2
NAMED = frozenset(
    "city country person leader scientist author book movie band brand app river monument language game library "
    "framework drug".split()
)
"""Types of which a value may also be a name that nobody knows."""
INVENTED = 0.25  # share of invented names among the values of those types
SYLLABLES = (
    "ba be bi bo bra ca ce cor da de dor dra e el en fa fer fi fle ga gal gi gra ha hel i il ja ka kel ki kra la le "
    "lin lo lu ma mar me mi mo na ne ni nor o or pa pel pi pra qua ra re ri ro ru sa sel si sta so ta te ti tor tra "
    "u ul va ve vi vor wa wel wi xa ya zo ze"
).split()
ENDINGS = "a an ar en ia in is o on ov us ville ton berg stein mond ra na ski son dale ford ino ette ix um eth".split()


class Pair(NamedTuple):
    a: str
    b: str
    label: int
    source: str  # grammar, banking77, paws
    kind: str  # what makes the pair: wording, repeat, slot, exchange, sibling, edit …


@dataclass(frozen=True, slots=True)
class Frame:
    block: int
    line: int
    wordings: tuple[str, ...]
    slots: tuple[str, ...]  # names as written, digits included
    symmetric: bool


@cache
def slot_values() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Type → its values → the wordings of each."""
    found = {}
    for line in phrases.lines("slots"):
        name, _, values = line.partition(": ")
        found[name] = tuple(tuple(value.strip().split("|")) for value in values.split(", "))
    return found


@cache
def frames() -> tuple[Frame, ...]:
    found: list[Frame] = []
    block = -1
    for line in phrases.frames():
        if line.startswith("#"):
            block += 1
        elif line:
            wordings = tuple(line.lstrip("~").split(" | "))
            slots = tuple(dict.fromkeys("".join(slot) for slot in slots_in(wordings[0])))
            found.append(Frame(block, len(found), wordings, slots, line.startswith("~")))
    return tuple(found)


@cache
def blocks() -> tuple[tuple[Frame, ...], ...]:
    count = frames()[-1].block + 1
    return tuple(tuple(frame for frame in frames() if frame.block == i) for i in range(count))


def kind_of(slot: str) -> str:
    return slot.rstrip("0123456789")


def slots_in(wording: str) -> list[tuple[str, str]]:
    """(type, digit or "") of each slot in a wording."""
    return _SLOT.findall(wording)


def invented(number: int) -> str:
    """A made-up name; another number, another name (but for few)."""
    rng = Random(number)
    return ("".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))) + rng.choice(ENDINGS)).capitalize()


def wordings_of(kind: str, value: int) -> tuple[str, ...]:
    """How a value is said: those of the list first, then invented names without end."""
    listed = slot_values()[kind]
    return listed[value] if value < len(listed) else (invented(value),)


def draw(kind: str, taken: set[int], rng: Random) -> int:
    """A value of this type that is not taken."""
    if kind in NAMED and rng.random() < INVENTED:
        return rng.randrange(1000, 1_000_000)
    return rng.choice([i for i in range(len(slot_values()[kind])) if i not in taken])


def bind(frame: Frame, rng: Random, given: dict[str, int] | None = None) -> dict[str, int]:
    """A value for each slot; two slots of one type never get the same."""
    bound: dict[str, int] = {}
    for slot in frame.slots:
        taken = {bound[other] for other in bound if kind_of(other) == kind_of(slot)}
        if given is not None and slot in given and given[slot] not in taken:
            bound[slot] = given[slot]
        else:
            bound[slot] = draw(kind_of(slot), taken, rng)
    return bound


def say(frame: Frame, bound: dict[str, int], rng: Random, wording: int) -> str:
    text = _EITHER.sub(lambda match: rng.choice(match.group(1).split("/")), frame.wordings[wording])
    text = _SLOT.sub(lambda match: rng.choice(wordings_of(match.group(1), bound["".join(match.groups())])), text)
    return finish(" ".join(text.split()), rng)


def finish(text: str, rng: Random) -> str:
    """Articles, and capitals and marks as people put them, or not."""
    text = _A_VOWEL.sub(r"\1n ", text)
    style = rng.random()
    if style < 0.6:
        text = re.sub(r"\bi\b", "I", text)
        text = text[:1].upper() + text[1:] + rng.choice(("?", "?", "?", "", "."))
    elif style < 0.8:
        text = text + rng.choice(("?", ""))
    return text


class _Family:
    """What is said about one meaning of a frame."""

    def __init__(self, frame: Frame, rng: Random) -> None:
        self.rng = rng
        self.frame = frame
        self.bound = bind(frame, rng)
        order = list(range(len(frame.wordings)))
        rng.shuffle(order)
        self.order = order
        self.same = [self._spoken(frame, self.bound, wording) for wording in (order + order)[:3]]

    def _spoken(self, frame: Frame, bound: dict[str, int], wording: int | None = None) -> str:
        chosen = self.rng.randrange(len(frame.wordings)) if wording is None else wording
        return reword(say(frame, bound, self.rng, chosen), self.rng, self.rng.choice((0, 0, 0, 1, 1, 2)))

    def one(self) -> str:
        return self.rng.choice(self.same)

    def pairs(self) -> Iterator[Pair]:
        yield from self._rewordings()
        yield from self._values()
        yield from self._exchanges()
        yield from self._siblings()
        yield from self._edits()
        yield from self._restrictions()
        if self.rng.random() < 0.25:
            yield from self._in_context()

    def _pair(self, a: str, b: str, label: int, kind: str) -> Iterator[Pair]:
        if a.casefold() != b.casefold() or label:
            yield Pair(a, b, label, "grammar", kind)

    def _rewordings(self) -> Iterator[Pair]:
        first, second, third = self.same
        yield from self._pair(first, second, 1, "wording")
        yield from self._pair(first, third, 1, "wording")
        yield from self._pair(second, third, 1, "wording")
        yield from self._pair(first, reword(first, self.rng, self.rng.randint(1, 3)), 1, "repeat")

    def _values(self) -> Iterator[Pair]:
        """Another value in one slot, in the same wording as often as in another."""
        slots = list(self.frame.slots)
        self.rng.shuffle(slots)
        for slot in (slots + slots)[:2] if slots else []:
            taken = {i for other, i in self.bound.items() if kind_of(other) == kind_of(slot)}
            other = {**self.bound, slot: draw(kind_of(slot), taken, self.rng)}
            wording = self.order[0] if self.rng.random() < 0.6 else None
            yield from self._pair(self.same[0], self._spoken(self.frame, other, wording), 0, "slot")

    def _exchanges(self) -> Iterator[Pair]:
        twins = [slot for slot in self.frame.slots if slot.endswith("1") and f"{slot[:-1]}2" in self.frame.slots]
        for slot in twins:
            twin = f"{slot[:-1]}2"
            other = {**self.bound, slot: self.bound[twin], twin: self.bound[slot]}
            for wording in (self.order[0], self.order[0], None):
                text = self._spoken(self.frame, other, wording)
                yield from self._pair(self.same[0], text, int(self.frame.symmetric), "exchange")

    def _siblings(self) -> Iterator[Pair]:
        """A neighbouring question about the same things."""
        around = [frame for frame in blocks()[self.frame.block] if frame.line != self.frame.line]
        shared = [frame for frame in around if {*map(kind_of, frame.slots)} & {*map(kind_of, self.frame.slots)}]
        near = [frame for frame in around if abs(frame.line - self.frame.line) <= 2]
        for pool in (shared or near, near):
            if pool:
                frame = self.rng.choice(pool)
                yield from self._pair(
                    self.one(), self._spoken(frame, bind(frame, self.rng, self._given(frame))), 0, "sibling"
                )

    def _given(self, frame: Frame) -> dict[str, int]:
        """This family's values under the slot names of another frame."""
        given = dict(self.bound)
        for slot in frame.slots:
            for mine, value in self.bound.items():
                if kind_of(mine) == kind_of(slot):
                    given.setdefault(slot, value)
        return given

    def _edits(self) -> Iterator[Pair]:
        for text in self.same[:2]:
            if edited := hard_edit(text, self.rng):
                changed = reword(edited[0], self.rng, self.rng.choice((0, 0, 1)))
                against = text if self.rng.random() < 0.6 else self.one()
                yield from self._pair(against, changed, 0, "edit " + edited[1].partition(":")[0])

    def _restrictions(self) -> Iterator[Pair]:
        """The same restriction on both sides is no difference; on one side, or another one, it is."""
        first, second, third = self.same
        adjunct, other = self.rng.sample(adjuncts(), 2)
        if self.rng.random() < 0.5:
            other = self.rng.choice([a for a in adjuncts() if a.group == adjunct.group and a is not adjunct])
        narrowed = restrict(first, adjunct, self.rng)
        yield from self._pair(narrowed, restrict(second, adjunct, self.rng), 1, "both restricted")
        yield from self._pair(third, narrowed, 0, "edit scope")
        if self.rng.random() < 0.5:
            yield from self._pair(narrowed, restrict(third, other, self.rng), 0, "edit scope")

    def _in_context(self) -> Iterator[Pair]:
        """After one and the same sentence, or before one and the same second question."""
        before, after = "", ""
        if self.rng.random() < 0.6:
            before = self.rng.choice(phrases.short("contexts")) + " "
        else:
            frame = self.rng.choice(frames())
            after = self.rng.choice(LINKS) + say(frame, bind(frame, self.rng), self.rng, 0)
        first, second, third = (f"{before}{text.rstrip('?.! ')}{after or '?'}" for text in self.same)
        yield from self._pair(first, second, 1, "wording")
        if edited := hard_edit(third, self.rng):
            yield from self._pair(first, edited[0], 0, "edit " + edited[1].partition(":")[0])


def from_grammar(rng: Random, families: int, leave_out: Sequence[int] = ()) -> list[Pair]:
    """Pairs of about `families` meanings of every frame, more where it has more wordings; but for some blocks."""
    found: list[Pair] = []
    for frame in frames():
        if frame.block not in leave_out:
            for _ in range(max(1, round(families * len(frame.wordings) / USUAL_WORDINGS))):
                found += _Family(frame, rng).pairs()
    return found


def around(texts: Sequence[tuple[str, str]], source: str, rng: Random) -> list[Pair]:
    """For licensed pairs that mean the same: reworded, edited, and restricted on one side or on both."""
    found: list[Pair] = []
    for one, other in texts:
        found.append(Pair(one, reword(one, rng, rng.randint(1, 3)), 1, source, "repeat"))
        if edited := hard_edit(one, rng):
            changed = reword(edited[0], rng, rng.choice((0, 0, 1)))
            against = one if rng.random() < 0.6 else other
            found.append(Pair(against, changed, 0, source, "edit " + edited[1].partition(":")[0]))
        if rng.random() < 0.35:
            adjunct = rng.choice(adjuncts())
            narrowed = restrict(one, adjunct, rng)
            found.append(Pair(narrowed, restrict(other, adjunct, rng), 1, source, "both restricted"))
            found.append(Pair(other, narrowed, 0, source, "edit scope"))
    return found
